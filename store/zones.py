"""Zone maps, segment lists, statistics and block checksums of one array's segment.

One checked file per (array, segment), computed from the bytes that are on disk:

=================  ==========================================  =======================
section            shape                                       meaning
=================  ==========================================  =======================
``checksums``      (layer, row_chunk, column_chunk, block)     crc32c of shard blocks
``page_max/min``   (layer, unit, page)                         keys, ordinary rows
``segment``        (layer, unit, 4)                            keys: max, min over
                                                               ordinary, then special rows
``top/low_key``    (layer, unit, 8)                            greatest and least keys
``top/low_row``    (layer, unit, 8)                            their rows in the segment
``moments``        (layer, unit, 4)                            mean, M2, M3, M4
``counts``         (layer, unit, 3)                            ordinary values, > 0, NaN
=================  ==========================================  =======================

Arrays without a node axis have ``checksums`` alone.

A segment is described in one pass over blocks that fit the processor's cache, in the
order of the file: nothing is transposed. Extremes are folded over groups of 16 rows first,
so that the lists are found by looking into the few groups that reach far enough.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.keys import (
    finite_values,
    highest_key,
    infinity_key,
    lowest_key,
    ordered_keys,
    signed_zero_keys,
)
from actstore.store.layout import PAGE_ROWS, ArraySpec
from actstore.store.shards import SegmentBuffer, block_checksums
from actstore.store.statistics import join_moments, page_moments

__all__ = ["EMPTY_ROW", "LIST_LENGTH", "describe_segment", "zone_attributes"]

LIST_LENGTH = 8
"""Entries per tail and unit in a segment's list."""

EMPTY_ROW = 0xFFFF
"""Row of a list entry that does not exist; its key is the identity of the fold."""

_GROUP = 16
"""Rows whose extremes are kept while a layer is described; divides a page."""

_BLOCK_VALUES = 2**17
"""Values worked on at once: with their float32 copies they stay in the processor's cache."""


def zone_attributes(spec: ArraySpec, segment: int, plan_hash: str) -> dict[str, Any]:
    """What a zone file says of itself, so that one in another's place is not believed."""
    return {"array": spec.key, "segment": segment, "plan": plan_hash}


def describe_segment(
    buffer: SegmentBuffer, special: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    """The sections of a segment's zone file.

    Args:
        buffer: the segment's values, as they are on disk.
        special: ``(row,)`` over the filled rows; such rows are summarised apart.
    """
    spec = buffer.spec
    sections: dict[str, npt.NDArray[Any]] = {"checksums": block_checksums(spec, buffer.chunks)}
    if not spec.has_zones:
        return sections
    per_layer = [_Layer(spec, chunks, special).describe() for chunks in buffer.chunks]
    sections.update({name: np.stack([part[name] for part in per_layer]) for name in per_layer[0]})
    return sections


@dataclass(frozen=True)
class _Block:
    """What a block of whole pages and one column chunk says of its units.

    Attributes:
        group_max, group_min: keys ``(group, unit)``.
        positive, nan: counts ``(page, unit)``.
        moments: float64 ``(page, unit, 4)``.
    """

    group_max: npt.NDArray[Any]
    group_min: npt.NDArray[Any]
    positive: npt.NDArray[np.uint32]
    nan: npt.NDArray[np.uint32]
    moments: npt.NDArray[np.float64]


class _Layer:
    """One layer of a segment.

    Args:
        spec: the array.
        chunks: ``(row_chunk, column_chunk, row, column)``.
        special: ``(row,)`` over the filled rows.
    """

    def __init__(
        self, spec: ArraySpec, chunks: npt.NDArray[Any], special: npt.NDArray[np.bool_]
    ) -> None:
        self._spec = spec
        self._chunks = chunks
        self._special = special
        self._low = spec.dtype.keys.type(lowest_key(spec.dtype))
        self._high = spec.dtype.keys.type(highest_key(spec.dtype))
        self._limit = infinity_key(spec.dtype)
        # Rows that no sequence fills are passed over like special ones.
        self._left_out = np.ones(len(chunks) * spec.chunk_rows, bool)
        self._left_out[: len(special)] = special

    def describe(self) -> dict[str, npt.NDArray[Any]]:
        """The layer's part of every section but the checksums."""
        spec, low, high = self._spec, self._low, self._high
        units = spec.column_chunks * spec.chunk_width
        rows = len(self._left_out)
        group_max = np.empty((rows // _GROUP, units), spec.dtype.keys)
        group_min = np.empty_like(group_max)
        moments = np.empty((rows // PAGE_ROWS, units, 4))
        positive = np.empty((rows // PAGE_ROWS, units), np.uint32)
        nan = np.empty_like(positive)
        pages = max(1, _BLOCK_VALUES // (spec.chunk_width * PAGE_ROWS))
        step = min(pages * PAGE_ROWS, spec.chunk_rows)
        for row_chunk, column_chunk in np.ndindex(*self._chunks.shape[:2]):
            columns = slice(column_chunk * spec.chunk_width, (column_chunk + 1) * spec.chunk_width)
            for start in range(0, spec.chunk_rows, step):
                stop = min(start + step, spec.chunk_rows)
                first = row_chunk * spec.chunk_rows + start
                last = first + stop - start
                block = self._describe_block(
                    self._chunks[row_chunk, column_chunk, start:stop],
                    np.flatnonzero(self._left_out[first:last]),
                )
                groups = slice(first // _GROUP, last // _GROUP)
                within = slice(first // PAGE_ROWS, last // PAGE_ROWS)
                group_max[groups, columns] = block.group_max
                group_min[groups, columns] = block.group_min
                moments[within, columns] = block.moments
                positive[within, columns] = block.positive
                nan[within, columns] = block.nan
        units = spec.columns
        page_max = self._fold_pages(group_max[:, :units], np.maximum, low)
        page_min = self._fold_pages(group_min[:, :units], np.minimum, high)
        special_max, special_min = self._special_extremes()
        top_key, top_row = self._select(group_max[:, :units], page_max, np.int8(0))
        # The least are the greatest of the complement, ties by row alike.
        low_key, low_row = self._select(~group_min[:, :units], ~page_min, np.int8(-1))
        ordinary = (~self._left_out).reshape(-1, PAGE_ROWS).sum(1)
        count = ordinary[:, None] - nan[:, :units].astype(np.int64)
        return {
            "page_max": page_max,
            "page_min": page_min,
            "segment": np.stack(
                [page_max.max(1), page_min.min(1), special_max[:units], special_min[:units]], axis=1
            ),
            "top_key": top_key,
            "top_row": top_row,
            "low_key": ~low_key,
            "low_row": low_row,
            "moments": join_moments(moments[:, :units], count),
            "counts": np.stack(
                [
                    count.sum(0).astype(np.uint32),
                    positive[:, :units].sum(0, dtype=np.uint32),
                    nan[:, :units].sum(0, dtype=np.uint32),
                ],
                axis=1,
            ),
        }

    def _describe_block(self, stored: npt.NDArray[Any], left_out: npt.NDArray[np.int64]) -> _Block:
        """Summarise ``stored (row, column)``; the rows ``left_out`` do not count."""
        low, high, limit = self._low, self._high, self._limit
        keys = signed_zero_keys(stored, self._spec.dtype)
        keys[left_out] = low
        group_max = _fold_groups(keys, np.maximum)
        positive = keys > 0
        keys[left_out] = high
        group_min = _fold_groups(keys, np.minimum)
        missing = None
        is_finite = bool(group_max.max() < limit and group_min.min() > -limit - 1)
        if not is_finite:
            missing = (keys > limit) | (keys < -limit - 1)
            missing[left_out] = False
            positive[missing] = False
            keys[missing] = high
            group_min = _fold_groups(keys, np.minimum)
            keys[missing] = low
            keys[left_out] = low
            group_max = _fold_groups(keys, np.maximum)
        # Zero and minus zero share a key; only minus zero has the key -1 until here.
        group_max += group_max == -1
        group_min += group_min == -1
        if is_finite:
            values = finite_values(stored, self._spec.dtype)
        else:
            values = self._spec.dtype.to_float32(stored)
        return _Block(
            group_max,
            group_min,
            _count(positive),
            np.zeros((len(stored) // PAGE_ROWS, stored.shape[1]), np.uint32)
            if missing is None
            else _count(missing),
            page_moments(values, left_out, missing),
        )

    def _fold_pages(
        self, groups: npt.NDArray[Any], fold: np.ufunc, identity: Any
    ) -> npt.NDArray[Any]:
        """Keys ``(unit, page)`` of all the segment's pages from ``(group, unit)`` ones."""
        per_page = groups.reshape(-1, PAGE_ROWS // _GROUP, groups.shape[1])
        pages = np.full((groups.shape[1], self._spec.pages), identity, groups.dtype)
        pages[:, : len(per_page)] = fold.reduce(per_page, axis=1).T
        return pages

    def _special_extremes(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Greatest and least key ``(unit,)`` over the special rows."""
        row_chunk, row = np.divmod(np.flatnonzero(self._special), self._spec.chunk_rows)
        # Indices on both sides of a slice put their axis first.
        stored = self._chunks[row_chunk, :, row]
        keys = ordered_keys(stored, self._spec.dtype)
        missing = (keys > self._limit) | (keys < -self._limit - 1)
        greatest = np.where(missing, self._low, keys).max(0, initial=self._low)
        least = np.where(missing, self._high, keys).min(0, initial=self._high)
        return greatest.reshape(-1), least.reshape(-1)

    def _select(
        self, groups: npt.NDArray[Any], pages: npt.NDArray[Any], flip: np.int8
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]:
        """The greatest keys of every unit, then lower rows first.

        Args:
            groups: greatest key of each group of rows, ``(group, unit)``.
            pages: greatest key of each page, ``(unit, page)``.
            flip: 0, or -1 when groups and pages hold complements of keys.

        Returns:
            Keys ``(unit, 8)`` in rank order and rows ``(unit, 8)``; missing entries hold the
            lowest key and ``0xFFFF``.
        """
        low, count = self._low, LIST_LENGTH
        units = groups.shape[1]
        # That many pages reach their own maximum, so the last of those is a floor.
        floor = _nth_greatest(pages, count, low)
        reached = (groups >= floor) & (groups > low)
        crowded = np.flatnonzero(np.count_nonzero(reached, axis=0) > 4 * count)
        if len(crowded):
            columns = np.ascontiguousarray(groups[:, crowded].T)
            floor[crowded] = least = _nth_greatest(columns, count, low)
            above = columns > least[:, None]
            # Of groups that only tie with the floor the first ones have the first rows.
            tied = (columns == least[:, None]) & (columns > low)
            tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= count
            reached[:, crowded] = (above | tied).T
        group_of, unit_of = np.nonzero(reached)
        by_unit = np.argsort(unit_of, kind="stable")
        group_of, unit_of = group_of[by_unit], unit_of[by_unit]
        keys = self._group_keys(group_of, unit_of)
        row_of = group_of[:, None] * _GROUP + np.arange(_GROUP)
        is_out = (keys > self._limit) | (keys < -self._limit - 1) | self._left_out[row_of]
        keys ^= flip
        keys[is_out] = low
        pair, place = np.nonzero((keys >= floor[unit_of, None]) & (keys > low))
        unit_of, row_of, key_of = unit_of[pair], row_of[pair, place], keys[pair, place]
        # Candidates come by unit and row; a stable sort by unit and key keeps that of rows.
        order = np.argsort((unit_of << 32) - key_of, kind="stable")
        unit_of, row_of, key_of = unit_of[order], row_of[order], key_of[order]
        rank = np.arange(len(unit_of)) - np.searchsorted(unit_of, np.arange(units))[unit_of]
        keep = rank < count
        top_key = np.full((units, count), low, groups.dtype)
        top_row = np.full((units, count), EMPTY_ROW, np.uint16)
        top_key[unit_of[keep], rank[keep]] = key_of[keep]
        top_row[unit_of[keep], rank[keep]] = row_of[keep]
        return top_key, top_row

    def _group_keys(
        self, groups: npt.NDArray[np.int64], units: npt.NDArray[np.int64]
    ) -> npt.NDArray[Any]:
        """Keys ``(pair, row)`` of the rows of some groups, each for one unit."""
        spec = self._spec
        row_chunk, row = np.divmod(groups * _GROUP, spec.chunk_rows)
        column_chunk, column = np.divmod(units, spec.chunk_width)
        chunk = row_chunk * spec.column_chunks + column_chunk
        first = (chunk * spec.chunk_rows + row) * spec.chunk_width + column
        place = first[:, None] + np.arange(_GROUP) * spec.chunk_width
        return ordered_keys(self._chunks.reshape(-1)[place], spec.dtype)


def _fold_groups(keys: npt.NDArray[Any], fold: np.ufunc) -> npt.NDArray[Any]:
    """``(group, unit)`` fold of ``(row, unit)``, by halves: whole vectors at a time."""
    folded = keys.reshape(-1, _GROUP, keys.shape[1])
    while folded.shape[1] > 1:
        half = folded.shape[1] // 2
        folded = fold(folded[:, :half], folded[:, half:])
    return folded[:, 0]


def _count(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """``(page, unit)`` numbers of true elements of ``(row, unit)``."""
    rows, units = mask.shape
    lanes = mask.view(np.uint8).reshape(rows // PAGE_ROWS, -1, _GROUP * units)
    # 32 ones fit a byte, and adding bytes is the fastest addition there is.
    partial = lanes.sum(1, dtype=np.uint8).reshape(len(lanes), _GROUP, units)
    counts: npt.NDArray[np.uint32] = partial.sum(1, dtype=np.uint32)
    return counts


def _nth_greatest(values: npt.NDArray[Any], n: int, identity: Any) -> npt.NDArray[Any]:
    """The ``n``-th greatest of every row; ``identity`` where there are fewer."""
    if values.shape[1] < n:
        return np.full(len(values), identity, values.dtype)
    nth: npt.NDArray[Any] = np.partition(values, values.shape[1] - n, axis=1)[:, -n]
    return nth
