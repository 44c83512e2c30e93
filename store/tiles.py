"""Describing a tile: some column chunks of one layer of a segment.

Every unit is described from its own column alone, so the tiles of a segment can be described
in any order and by any number of threads, and the result is the same.

A tile is described in one pass over blocks that fit the processor's cache, in the order of
the file: nothing is transposed. Extremes are folded over groups of 16 rows first, so that the
lists are found by looking into the few groups that reach far enough. The rows of a group
lie 32 apart in a page: then every fold and every sum runs over long rows of the block.
"""

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
from actstore.store.statistics import BlockSums, central_moments, join_moments
from actstore.store.unit_grid import PAGE_ROWS, UnitGrid

__all__ = ["EMPTY_ROW", "LIST_LENGTH", "Tile"]

LIST_LENGTH = 8
"""Entries per tail and unit in a segment's list."""

EMPTY_ROW = 0xFFFF
"""Row of a list entry that does not exist; its key is the identity of the fold."""

_GROUP = 16
"""Rows whose extremes are kept while a tile is described."""

_GROUPS = PAGE_ROWS // _GROUP
"""Groups of a page; also the distance of a group's rows."""

_ROWS = np.arange(_GROUP) * _GROUPS
"""The rows of a group, from its first."""

_BLOCK_VALUES = 2**17
"""Values worked on at once: with their float32 copies they stay in the processor's cache."""

_ONES = 128
"""Ones that are added as bytes, and divide a page."""


class Tile:
    """Some column chunks of one layer of a segment.

    Args:
        spec: the array.
        chunks: the layer's values, ``(row_chunk, column_chunk, row, column)``, C-contiguous.
        first: the tile's first column chunk.
        stop: the column chunk after its last one.
        special: ``(row,)`` over the filled rows.
    """

    def __init__(
        self,
        spec: UnitGrid,
        chunks: npt.NDArray[Any],
        first: int,
        stop: int,
        special: npt.NDArray[np.bool_],
    ) -> None:
        self._spec = spec
        self._chunks = chunks
        self._first = first
        self._stop = stop
        self._special = special
        self._units = min(stop * spec.chunk_width, spec.columns) - first * spec.chunk_width
        self._low = spec.dtype.keys.type(lowest_key(spec.dtype))
        self._high = spec.dtype.keys.type(highest_key(spec.dtype))
        self._limit = infinity_key(spec.dtype)
        # Rows that no sequence fills are passed over like special ones.
        self._left_out = np.ones(len(chunks) * spec.chunk_rows, bool)
        self._left_out[: len(special)] = special
        pages = len(self._left_out) // PAGE_ROWS
        shape = (stop - first, pages, _GROUPS, spec.chunk_width)
        self._group_max: npt.NDArray[Any] = np.empty(shape, spec.dtype.keys)
        self._group_min: npt.NDArray[Any] = np.empty(shape, spec.dtype.keys)
        rows = min(
            max(1, _BLOCK_VALUES // (spec.chunk_width * PAGE_ROWS)) * PAGE_ROWS, spec.chunk_rows
        )
        self._keys: npt.NDArray[Any] = np.empty((rows, spec.chunk_width), spec.dtype.keys)
        self._sums = BlockSums(rows, spec.chunk_width)
        self._mask = np.empty((rows, spec.chunk_width), bool)

    def describe(self) -> dict[str, npt.NDArray[Any]]:
        """The tile's units of every section but the checksums; ``(unit, …)`` each."""
        spec, units = self._spec, self._units
        step, width = len(self._keys), spec.chunk_width
        starts = [
            (row_chunk, start)
            for row_chunk in range(len(self._chunks))
            for start in range(0, spec.chunk_rows, step)
        ]
        columns = (self._stop - self._first) * width
        sums = np.empty((len(starts), 5, columns))
        # Ordinary values, those above zero, NaN.
        counts = np.empty((len(starts), columns, 3), np.uint32)
        # What overflows float32 in a unit is infinite or NaN in its own moments alone.
        with np.errstate(invalid="ignore", over="ignore"):
            for number, (row_chunk, start) in enumerate(starts):
                stop = min(start + step, spec.chunk_rows)
                first_row = row_chunk * spec.chunk_rows + start
                last_row = first_row + stop - start
                left_out = np.flatnonzero(self._left_out[first_row:last_row])
                pages = slice(first_row // PAGE_ROWS, last_row // PAGE_ROWS)
                for chunk in range(self._stop - self._first):
                    within = slice(chunk * width, (chunk + 1) * width)
                    self._describe_block(
                        self._chunks[row_chunk, self._first + chunk, start:stop],
                        left_out,
                        self._group_max[chunk, pages],
                        self._group_min[chunk, pages],
                        counts[number, within],
                        sums[number, :, within],
                    )
        for extremes in (self._group_max, self._group_min):
            # Zero and minus zero share a key; only minus zero has the key -1 until here.
            extremes += extremes == -1
        page_max = self._by_unit(self._group_max.max(axis=2), self._low)
        page_min = self._by_unit(self._group_min.min(axis=2), self._high)
        special_max, special_min = self._special_extremes()
        top_key, top_row = self._select(self._group_max, page_max, np.int8(0))
        # The least are the greatest of the complement, ties by row alike.
        low_key, low_row = self._select(~self._group_min, ~page_min, np.int8(-1))
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
            "moments": join_moments(
                central_moments(sums[:, :, :units], counts[:, :units, 0]), counts[:, :units, 0]
            ),
            "counts": counts[:, :units].sum(0, dtype=np.uint32),
        }

    def _describe_block(
        self,
        stored: npt.NDArray[Any],
        left_out: npt.NDArray[np.int64],
        group_max: npt.NDArray[Any],
        group_min: npt.NDArray[Any],
        counts: npt.NDArray[np.uint32],
        sums: npt.NDArray[np.float64],
    ) -> None:
        """Summarise a block into the arguments after the second.

        Args:
            stored: ``(row, unit)``.
            left_out: its rows that do not count.
            group_max: keys ``(page, group, unit)``.
            group_min: keys of the same shape.
            counts: ``(unit, 3)``.
            sums: ``(5, unit)``, see :meth:`BlockSums.add`.
        """
        dtype, low, high, limit = self._spec.dtype, self._low, self._high, self._limit
        rows = len(stored)
        keys = signed_zero_keys(stored, dtype, self._keys[:rows])
        keys[left_out] = low
        _fold(np.maximum, keys, group_max)
        positive = np.greater(keys, 0, out=self._mask[:rows])
        keys[left_out] = high
        _fold(np.minimum, keys, group_min)
        values = self._sums.values[:rows]
        missing = None
        nan: Any = 0
        if group_max.max() < limit and group_min.min() > -limit - 1:
            finite_values(stored, dtype, values)
        else:
            values[...] = dtype.to_float32(stored)
            missing = (keys > limit) | (keys < -limit - 1)
            missing[left_out] = False
            positive[missing] = False
            keys[missing] = high
            _fold(np.minimum, keys, group_min)
            keys[missing] = low
            keys[left_out] = low
            _fold(np.maximum, keys, group_max)
            nan = missing.sum(0, dtype=np.uint32)
        counts[:, 0] = rows - len(left_out) - nan
        counts[:, 1] = _count(positive)
        counts[:, 2] = nan
        self._sums.add(rows, left_out, missing, sums)

    def _by_unit(self, pages: npt.NDArray[Any], identity: Any) -> npt.NDArray[Any]:
        """Keys ``(unit, page)`` of all the segment's pages from ``(chunk, page, column)``."""
        result = np.full((self._units, self._spec.pages), identity, pages.dtype)
        by_unit = pages.transpose(0, 2, 1).reshape(-1, pages.shape[1])
        result[:, : pages.shape[1]] = by_unit[: self._units]
        return result

    def _special_extremes(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Greatest and least key ``(unit,)`` over the special rows."""
        row_chunk, row = np.divmod(np.flatnonzero(self._special), self._spec.chunk_rows)
        # Indices on both sides of a slice put their axis first.
        stored = self._chunks[:, self._first : self._stop][row_chunk, :, row]
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
            groups: greatest key of each group, ``(chunk, page, group, column)``.
            pages: greatest key of each page, ``(unit, page)``.
            flip: 0, or -1 when groups and pages hold complements of keys.

        Returns:
            Keys ``(unit, 8)`` in rank order and rows ``(unit, 8)``; missing entries hold the
            lowest key and ``0xFFFF``.
        """
        low, count, units = self._low, LIST_LENGTH, self._units
        chunks, in_use, _, width = groups.shape
        # That many pages reach their own maximum, so the last of those is a floor.
        floor = np.full(chunks * width, self._high, groups.dtype)
        floor[:units] = _nth_greatest(pages, count, low)
        # Padding's columns hold NaN, so no group of theirs is above the lowest key.
        lanes = groups.reshape(chunks, -1, _GROUPS * width)
        floors = np.repeat(floor.reshape(chunks, 1, width), _GROUPS, axis=1)
        reached = lanes >= floors.reshape(chunks, 1, _GROUPS * width)
        reached &= lanes > low
        reached = reached.reshape(groups.shape)
        places = np.flatnonzero(reached)
        crowded = _frequent(places // groups[0].size * width + places % width, 2 * count)
        if len(crowded):
            chunk, column = np.divmod(crowded, width)
            # Indices on both sides of a slice put their axis first: (unit, page, group).
            keys = groups[chunk, :, :, column]
            floor[crowded] = _nth_greatest(keys.reshape(len(crowded), -1), count, low)
            least = floor[crowded, None, None]
            # Of groups that only tie with the floor those of the first pages have the first rows.
            tied = (keys == least) & (keys > low)
            in_page = tied.sum(2)
            tied &= (np.cumsum(in_page, axis=1) - in_page < count)[:, :, None]
            reached[chunk, :, :, column] = (keys > least) | tied
            places = np.flatnonzero(reached)
        place, column = np.divmod(places, width)
        place, group = np.divmod(place, _GROUPS)
        chunk, page = np.divmod(place, in_use)
        unit = chunk * width + column
        first_row = page * PAGE_ROWS + group
        keys = self._group_keys(unit, first_row)
        rows = first_row[:, None] + _ROWS
        is_out = (keys > self._limit) | (keys < -self._limit - 1) | self._left_out[rows]
        keys ^= flip
        keys[is_out] = low
        found = np.flatnonzero((keys >= floor[unit, None]) & (keys > low))
        unit, keys, rows = unit[found // _GROUP], keys.reshape(-1)[found], rows.reshape(-1)[found]
        # One number per candidate, in the order of ranks: unit, key downwards, row. It has
        # 16 bits for the row, at most 32 for the key; what is left holds any number of units.
        behind = (int(self._high) - keys.astype(np.int64)).astype(np.uint64)
        ranked = np.sort((unit.astype(np.uint64) << 48) | (behind << 16) | rows.astype(np.uint64))
        unit = (ranked >> 48).astype(np.int64)
        rank = np.arange(len(unit)) - np.searchsorted(unit, np.arange(units))[unit]
        ranked, unit, rank = ranked[rank < count], unit[rank < count], rank[rank < count]
        top_key = np.full((units, count), low, groups.dtype)
        top_row = np.full((units, count), EMPTY_ROW, np.uint16)
        behind = (ranked >> 16) & 0xFFFFFFFF
        top_key[unit, rank] = int(self._high) - behind.astype(np.int64)
        top_row[unit, rank] = ranked & 0xFFFF
        return top_key, top_row

    def _group_keys(
        self, units: npt.NDArray[np.int64], first_rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[Any]:
        """Keys ``(pair, row)`` of the groups that begin at some rows, each for one unit."""
        spec = self._spec
        row_chunk, row = np.divmod(first_rows, spec.chunk_rows)
        column_chunk, column = np.divmod(units, spec.chunk_width)
        chunk = row_chunk * spec.column_chunks + self._first + column_chunk
        first = (chunk * spec.chunk_rows + row) * spec.chunk_width + column
        place = first[:, None] + _ROWS * spec.chunk_width
        return ordered_keys(self._chunks.reshape(-1)[place], spec.dtype)


def _fold(fold: np.ufunc, keys: npt.NDArray[Any], groups: npt.NDArray[Any]) -> None:
    """Fold ``keys (row, unit)`` into ``groups (page, group, unit)``."""
    pages = len(groups)
    fold.reduce(keys.reshape(pages, _GROUP, -1), axis=1, out=groups.reshape(pages, -1))


def _count(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """``(unit,)`` numbers of true elements of ``(row, unit)``."""
    units = mask.shape[1]
    # So many ones fit a byte, and adding bytes is the fastest addition there is.
    ones = mask.view(np.uint8).reshape(_ONES, -1)
    partial = np.add.reduce(ones, axis=0, dtype=np.uint8).reshape(-1, units)
    counts: npt.NDArray[np.uint32] = np.add.reduce(partial, axis=0, dtype=np.uint32)
    return counts


def _frequent(numbers: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """The numbers that occur more often than ``most`` times, ascending."""
    return np.flatnonzero(np.bincount(numbers) > most)


def _nth_greatest(values: npt.NDArray[Any], n: int, identity: Any) -> npt.NDArray[Any]:
    """The ``n``-th greatest of every row; ``identity`` where there are fewer."""
    if values.shape[1] < n:
        return np.full(len(values), identity, values.dtype)
    nth: npt.NDArray[Any] = np.partition(values, values.shape[1] - n, axis=1)[:, -n]
    return nth
