"""What a search ranks: the values of a scalar in a store, with whatever bounds they have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived import DerivedScalar, Product, Source
from actstore.query.derived.post_norms import rescaled_source
from actstore.query.scalar_indexes import find_index
from actstore.query.value_readers import DerivedValues, ProductValues, StoredValues, ValueReader
from actstore.query.zone_transforms import (
    Combination,
    CombinedUnits,
    CombinedValues,
    NormalisedValues,
    NormalisedZones,
)
from actstore.query.zoned import ProductBounds, ZonedValues, ZoneMapped
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.index_spec import ZONES
from actstore.store.latent_reader import LatentArray
from actstore.store.reader import DescribedUnits, StoredArray
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["Normalisation", "Scored", "score"]


class Normalisation(StrEnum):
    """What makes the values of units comparable; over ordinary rows."""

    MAX = "max"
    """Divided by the unit's greatest magnitude."""
    STD = "std"
    """Less the unit's mean, divided by its standard deviation."""


@dataclass(frozen=True)
class Scored:
    """The values that a search ranks.

    Attributes:
        store: the open store.
        declared: the scalar.
        values: reads them.
        zoned: their bounds; None where only a scan can find the best.
        latents: layer -> latents that the store keeps, of a scalar that is such a latent.
        bounded_by: what the bounds are of, for people.
        members: units that make one score.
    """

    store: "OpenStore"
    declared: DerivedScalar
    values: ValueReader
    zoned: ZonedValues | None
    latents: dict[int, LatentArray]
    bounded_by: str
    members: int = 1

    @property
    def source(self) -> str:
        """Where the values come from, for people."""
        return self.values.source

    def normalised(self, how: Normalisation) -> "Scored":
        """The values in units of each unit's own.

        Raises:
            InvalidInput: the store has no statistics of the scalar's units.
        """
        scale = _Scales(self.store, self.declared, how)
        if self.zoned is None:
            return replace(self, values=NormalisedValues(self.values, scale), latents={})
        zones = NormalisedZones(self.zoned, scale)
        return replace(self, values=zones.reader, zoned=zones, latents={})

    def combined(self, pairs: Sequence[tuple[int, int]], how: Combination) -> "Scored":
        """One score per row for a group of units."""
        if self.zoned is None:
            values: ValueReader = CombinedValues(self.values, pairs, how)
            return replace(self, values=values, latents={}, members=len(pairs))
        zones = CombinedUnits(self.zoned, pairs, how)
        return replace(self, values=zones.reader, zoned=zones, latents={}, members=len(pairs))


def score(store: "OpenStore", declared: DerivedScalar, few_units: bool = False) -> Scored:
    """The values of a scalar, with the best bounds that the store has for them.

    Args:
        store: the open store.
        declared: the scalar.
        few_units: whether few units of a layer are asked for, so that a copy by column is
            worth reading.

    Raises:
        Unavailable: an array of it has fewer committed segments than the store.
        InvalidInput: it is of latents, and the store has no such autoencoders, or several.
    """
    make = partial(Scored, store, declared, latents=store.latent_arrays(declared))
    own = find_index(store.sources, declared, store.config_of(declared), ZONES)
    scaled = rescaled_source(declared, store.sources.dimensions)
    array = _stored(store, scaled)
    if array is not None:
        c = partial(store.coefficients, declared)
        copy = store.reader.column_copies.get(_place(array)) if few_units else None
        values: ValueReader = StoredValues(array, c, copy)
        if own is None and array.spec.has_zones:
            zones = ZoneMapped(array, store.unit_index(array), c, values)
            return make(values=values, zoned=zones, bounded_by=f"zone map of {array.spec.key}")
    elif (factors := _factors(store, declared)) is not None:
        left, right = (StoredValues(one, partial(_ones, one)) for one in factors)
        values = ProductValues(left, right)
        if own is None and all(one.spec.has_zones for one in factors):
            a, b = (
                ZoneMapped(one, store.unit_index(one), partial(_ones, one), reader)
                for one, reader in zip(factors, (left, right), strict=True)
            )
            names = " and ".join(one.spec.key for one in factors)
            product = ProductBounds(a, b, values)
            return make(values=values, zoned=product, bounded_by=f"interval of {names}")
    else:
        values = DerivedValues(store, declared)
    if own is None:
        return make(values=values, zoned=None, bounded_by="nothing")
    zones = ZoneMapped(own, store.unit_index(own), partial(_ones, own), values)
    return make(values=values, zoned=zones, bounded_by=f"index {own.spec.key}")


def _place(array: StoredArray) -> tuple[ActivationLocationType, PassType]:
    return array.spec.location, array.spec.pass_type


def _ones(described: DescribedUnits, _: int) -> npt.NDArray[np.float64]:
    return np.ones(described.spec.columns)


def _stored(store: "OpenStore", source: Source | None) -> StoredArray | None:
    """The stored array that a source is; None where it is none that can be read by page.

    Raises:
        Unavailable: the array's set has fewer committed segments than the store.
    """
    if source is None or not isinstance(source.of, ActivationLocationType):
        return None
    place = (source.of, source.pass_type)
    if place not in store.reader.arrays or source.of.is_pair_shaped:
        return None
    array = store.reader.array(*place)
    if array.segments != store.reader.segments:
        raise Unavailable(
            f"{array.spec.key} has {len(array.segments)} of {len(store.reader.segments)} committed "
            "segments: a ranking would miss the others. Finish its set with `actstore ingest`.",
            kind=ErrorKind.NOT_STORED,
        )
    return array


def _factors(store: "OpenStore", declared: DerivedScalar) -> tuple[StoredArray, StoredArray] | None:
    """The two stored arrays that a value is the product of; None where it is not that."""
    if not isinstance(declared.dependence, Product) or len(declared.sources) != 2:
        return None
    left, right = (_stored(store, source) for source in declared.sources)
    if left is None or right is None or left.spec.chunk_width != right.spec.chunk_width:
        return None
    return left, right


class _Scales:
    """Centre and scale of every unit, layer by layer, read once."""

    def __init__(self, store: "OpenStore", declared: DerivedScalar, how: Normalisation) -> None:
        self._how = how
        self._known: dict[int, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
        scored = score(store, declared)
        if not isinstance(scored.zoned, ZoneMapped):
            raise InvalidInput(
                f"{declared.name} has no statistics of its units to normalise by. Build them with "
                f"`actstore index {store.path} {declared.name}`.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        self._zones = scored.zoned

    def __call__(self, layer: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        if layer not in self._known:
            self._known[layer] = self._read(layer)
        return self._known[layer]

    def _read(self, layer: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        if self._how is Normalisation.STD:
            mean, variance = self._zones.moments(layer)
            scale = np.sqrt(variance)
            centre = mean
        else:
            bounds = self._zones.segment_bounds(layer, np.arange(len(self._zones)), False)
            with np.errstate(invalid="ignore"):
                high = np.where(bounds.filled, bounds.maximum, -np.inf).max(1, initial=-np.inf)
                low = np.where(bounds.filled, bounds.minimum, np.inf).min(1, initial=np.inf)
            scale = np.maximum(np.abs(high), np.abs(low)).astype(np.float64)
            centre = np.zeros(len(scale))
        # A unit that is constant, or beyond measure, has no scale.
        return centre, np.where(np.isfinite(scale) & (scale > 0), scale, np.nan)
