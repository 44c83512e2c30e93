"""A store opened for reading: the committed segments at that moment, and nothing else."""

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actstore.store.blobs import LocalBlobs
from actstore.store.commits import CommitRecord, read_commits
from actstore.store.errors import ErrorKind, StoreDamaged, Unavailable
from actstore.store.layout import ArraySpec
from actstore.store.manifest import SetRecord, read_manifest, read_sets, replaced_arrays
from actstore.store.plan import Plan, SegmentPlan, load_plans
from actstore.store.sections import SectionFile
from actstore.store.shards import Descriptors, ShardReader
from actstore.store.vocabulary import ActivationLocationType, PassType
from actstore.store.zones import zone_attributes

__all__ = ["StoreReader", "StoredArray"]

_T = TypeVar("_T")


class _Cache:
    """Least-recently-used values under string keys; safe among threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                found: _T = self._values[key]
                return found
        value = make()
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value


class StoredArray:
    """One array of an open store: verified values and verified zone maps.

    Attributes:
        spec: shape, dtype and places.
        segments: committed segment numbers, ascending.
    """

    def __init__(self, spec: ArraySpec, store: "StoreReader", commits: dict[int, CommitRecord]):
        self.spec = spec
        self.segments = sorted(commits)
        self._commits = commits
        self._store = store
        self.reader = ShardReader(spec, store.files, self.rows_of, self._checksums)

    def rows_of(self, segment: int) -> int:
        """Filled rows of a committed segment.

        Raises:
            Unavailable: the segment is not committed.
        """
        return self._commit(segment).rows

    def _commit(self, segment: int) -> CommitRecord:
        if segment not in self._commits:
            raise Unavailable(
                f"Segment {segment} of {self.spec.key} is not committed: its rows are missing. "
                "Run the same `actstore ingest` again to finish it.",
                kind=ErrorKind.NOT_STORED,
            )
        return self._commits[segment]

    def zones(self, segment: int) -> SectionFile:
        """The segment's zone maps, lists and statistics; every read is verified."""
        path = self.spec.zone_path(segment)
        file = self._store.section_file(path)
        if file.attributes != zone_attributes(self.spec, segment, self._commit(segment).plan):
            raise StoreDamaged(
                f"{path} is the zone file of something else: {file.attributes}. "
                "Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return file

    def _checksums(self, segment: int, layer: int) -> npt.NDArray[np.uint32]:
        return self._store.cache.get(
            (self.spec.key, segment, layer),
            lambda: self.zones(segment).row("checksums", layer),
        )


class StoreReader:
    """A store opened for reading.

    Args:
        path: the store's directory.

    Raises:
        NotAStore: there is no store, or its format is newer.
        StoreDamaged: a record or a plan fails its checksum.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path)
        self.blobs = LocalBlobs(self.root)
        self.manifest = read_manifest(self.blobs)
        self.sets: dict[str, SetRecord] = read_sets(self.blobs, self.manifest.segment_rows)
        # Records before plans: a plan is published before any record that names it.
        commits = {name: read_commits(self.blobs, name) for name in self.sets}
        # A further set may be ahead of the base; without the base its rows are not there yet.
        base = commits.get("base", {})
        self.commits = {
            name: {segment: record for segment, record in records.items() if segment in base}
            for name, records in commits.items()
        }
        self.plans: list[Plan] = load_plans(self.root)
        self._check_plans()
        self.files = Descriptors(self.root)
        self.cache = _Cache(4096)
        self._section_files = _Cache(256)
        self.arrays: dict[tuple[ActivationLocationType, PassType], StoredArray] = {}
        replaced = replaced_arrays(self.sets)
        for name, record in self.sets.items():
            for spec in record.arrays:
                if spec.key in replaced:
                    continue
                array = StoredArray(spec, self, self.commits[name])
                self.arrays[spec.location, spec.pass_type] = array

    def _check_plans(self) -> None:
        """Every committed segment must have the plan that fixed its rows."""
        plans = {plan.hash: plan for plan in self.plans}
        for record in (record for records in self.commits.values() for record in records.values()):
            plan = plans.get(record.plan)
            index = -1 if plan is None else record.segment - plan.first_segment
            if plan is None or not 0 <= index < plan.n_segments:
                raise StoreDamaged(
                    f"{record.path} belongs to plan {record.plan[:12]}, which is missing or does "
                    "not hold it. Run `actstore verify`.",
                    kind=ErrorKind.MISSING_FILE,
                )

    @property
    def segment_rows(self) -> int:
        """S, the token rows of a segment."""
        return self.manifest.segment_rows

    @cached_property
    def segments(self) -> list[int]:
        """Committed segments of the base set, ascending."""
        return sorted(self.commits.get("base", {}))

    @cached_property
    def planned_segments(self) -> int:
        """Segments of all plans."""
        return sum(plan.n_segments for plan in self.plans)

    def section_file(self, path: str) -> SectionFile:
        """An opened checked file, kept for the next read."""
        return self._section_files.get((path,), lambda: SectionFile(self.root / path, path))

    def segment(self, number: int) -> SegmentPlan:
        """The rows, sequences and batches of a segment, from its plan."""
        return self.cache.get(("segment", number), lambda: self.plan_of(number).segment(number))

    def plan_of(self, segment: int) -> Plan:
        """The plan that fixed a segment.

        Raises:
            Unavailable: no plan has such a segment.
        """
        for plan in self.plans:
            if plan.first_segment <= segment < plan.first_segment + plan.n_segments:
                return plan
        raise Unavailable(
            f"There is no segment {segment}; the plans have {self.planned_segments}.",
            kind=ErrorKind.UNKNOWN_ROW,
        )

    def array(
        self, location: ActivationLocationType, pass_type: PassType = PassType.FORWARD
    ) -> StoredArray:
        """A stored array.

        Raises:
            Unavailable: the location is not stored; the message says what is.
        """
        try:
            return self.arrays[location, pass_type]
        except KeyError:
            stored = ", ".join(sorted(array.spec.key for array in self.arrays.values()))
            raise Unavailable(
                f"{location}/{pass_type} is not stored here. Stored: {stored}. "
                f"Ingest it with `--locations {location}` into another store.",
                kind=ErrorKind.NOT_STORED,
            ) from None

    def close(self) -> None:
        """Release the open files."""
        self.files.close()
