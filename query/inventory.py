"""What a store holds, in numbers and for people."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from actstore.query.rows import RowMap
from actstore.query.sources import Sources
from actstore.store.latent_reader import LatentSet, open_latent_sets
from actstore.store.reader import StoreReader
from actstore.store.vocabulary import FORWARD_LOCATIONS, ActivationLocationType, PassType

__all__ = ["LatentSetInfo", "LocationInfo", "StoreInfo", "list_locations", "summarise"]


@dataclass(frozen=True)
class LocationInfo:
    """Where the values of one location come from.

    Attributes:
        name: the location; ``<location>/backward`` for its gradient.
        kind: ``stored``, ``reconstructed``, ``needs a model`` or ``not obtainable``.
        source: the same with dtype or inputs, for people.
        axes: axes after ``layer`` and ``token``.
        meaning: one line.
        dtype: of the stored values; None unless stored.
        retention: ``raw``, ``index`` or ``none``.
        bytes: committed shard bytes.
        segments: committed segments.
        measured_error: worst difference of a row from an independent forward pass, relative
            to the row's largest magnitude; None before a self-check.
        steps: recipes that follow one another from stored values to it: what having it
            costs. 0 for a stored one; None for one that cannot be had, and for gradients.
        inputs_error: the worst measured error of the stored arrays that it is made from.
    """

    name: str
    kind: str
    source: str
    axes: tuple[str, ...]
    meaning: str
    dtype: str | None
    retention: str
    bytes: int
    segments: int
    measured_error: float | None
    steps: int | None
    inputs_error: float | None


@dataclass(frozen=True)
class LatentSetInfo:
    """A set of latents of autoencoders.

    Attributes:
        name: the set.
        location: what its autoencoders read.
        autoencoders: layer -> name, as it was given.
        latents: layer -> how many.
        segments: committed segments.
        bytes: of the latents and the autoencoders.
    """

    name: str
    location: str
    autoencoders: Mapping[int, str]
    latents: Mapping[int, int]
    segments: int
    bytes: int


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds.

    Attributes:
        path: the store's directory.
        id: hash of model and config.
        model: the model's name.
        architecture: its family.
        layers: its blocks.
        tokens, tokens_planned: committed and planned token rows.
        sequences, documents: committed sequences, and documents with one at least.
        segments_committed, segments_planned: units of commit.
        segment_rows: rows of a segment.
        missing: ranges (first, last) of planned segments that are not committed.
        coverage: set -> committed segments.
        objectives: set -> what its gradients are of; ``locations`` has the first one's.
        latents: the sets of latents of autoencoders, by name.
        locations: the stored ones, by name.
    """

    path: str
    id: str
    model: str
    architecture: str
    layers: int
    tokens: int
    tokens_planned: int
    sequences: int
    documents: int
    segments_committed: int
    segments_planned: int
    segment_rows: int
    missing: tuple[tuple[int, int], ...]
    coverage: Mapping[str, int]
    objectives: Mapping[str, str]
    latents: Mapping[str, LatentSetInfo]
    locations: Mapping[str, LocationInfo]

    @property
    def is_complete(self) -> bool:
        """Whether every planned segment is committed."""
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)


def list_locations(reader: StoreReader, sources: Sources) -> dict[str, LocationInfo]:
    """All forward locations in the order of the forward pass, then stored gradients."""
    retention = {
        label: kept for record in reader.sets.values() for label, kept in record.retention.items()
    }
    gradients = [
        location for location, pass_type in reader.arrays if pass_type is PassType.BACKWARD
    ]
    return {
        entry.name: entry
        for pass_type, locations in (
            (PassType.FORWARD, list(FORWARD_LOCATIONS)),
            (PassType.BACKWARD, gradients),
        )
        for location in locations
        for entry in [_describe(reader, sources, location, pass_type, retention)]
    }


def _describe(
    reader: StoreReader,
    sources: Sources,
    location: ActivationLocationType,
    pass_type: PassType,
    retention: Mapping[str, str],
) -> LocationInfo:
    array = reader.arrays.get((location, pass_type))
    forward = pass_type is PassType.FORWARD
    size = 0
    if array is not None:
        size = sum(
            array.spec.shard_bytes(shard, array.rows_of(segment))
            for segment in array.segments
            for shard in range(array.spec.shards)
        )
    return LocationInfo(
        name=location.label if forward else f"{location}/{pass_type}",
        kind=sources.kind(location, pass_type),
        source=sources.describe(location, pass_type),
        axes=tuple(str(axis) for axis in location.axes),
        meaning=location.meaning,
        dtype=array.spec.dtype.value if array is not None else None,
        retention=retention.get(location.label, "none") if array is None or forward else "raw",
        bytes=size,
        segments=len(array.segments) if array is not None else 0,
        measured_error=sources.errors.get(array.spec.key) if array is not None else None,
        steps=sources.steps(location) if forward else None,
        inputs_error=sources.inputs_error(location) if forward else None,
    )


def summarise(reader: StoreReader, rows: RowMap, sources: Sources) -> StoreInfo:
    """Count what is committed and what is planned."""
    manifest = reader.manifest
    committed = set(reader.segments)
    return StoreInfo(
        path=str(reader.root),
        id=manifest.id,
        model=str(manifest.model["name"]),
        architecture=sources.model.architecture.name,
        layers=sources.n_layers,
        tokens=sum(record.rows for record in reader.commits.get("base", {}).values()),
        tokens_planned=sum(plan.counts.tokens for plan in reader.plans),
        sequences=len(rows.committed_sequences),
        documents=rows.n_committed_documents,
        segments_committed=len(committed),
        segments_planned=reader.planned_segments,
        segment_rows=reader.segment_rows,
        missing=_ranges(n for n in range(reader.planned_segments) if n not in committed),
        coverage={name: len(commits) for name, commits in reader.commits.items()},
        objectives=dict(reader.objectives),
        latents={name: _describe_set(found) for name, found in open_latent_sets(reader).items()},
        locations={
            name: entry
            for name, entry in list_locations(reader, sources).items()
            if entry.kind == "stored"
        },
    )


def _describe_set(found: LatentSet) -> LatentSetInfo:
    layers = found.layers.items()
    return LatentSetInfo(
        name=found.name,
        location=found.location,
        autoencoders={layer: str(array.spec.settings["name"]) for layer, array in layers},
        latents={layer: array.n_latents for layer, array in layers},
        segments=len(found.segments),
        bytes=found.bytes,
    )


def _ranges(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Consecutive numbers as (first, last)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return tuple(ranges)
