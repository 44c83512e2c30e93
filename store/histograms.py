"""Histograms of units: counts in bins that are the same for every store, and what follows.

The bins are cut by the bits of float32: by sign, by powers of two, and within an octave by the
first bits of the mantissa. float16, bfloat16, float32 and derived values so share them, and
histograms of any rows add up exactly. Why these: ``docs/decisions/006-histograms.md``.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = [
    "BINS",
    "EDGES",
    "GREATEST",
    "LEAST",
    "QUANTILES",
    "Bracket",
    "DisplayBins",
    "Histogram",
    "bins_of",
    "count_values",
    "quantiles",
]

_OCTAVES = ((-38, -22, 1), (-22, -12, 2), (-12, 8, 4), (8, 17, 1))
"""From a power of two, up to another, bins per octave: finest where activations lie."""

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
"""The quantiles that tables show."""


def _bin_edges() -> npt.NDArray[np.float32]:
    above = [
        2.0**octave * (1 + part / parts)
        for first, stop, parts in _OCTAVES
        for octave in range(first, stop)
        for part in range(parts)
    ]
    positive = np.array(above, np.float32)
    # Of all float32 numbers, zero alone is at least 0 and less than the smallest of them.
    zero = np.array([0, np.finfo(np.float32).smallest_subnormal], np.float32)
    infinity = np.array([np.inf], np.float32)
    edges = np.concatenate([-infinity, -positive[::-1], zero, positive, infinity])
    edges.flags.writeable = False
    return edges


EDGES = _bin_edges()
"""float32 ``(bin + 1,)``, ascending. A bin holds its lower edge and not its upper one, but that
the last holds infinity; one bin holds zero alone."""

BINS = len(EDGES) - 1
"""253: 126 of either sign, and zero."""

_NAN = BINS


def _greatest_values() -> npt.NDArray[np.float32]:
    values = np.nextafter(EDGES[1:], np.float32(-np.inf))
    values[-1] = np.inf
    values.flags.writeable = False
    return values


LEAST = EDGES[:-1]
"""The least value that each bin may hold, float32 ``(bin,)``."""

GREATEST = _greatest_values()
"""The greatest value that each bin may hold, float32 ``(bin,)``."""


def bins_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """The bin of every value; ``BINS`` for NaN."""
    found: npt.NDArray[np.intp] = np.searchsorted(EDGES[1:-1], values, side="right")
    return np.where(np.isnan(values), _NAN, found)


@dataclass(frozen=True)
class Bracket:
    """A number that is not known exactly.

    Attributes:
        estimate: a likely value, within the bracket.
        low, high: the true value is one of these, or between them.
    """

    estimate: float
    low: float
    high: float

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left open."""
        return self.low == self.high

    def to_json(self) -> dict[str, float | None]:
        """The members; None for what is not finite."""
        return {name: _finite(getattr(self, name)) for name in ("estimate", "low", "high")}


@dataclass(frozen=True, eq=False)
class DisplayBins:
    """Bins of equal width, for people to look at.

    Attributes:
        edges: float64 ``(bin + 1,)``.
        counts: float64 ``(bin,)``; they add up to the number of values.
        is_estimated: True: a bin of the histogram that lies in several of these is shared
            out by width.
    """

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    is_estimated: bool = True

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return {
            "edges": self.edges.tolist(),
            "counts": self.counts.tolist(),
            "estimated": self.is_estimated,
        }


@dataclass(frozen=True, eq=False)
class Histogram:
    """How the values of one unit are spread.

    Attributes:
        counts: exact, int64 ``(bin,)`` over the bins of :data:`EDGES`.
        nan: NaN values, which are in no bin.
        minimum, maximum: exact; NaN where there is no value.
    """

    counts: npt.NDArray[np.int64]
    nan: int
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if self.counts.shape != (BINS,):
            raise InvalidInput(
                f"A histogram has {BINS} counts, not {self.counts.shape}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )

    @classmethod
    def of_values(cls, values: npt.NDArray[np.float32], nan: int = 0) -> Self:
        """The histogram of some values.

        Args:
            values: float32, any shape.
            nan: NaN values that were left out of them.
        """
        flat = values.reshape(-1)
        counts = count_values(flat)
        seen = flat[~np.isnan(flat)]
        # Adding 0 makes minus zero zero.
        low, high = (float(seen.min()) + 0.0, float(seen.max()) + 0.0) if len(seen) else _NOTHING
        return cls(counts[:BINS], nan + int(counts[_NAN]), low, high)

    @property
    def edges(self) -> npt.NDArray[np.float32]:
        """:data:`EDGES`."""
        return EDGES

    @cached_property
    def total(self) -> int:
        """Values, NaN excluded."""
        return int(self.counts.sum())

    @cached_property
    def bin_low(self) -> npt.NDArray[np.float32]:
        """The least value that each bin may hold, given the minimum; float32 ``(bin,)``."""
        return np.maximum(LEAST, np.float32(self.minimum))

    @cached_property
    def bin_high(self) -> npt.NDArray[np.float32]:
        """The greatest value that each bin may hold, given the maximum; float32 ``(bin,)``."""
        return np.minimum(GREATEST, np.float32(self.maximum))

    def __add__(self, other: "Histogram") -> "Histogram":
        """The histogram of two disjoint samples together."""
        return Histogram(
            self.counts + other.counts,
            self.nan + other.nan,
            float(np.fmin(self.minimum, other.minimum)),
            float(np.fmax(self.maximum, other.maximum)),
        )

    def quantile(self, share: float) -> Bracket:
        """The least value that at least this share of the values does not pass.

        It is the value of rank ``ceil(share * total)``, counted from 1, and lies in a known bin:
        its bounds, cut at the unit's own extremes, are the bracket. The estimate shares the bin
        out evenly among its values.

        Args:
            share: from 0 (the minimum) to 1 (the maximum).

        Returns:
            NaN alone where there is no value.

        Raises:
            InvalidInput: the share is not between 0 and 1.
        """
        extremes = np.array([[self.minimum, self.maximum]], np.float32)
        found = quantiles(self.counts[None], extremes, share)
        return Bracket(*(float(part[0]) for part in found))

    def share_above(self, value: float) -> Bracket:
        """The share of the values that are greater than a number.

        Exact where no bin with values reaches across it: at the greatest value of a bin, so at 0.

        Args:
            value: any number but NaN.

        Returns:
            NaN alone where there is no value.

        Raises:
            InvalidInput: the number is NaN.
        """
        if math.isnan(value):
            raise InvalidInput(
                "Nothing is above or below NaN; give a number.", kind=ErrorKind.INVALID_ARGUMENT
            )
        if not self.total:
            return Bracket(math.nan, math.nan, math.nan)
        # No float32 lies between a number and the nearest float32 that is not greater.
        limit = _float32_below(value)
        number = min(int(bins_of(np.array([limit]))[0]), BINS - 1)
        least = most = int(self.counts[number + 1 :].sum())
        count = int(self.counts[number])
        low, high = float(self.bin_low[number]), float(self.bin_high[number])
        estimate = float(least)
        if count and limit < low:
            least = most = least + count
            estimate = float(least)
        elif count and limit < high:
            estimate = least + count * _share_after(low, high, float(limit))
            most += count - (self.minimum >= low)
            least += int(self.maximum <= high)
        estimate = min(max(estimate, float(least)), float(most))
        return Bracket(estimate / self.total, least / self.total, most / self.total)

    def rebinned(self, bins: int) -> DisplayBins:
        """Bins of equal width from the minimum to the maximum, with estimated counts.

        Infinite values are counted in the outermost bins.

        Args:
            bins: how many.

        Raises:
            InvalidInput: ``bins`` is not positive.
        """
        if bins < 1:
            raise InvalidInput(
                f"bins is {bins}; it must be positive.", kind=ErrorKind.INVALID_ARGUMENT
            )
        places = np.flatnonzero(self.counts)
        if not len(places):
            return DisplayBins(np.linspace(0.0, 1.0, bins + 1), np.zeros(bins))
        finite = np.finfo(np.float32).max
        low = self.bin_low[places].astype(np.float64)
        high = self.bin_high[places].astype(np.float64)
        outermost = float(EDGES[-2])
        # Beyond the outermost edge nobody knows how far finite values reach.
        low = np.where(low < -finite, np.minimum(-outermost, high), low)
        high = np.where(high > finite, np.maximum(outermost, low), high)
        low, high = np.clip(low, -finite, finite), np.clip(high, -finite, finite)
        first, last = float(low[0]), float(high[-1])
        if first == last:
            last = first + (abs(first) or 1.0) * 1e-6
        edges = np.linspace(first, last, bins + 1)
        width = high - low
        # A bin of one value is a point: all of it belongs where the point is.
        shared = np.flatnonzero(width > 0)
        reached = np.clip((edges[:, None] - low[shared]) / width[shared], 0, 1)
        counts = np.diff(reached, axis=0) @ self.counts[places[shared]].astype(np.float64)
        points = np.flatnonzero(width <= 0)
        place = np.searchsorted(edges, low[points], side="right") - 1
        np.add.at(counts, np.clip(place, 0, bins - 1), self.counts[places[points]])
        return DisplayBins(edges, counts)

    def to_json(self) -> dict[str, Any]:
        """The members, the bins that hold values, and the usual quantiles, as JSON values."""
        places = np.flatnonzero(self.counts)
        return {
            "total": self.total,
            "nan": self.nan,
            "minimum": _finite(self.minimum),
            "maximum": _finite(self.maximum),
            "bins": [
                {"low": _finite(low), "high": _finite(high), "count": count}
                for low, high, count in zip(
                    self.bin_low[places].tolist(),
                    self.bin_high[places].tolist(),
                    self.counts[places].tolist(),
                    strict=True,
                )
            ],
            "quantiles": {str(share): self.quantile(share).to_json() for share in QUANTILES},
        }


_NOTHING = (math.nan, math.nan)


def count_values(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """int64 ``(bin + 1,)``: values in every bin, and NaN in the last place.

    Args:
        values: float32 ``(value,)``.
    """
    counts: npt.NDArray[np.int64] = np.bincount(bins_of(values), minlength=BINS + 1)
    return counts


def quantiles(
    counts: npt.NDArray[np.int64], extremes: npt.NDArray[np.float32], share: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A quantile of many units; see :meth:`Histogram.quantile`.

    Args:
        counts: int64 ``(unit, bin)``.
        extremes: float32 ``(unit, 2)``: least and greatest value.
        share: from 0 to 1.

    Returns:
        Estimate, low and high, float64 ``(unit,)`` each; NaN where a unit has no value.

    Raises:
        InvalidInput: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise InvalidInput(
            f"A quantile is asked for with a share from 0 to 1, such as 0.99, not {share}.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    below = np.cumsum(counts, axis=1)
    total = below[:, -1]
    # A product such as 0.07 * 100 is a little more than the number that was meant.
    rank = np.ceil(np.round(share * total, 6)).astype(np.int64).clip(1, np.maximum(total, 1))
    number = (below >= rank[:, None]).argmax(axis=1)
    units = np.arange(len(counts))
    least, greatest = extremes[:, 0], extremes[:, 1]
    low, high = np.maximum(LEAST[number], least), np.minimum(GREATEST[number], greatest)
    # The first and the last value are known.
    high = np.where(rank == 1, least, high)
    low = np.where(rank == total, greatest, low)
    high = np.where(rank == total, greatest, high).astype(np.float64)
    low = np.where(rank == 1, least, low).astype(np.float64)
    count = counts[units, number]
    within = (rank - (below[units, number] - count) - 0.5) / np.maximum(count, 1)
    with np.errstate(invalid="ignore"):
        estimate = np.clip(low + (high - low) * within, low, high)
    # Infinity has no middle: the end that is a number, if there is one.
    estimate = np.where(np.isinf(high), low, np.where(np.isinf(low), high, estimate))
    found = [np.where(total > 0, part, np.nan) for part in (estimate, low, high)]
    return found[0], found[1], found[2]


def _float32_below(value: float) -> np.float32:
    """The greatest float32 that is not greater than a number."""
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    return np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > value else nearest


def _share_after(low: float, high: float, value: float) -> float:
    if math.isinf(low) or math.isinf(high):
        return 0.5
    return (high - value) / (high - low)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
