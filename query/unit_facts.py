"""What the store says of a scalar's units: counts, moments and extremes over ordinary rows.

They are those of a stored array of which the scalar is a fixed multiple, or of its own index.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived import DerivedScalar
from actstore.query.derived.post_norms import rescaled_source
from actstore.query.scalar_indexes import find_index
from actstore.query.value_readers import derived_value
from actstore.store.errors import ErrorKind, Unavailable
from actstore.store.index_spec import ZONES
from actstore.store.keys import highest_key, key_values, lowest_key
from actstore.store.vocabulary import ActivationLocationType

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore
    from actstore.store.index import SegmentBounds, UnitIndex

__all__ = ["UnitFacts", "find_facts", "require_facts"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UnitFacts:
    """What is known of some units over ordinary rows; every array is ``(unit,)``.

    Attributes:
        count: values, NaN excluded.
        nan: NaN values.
        positive_share: share of the values above zero; NaN where it is not known.
        mean, variance, skewness, kurtosis: population moments, kurtosis 3 for a normal
            distribution; NaN where they are undefined.
        min, max: of the values.
        special_min, special_max: of special rows.
    """

    count: npt.NDArray[np.int64]
    nan: npt.NDArray[np.int64]
    positive_share: Floats
    mean: Floats
    variance: Floats
    skewness: Floats
    kurtosis: Floats
    min: Floats
    max: Floats
    special_min: Floats
    special_max: Floats


FactsOf = Callable[[int, npt.NDArray[np.int64]], UnitFacts]


def require_facts(store: "OpenStore", declared: DerivedScalar) -> tuple[FactsOf, str]:
    """What :func:`find_facts` gives, where there is something.

    Raises:
        Unavailable: the store has no statistics of the scalar.
    """
    found = find_facts(store, declared)
    if found is None:
        raise Unavailable(
            f"{store.path} has no statistics of {declared.name}. Index it with `actstore index "
            f"{store.path} {declared.name}`.",
            kind=ErrorKind.NOT_STORED,
        )
    return found


def find_facts(store: "OpenStore", declared: DerivedScalar) -> tuple[FactsOf, str] | None:
    """What gives the facts of some units of a layer, and its name; None for nothing."""
    if declared.is_pair_shaped or declared.is_flattened:
        return None
    own = find_index(store.sources, declared, store.config_of(declared), ZONES)
    if own is not None:
        ones = np.ones(own.spec.columns)
        return partial(_facts, store.unit_index(own), lambda _: ones), f"index {own.spec.key}"
    source = rescaled_source(declared, store.sources.dimensions)
    if source is None or not isinstance(source.of, ActivationLocationType):
        return None
    array = store.reader.arrays.get((source.of, source.pass_type))
    if array is None or not array.spec.has_zones or array.segments != store.reader.segments:
        return None
    factors = partial(store.coefficients, declared)
    return partial(_facts, store.unit_index(array), factors), f"zone map of {array.spec.key}"


def _facts(
    index: "UnitIndex",
    coefficients: Callable[[int], Floats],
    layer: int,
    units: npt.NDArray[np.int64],
) -> UnitFacts:
    found = index.statistics(layer)
    c = coefficients(layer)[units]
    count, positive = found.count[units], found.positive[units]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = positive / count
        # How many are zero is not known, and so neither how many are below it.
        share = np.where(c > 0, share, np.where((c == 0) & (count > 0), 0.0, np.nan))
    bounds = index.segment_bounds(layer, units)
    low, high = _extremes(index, bounds, c, special=False)
    special_low, special_high = _extremes(index, bounds, c, special=True)
    shape = c != 0
    return UnitFacts(
        count=count,
        nan=found.nan[units],
        positive_share=share,
        mean=found.mean[units] * c,
        variance=found.variance[units] * c**2,
        skewness=np.where(shape, found.skewness[units] * np.sign(c), np.nan),
        kurtosis=np.where(shape, found.kurtosis[units], np.nan),
        min=low,
        max=high,
        special_min=special_low,
        special_max=special_high,
    )


def _extremes(
    index: "UnitIndex", bounds: "SegmentBounds", c: Floats, *, special: bool
) -> tuple[Floats, Floats]:
    """Least and greatest value; NaN where there is none."""
    dtype = index.spec.dtype
    high, low = (
        (bounds.special_maximum, bounds.special_minimum)
        if special
        else (bounds.maximum, bounds.minimum)
    )
    top = high.max(axis=1, initial=lowest_key(dtype))
    bottom = low.min(axis=1, initial=highest_key(dtype))
    filled = top >= bottom
    ends = [
        derived_value(key_values(np.where(filled, keys, 0), dtype), c).astype(np.float64)
        for keys in (bottom, top)
    ]
    least, greatest = np.where(c >= 0, ends[0], ends[1]), np.where(c >= 0, ends[1], ends[0])
    return np.where(filled, least, np.nan), np.where(filled, greatest, np.nan)
