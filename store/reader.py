"""A store opened for reading: the committed segments at that moment, and nothing else."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from actstore.store.blobs import LocalBlobs
from actstore.store.commits import CommitRecord, read_commits
from actstore.store.errors import ErrorKind, StoreDamaged, Unavailable
from actstore.store.layout import ArraySpec
from actstore.store.manifest import SetRecord, read_manifest, read_sets, replaced_arrays
from actstore.store.plan import Plan, SegmentPlan, load_plans
from actstore.store.records import canonical_json
from actstore.store.sections import SectionFile
from actstore.store.shards import Descriptors, ShardReader
from actstore.store.unit_grid import UnitGrid
from actstore.store.vocabulary import ActivationLocationType, PassType
from actstore.store.zones import zone_attributes

__all__ = ["DescribedUnits", "StoreReader", "StoredArray"]

_T = TypeVar("_T")

_CHECKSUMS_AT_ONCE = 8192
"""Block checksums read together: 32 KiB, which a disk gives as fast as one page."""


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


class _LayerChecksums:
    """The checksums of one layer of a segment, read as far as they are looked up.

    Args:
        zones: opens the segment's zone file, which is not kept open here.
        layer: the layer.
    """

    def __init__(self, zones: Callable[[], SectionFile], layer: int) -> None:
        self._zones = zones
        self._shape = zones().shape("checksums")[1:]
        self._first = layer * prod(self._shape)
        self._table = np.empty(prod(self._shape), np.uint32)
        self._read = np.zeros(-(-len(self._table) // _CHECKSUMS_AT_ONCE), bool)

    def __getitem__(
        self, place: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
    ) -> npt.NDArray[np.uint32]:
        """Checksums at row chunks, column chunks and blocks that broadcast together."""
        _, columns, blocks = self._shape
        index = (place[0] * columns + place[1]) * blocks + place[2]
        parts = np.unique(index // _CHECKSUMS_AT_ONCE)
        for part in parts[~self._read[parts]].tolist():
            low = part * _CHECKSUMS_AT_ONCE
            high = min(low + _CHECKSUMS_AT_ONCE, len(self._table))
            self._table[low:high] = self._zones().slice(
                "checksums", self._first + low, self._first + high
            )
            # Set last: another thread may read the part as well, but not look up too early.
            self._read[part] = True
        found: npt.NDArray[np.uint32] = self._table[index]
        return found


class DescribedUnits:
    """Units whose values are described segment by segment, in verified files.

    Attributes:
        spec: how many units, and how their rows are cut.
        segments: committed segment numbers, ascending.
    """

    def __init__(
        self, spec: UnitGrid, store: "StoreReader", commits: dict[int, CommitRecord]
    ) -> None:
        self.spec = spec
        self.segments = sorted(commits)
        self._commits = commits
        self._store = store

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


class StoredArray(DescribedUnits):
    """One array of an open store: verified values and verified zone maps.

    Attributes:
        spec: shape, dtype and places.
        reader: its values.
    """

    spec: ArraySpec

    def __init__(
        self, spec: ArraySpec, store: "StoreReader", commits: dict[int, CommitRecord]
    ) -> None:
        super().__init__(spec, store, commits)
        self.reader = ShardReader(spec, store.files, self.rows_of, self._checksums)

    def digest(self, segment: int) -> str:
        """Sha256 of what the segment's commit record says of its shards: other bytes, another.

        Raises:
            Unavailable: the segment is not committed.
        """
        paths = {self.spec.shard_path(shard, segment) for shard in range(self.spec.shards)}
        entries = [one.to_json() for one in self._commit(segment).files if one.path in paths]
        return hashlib.sha256(canonical_json(sorted(entries))).hexdigest()

    def _checksums(self, segment: int, layer: int) -> npt.NDArray[np.uint32]:
        table = self._store.cache.get(
            (self.spec.key, segment, layer),
            lambda: _LayerChecksums(partial(self.zones, segment), layer),
        )
        # The shard reader only looks places up, which a table read by need does as an array does.
        return cast("npt.NDArray[np.uint32]", table)


class StoreReader:
    """A store opened for reading.

    Args:
        path: the store's directory.
        objective: name of the objective whose gradients ``arrays`` holds. By default that of
            the base set, or of the set with most segments committed, the first by name.

    Attributes:
        arrays: location and pass -> array. All backward arrays here are gradients of one
            objective, so that nobody multiplies those of two; :meth:`array_of` has the others.
        objective: that objective's name; None where no set has gradients.

    Raises:
        NotAStore: there is no store, or its format is newer.
        StoreDamaged: a record or a plan fails its checksum.
        Unavailable: no set has gradients of ``objective``.
    """

    def __init__(self, path: str | Path, *, objective: str | None = None) -> None:
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
        self._set_arrays = self._open_sets()
        self.objective = self._chosen_objective(objective)
        self.arrays: dict[tuple[ActivationLocationType, PassType], StoredArray] = {}
        for arrays in self._set_arrays.values():
            for place, array in arrays.items():
                if array.spec.objective in (None, self.objective):
                    self.arrays.setdefault(place, array)

    def _open_sets(
        self,
    ) -> dict[str, dict[tuple[ActivationLocationType, PassType], StoredArray]]:
        """Every array that is read, by set: the base, then the most complete, then by name."""
        replaced = replaced_arrays(self.sets)
        return {
            name: {
                (spec.location, spec.pass_type): StoredArray(spec, self, self.commits[name])
                for spec in self.sets[name].arrays
                if spec.key not in replaced
            }
            for name in sorted(self.sets, key=lambda n: (n != "base", -len(self.commits[n]), n))
        }

    def _chosen_objective(self, wanted: str | None) -> str | None:
        if wanted is None:
            return next(iter(self.objectives.values()), None)
        if wanted not in self.objectives.values():
            known = ", ".join(dict.fromkeys(self.objectives.values())) or "none"
            raise Unavailable(
                f"No gradients of {wanted} are stored here. Objectives stored: {known}. Add them "
                f"with `actstore ingest --set NAME --objective '{wanted}'`.",
                kind=ErrorKind.NOT_STORED,
            )
        return wanted

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
    def committed_rows(self) -> int:
        """Filled rows of the committed segments."""
        return sum(record.rows for record in self.commits.get("base", {}).values())

    @cached_property
    def planned_segments(self) -> int:
        """Segments of all plans."""
        return sum(plan.n_segments for plan in self.plans)

    @cached_property
    def objectives(self) -> Mapping[str, str]:
        """Set -> what its backward arrays are the gradients of; the default's set first."""
        return {
            name: objective
            for name in self._set_arrays
            if (objective := self.sets[name].objective) is not None
        }

    @cached_property
    def indexes(self) -> Mapping[str, DescribedUnits]:
        """Set -> index of a derived scalar, whether or not it still speaks of what is stored."""
        return {
            name: DescribedUnits(spec, self, self.commits[name])
            for name, record in sorted(self.sets.items())
            for spec in record.indexes
        }

    @cached_property
    def column_copies(self) -> Mapping[tuple[ActivationLocationType, PassType], StoredArray]:
        """Location and pass -> copy by column of the array that is read there.

        Only those that hold every committed segment, each made from the very bytes that are there
        now.
        """
        found: dict[tuple[ActivationLocationType, PassType], StoredArray] = {}
        for name, record in sorted(self.sets.items()):
            for spec in record.copies:
                place = (spec.location, spec.pass_type)
                of, records = self.arrays.get(place), self.commits[name]
                if of is None or of.spec.key != spec.copy_of or sorted(records) != of.segments:
                    continue
                if all(records[one].statistics == of.digest(one) for one in of.segments):
                    found.setdefault(place, StoredArray(spec, self, records))
        return found

    @property
    def every_described(self) -> list[DescribedUnits]:
        """All that is described by unit: arrays of all sets, and indexes of derived scalars."""
        described = [*self.every_array, *self.indexes.values()]
        return [one for one in described if one.spec.has_zones or one.spec.has_histogram]

    @property
    def every_array(self) -> list[StoredArray]:
        """The arrays of all sets, gradients of every objective among them."""
        return [array for arrays in self._set_arrays.values() for array in arrays.values()]

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

    def array_of(
        self,
        set_name: str,
        location: ActivationLocationType,
        pass_type: PassType = PassType.BACKWARD,
    ) -> StoredArray:
        """An array of one set, whatever the objective of :attr:`arrays` is.

        Raises:
            Unavailable: there is no such set, or it has no such array.
        """
        found = self._set_arrays.get(set_name, {}).get((location, pass_type))
        if found is None:
            stored = ", ".join(
                f"{name}: {array.spec.key}"
                for name, arrays in self._set_arrays.items()
                for array in arrays.values()
            )
            raise Unavailable(
                f"Set {set_name!r} has no {location}/{pass_type} here. Stored: {stored}.",
                kind=ErrorKind.NOT_STORED,
            )
        return found

    def close(self) -> None:
        """Release the open files."""
        self.files.close()
