"""Building the index of derived scalars: every value is derived once, described, and let go.

A segment's values are the canonical ones that ``derive`` gives, a layer at a time, described as the
zone files of arrays describe stored values. Running it again goes on where the last run
stopped, and completes segments that were ingested since.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.query.choices import require_rankable
from actstore.query.derived import DerivedScalar
from actstore.query.opening import OpenStore
from actstore.query.scalar_indexes import arrays_of, fingerprint, has_gradients
from actstore.query.scored import score
from actstore.query.value_readers import ValueReader
from actstore.store.commits import commit_path, lock_segment, read_commits
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.index_sets import publish_index_segment, publish_index_set
from actstore.store.index_spec import HISTOGRAM, INDEX_PARTS, ZONES, IndexSpec
from actstore.store.manifest import SetRecord
from actstore.store.plan import SegmentPlan
from actstore.store.publishing import BASE_SET
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact
from actstore.store.unit_buffer import UnitBuffer
from actstore.store.vocabulary import PassType
from actstore.store.zones import describe_units

__all__ = ["BuiltIndex", "build_indexes"]

Progress = Callable[[str, int, int], None]

_NAME_DIGITS = 8
_MOST_UNITS = 2**20
_CELLS_AT_ONCE = 2**22


@dataclass(frozen=True)
class BuiltIndex:
    """What a run did for one index.

    Attributes:
        scalar: what it is of.
        set: the set's name.
        parts: what it holds.
        segments: segments that it has now.
        written: segments that this run wrote.
        values: values that this run derived.
        bytes: bytes of the files that this run wrote.
    """

    scalar: str
    set: str
    parts: tuple[str, ...]
    segments: int
    written: int
    values: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)


def build_indexes(
    path: str | Path,
    scalars: Iterable[str | DerivedScalar],
    *,
    parts: Sequence[str] | None = None,
    pass_type: str = "forward",
    objective: str | None = None,
    progress: Progress | None = None,
) -> list[BuiltIndex]:
    """Index derived scalars over a store's committed segments, a set each.

    From then on ``topk`` of such a scalar reads lists or a few pages instead of every value,
    and its units have statistics and histograms.

    Args:
        path: the store's directory.
        scalars: by name, or declarations.
        parts: ``zones`` (zone maps, lists, moments) and ``histogram``. By default both, without
            zones where the scalar has those of a stored array already.
        pass_type: ``backward`` for the gradient of the objective with respect to them.
        objective: whose gradients are read, of several; the store's default otherwise.
        progress: called with ``index``, values done and values in all.

    Returns:
        What was done, by scalar.

    Raises:
        InvalidInput: an unknown scalar, one over pairs of tokens, or one about a node.
        StoreConflict: a set of that name holds something else.
        Unavailable: the store cannot derive a scalar.
        IngestStopped: the disk is full, read-only or failing.
    """
    with OpenStore(path, objective=objective) as store:
        store.require_committed()
        store.reader.blobs.sweep()
        declared = [store.scalar(name, pass_type) for name in scalars]
        if not declared:
            raise _invalid("No scalar is given; name one at least.")
        specs = [_spec(store, one, parts) for one in declared]
        for one in declared:
            _require_derivable(store, one)
        records = [publish_index_set(store.reader.blobs, spec) for spec in specs]
        total = sum(_values_left(store, record) for record in records)
        done = 0

        def advance(values: int) -> None:
            nonlocal done
            done += values
            if progress is not None:
                progress("index", done, total)

        built = [
            _complete(store, one, record, advance)
            for one, record in zip(declared, records, strict=True)
        ]
    # A run that was stopped after its last segment left this to the next one.
    with closing(StoreReader(path)) as reader:
        compact(reader)
    return built


def _spec(store: OpenStore, declared: DerivedScalar, parts: Sequence[str] | None) -> IndexSpec:
    require_rankable(declared)
    if declared.is_pair_shaped or declared.is_flattened:
        raise _invalid(
            f"{declared.name} has a value for every pair of tokens; an index is of units over "
            "tokens. Rank it with `layers`, `heads` or `where`."
        )
    shape = store.unit_shape(declared)
    if int(np.prod(shape)) > _MOST_UNITS:
        raise _invalid(
            f"{declared.name} has {int(np.prod(shape)):,} values per token and layer; an index is "
            f"of at most {_MOST_UNITS:,}."
        )
    if parts is None:
        has_zones = score(store, declared).bounded_by.startswith("zone map")
        parts = (HISTOGRAM,) if has_zones else (ZONES, HISTOGRAM)
    given = {parts} if isinstance(parts, str) else set(parts)
    held = tuple(part for part in INDEX_PARTS if part in given) + tuple(
        sorted(map(str, given - set(INDEX_PARTS)))
    )
    own = fingerprint(store.sources, declared, store.config_of(declared))
    # What holds something else is another set.
    kind = held[0] if len(held) == 1 else "index"
    digits = own[:_NAME_DIGITS]
    return IndexSpec(
        scalar=declared.name,
        pass_type=PassType.BACKWARD if declared.name.endswith("_gradient") else PassType.FORWARD,
        layers=store.n_layers if declared.has_layers else None,
        unit_shape=shape,
        segment_rows=store.reader.segment_rows,
        set_name=f"{kind}-{declared.name}-{digits}",
        parts=held,
        fingerprint=own,
        made_from=arrays_of(store.sources, declared),
        objective=store.reader.objective if has_gradients(declared) else None,
    )


def _require_derivable(store: OpenStore, declared: DerivedScalar) -> None:
    """Fail before a set's record is published, not after."""
    values = score(store, declared).values
    segment = store.reader.segments[0]
    for layer in store.layers_of(declared)[:1]:
        values.block(segment, layer, 0, 1, [0])


# The segments


def _values_left(store: OpenStore, record: SetRecord) -> int:
    (spec,) = record.indexes
    return sum(
        commit.rows * spec.columns * spec.layer_count
        for segment, commit in store.reader.commits[BASE_SET].items()
        if not store.reader.blobs.exists(commit_path(record.name, segment))
    )


def _complete(
    store: OpenStore,
    declared: DerivedScalar,
    record: SetRecord,
    advance: Callable[[int], None],
) -> BuiltIndex:
    (spec,) = record.indexes
    blobs = store.reader.blobs
    values = score(store, declared).values
    written = derived = size = 0
    for segment in store.reader.segments:
        path = commit_path(record.name, segment)
        if blobs.exists(path):
            continue
        plan = store.reader.segment(segment)
        with lock_segment(store.path, record.name, segment) as is_ours:
            # Looked at again: another process may have finished it since.
            if is_ours and not blobs.exists(path):
                layers = set(store.layers_of(declared))
                sections = _describe(spec, values, plan, layers, advance)
                hashed = store.reader.plan_of(segment).hash
                commit = publish_index_segment(blobs, record, hashed, plan, sections)
                written += 1
                derived += plan.n_rows * spec.columns * len(layers)
                size += sum(entry.size for entry in commit.files)
            else:
                advance(plan.n_rows * spec.columns * spec.layer_count)
    return BuiltIndex(
        scalar=declared.name,
        set=record.name,
        parts=spec.parts,
        segments=len(read_commits(blobs, record.name)),
        written=written,
        values=derived,
        bytes=size,
    )


def _describe(
    spec: IndexSpec,
    values: ValueReader,
    plan: SegmentPlan,
    layers: set[int],
    advance: Callable[[int], None],
) -> dict[str, npt.NDArray[Any]]:
    """The sections of a segment's file, described a layer at a time."""
    described: list[dict[str, npt.NDArray[Any]]] = []
    of_layer = replace(spec, layers=None)
    for layer in range(spec.layer_count):
        buffer = UnitBuffer(of_layer, plan.n_rows)
        if layer in layers:
            _fill(buffer, values, plan, layer)
        else:
            # The scalar does not exist there: no row has a value.
            buffer.chunks[...] = spec.dtype.fill
        described.append(describe_units(buffer, plan.special, spec.parts))
        advance(plan.n_rows * spec.columns)
    return {name: np.concatenate([part[name] for part in described]) for name in described[0]}


def _fill(buffer: UnitBuffer, values: ValueReader, plan: SegmentPlan, layer: int) -> None:
    for start, stop in values.extents(plan.number, plan.n_rows, _CELLS_AT_ONCE):
        buffer.put(0, start, values.block(plan.number, layer, start, stop))


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
