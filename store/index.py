"""Lists, bounds and statistics of every unit, wherever they are kept.

:class:`UnitIndex` joins the compacted file of an array with a fold of the segments that
it does not cover, so its readers see every committed segment and need not know which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actstore.store.index_file import ByteCache, Units, array_coverage, newest_index_file
from actstore.store.index_fold import LayerIndex, Moments, fold_layer, fold_moments
from actstore.store.reader import DescribedUnits, StoreReader
from actstore.store.statistics import UnitStatistics
from actstore.store.unit_grid import UnitGrid
from actstore.store.unit_lists import Tail, UnitLists, join_lists

__all__ = ["SegmentBounds", "UnitIndex", "open_unit_index"]


@dataclass(frozen=True)
class SegmentBounds:
    """The extremes of some units in every segment, as ordered keys.

    Attributes:
        segments: ascending segment numbers.
        maximum, minimum: over ordinary rows, ``(unit, segment)``; a maximum below its
            minimum means that there is no value.
        special_maximum, special_minimum: over special rows, alike.
    """

    segments: list[int]
    maximum: npt.NDArray[np.signedinteger]
    minimum: npt.NDArray[np.signedinteger]
    special_maximum: npt.NDArray[np.signedinteger]
    special_minimum: npt.NDArray[np.signedinteger]


class _Source(Protocol):
    """Where the numbers of some segments come from."""

    segments: list[int]

    def lists(self, layer: int, tail: Tail, units: Units | None) -> UnitLists: ...

    def bounds(self, layer: int, units: Units | None) -> npt.NDArray[np.signedinteger]: ...

    def counts(self, layer: int, unit: int) -> npt.NDArray[np.int64]: ...


class UnitIndex:
    """Lists, bounds and statistics of every unit of an array over the committed segments.

    Args:
        spec: the array.
        sources: parts that cover disjoint segments.
        moments: layer -> moments and counts over all of them.

    Attributes:
        segments: covered segments, ascending.
    """

    def __init__(
        self, spec: UnitGrid, sources: list[_Source], moments: Callable[[int], Moments]
    ) -> None:
        self.spec = spec
        self._moments = moments
        self._sources = sources
        numbers = [segment for source in sources for segment in source.segments]
        self._order = np.argsort(np.array(numbers, np.int64), kind="stable")
        self.segments = sorted(numbers)

    def layer_lists(self, layer: int, tail: Tail, units: Units | None = None) -> UnitLists:
        """Merged lists of a layer's units.

        Args:
            layer: the layer.
            tail: ``top`` or ``low``.
            units: which units, in the order wanted; all by default.

        Raises:
            StoreDamaged: a block of an index or zone file fails its checksum.
        """
        parts = [source.lists(layer, tail, units) for source in self._sources]
        if not parts:
            count = self.spec.columns if units is None else len(units)
            parts = [_no_lists(self.spec, count)]
        return join_lists(parts, self.spec.dtype, tail)

    def segment_bounds(self, layer: int, units: Units | None = None) -> SegmentBounds:
        """Extremes of a layer's units in every segment.

        Args:
            layer: the layer.
            units: which units, in the order wanted; all by default.

        Raises:
            StoreDamaged: a block of an index or zone file fails its checksum.
        """
        count = self.spec.columns if units is None else len(units)
        parts = [source.bounds(layer, units) for source in self._sources]
        empty = np.empty((count, 4, 0), self.spec.dtype.keys)
        bounds = np.concatenate([empty, *parts], axis=2)[:, :, self._order]
        return SegmentBounds(self.segments, *(bounds[:, number] for number in range(4)))

    @cached_property
    def ordinary_rows(self) -> int:
        """Ordinary rows of the segments: each is a value or a NaN of any one unit.

        Raises:
            StoreDamaged: a block of an index or zone file fails its checksum.
        """
        counts = [source.counts(0, 0) for source in self._sources]
        return sum(int(values + nan) for values, _, nan in counts)

    def statistics(self, layer: int) -> UnitStatistics:
        """Counts and moments of every unit of a layer over ordinary rows.

        Raises:
            StoreDamaged: a block of an index or zone file fails its checksum.
        """
        moments, counts = self._moments(layer)
        return UnitStatistics.from_moments(moments, counts)


def open_unit_index(reader: StoreReader, array: DescribedUnits) -> UnitIndex:
    """The index of an array over the segments that the reader sees.

    The compacted file that covers most of them is used; the rest is folded from zone
    files when it is asked for.

    Raises:
        StoreDamaged: the compacted file is malformed.
    """
    coverage = array_coverage(reader, array)
    file = newest_index_file(reader.root, array.spec, coverage)
    covered = set(file.segments) if file else set()
    rest = [segment for segment in array.segments if segment not in covered]

    def moments(layer: int) -> Moments:
        if file is not None and file.coverage.is_beginning_of(coverage):
            return fold_moments(array, rest, layer, file.moments(layer))
        return fold_moments(array, array.segments, layer)

    sources: list[_Source] = [file] if file else []
    if rest:
        sources.append(_Fold(array, rest))
    return UnitIndex(array.spec, sources, moments)


class _Fold:
    """Segments that no compacted file covers, folded when a layer is asked for."""

    def __init__(self, array: DescribedUnits, segments: list[int]) -> None:
        self._array = array
        self.segments = segments
        self._cache = ByteCache()

    def lists(self, layer: int, tail: Tail, units: Units | None) -> UnitLists:
        index = self._layer(layer)
        lists = index.top if tail == "top" else index.low
        return lists if units is None else lists.take(units)

    def bounds(self, layer: int, units: Units | None) -> npt.NDArray[np.signedinteger]:
        bounds = self._layer(layer).bounds
        return bounds if units is None else bounds[units]

    def counts(self, layer: int, unit: int) -> npt.NDArray[np.int64]:
        files = (self._array.zones(segment) for segment in self.segments)
        total: npt.NDArray[np.int64] = sum(
            (file.row("counts", layer, unit).astype(np.int64) for file in files),
            np.zeros(3, np.int64),
        )
        return total

    def _layer(self, layer: int) -> LayerIndex:
        return self._cache.get(str(layer), lambda: fold_layer(self._array, self.segments, layer))


def _no_lists(spec: UnitGrid, units: int) -> UnitLists:
    return UnitLists(
        np.empty((units, 0), spec.dtype.keys),
        np.empty((units, 0), np.int64),
        np.zeros(units, np.int64),
        np.ones(units, bool),
    )
