"""The table of histograms in a snapshot, filled from the indexes that hold them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actstore.store.histograms import BINS, GREATEST, LEAST
from actstore.store.index_spec import IndexSpec
from actstore.store.unit_histograms import UnitHistograms

if TYPE_CHECKING:
    from actstore.store.reader import DescribedUnits, StoreReader

__all__ = ["current_indexes", "histogram_rows"]


def current_indexes(reader: "StoreReader") -> "list[DescribedUnits]":
    """Indexes of all committed segments, one per scalar, pass and thing that they hold.

    An index that an array has been added under since may still be among them: what a
    scalar is made from is not known here.
    """
    found: dict[tuple[str, str, bool, bool], DescribedUnits] = {}
    stored = {array.spec.key for array in reader.arrays.values()} | {"token_id"}
    for index in reader.indexes.values():
        spec = index.spec
        is_sound = isinstance(spec, IndexSpec) and stored.issuperset(spec.made_from)
        if is_sound and index.segments == reader.segments:
            key = (spec.label, spec.pass_type.value, spec.has_zones, spec.has_histogram)
            found.setdefault(key, index)
    return list(found.values())


def histogram_rows(histograms: UnitHistograms, layer: int) -> dict[str, Any]:
    """One row per bin of a layer's units that holds values, ordered by unit and bin.

    ``low`` and ``high`` are the least and greatest value that the bin may hold, given the
    unit's own extremes.

    Raises:
        StoreDamaged: a block of the files fails its checksum.
    """
    found, spec = histograms.layer(layer), histograms.spec
    unit, number = np.nonzero(found.counts[:, :BINS])
    return {
        "location": pa.repeat(spec.label, len(unit)),
        "pass": pa.repeat(spec.pass_type.value, len(unit)),
        "layer": np.full(len(unit), layer),
        "unit": unit,
        "bin": number,
        "low": np.maximum(LEAST[number], found.extremes[unit, 0]),
        "high": np.minimum(GREATEST[number], found.extremes[unit, 1]),
        "count": found.counts[unit, number],
    }
