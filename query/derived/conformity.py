"""Whether a formula of a user's own kept to its declaration: dtype, shape, sources unharmed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.query.derived.declaration import DerivedScalar
from actstore.query.derived.registry import SCALARS
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.sources import Source
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["conforming", "expected_axes"]


def expected_axes(declared: DerivedScalar) -> tuple[str, ...]:
    """Names of all axes of a formula's value, for people.

    >>> expected_axes(SCALARS["mlp_write"])
    ('token', 'neuron', 'channel')
    """
    return ("pair" if declared.is_flattened else "token", *map(str, declared.axes))


def conforming(
    declared: DerivedScalar,
    value: "Tensor | object",
    sources: Sequence[Source],
    tensors: "Sequence[Tensor]",
    versions: Sequence[int],
    dimensions: ModelDimensions,
    rows: int | None,
) -> "Tensor":
    """A formula's value, if it is what the declaration says.

    Args:
        declared: the scalar.
        value: what its formula returned.
        sources: the sources of the pass that was asked for.
        tensors: their tensors, then the weights.
        versions: how often each of those had been written to before.
        dimensions: the model's sizes.
        rows: rows that were taken out of the sources first; None for all.

    Returns:
        float64 ``(token, *axes)``; booleans and whole numbers become float64.

    Raises:
        InvalidInput: it is no tensor, of another dtype or shape, or a source was written to.
    """
    import torch

    if any(tensor._version != known for tensor, known in zip(tensors, versions, strict=True)):
        raise _unfit(
            declared,
            "its formula writes into a source or weight, which others read too. Make a new "
            "tensor (`x * 2`, `x.clamp(…)`, not `x *= 2`, `x.clamp_(…)`), and open the store "
            "again: what it holds in memory is no longer the store's",
        )
    if not isinstance(value, torch.Tensor):
        raise _unfit(declared, f"its formula returned {type(value).__name__}, not a tensor")
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        value = value.to(torch.float64)
    if value.dtype is not torch.float64:
        raise _unfit(
            declared,
            f"its formula returned {str(value.dtype).removeprefix('torch.')}. Sources come as "
            "float64, and the value must stay so",
        )
    expected = _sizes(declared, sources, tensors, dimensions, rows)
    found = tuple(value.shape)
    if len(found) != len(expected) or any(
        size is not None and size != at for size, at in zip(expected, found, strict=True)
    ):
        names = ", ".join(
            name if size is None else f"{name}={size}"
            for name, size in zip(expected_axes(declared), expected, strict=True)
        )
        raise _unfit(declared, f"its formula returned the shape {found}; its axes are ({names})")
    return value


def _sizes(
    declared: DerivedScalar,
    sources: Sequence[Source],
    tensors: "Sequence[Tensor]",
    dimensions: ModelDimensions,
    rows: int | None,
) -> tuple[int | None, ...]:
    """Expected lengths; None where only the value itself can tell."""
    whole = [
        len(tensor)
        for number, (source, tensor) in enumerate(zip(sources, tensors, strict=False))
        if (rows is None or number in declared.whole) and not _is_flattened(source)
    ]
    tokens = whole[0] if whole else None
    first = tokens if rows is None else rows
    if declared.is_flattened:
        first = None if tokens is None or rows is not None else tokens * (tokens + 1) // 2
    known: dict[Dimension, int | None] = {Dimension.ATTENDED: tokens, Dimension.LATENT: None}
    return (first, *(known[a] if a in known else dimensions.size(a) for a in declared.axes))


def _is_flattened(source: Source) -> bool:
    return isinstance(source.of, str) and source.of in SCALARS and SCALARS[source.of].is_flattened


def _unfit(declared: DerivedScalar, reason: str) -> InvalidInput:
    place = "" if declared.origin is None else f" (declared in {declared.origin})"
    return InvalidInput(
        f"{declared.name} cannot be derived: {reason}{place}.", kind=ErrorKind.INVALID_ARGUMENT
    )
