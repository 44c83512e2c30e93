"""Merging the segments' top and low lists, and how deep the result is proven.

Every list is in rank order: for the tail ``top`` value descending, for ``low`` ascending,
then token ascending. Keys of the low tail are complemented while merging, so that both
tails are one case: the greatest first.

**Proven depth.** A segment's list holds its first 8 values in rank order. If the segment
has more, each of the others ranks after the 8th: call that entry the segment's *edge*.
Let E be the edge that ranks first among all segments that have one. A value that is in
no list belongs to a segment with an edge, so it ranks after that edge, hence after E.
An entry of the merged list that ranks at or before E therefore comes before every
unseen value, and every seen value is in the merged list: so it stands at its true rank.
Entries after E are values of the unit, but others may stand between them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.store.keys import lowest_key
from actstore.store.layout import StoredDtype

__all__ = ["LIST_DEPTH", "TAILS", "ListMerger", "Tail", "UnitLists", "join_lists"]

LIST_DEPTH = 128
"""Entries per tail and unit that a merged list keeps."""

Tail = Literal["top", "low"]
TAILS: tuple[Tail, Tail] = ("top", "low")

NO_ROW = -1
"""Row of an entry that does not exist; its key is the worst there is."""


@dataclass(frozen=True)
class UnitLists:
    """The greatest or least values of some units over ordinary rows, NaN left out.

    Attributes:
        keys: ordered keys (``store.keys``), ``(unit, rank)``.
        rows: global rows, int64 ``(unit, rank)``; -1 where there is no entry.
        proven: leading entries that certainly are the true ones, int64 ``(unit,)``.
        complete: whether the list holds every value of the unit, ``(unit,)``.
    """

    keys: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    proven: npt.NDArray[np.int64]
    complete: npt.NDArray[np.bool_]

    def take(self, units: npt.NDArray[np.int64]) -> "UnitLists":
        """The lists of some of the units."""
        return UnitLists(
            self.keys[units], self.rows[units], self.proven[units], self.complete[units]
        )


class ListMerger:
    """Merges lists of disjoint groups of rows, one tail of one layer.

    Groups must come in ascending order of their rows.

    Args:
        units: how many.
        dtype: of the stored values.
        tail: which end.
        depth: entries to keep.
    """

    def __init__(self, units: int, dtype: StoredDtype, tail: Tail, depth: int) -> None:
        self._tail = tail
        self._depth = depth
        self._worst = dtype.keys.type(lowest_key(dtype))
        self._keys: npt.NDArray[Any] = np.full((units, 0), self._worst, dtype.keys)
        self._rows = np.full((units, 0), NO_ROW, np.int64)
        self._cut = np.zeros(units, bool)
        self._edge_key: npt.NDArray[Any] = np.full(units, self._worst, dtype.keys)
        self._edge_row = np.full(units, np.iinfo(np.int64).max)
        self._has_edge = np.zeros(units, bool)

    def add(
        self,
        keys: npt.NDArray[Any],
        rows: npt.NDArray[np.int64],
        has_more: npt.NDArray[np.bool_],
    ) -> None:
        """Merge the lists of one or more segments.

        Args:
            keys: ``(unit, segment, rank)``.
            rows: global rows, int64 of the same shape.
            has_more: whether the segment has values beyond its list, ``(unit, segment)``.
        """
        upward = self._upward(keys)
        edge_key = np.where(has_more, upward[:, :, -1], self._worst)
        best = edge_key.argmax(axis=1)
        units = np.arange(len(keys))
        # Of equal keys argmax finds the earliest segment, and so the first row.
        self._note_edge(
            edge_key[units, best], rows[units, best, -1], np.logical_or.reduce(has_more, axis=1)
        )
        self._merge(upward.reshape(len(keys), -1), rows.reshape(len(keys), -1))

    def add_lists(self, *parts: UnitLists) -> None:
        """Merge lists that were merged before, over disjoint groups of rows in any order.

        The last proven entry of such a list is its edge.
        """
        for part in parts:
            if part.keys.shape[1]:
                last = np.maximum(part.proven - 1, 0)
                units = np.arange(len(last))
                key = self._upward(part.keys)[units, last]
                self._note_edge(key, part.rows[units, last], ~part.complete)
        keys = np.concatenate([self._upward(part.keys) for part in parts], axis=1)
        rows = np.concatenate([part.rows for part in parts], axis=1)
        order = np.argsort(rows, axis=1, kind="stable")
        self._merge(
            np.take_along_axis(keys, order, axis=1), np.take_along_axis(rows, order, axis=1)
        )

    def _upward(self, keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return keys if self._tail == "top" else ~keys

    def _note_edge(
        self,
        key: npt.NDArray[Any],
        row: npt.NDArray[np.int64],
        has_edge: npt.NDArray[np.bool_],
    ) -> None:
        earlier = (key > self._edge_key) | ((key == self._edge_key) & (row < self._edge_row))
        replaced = has_edge & earlier
        self._edge_key = np.where(replaced, key, self._edge_key)
        self._edge_row = np.where(replaced, row, self._edge_row)
        self._has_edge |= has_edge

    def _merge(self, keys: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> None:
        keys = np.concatenate([self._keys, keys], axis=1)
        rows = np.concatenate([self._rows, rows], axis=1)
        # Stable: entries with one key are in the order of their rows already.
        order = np.argsort(~keys, axis=1, kind="stable")
        if keys.shape[1] > self._depth:
            beyond = np.take_along_axis(keys, order[:, self._depth : self._depth + 1], axis=1)
            self._cut |= beyond[:, 0] > self._worst
            order = order[:, : self._depth]
        self._keys = np.take_along_axis(keys, order, axis=1)
        self._rows = np.take_along_axis(rows, order, axis=1)

    @property
    def lists(self) -> UnitLists:
        """What has been merged so far; ``(unit, depth)`` whatever was added."""
        present = self._keys > self._worst
        edge_key, edge_row = self._edge_key[:, None], self._edge_row[:, None]
        before_edge = (self._keys > edge_key) | (
            (self._keys == edge_key) & (self._rows <= edge_row)
        )
        proven = (present & (before_edge | ~self._has_edge[:, None])).sum(axis=1)
        missing = ((0, 0), (0, self._depth - self._keys.shape[1]))
        keys = np.pad(self._keys, missing, constant_values=self._worst)
        rows = np.where(present, self._rows, NO_ROW)
        return UnitLists(
            keys if self._tail == "top" else ~keys,
            np.pad(rows, missing, constant_values=NO_ROW),
            proven.astype(np.int64),
            ~(self._has_edge | self._cut),
        )


def join_lists(parts: list[UnitLists], dtype: StoredDtype, tail: Tail) -> UnitLists:
    """The lists of the union of disjoint groups of rows.

    Args:
        parts: lists of the same units over each group, in any order.
        dtype: of the stored values.
        tail: which end.

    Returns:
        Lists of at most ``LIST_DEPTH`` entries.
    """
    if len(parts) == 1:
        return parts[0]
    merger = ListMerger(len(parts[0].keys), dtype, tail, LIST_DEPTH)
    merger.add_lists(*parts)
    return merger.lists
