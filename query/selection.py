"""Which rows and units a search may answer with."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from actstore.store.layout import PAGE_ROWS
from actstore.store.reader import StoreReader

__all__ = ["RowSelection", "UnitSelection"]


class RowSelection:
    """The rows that may answer: ordinary or all, restricted by a predicate or not.

    Args:
        store: the open store.
        rows: ascending global rows that a predicate allows; None for all.
        special: whether special rows may answer too.
    """

    def __init__(
        self, store: StoreReader, rows: npt.NDArray[np.int64] | None, special: bool
    ) -> None:
        self._store = store
        self.rows = rows
        self.special = special

    def special_rows(self, segment: int) -> npt.NDArray[np.bool_]:
        """``(row,)`` mask of a segment's special rows."""
        mask: npt.NDArray[np.bool_] = self._store.segment(segment).special
        return mask

    def within(self, segment: int, length: int) -> npt.NDArray[np.bool_]:
        """``(row,)`` mask of the rows that the predicate allows in a segment."""
        if self.rows is None:
            return np.ones(length, bool)
        first = segment * self._store.segment_rows
        low, high = np.searchsorted(self.rows, [first, first + length])
        mask = np.zeros(length, bool)
        mask[self.rows[low:high] - first] = True
        return mask

    def allowed(self, segment: int, length: int) -> npt.NDArray[np.bool_]:
        """``(row,)`` mask of everything that may answer in a segment."""
        mask = self.within(segment, length)
        return mask if self.special else mask & ~self.special_rows(segment)[:length]

    def pages(self, segment: int, length: int) -> npt.NDArray[np.bool_]:
        """``(page,)`` whether a page holds an ordinary row that may answer."""
        mask = self.within(segment, length) & ~self.special_rows(segment)[:length]
        return np.logical_or.reduceat(mask, np.arange(0, length, PAGE_ROWS))

    def contains(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the predicate allows each global row."""
        if self.rows is None:
            return np.ones(len(tokens), bool)
        place = np.searchsorted(self.rows, tokens)
        found = place < len(self.rows)
        found[found] = self.rows[place[found]] == tokens[found]
        return found

    def segments(self, committed: list[int]) -> list[int]:
        """The committed segments that hold an allowed row."""
        if self.rows is None:
            return committed
        present = set(np.unique(self.rows // self._store.segment_rows).tolist())
        return [segment for segment in committed if segment in present]

    def tokens(self, committed: list[int]) -> Iterator[npt.NDArray[np.int64]]:
        """The rows that may answer, a segment at a time, ascending."""
        for segment in self.segments(committed):
            length = self._store.commits["base"][segment].rows
            first = segment * self._store.segment_rows
            yield first + np.flatnonzero(self.allowed(segment, length))

    def count(self, committed: list[int], ordinary: int) -> int:
        """How many rows may answer.

        Args:
            committed: the committed segments.
            ordinary: ordinary rows of all of them; saves looking where there is no predicate.
        """
        if self.rows is not None:
            return sum(len(tokens) for tokens in self.tokens(committed))
        return self._store.committed_rows if self.special else ordinary


@dataclass(frozen=True)
class UnitSelection:
    """The layers and units that may answer.

    Attributes:
        layers: ascending layer numbers (0 alone for a scalar without layers).
        columns: number of units of a layer.
        units: ascending units for all layers, or None for all.
        by_layer: ascending units per layer, where they differ from layer to layer.
    """

    layers: tuple[int, ...]
    columns: int
    units: npt.NDArray[np.int64] | None = None
    by_layer: dict[int, npt.NDArray[np.int64]] | None = field(default=None)

    def of(self, layer: int) -> npt.NDArray[np.int64]:
        """Ascending units of a layer that may answer."""
        chosen = np.arange(self.columns) if self.units is None else self.units
        if self.by_layer is not None:
            return np.intersect1d(chosen, self.by_layer.get(layer, np.empty(0, np.int64)))
        return chosen

    def only(self, layer: int, unit: int) -> "UnitSelection":
        """One unit of one layer."""
        return UnitSelection((layer,), self.columns, np.array([unit], np.int64))

    def only_layer(self, layer: int) -> "UnitSelection":
        """One layer."""
        return UnitSelection((layer,), self.columns, self.units, self.by_layer)

    @property
    def total(self) -> int:
        """Number of (layer, unit) pairs."""
        return sum(len(self.of(layer)) for layer in self.layers)
