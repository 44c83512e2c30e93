"""A location or scalar, projected on a vector that the caller gives: a probe, a direction."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.derived.declaration import DerivedScalar, Frame, General
from actstore.query.derived.naming import named_source, node_type_of
from actstore.query.derived.registry import SCALARS
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.vocabulary import Dimension, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["projection"]

_PROJECTED = (Dimension.CHANNEL, Dimension.HEAD_CHANNEL, Dimension.NEURON, Dimension.VOCABULARY)
_DIGITS = 8


def projection(
    source: DerivedScalar,
    vector: Any,
    dimensions: ModelDimensions,
    *,
    name: str | None = None,
    layers: int | Iterable[int] | None = None,
    pass_type: str = "forward",
) -> DerivedScalar:
    """``sum_d x[t, …, d] * vector[d]``, over the last axis of a scalar.

    Args:
        source: a known scalar whose last axis is channels, head channels, neurons or the
            vocabulary.
        vector: numbers ``(width of that axis,)``: a list, an array or a tensor. A copy is
            kept, in float64.
        dimensions: the model's sizes.
        name: the projection's name; made of the source's and a digest of the vector by
            default, so that the same vector has the same name.
        layers: the layers at which it exists; all of the source's by default.
        pass_type: ``backward`` projects the gradient instead.

    Returns:
        A scalar with the other axes of the source; with one value per token and layer, of
        node type ``layer``, where there is none.

    Raises:
        InvalidInput: a source without such an axis, an unknown layer, or a vector that has
            another width or a number that is not finite.
    """
    axis = source.axes[-1]
    if SCALARS.get(source.name) is not source:
        raise _invalid(f"{source.name} is not registered; register it before it is projected.")
    if axis not in _PROJECTED:
        raise _invalid(
            f"{source.name} ends with the axis {axis}; only {', '.join(_PROJECTED)} are projected "
            "on a vector."
        )
    if pass_type not in set(PassType):
        raise _invalid(f"pass_type is {pass_type!r}; use {', '.join(PassType)}.")
    numbers = _checked(vector, source, dimensions.size(axis))
    chosen = _layers(source, layers, dimensions.n_layers)
    backward = pass_type == PassType.BACKWARD
    prefix = f"{source.name}_grad" if backward else source.name
    digest = hashlib.sha256(numbers.tobytes() + repr(chosen).encode()).hexdigest()[:_DIGITS]
    label = f"{prefix}_on_{digest}" if name is None else name
    inputs = (named_source((source.name, pass_type), label),)
    kept = source.axes[:-1]
    axes = (*kept, Dimension.SINGLETON) if kept in ((), (Dimension.ATTENDED,)) else kept
    letters = ", ".join(["t", *(f"{one}" for one in axes if one is not Dimension.SINGLETON)])

    def formula(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
        import torch

        projected = sources[0] @ torch.from_numpy(numbers)
        return projected.unsqueeze(-1) if axes[-1] is Dimension.SINGLETON else projected

    what = f"the gradient of {source.name}" if backward else source.name
    value = f"grad({source.name})" if backward else source.name
    return DerivedScalar(
        name=label,
        meaning=f"{what}, projected on a given vector",
        definition=f"sum_d {value}[{letters}, d] * vector[d]",
        axes=axes,
        node_type=node_type_of(axes, label, inputs, source.latents),
        has_layers=source.has_layers,
        sources=inputs,
        dependence=General(),
        formula=formula,
        is_flattened=source.is_flattened,
        about=source.about,
        only_node_layer=source.only_node_layer,
        latents=source.latents,
        layers=chosen,
        origin="project",
    )


def _checked(vector: Any, source: DerivedScalar, width: int) -> npt.NDArray[np.float64]:
    rule = f"The vector for {source.name} has {width} finite numbers"
    if hasattr(vector, "detach"):
        # A tensor: bfloat16 and other devices are unknown to numpy.
        vector = vector.detach().cpu()
        vector = vector if vector.is_complex() else vector.double().numpy()
    try:
        found = np.asarray(vector)
    except ValueError:
        raise _invalid(f"{rule}; this one is ragged.") from None
    if found.dtype.kind not in "fiub":
        raise _invalid(f"{rule}; this one holds {found.dtype}.")
    if found.shape != (width,):
        raise _invalid(f"{rule}; this one has the shape {found.shape}.")
    numbers = found.astype(np.float64)
    if not np.isfinite(numbers).all():
        place = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise _invalid(f"{rule}; this one has {numbers[place]} at {place}.")
    return numbers


def _layers(
    source: DerivedScalar, layers: int | Iterable[int] | None, n_layers: int
) -> tuple[int, ...] | None:
    if layers is None:
        return source.layers
    given = list(layers) if isinstance(layers, Iterable) else [layers]
    known = range(n_layers) if source.layers is None else source.layers
    if not source.has_layers:
        known = ()
    outside = [layer for layer in given if isinstance(layer, bool) or layer not in known]
    if outside or not given:
        raise InvalidInput(
            f"layers is {given}; {source.name} has {list(known) or 'no layers'}. Name some of "
            "those, or leave it out.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    return tuple(sorted({int(layer) for layer in given}))


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
