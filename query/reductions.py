"""The best values among tensors in memory, and their sums.

The order is total: value descending (ascending for the least); ties by the order of the tensors, then by the
index within one. -0.0 equals 0.0 and NaN never ranks. Pairs whose attended token comes after
the token are masked, in rankings and in sums: a causal model has no value there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actstore.query.derived.registry import SCALARS, scalar
from actstore.query.indexing import DerivedScalarIndex, scalar_axes
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import Dimension, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerValues", "rank", "total", "without_masked_pairs"]


@dataclass(frozen=True, eq=False)
class LayerValues:
    """One tensor among those that are ranked or summed.

    Attributes:
        dst: the scalar's name.
        pass_type: the value itself or its gradient.
        layer: None outside the blocks.
        values: the tensor, of any shape.
    """

    dst: str
    pass_type: PassType
    layer: int | None
    values: "Tensor"


def without_masked_pairs(dst: str, values: "Tensor") -> "Tensor":
    """The values, with zero at pairs whose attended token comes after the token.

    Scores are minus infinity there, which would be the least value and every sum. Tensors
    with fewer tokens than attended ones are a choice of rows and stay as they are.

    Args:
        dst: a scalar; of one without an attended axis nothing changes.
        values: ``(token, *axes)``.
    """
    kept = _existing(dst, values)
    return values if kept is None else values.masked_fill(~kept, 0)


def rank(
    pieces: Sequence[LayerValues], k: int | None, largest: bool
) -> tuple["Tensor", list[DerivedScalarIndex]]:
    """The k best values of all tensors together.

    Args:
        pieces: on one device; their order breaks ties.
        k: how many at most; None for all.
        largest: the greatest, else the least.

    Returns:
        ``(rank,)`` values, best first, and where each stands.

    Raises:
        InvalidInput: k is below 1, or a scalar is unknown.
    """
    import torch

    if k is not None and (type(k) is not int or k < 1):
        raise InvalidInput(
            f"k is {k!r}; it must be an integer of at least 1, or None for all values.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    if not pieces:
        return torch.empty(0), []
    values: list[Tensor] = []
    places: list[Tensor] = []
    for piece in pieces:
        flat = piece.values.detach().reshape(-1)
        ranked = _ranked(piece)
        best = ranked[_best(flat[ranked], k, largest)]
        values.append(flat[best])
        places.append(best)
    joined = torch.cat(values)
    order = _best(joined, k, largest)
    owner = np.repeat(np.arange(len(pieces)), [len(part) for part in places])
    place = torch.cat(places).cpu().numpy()
    chosen = order.cpu().numpy()
    return joined[order], [_index(pieces[owner[at]], int(place[at])) for at in chosen]


def total(pieces: Sequence[LayerValues], dims_to_keep: Sequence[Dimension] = ()) -> "Tensor":
    """The sum of all tensors, without masked pairs.

    Args:
        pieces: on one device, each with the axes of its scalar where axes are kept.
        dims_to_keep: axes that stay.

    Returns:
        float64; the kept axes in the order of the first scalar's, 0-d without any.

    Raises:
        InvalidInput: a kept axis is missing or differs in length, or a tensor does not have
            its scalar's axes.
    """
    import torch

    kept = {Dimension(dim) for dim in dims_to_keep}
    device = pieces[0].values.device if pieces else None
    result = torch.zeros((), dtype=torch.float64, device=device)
    first: list[Dimension] = []
    for place, piece in enumerate(pieces):
        values = without_masked_pairs(piece.dst, piece.values).to(torch.float64)
        if not kept:
            result = result + values.sum()
            continue
        axes = _axes(piece, kept)
        lost = [at for at, axis in enumerate(axes) if axis not in kept]
        summed = values.sum(lost) if lost else values
        order = [axis for axis in axes if axis is not None and axis in kept]
        if place == 0:
            first, result = order, summed
            continue
        summed = summed.permute([order.index(axis) for axis in first])
        if summed.shape != result.shape:
            raise InvalidInput(
                f"{piece.dst} has {tuple(summed.shape)} places along {', '.join(first)}, and "
                f"{pieces[0].dst} has {tuple(result.shape)}. Sum them by themselves.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        result = result + summed
    return result


def _axes(piece: LayerValues, kept: set[Dimension]) -> list[Dimension | None]:
    """Axes of a scalar's tensor; None for the pairs of a flattened one."""
    declared = scalar(piece.dst)
    axes: list[Dimension | None] = list(scalar_axes(declared))
    if declared.is_flattened:
        axes[0] = None
    missing = kept.difference(axis for axis in axes if axis is not None)
    if missing or piece.values.ndim != len(axes):
        raise InvalidInput(
            f"{piece.dst} of layer {piece.layer} is {tuple(piece.values.shape)} with the axes "
            f"{', '.join(axis or 'pair' for axis in axes)}; {', '.join(sorted(kept))} cannot be "
            "kept. Keep axes that all scalars have.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return axes


def _ranked(piece: LayerValues) -> "Tensor":
    import torch

    flat = piece.values.detach().reshape(-1)
    kept = _existing(piece.dst, piece.values)
    ranked = torch.ones_like(flat, dtype=torch.bool) if kept is None else kept.reshape(-1)
    return (ranked & ~flat.isnan()).nonzero().reshape(-1)


def _best(values: "Tensor", k: int | None, largest: bool) -> "Tensor":
    """Places of the k best of a vector without NaN, best first, the earlier of equals first."""
    import torch

    # Zero is added because a radix sort tells -0.0 from 0.0.
    keys = values.long() if values.dtype is torch.bool else values + 0
    places = torch.arange(len(keys), device=keys.device)
    if k is not None and k < len(keys):
        # Which of several equal values `topk` returns is not defined; the last value is.
        last = keys.topk(k, largest=largest).values[-1]
        better = places[keys > last if largest else keys < last]
        equal = places[keys == last][: k - len(better)]
        places = torch.cat((better, equal))
    return places[keys[places].sort(stable=True, descending=largest).indices]


def _existing(dst: str, values: "Tensor") -> "Tensor | None":
    import torch

    declared = SCALARS.get(dst)
    if declared is None or declared.is_flattened or not declared.is_pair_shaped:
        return None
    axis = 1 + declared.axes.index(Dimension.ATTENDED)
    if values.ndim != 1 + len(declared.axes) or values.shape[axis] > values.shape[0]:
        return None
    token = torch.arange(values.shape[0], device=values.device)
    attended = torch.arange(values.shape[axis], device=values.device)
    kept = attended <= token.unsqueeze(-1)
    shape = [1] * values.ndim
    shape[0], shape[axis] = kept.shape
    return kept.reshape(shape).expand(values.shape)


def _index(piece: LayerValues, place: int) -> DerivedScalarIndex:
    shape = piece.values.shape
    where = tuple(int(part) for part in np.unravel_index(place, shape)) if shape else ()
    return DerivedScalarIndex(piece.dst, where, piece.layer, piece.pass_type)
