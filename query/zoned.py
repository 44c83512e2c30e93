"""Derived values with bounds: all that an exact search asks of a scalar.

Whatever a scalar is made of, a search sees the same: float32 values of units in pages of 512
rows, numbers that no value of a page or a segment passes, and perhaps the units' proven lists.
The bounds speak of the derived values themselves, rounded as those are: rounding is monotone, so
the image of a maximum bounds the images of all values below it, with no slack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from actstore.query.value_readers import ValueReader, derived_value
from actstore.store.index import UnitIndex
from actstore.store.keys import key_values
from actstore.store.reader import DescribedUnits

if TYPE_CHECKING:
    from actstore.store.sections import SectionFile
    from actstore.store.unit_lists import Tail

__all__ = ["Bounds", "ProductBounds", "RankedLists", "ZoneMapped", "ZonedValues"]

Units = npt.NDArray[np.int64]

_FEW_UNITS = 16
"""Units whose zones are read one by one; of more, the layer's are read at once."""


@dataclass(frozen=True)
class Bounds:
    """What the values of some units do not pass in each of some zones.

    Attributes:
        maximum: float32 ``(unit, zone)``; no value is greater. Infinity where nothing is known.
        minimum: float32 ``(unit, zone)``; no value is less.
        filled: whether the zone may hold a value of the unit, ``(unit, zone)``.
    """

    maximum: npt.NDArray[np.float32]
    minimum: npt.NDArray[np.float32]
    filled: npt.NDArray[np.bool_]

    def scores(self, largest: bool) -> npt.NDArray[np.float32]:
        """Bounds on the score: the value, or minus the value for the least."""
        found: npt.NDArray[np.float32] = self.maximum if largest else -self.minimum
        return found


@dataclass(frozen=True)
class RankedLists:
    """The first values of some units in rank order, over ordinary rows.

    Attributes:
        values: float32 ``(unit, rank)``.
        rows: global rows, int64 ``(unit, rank)``; -1 where there is no entry.
        bound: the score that no value outside of the list passes, float32 ``(unit,)``.
        complete: whether the list holds every value of the unit, ``(unit,)``.
    """

    values: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    bound: npt.NDArray[np.float32]
    complete: npt.NDArray[np.bool_]


class ZonedValues(Protocol):
    """A scalar as a search sees it."""

    @property
    def segments(self) -> list[int]:
        """Covered segments, ascending."""
        ...

    @property
    def segment_rows(self) -> int:
        """S, the token rows of a segment."""
        ...

    @property
    def reader(self) -> ValueReader:
        """The values."""
        ...

    @property
    def is_tight(self) -> bool:
        """Whether bounds are attained, so that few pages have to be read."""
        ...

    @property
    def has_lists(self) -> bool:
        """Whether units have lists."""
        ...

    def rows_of(self, segment: int) -> int:
        """Filled rows of a segment."""
        ...

    def lists(self, layer: int, units: Units, largest: bool) -> RankedLists | None:
        """The units' lists; None where there are none."""
        ...

    def segment_bounds(self, layer: int, units: Units, special: bool) -> Bounds:
        """Bounds ``(unit, segment)`` over ordinary rows, or over special ones."""
        ...

    def page_bounds(self, segment: int, layer: int, units: Units) -> Bounds:
        """Bounds ``(unit, page)`` over ordinary rows."""
        ...


class ZoneMapped:
    """Described units times a coefficient each: a stored array, or an index of a scalar.

    Args:
        described: whose zone maps.
        index: its lists and segments' bounds.
        coefficients: layer -> float64 ``(unit,)``; ones for an index of the scalar itself.
        reader: the values.
    """

    is_tight = True
    has_lists = True

    def __init__(
        self,
        described: DescribedUnits,
        index: UnitIndex,
        coefficients: Callable[[int], npt.NDArray[np.float64]],
        reader: ValueReader,
    ) -> None:
        self._described = described
        self._index = index
        self._coefficients = coefficients
        self._dtype = described.spec.dtype
        self.reader = reader
        self.segment_rows = described.spec.segment_rows
        self.segments = index.segments

    def rows_of(self, segment: int) -> int:
        """Filled rows of a segment."""
        return self._described.rows_of(segment)

    def __len__(self) -> int:
        return self._described.spec.columns

    def moments(self, layer: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and variance of every unit over ordinary rows, float64 ``(unit,)``."""
        statistics, c = self._index.statistics(layer), self._coefficients(layer)
        return statistics.mean * c, statistics.variance * c**2

    def lists(self, layer: int, units: Units, largest: bool) -> RankedLists | None:
        """The units' lists."""
        c = self._coefficients(layer)[units]
        upward = (c >= 0) == largest
        tails: tuple[tuple[Tail, npt.NDArray[np.bool_]], ...] = (("top", upward), ("low", ~upward))
        found = [
            (picked, self._index.layer_lists(layer, tail, units[picked]))
            for tail, members in tails
            if len(picked := np.flatnonzero(members))
        ]
        depth = max((part.keys.shape[1] for _, part in found), default=0)
        values = np.full((len(units), depth), np.nan, np.float32)
        rows = np.full((len(units), depth), -1, np.int64)
        bound = np.full(len(units), np.inf, np.float32)
        complete = np.zeros(len(units), bool)
        for picked, part in found:
            width = part.keys.shape[1]
            if not width:
                continue
            value = derived_value(key_values(part.keys, self._dtype), c[picked, None])
            values[picked, :width], rows[picked, :width] = value, part.rows
            last = value[np.arange(len(picked)), np.maximum(part.proven - 1, 0)]
            score = last if largest else -last
            # 0 * infinity is NaN and never ranks; all else is 0.
            score = np.where(c[picked] == 0, np.float32(0), score)
            unknown = np.isnan(score) | (part.proven == 0)
            bound[picked] = np.where(unknown, np.float32(np.inf), score)
            complete[picked] = part.complete
        return RankedLists(values, rows, bound, complete)

    def segment_bounds(self, layer: int, units: Units, special: bool) -> Bounds:
        """Bounds ``(unit, segment)`` over ordinary rows, or over special ones."""
        bounds = self._index.segment_bounds(layer, units)
        c = self._coefficients(layer)[units]
        if special:
            return self._bounds(bounds.special_maximum, bounds.special_minimum, c)
        return self._bounds(bounds.maximum, bounds.minimum, c)

    def page_bounds(self, segment: int, layer: int, units: Units) -> Bounds:
        """Bounds ``(unit, page)`` over ordinary rows."""
        zones = self._described.zones(segment)
        c = self._coefficients(layer)[units]
        high, low = (_rows_of(zones, name, layer, units) for name in ("page_max", "page_min"))
        return self._bounds(high, low, c)

    def _bounds(
        self,
        maximum: npt.NDArray[np.signedinteger],
        minimum: npt.NDArray[np.signedinteger],
        coefficient: npt.NDArray[np.float64],
    ) -> Bounds:
        """Bounds of the values whose keys have these extremes."""
        filled = maximum >= minimum
        c = coefficient[:, None]
        high = derived_value(key_values(np.where(filled, maximum, 0), self._dtype), c)
        low = derived_value(key_values(np.where(filled, minimum, 0), self._dtype), c)
        high, low = np.where(c >= 0, high, low), np.where(c >= 0, low, high)
        # 0 * infinity is NaN and never ranks; what else the zone holds is 0.
        high, low = np.where(c == 0, np.float32(0), high), np.where(c == 0, np.float32(0), low)
        return Bounds(
            np.where(np.isnan(high), np.float32(np.inf), high),
            np.where(np.isnan(low), np.float32(-np.inf), low),
            filled,
        )


class ProductBounds:
    """A product bounded by its factors: by the greatest and least of the four corner products.

    Good for the greatest values of many units; of one unit most pages must be looked at.

    Args:
        left: one factor.
        right: the other, of the same units.
        reader: the values.
    """

    is_tight = False
    has_lists = False

    def __init__(self, left: ZonedValues, right: ZonedValues, reader: ValueReader) -> None:
        self._left, self._right = left, right
        self.reader = reader
        self.segment_rows = left.segment_rows
        self.segments = left.segments

    def rows_of(self, segment: int) -> int:
        """Filled rows of a segment."""
        return self._left.rows_of(segment)

    def lists(self, layer: int, units: Units, largest: bool) -> RankedLists | None:
        """None: the lists of the factors say nothing of their product."""
        return None

    def segment_bounds(self, layer: int, units: Units, special: bool) -> Bounds:
        """Bounds ``(unit, segment)`` over ordinary rows, or over special ones."""
        return _corners(
            self._left.segment_bounds(layer, units, special),
            self._right.segment_bounds(layer, units, special),
        )

    def page_bounds(self, segment: int, layer: int, units: Units) -> Bounds:
        """Bounds ``(unit, page)`` over ordinary rows."""
        return _corners(
            self._left.page_bounds(segment, layer, units),
            self._right.page_bounds(segment, layer, units),
        )


def _rows_of(zones: "SectionFile", section: str, layer: int, units: Units) -> npt.NDArray[Any]:
    """Some units' rows of a section ``(layer, unit, …)``."""
    if len(units) > _FEW_UNITS:
        whole: npt.NDArray[Any] = zones.row(section, layer)[units]
        return whole
    return np.stack([zones.row(section, layer, int(unit)) for unit in units])


def _corners(left: Bounds, right: Bounds) -> Bounds:
    with np.errstate(invalid="ignore", over="ignore"):
        corners = np.stack(
            [
                (a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)
                for a in (left.maximum, left.minimum)
                for b in (right.maximum, right.minimum)
            ]
        )
    # 0 * infinity: a value near the infinite end times one near zero may be anything.
    unknown = np.isnan(corners).any(axis=0)
    return Bounds(
        np.where(unknown, np.float32(np.inf), corners.max(axis=0)),
        np.where(unknown, np.float32(-np.inf), corners.min(axis=0)),
        left.filled & right.filled,
    )
