"""Tensors of an open store: raw values, rows of them, batches, derived scalars."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.batches import BatchReader
from actstore.query.derived import DerivedScalar, parse_scalar
from actstore.query.derived.backward import in_pass
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN
from actstore.query.derived.registry import require_free_name
from actstore.query.opening import OpenStore
from actstore.query.reading import (
    TensorReader,
    choose_layers,
    choose_scalar_layers,
    torch_dtype,
)
from actstore.query.rows import Rows
from actstore.query.tensors import LabelledTensor, LabelledTensors
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.location_names import parse_location
from actstore.store.vocabulary import PassType

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["Numbers", "ScalarName", "StoreTensors"]

Numbers = int | Iterable[int] | None
ScalarName = str | DerivedScalar
"""A scalar by its name, or its declaration."""


class StoreTensors(OpenStore):
    """The part of :class:`actstore.query.session.Store` that gives tensors."""

    @cached_property
    def _tensors(self) -> TensorReader:
        return TensorReader(self.sources, self.row_map, self.max_result_bytes)

    # Raw values

    def raw(
        self,
        location: str,
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        pass_type: str = "forward",
        dtype: str = "float32",
    ) -> LabelledTensor:
        """A location's values as the store holds or reconstructs them.

        Queries and keys come as the attention function received them; :meth:`derive` gives
        them with the specification's d_head^(-1/4).

        Args:
            location: its own or its TransformerLens name.
            sequences: whole sequences, in this order.
            tokens: global rows, in this order; instead of ``sequences``.
            layers: all by default.
            pass_type: ``forward`` or ``backward``.
            dtype: of the result. float32 holds every stored value exactly.

        Returns:
            ``(layer, token, *unit axes)``, without ``layer`` outside the blocks. An
            attended axis is as long as the longest sequence; where a shorter one ends,
            NaN follows.

        Raises:
            InvalidInput: an unknown location, layer or row, or a result above the limit.
            Unavailable: a row is not committed, or the location cannot be had.
        """
        found, named_layer = parse_location(location)
        of_pass = _pass_type(pass_type)
        chosen = self._layers(found.label, found.has_layers, named_layer, layers)
        return self._tensors.raw(found, of_pass, chosen, self._rows(sequences, tokens), dtype)

    def gather(
        self,
        location: str,
        *,
        layers: Numbers = None,
        tokens: Numbers = None,
        columns: Sequence[str] | None = None,
        dtype: str = "float32",
    ) -> tuple["Tensor", pa.Table]:
        """Any rows in any order, with what stands at them.

        Args:
            location: its own or its TransformerLens name.
            layers: all by default.
            tokens: global rows, repeats allowed; all committed ones by default.
            columns: columns of ``documents`` to join to the table.
            dtype: of the tensor.

        Returns:
            The tensor of :meth:`raw`, and a table with one row per token: ``token,
            sequence, position, token_id, text, special, document`` and ``columns``.

        Raises:
            InvalidInput: an unknown location, layer, row or column, or a result too large.
            Unavailable: a row is not committed, or the location cannot be had.
        """
        rows = self._rows(None, tokens)
        table = self.row_map.table(rows, columns)
        return self.raw(location, tokens=rows.token, layers=layers, dtype=dtype).values, table

    def batches(
        self,
        location: str,
        *,
        layer: int | None = None,
        size: int = 4096,
        shuffle: int | None = None,
        special: bool = False,
        dtype: str = "float32",
    ) -> Iterator[tuple["Tensor", npt.NDArray[np.int64]]]:
        """Every committed row once, in batches, for training on stored activations.

        With a seed, all pages of 512 rows (whole sequences of a reconstructed location) are
        permuted uniformly; a window of 256 MiB is filled with the next ones, its rows are
        permuted uniformly, and what is left of it, less than a batch, joins the next. So rows
        of one page come within one window, but for those left. The order depends on the seed
        and on what is committed, not on the machine.

        Args:
            location: its own or its TransformerLens name.
            layer: the layer, for a location that has layers.
            size: rows of a batch; the last may be shorter.
            shuffle: seed of the order; None for ascending rows.
            special: let special rows (position 0, special tokens) come too.
            dtype: of the batches.

        Returns:
            An iterator of tensors ``(row, *unit axes)`` with their global rows.

        Raises:
            InvalidInput: an unknown location or layer, or a size below 1.
            Unavailable: the location cannot be had.
        """
        found, named_layer = parse_location(location)
        if size < 1:
            raise _invalid(f"size is {size}; a batch has at least 1 row.")
        if found.is_pair_shaped:
            raise _invalid(
                f"{found} has an axis over attended tokens, which differs from row to row. Take "
                "another location, or sequences by `raw`."
            )
        chosen = self._layers(found.label, found.has_layers, named_layer, layer)
        if len(chosen) != 1:
            raise _invalid(
                f"Batches of {found} are of one layer; name it with `layer`, "
                f"0 to {self.n_layers - 1}."
            )
        self.sources.require(found, PassType.FORWARD, chosen[0])
        reader = BatchReader(self.sources, self.row_map, found, chosen[0])
        return reader.batches(size, shuffle, special, torch_dtype(dtype))

    # Derived values

    @overload
    def derive(
        self,
        names: ScalarName,
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
        config: DstConfig = PLAIN,
        pass_type: str = "forward",
    ) -> LabelledTensor: ...

    @overload
    def derive(
        self,
        names: list[ScalarName] | list[str] | tuple[ScalarName, ...],
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
        config: DstConfig = PLAIN,
        pass_type: str = "forward",
    ) -> LabelledTensors: ...

    def derive(
        self,
        names: ScalarName | list[ScalarName] | list[str] | tuple[ScalarName, ...],
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
        config: DstConfig = PLAIN,
        pass_type: str = "forward",
    ) -> LabelledTensor | LabelledTensors:
        """Derived scalars of whole sequences or of rows.

        Values are computed in float64 for one sequence and layer at a time and rounded once
        to float32, so they do not depend on what else was asked for.

        Args:
            names: a derived scalar, or several; a location's name is its raw scalar. Scalars are
                given by name or as declarations.
            sequences: whole sequences, in this order.
            tokens: global rows, in this order; instead of ``sequences``.
            layers: all by default; ignored by a scalar outside the blocks among several.
            dtype: ``float64`` for the unrounded values; narrower ones round the float32.
            config: what some scalars are about: a node, a trace, autoencoders. Its
                ``layer_indices`` restrict the layers as ``layers`` does.
            pass_type: ``backward`` for the gradient of the store's objective with respect to
                the scalar, where it has one.

        Returns:
            A labelled tensor ``(layer, token, *unit axes)``, as :meth:`raw`; for several
            names a mapping of them. A flattened scalar has ``pair`` in place of ``token``.

        Raises:
            InvalidInput: an unknown scalar, layer or row, or a result above the limit.
            Unavailable: a row is not committed, or a source cannot be had.
        """
        rows = self._rows(sequences, tokens)
        if isinstance(names, str | DerivedScalar):
            return self._derive(names, rows, layers, dtype, config, pass_type)
        found: dict[str, LabelledTensor] = {}
        for name in names:
            outside = not parse_scalar(name, self._own_scalars)[0].has_layers
            of_all = None if outside else layers
            tensor = self._derive(name, rows, of_all, dtype, config, pass_type)
            found[tensor.name] = tensor
        return LabelledTensors(found)

    def _derive(
        self,
        name: ScalarName,
        rows: Rows,
        layers: Numbers,
        dtype: str,
        config: DstConfig,
        pass_type: str,
    ) -> LabelledTensor:
        declared, named_layer = parse_scalar(name, self._own_scalars)
        declared = in_pass(declared, pass_type)
        config = self.kept_latents.config_for(declared, config)
        chosen = choose_scalar_layers(declared, self.n_layers, config, named_layer, layers)
        # Kept values are rounded to float32; whoever wants more gets them computed.
        kept = {} if dtype == "float64" else self.kept_latents.arrays_of(declared, config)
        return self._tensors.derived(declared, chosen, rows, dtype, config, kept)

    def project(
        self,
        scalar: ScalarName,
        vector: Any,
        *,
        name: str | None = None,
        layers: Numbers = None,
        pass_type: str = "forward",
        replace: bool = False,
    ) -> DerivedScalar:
        """A scalar of this store's own: a location or scalar, projected on a vector.

        It is ``sum_d x[t, d] * vector[d]`` over the last axis: of ``resid_post_mlp`` one value
        per token and layer, of ``mlp_write`` one per neuron. ``derive``, ``topk`` and
        ``examples`` of this store take it as it is returned, and by its name.

        Args:
            scalar: a location or scalar that ends with channels, neurons or the vocabulary.
            vector: finite numbers ``(width of that axis,)``: a list, an array or a tensor.
            name: its name; by default the source's with a digest of the vector.
            layers: the layers at which it exists; all by default.
            pass_type: ``backward`` projects the gradient.
            replace: take the place of another projection of that name.

        Raises:
            InvalidInput: an unknown scalar or layer, a vector that does not fit, or a name that
                is taken.
        """
        from actstore.query.derived.projection import projection

        source, named_layer = parse_scalar(scalar, self._own_scalars)
        if named_layer is not None:
            choose_layers(source.name, source.has_layers, self.n_layers, named_layer, layers)
            layers = named_layer
        declared = projection(
            source,
            vector,
            self.sources.dimensions,
            name=name,
            layers=layers,
            pass_type=pass_type,
        )
        label = declared.name
        require_free_name(label)
        if label in self._own_scalars and name is not None and not replace:
            raise _invalid(
                f"{label!r} is a projection of this store already. Choose another name, or pass "
                "replace=True."
            )
        self._own_scalars[label] = declared
        return declared

    # Arguments

    def _rows(self, sequences: Numbers, tokens: Numbers) -> Rows:
        self.require_committed()
        if sequences is not None and tokens is not None:
            raise _invalid("Both sequences and tokens are given; give one of them.")
        if sequences is not None:
            return self.row_map.of_sequences(sequences)
        return self.row_map.all() if tokens is None else self.row_map.of_tokens(tokens)

    def _layers(
        self, name: str, has_layers: bool, named: int | None, layers: Numbers
    ) -> Sequence[int | None]:
        return choose_layers(name, has_layers, self.n_layers, named, layers)


def _pass_type(name: str) -> PassType:
    try:
        return PassType(name)
    except ValueError:
        raise _invalid(f"pass_type is {name!r}; use {', '.join(PassType)}.") from None


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
