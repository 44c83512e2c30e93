"""The histogram of every unit of an index, wherever it is kept.

A compacted file has one record per unit; segments that it does not cover are added from
their own files, so every committed segment counts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.store.histogram_sections import (
    LayerHistograms,
    read_histograms,
    unpack_histograms,
)
from actstore.store.sections import SectionFile

if TYPE_CHECKING:
    from actstore.store.histograms import Histogram
    from actstore.store.reader import DescribedUnits, StoreReader

__all__ = ["MERGED_SECTION", "UnitHistograms", "fold_histograms", "merged_histograms"]

MERGED_SECTION = "histograms"
"""Of the compacted index, followed by a dot and the layer."""


def fold_histograms(
    described: "DescribedUnits",
    segments: Sequence[int],
    layer: int,
    beginning: LayerHistograms | None = None,
) -> LayerHistograms:
    """Add up the histograms of a layer's units over some segments.

    Args:
        described: an index that holds histograms.
        segments: which, in any order: sums do not depend on it.
        layer: the layer.
        beginning: the sum over other segments.

    Raises:
        StoreDamaged: a segment's file is missing or fails a checksum.
    """
    units = described.spec.columns
    found = LayerHistograms.empty(units) if beginning is None else beginning
    for segment in segments:
        found = found + read_histograms(described.zones(segment), layer, units)
    return found


def merged_histograms(
    file: SectionFile, layer: int, units: npt.NDArray[np.int64] | None = None
) -> LayerHistograms:
    """The histograms that a compacted file has of a layer's units, of all by default.

    Raises:
        StoreDamaged: a block of the file fails its checksum.
    """
    section = f"{MERGED_SECTION}.{layer}"
    if units is None:
        return unpack_histograms(file.read(section))
    records = [file.row(section, int(unit)) for unit in units]
    width = file.shape(section)[1]
    return unpack_histograms(np.stack(records) if records else np.empty((0, width), np.uint8))


class UnitHistograms:
    """The histograms of an index over the committed segments.

    Args:
        reader: the store.
        described: the index; it holds histograms.

    Raises:
        StoreDamaged: the compacted file is malformed.
    """

    def __init__(self, reader: "StoreReader", described: "DescribedUnits") -> None:
        from actstore.store.index_file import array_coverage, newest_index_file

        self.spec = described.spec
        self._described = described
        self._merged: SectionFile | None = None
        covered: set[int] = set()
        coverage = array_coverage(reader, described)
        newest = newest_index_file(reader.root, described.spec, coverage)
        if newest is not None:
            file = reader.section_file(newest.path)
            # One of an earlier version has none.
            if f"{MERGED_SECTION}.0" in file:
                self._merged, covered = file, set(newest.segments)
        self._rest = [segment for segment in described.segments if segment not in covered]

    def of(self, layer: int, unit: int) -> "Histogram":
        """The histogram of one unit: one verified read where the index is compacted.

        Args:
            layer: the layer, 0 for a scalar outside the blocks.
            unit: its place among the layer's units.

        Raises:
            StoreDamaged: a block of a file fails its checksum.
        """
        found = LayerHistograms.empty(1)
        if self._merged is not None:
            found = merged_histograms(self._merged, layer, np.array([unit]))
        for segment in self._rest:
            file = self._described.zones(segment)
            found = found + read_histograms(file, layer, self.spec.columns, unit)
        return found[0]

    def layer(self, layer: int) -> LayerHistograms:
        """The histograms of all units of a layer.

        Raises:
            StoreDamaged: a block of a file fails its checksum.
        """
        merged = None if self._merged is None else merged_histograms(self._merged, layer)
        return fold_histograms(self._described, self._rest, layer, merged)
