"""Filling tensors: from rows and layers to labelled values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.derived import DerivedScalar
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN, evaluate, layers_of
from actstore.query.latent_sets import dense_window, describe_kept
from actstore.query.rows import RowMap, Rows
from actstore.query.sources import Sources
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.latent_reader import LatentArray
from actstore.store.reader import StoredArray
from actstore.store.vocabulary import ActivationLocationType, Dimension, PassType

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.query.sequence_values import SequenceValues

__all__ = ["TensorReader", "choose_layers", "choose_scalar_layers", "read_rows", "torch_dtype"]

Layers = Sequence[int | None]
"""Layer numbers, or None alone for what lies outside the blocks."""

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_LONG_RUN = 32


@dataclass(frozen=True)
class TensorReader:
    """Reads labelled tensors from an open store.

    Attributes:
        sources: where values come from.
        rows: the store's rows.
        max_bytes: greatest tensor that one call may return.
    """

    sources: Sources
    rows: RowMap
    max_bytes: int

    def raw(
        self,
        location: ActivationLocationType,
        pass_type: PassType,
        layers: Layers,
        rows: Rows,
        dtype: str,
    ) -> LabelledTensor:
        """A location as it is stored, or as its recipe makes it."""
        for layer in layers:
            self.sources.require(location, pass_type, layer)
        array = self.sources.reader.arrays.get((location, pass_type))
        result = self._allocate(location.label, location.axes, layers, rows, dtype)
        if array is None or location.is_pair_shaped:
            self._fill(
                result, layers, rows, lambda v, layer, at: v.raw(location, pass_type, layer)[at]
            )
        else:
            import torch

            for index, layer in enumerate(layers):
                values = torch.from_numpy(read_rows(array, layer, rows.token))
                result[index].copy_(values.reshape(result.shape[1:]))
        source = self.sources.describe(location, pass_type)
        return _label(location.label, location.axes, result, layers, rows, source)

    def derived(
        self,
        declared: DerivedScalar,
        layers: Layers,
        rows: Rows,
        dtype: str,
        config: DstConfig = PLAIN,
        kept: Mapping[int, LatentArray] | None = None,
    ) -> LabelledTensor:
        """A derived scalar, sequence by sequence.

        A flattened one has a row per pair of a row's token and one that it attends to. Latents
        that are ``kept``, by layer, are read.
        """
        latents = 0
        if Dimension.LATENT in declared.axes:
            assert declared.latents is not None
            family = config.family(declared.latents)
            latents = max(family.n_latents(layer) for layer in layers)
        pairs = _pairs(rows) if declared.is_flattened else None
        along = rows if pairs is None else pairs[0]
        result = self._allocate(declared.name, declared.axes, layers, along, dtype, latents)

        def value_of(values: "SequenceValues", layer: int | None, at: "Tensor") -> "Tensor":
            array = None if layer is None else (kept or {}).get(layer)
            if array is None or values.rows.segment not in array.segments:
                return evaluate(declared, values, layer, at, config=config)
            import torch

            return torch.from_numpy(dense_window(array, values.rows.first_token, at.numpy()))

        self._fill(result, layers, rows, value_of, pairs is not None)
        source = self.sources.describe_scalar(declared)
        committed = self.sources.reader.segments
        used = [(kept or {}).get(-1 if layer is None else layer) for layer in layers]
        if kept and all(one is not None and one.segments == committed for one in used):
            source = describe_kept(kept.values())
        label = _label(declared.name, declared.axes, result, layers, along, source)
        if pairs is None:
            return label
        dims = tuple("pair" if name == "token" else name for name in label.dims)
        return replace(label, dims=dims, attended=pairs[1])

    def _allocate(
        self,
        name: str,
        axes: tuple[Dimension, ...],
        layers: Layers,
        rows: Rows,
        dtype: str,
        latents: int = 0,
    ) -> "Tensor":
        chosen = torch_dtype(dtype)
        import torch

        is_pair_shaped = Dimension.ATTENDED in axes
        longest = 0
        if is_pair_shaped:
            numbers = np.unique(rows.sequence).tolist()
            longest = max((self.rows.sequence(number).length for number in numbers), default=0)
        shape = (len(layers), len(rows), *self.sources.unit_shape(axes, longest, latents))
        size = int(np.prod(shape, dtype=np.int64)) * chosen.itemsize
        if size > self.max_bytes:
            raise InvalidInput(
                f"{name} of {len(rows):,} rows and {len(layers)} layers is {size:,} bytes, more "
                f"than the limit of {self.max_bytes:,}. Ask for fewer rows or layers, go through "
                "all of them with `batches`, or open the store with a greater "
                "`max_result_bytes`.",
                kind=ErrorKind.TOO_LARGE,
            )
        return torch.full(shape, torch.nan if is_pair_shaped or latents else 0.0, dtype=chosen)

    def _fill(
        self,
        result: "Tensor",
        layers: Layers,
        rows: Rows,
        value_of: "Callable[[SequenceValues, int | None, Tensor], Tensor]",
        by_pair: bool = False,
    ) -> None:
        import torch

        ends = np.cumsum(rows.position + 1)
        for number, places in rows.by_sequence():
            values = self.sources.sequence(self.rows.sequence(number))
            if by_pair:
                starts = ends[places] - rows.position[places] - 1
                spans = [np.arange(*span) for span in zip(starts, ends[places], strict=True)]
                target = torch.from_numpy(np.concatenate(spans))
            else:
                target = torch.from_numpy(places)
            position = torch.from_numpy(rows.position[places])
            for index, layer in enumerate(layers):
                value = value_of(values, layer, position)
                if result.dtype is not torch.float64:
                    # The canonical value; a narrower dtype rounds that one.
                    value = value.to(torch.float32)
                # An attended axis ends with its sequence; others are whole.
                cut = result[index]
                for axis, length in enumerate(value.shape[1:], 1):
                    cut = cut.narrow(axis, 0, length)
                cut[target] = value.to(result.dtype)


def _pairs(rows: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
    """The rows' pairs with every token up to each: the rows, repeated, and the positions."""
    repeats = rows.position + 1
    attended = np.arange(int(repeats.sum())) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    parts = (rows.token, rows.sequence, rows.position)
    return Rows(*(np.repeat(part, repeats) for part in parts)), attended


def _label(
    name: str,
    axes: tuple[Dimension, ...],
    values: "Tensor",
    layers: Layers,
    rows: Rows,
    source: str,
) -> LabelledTensor:
    dims = ("token", *(str(axis) for axis in axes))
    numbers = tuple(layer for layer in layers if layer is not None)
    if layers and not numbers:
        return LabelledTensor(name, values[0], dims, None, rows, source)
    return LabelledTensor(name, values, ("layer", *dims), numbers, rows, source)


def read_rows(
    array: StoredArray, layer: int | None, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Any committed global rows of a stored array, exact.

    Args:
        array: the stored array.
        layer: the layer, None for an array outside the blocks.
        rows: global rows ``(row,)``, any order, repeats allowed.

    Returns:
        float32 ``(row, column)``.
    """
    size, to_float32 = array.spec.segment_rows, array.spec.dtype.to_float32
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % size == 0)) + 1
    if len(rows) < _LONG_RUN * (len(breaks) + 1):
        return to_float32(array.reader.rows(layer or 0, rows))
    result = np.empty((len(rows), array.spec.columns), np.float32)
    done = 0
    for run in np.split(rows, breaks):
        segment, start = divmod(int(run[0]), size)
        window = array.reader.window(segment, layer or 0, start, start + len(run))
        result[done : done + len(run)] = to_float32(window)
        done += len(run)
    return result


def choose_layers(
    name: str,
    has_layers: bool,
    n_layers: int,
    named: int | None,
    layers: int | Iterable[int] | None,
) -> Layers:
    """The layers that a call means.

    Args:
        name: what is asked for, for messages.
        has_layers: whether it has layers.
        n_layers: blocks of the model.
        named: the layer that its name holds, if any.
        layers: the argument; None for all.

    Raises:
        InvalidInput: there is no such layer, or the name says another.
    """
    given: list[Any] | None = None
    if layers is not None:
        given = list(layers) if isinstance(layers, Iterable) else [layers]
    if named is not None:
        if given not in (None, [named]):
            raise _unknown(f"The name says layer {named}, layers says {given}; give one of them.")
        given = [named]
    if not has_layers:
        if given is not None:
            raise _unknown(f"{name} belongs to no layer; leave out layers={given}.")
        return (None,)
    for layer in given or ():
        whole = isinstance(layer, int | np.integer) and not isinstance(layer, bool)
        if not whole or not 0 <= layer < n_layers:
            raise _unknown(
                f"There is no layer {layer!r} of {name}; this model has 0 to {n_layers - 1}."
            )
    return range(n_layers) if given is None else [int(layer) for layer in given]


def choose_scalar_layers(
    declared: DerivedScalar,
    n_layers: int,
    config: DstConfig,
    named: int | None,
    layers: int | Iterable[int] | None,
) -> Layers:
    """The layers of a derived scalar that a call means; see :func:`choose_layers`.

    Raises:
        InvalidInput: it has no such layer, or not for this config.
    """
    known = layers_of(declared, n_layers, config)
    if layers is None and named is None:
        return known
    asked = choose_layers(declared.name, declared.has_layers, n_layers, named, layers)
    outside = [layer for layer in asked if layer not in known]
    if outside:
        raise _unknown(
            f"{declared.name} is at layers {list(known)} for this config, not at {outside}. "
            "Ask for those, or change the config."
        )
    return asked


def torch_dtype(name: str) -> Any:
    """Torch's dtype of this name.

    Raises:
        InvalidInput: not one that values are given in.
    """
    import torch

    if name not in _DTYPES:
        raise InvalidInput(
            f"dtype is {name!r}; use {', '.join(_DTYPES)}.", kind=ErrorKind.INVALID_ARGUMENT
        )
    return getattr(torch, name)


def _unknown(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.UNKNOWN_LAYER)
