"""Scores made of derived values: normalised per unit, or combined over a group of units.

Each is monotone in the values it is made of, float64 operations in a fixed order rounded once, so
the same operations on bounds give bounds.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from actstore.query.value_readers import ValueReader
from actstore.query.zoned import Bounds, RankedLists, Units, ZonedValues

__all__ = ["Combination", "CombinedUnits", "CombinedValues", "NormalisedValues", "NormalisedZones"]

Scale = Callable[[int], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
"""Layer -> what is subtracted and what is divided by, float64 ``(unit,)`` each; NaN for none."""


class NormalisedZones:
    """``(value - centre) / scale`` with a centre and a positive scale per unit.

    A unit without a scale has no scores: they are NaN, which never ranks.

    Args:
        of: the values.
        scale: the centres and scales.
    """

    def __init__(self, of: ZonedValues, scale: Scale) -> None:
        self._of = of
        self._scale = scale
        self.reader: ValueReader = NormalisedValues(of.reader, scale)
        self.segments = of.segments
        self.segment_rows = of.segment_rows
        self.is_tight = of.is_tight
        self.has_lists = of.has_lists

    def rows_of(self, segment: int) -> int:
        """Filled rows of a segment."""
        return self._of.rows_of(segment)

    def lists(self, layer: int, units: Units, largest: bool) -> RankedLists | None:
        """The units' lists."""
        found = self._of.lists(layer, units, largest)
        if found is None:
            return None
        centre, scale = (part[units] for part in self._scale(layer))
        value = found.bound if largest else -found.bound
        bound = _normalised(value, centre, scale)
        bound = bound if largest else -bound
        return RankedLists(
            _normalised(found.values, centre[:, None], scale[:, None]),
            found.rows,
            np.where(np.isnan(bound), np.float32(np.inf), bound),
            found.complete | np.isnan(scale),
        )

    def segment_bounds(self, layer: int, units: Units, special: bool) -> Bounds:
        """Bounds ``(unit, segment)`` over ordinary rows, or over special ones."""
        return self._bounds(layer, units, self._of.segment_bounds(layer, units, special))

    def page_bounds(self, segment: int, layer: int, units: Units) -> Bounds:
        """Bounds ``(unit, page)`` over ordinary rows."""
        return self._bounds(layer, units, self._of.page_bounds(segment, layer, units))

    def _bounds(self, layer: int, units: Units, found: Bounds) -> Bounds:
        centre, scale = (part[units][:, None] for part in self._scale(layer))
        high = _normalised(found.maximum, centre, scale)
        low = _normalised(found.minimum, centre, scale)
        return Bounds(
            np.where(np.isnan(high), np.float32(np.inf), high),
            np.where(np.isnan(low), np.float32(-np.inf), low),
            found.filled & ~np.isnan(scale),
        )


class NormalisedValues:
    """The values of :class:`NormalisedZones`."""

    def __init__(self, of: ValueReader, scale: Scale) -> None:
        self._of = of
        self._scale = scale
        self.source = of.source

    @property
    def chunk_width(self) -> int:
        """Columns that one read brings together."""
        return self._of.chunk_width

    @property
    def cells_per_row(self) -> int:
        """As of the values."""
        return self._of.cells_per_row

    def block(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.block`."""
        values = self._of.block(segment, layer, start, stop, chunks)
        centre, scale = self._scale(layer)
        if chunks is not None:
            width = self.chunk_width
            wanted = (np.array(chunks)[:, None] * width + np.arange(width)).reshape(-1)
            wanted = wanted[wanted < len(centre)]
            centre, scale = centre[wanted], scale[wanted]
        return _normalised(values, centre, scale)

    def column(
        self, segment: int, layer: int, start: int, stop: int, unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.column`."""
        values = self._of.column(segment, layer, start, stop, unit)
        centre, scale = self._scale(layer)
        return _normalised(values, centre[unit], scale[unit])

    def extents(self, segment: int, length: int, cells: int) -> Iterator[tuple[int, int]]:
        """See :meth:`ValueReader.extents`."""
        return self._of.extents(segment, length, cells)

    def rows(self, layer: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.rows`."""
        return _normalised(self._of.rows(layer, tokens), *self._scale(layer))

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.cells`."""
        values = self._of.cells(segment, layer, offsets, unit)
        centre, scale = self._scale(layer)
        return _normalised(values, centre[unit], scale[unit])

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """See :meth:`ValueReader.prefetch`."""
        self._of.prefetch(segment, layer, start, stop, chunks)


def _normalised(
    value: npt.NDArray[np.float32],
    centre: npt.NDArray[np.float64] | np.float64,
    scale: npt.NDArray[np.float64] | np.float64,
) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore", over="ignore"):
        found: npt.NDArray[np.float32] = ((value.astype(np.float64) - centre) / scale).astype(
            np.float32
        )
    return found


class Combination(StrEnum):
    """How the values of a group of units make one score."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"

    def of(self, parts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The score of values ``(unit, …)``: NaN where any of them is."""
        with np.errstate(invalid="ignore", over="ignore"):
            if self in (Combination.MAX, Combination.MIN):
                fold = np.maximum if self is Combination.MAX else np.minimum
                best: npt.NDArray[np.float32] = fold.reduce(parts, axis=0)
                return best
            # One after another, in float64: the order is fixed, so the sum is, and it is
            # monotone in every addend.
            total = np.zeros(parts.shape[1:])
            for part in parts:
                total += part
            if self is Combination.MEAN:
                total /= len(parts)
            found: npt.NDArray[np.float32] = total.astype(np.float32)
        return found


class CombinedUnits:
    """One score per row from a group of units, as the only unit of the only layer.

    Args:
        of: the values.
        pairs: (layer, unit) of the group's members, in the order of addition.
        how: how they are combined.
    """

    is_tight = False
    has_lists = False

    def __init__(self, of: ZonedValues, pairs: Sequence[tuple[int, int]], how: Combination) -> None:
        self._of = of
        self._pairs = tuple(pairs)
        self._how = how
        self.reader: ValueReader = CombinedValues(of.reader, pairs, how)
        self.segments = of.segments
        self.segment_rows = of.segment_rows

    def rows_of(self, segment: int) -> int:
        """Filled rows of a segment."""
        return self._of.rows_of(segment)

    def lists(self, layer: int, units: Units, largest: bool) -> RankedLists | None:
        """None: a row that is first for the group may be on none of its members' lists."""
        return None

    def segment_bounds(self, layer: int, units: Units, special: bool) -> Bounds:
        """Bounds ``(1, segment)`` over ordinary rows, or over special ones."""
        return self._combined(lambda at, members: self._of.segment_bounds(at, members, special))

    def page_bounds(self, segment: int, layer: int, units: Units) -> Bounds:
        """Bounds ``(1, page)`` over ordinary rows."""
        return self._combined(lambda at, members: self._of.page_bounds(segment, at, members))

    def _combined(self, bounds_of: Callable[[int, Units], Bounds]) -> Bounds:
        found: dict[tuple[int, int], tuple[Bounds, int]] = {}
        for at in dict.fromkeys(layer for layer, _ in self._pairs):
            members = np.array([unit for layer, unit in self._pairs if layer == at], np.int64)
            bounds = bounds_of(at, members)
            found |= {(at, unit): (bounds, place) for place, unit in enumerate(members.tolist())}
        parts = [found[pair] for pair in self._pairs]
        high = self._how.of(np.stack([bounds.maximum[place] for bounds, place in parts]))[None]
        low = self._how.of(np.stack([bounds.minimum[place] for bounds, place in parts]))[None]
        return Bounds(
            np.where(np.isnan(high), np.float32(np.inf), high),
            np.where(np.isnan(low), np.float32(-np.inf), low),
            np.logical_and.reduce([bounds.filled[place] for bounds, place in parts])[None],
        )


class CombinedValues:
    """The values of :class:`CombinedUnits`."""

    chunk_width = 1

    def __init__(self, of: ValueReader, pairs: Sequence[tuple[int, int]], how: Combination) -> None:
        self._of = of
        self._pairs = tuple(pairs)
        self._how = how
        self.source = of.source
        width = of.chunk_width
        self._chunks: dict[int, list[int]] = {
            layer: sorted({unit // width for at, unit in pairs if at == layer})
            for layer in sorted({at for at, _ in pairs})
        }

    @property
    def cells_per_row(self) -> int:
        """Every layer's row is looked at."""
        return self._of.cells_per_row * len(self._chunks)

    def block(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.block`."""
        width = self._of.chunk_width
        blocks = {
            at: self._of.block(segment, at, start, stop, members)
            for at, members in self._chunks.items()
        }
        columns = [
            blocks[at][:, self._chunks[at].index(unit // width) * width + unit % width]
            for at, unit in self._pairs
        ]
        return self._how.of(np.stack(columns))[:, None]

    def column(
        self, segment: int, layer: int, start: int, stop: int, unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.column`."""
        return self.block(segment, layer, start, stop)[:, 0]

    def extents(self, segment: int, length: int, cells: int) -> Iterator[tuple[int, int]]:
        """See :meth:`ValueReader.extents`."""
        return self._of.extents(segment, length, cells)

    def rows(self, layer: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.rows`."""
        found = {at: self._of.rows(at, tokens) for at in self._chunks}
        return self._how.of(np.stack([found[at][:, unit] for at, unit in self._pairs]))[:, None]

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.cells`."""
        found = [self._of.cells(segment, at, offsets, member) for at, member in self._pairs]
        return self._how.of(np.stack(found))

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """See :meth:`ValueReader.prefetch`."""
        for at, members in self._chunks.items():
            self._of.prefetch(segment, at, start, stop, members)
