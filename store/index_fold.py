"""Folding the segments' zone files into one summary per unit, a layer at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.store.reader import DescribedUnits
from actstore.store.statistics import merge_moments
from actstore.store.unit_lists import LIST_DEPTH, TAILS, ListMerger, UnitLists
from actstore.store.zones import LIST_LENGTH

__all__ = ["LayerIndex", "Moments", "fold_layer", "fold_moments", "list_depth"]

Moments = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]

_GROUP = 64
"""Segments whose lists are merged at once: bounds the memory, whatever the corpus."""

_LEAST_DEPTH = 32
"""Entries that lists have at least where the segments give so many: a usual question's worth."""


@dataclass(frozen=True)
class LayerIndex:
    """What the zone files of some segments say about the units of one layer.

    Attributes:
        top: the greatest values.
        low: the least values.
        bounds: keys ``(unit, 4, segment)``: max and min over ordinary, then special rows.
        moments: float64 ``(unit, 4)``: mean, M2, M3, M4 over ordinary rows.
        counts: int64 ``(unit, 3)``: ordinary values without NaN, those above 0, NaN.
    """

    top: UnitLists
    low: UnitLists
    bounds: npt.NDArray[np.signedinteger]
    moments: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        lists = sum(part.keys.nbytes + part.rows.nbytes for part in (self.top, self.low))
        return lists + self.bounds.nbytes + self.moments.nbytes + self.counts.nbytes


def list_depth(segments: int) -> int:
    """Entries of the merged lists of so many segments.

    Where values fall evenly, about 2.5 entries a segment come before some segment's list ends,
    and are proven. More of them would only cost space: a list that is read whole makes up most
    of the index of a store below a million rows.
    """
    return min(LIST_DEPTH, LIST_LENGTH * segments, max(_LEAST_DEPTH, 5 * segments // 2))


def fold_layer(
    array: DescribedUnits,
    segments: Sequence[int],
    layer: int,
    beginning: LayerIndex | None = None,
) -> LayerIndex:
    """Fold one layer of some segments; reads their zone files alone.

    Args:
        array: an array with zone maps.
        segments: ascending segment numbers.
        layer: the layer.
        beginning: the fold of all segments before these; the result is the same, bit by
            bit, as that of folding everything anew.

    Raises:
        StoreDamaged: a zone file is missing or fails a checksum.
    """
    spec = array.spec
    units = spec.columns
    before = 0 if beginning is None else beginning.bounds.shape[2]
    depth = list_depth(before + len(segments))
    mergers = {tail: ListMerger(units, spec.dtype, tail, depth) for tail in TAILS}
    bounds = np.empty((units, 4, before + len(segments)), spec.dtype.keys)
    listed = list(segments)
    if beginning is not None:
        bounds[:, :, :before] = beginning.bounds
        # A list that was cut shorter than ours may lack entries that belong into it.
        if beginning.top.keys.shape[1] >= min(depth, LIST_LENGTH * before):
            mergers["top"].add_lists(beginning.top)
            mergers["low"].add_lists(beginning.low)
        else:
            listed = array.segments[: before + len(segments)]
    for start in range(0, len(listed), _GROUP):
        group = listed[start : start + _GROUP]
        files = [array.zones(segment) for segment in group]
        first = np.array(group, np.int64)[None, :, None] * spec.segment_rows
        counts = np.stack([file.row("counts", layer) for file in files], axis=1)
        has_more = counts[:, :, 0] > LIST_LENGTH
        for tail, merger in mergers.items():
            keys = np.stack([file.row(f"{tail}_key", layer) for file in files], axis=1)
            rows = np.stack([file.row(f"{tail}_row", layer) for file in files], axis=1)
            merger.add(keys, rows + first, has_more)
    for number, segment in enumerate(segments, before):
        bounds[:, :, number] = array.zones(segment).row("segment", layer)
    folded = None if beginning is None else (beginning.moments, beginning.counts)
    moments, counts = fold_moments(array, segments, layer, folded)
    return LayerIndex(mergers["top"].lists, mergers["low"].lists, bounds, moments, counts)


def fold_moments(
    array: DescribedUnits, segments: Sequence[int], layer: int, beginning: Moments | None = None
) -> Moments:
    """Moments and counts of one layer's units, merged segment by segment in order.

    Rounding depends on the order of merging; keeping to one order makes the result the
    same whatever was merged before.

    Args:
        array: an array with zone maps.
        segments: ascending segment numbers.
        layer: the layer.
        beginning: the result for all segments before these.

    Returns:
        Moments ``(unit, 4)`` and counts ``(unit, 3)``, as in :class:`LayerIndex`.
    """
    units = array.spec.columns
    moments, counts = beginning or (np.zeros((units, 4)), np.zeros((units, 3), np.int64))
    for segment in segments:
        file = array.zones(segment)
        part = file.row("counts", layer).astype(np.int64)
        moments, _ = merge_moments(
            moments,
            counts[:, 0].astype(np.float64),
            file.row("moments", layer),
            part[:, 0].astype(np.float64),
        )
        counts = counts + part
    return moments, counts
