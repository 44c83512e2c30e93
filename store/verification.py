"""Reading every byte of a store against its checksum."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from crc32c import crc32c

from actstore.store.blobs import TEMPORARY_MARK, LocalBlobs
from actstore.store.commits import CommitRecord, commit_path
from actstore.store.coverage import Coverage
from actstore.store.errors import ActstoreError, ErrorKind, StoreDamaged
from actstore.store.index_file import read_index_coverage
from actstore.store.layout import PAGE_ROWS
from actstore.store.manifest import (
    LATENT_FOLDER,
    MANIFEST,
    FileEntry,
    SetRecord,
    read_manifest,
    read_sets,
)
from actstore.store.plan import Plan, load_plans
from actstore.store.plan_record import PLAN_FOLDER, RECORD_FILE, PlanRecord
from actstore.store.publishing import metadata_files, segment_files, token_rows
from actstore.store.records import decode_record, well_formed
from actstore.store.sections import SectionFile
from actstore.store.selfcheck import FOLDER as SELFCHECK_FOLDER
from actstore.store.selfcheck import SelfCheck

__all__ = ["Finding", "VerifyReport", "verify_store"]

_PIECE = 8 * 2**20
_HASH_DIGITS = 12

_Check = Callable[[], int]
"""Reads one file; returns its bytes or raises."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        path: the file, inside the store.
        problem: ``damaged``, ``missing`` or ``unknown``.
        detail: what was expected and what was found.
    """

    path: str
    problem: str
    detail: str


@dataclass
class VerifyReport:
    """What verification read and found.

    Attributes:
        files: files read.
        bytes: bytes read.
        findings: what is wrong; empty for a sound store.
        temporary: files of writers that are at work or died, committed by no record: never
            read, and adopted or swept by the next ingest.
    """

    files: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"ok": self.ok, **asdict(self)}


def verify_store(
    root: str | Path, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check every file of a store.

    A store whose ingest is at work or was killed is sound: what is not committed yet is
    listed as temporary.

    Args:
        root: the store's directory.
        progress: called with files checked and files in all.

    Returns:
        The report; a damaged file is a finding, not an error.

    Raises:
        NotAStore: there is no ``store.json``, or its format is newer.
    """
    blobs = LocalBlobs(root)
    report = VerifyReport()
    present = {key for key in blobs.listing() if not key.startswith("locks/")}
    temporary = {key for key in present if TEMPORARY_MARK in key}
    present -= temporary
    contents = _Contents(blobs, present)
    checks: dict[str, _Check] = {}
    for path, check in contents.expected():
        checks.setdefault(path, check)
    for number, (path, check) in enumerate(sorted(checks.items())):
        if progress is not None:
            progress(number, len(checks))
        try:
            report.bytes += check()
            report.files += 1
        except Exception as error:  # noqa: BLE001 - whatever a file makes us raise is a finding
            if blobs.exists(path):
                report.findings.append(Finding(path, "damaged", _detail(error)))
            # Compaction may have removed a derived file since it was listed.
            elif not (path in present and _is_derived(path)):
                report.findings.append(Finding(path, "missing", "a record names it"))
    temporary |= contents.unfinished - checks.keys()
    report.findings += [
        Finding(path, "unknown", "no record names it")
        for path in sorted(present - checks.keys() - temporary)
    ]
    if not any(finding.path.startswith(f"{PLAN_FOLDER}/") for finding in report.findings):
        # Plans may be sound one by one and not fit together.
        try:
            load_plans(root)
        except StoreDamaged as error:
            report.findings.append(Finding(PLAN_FOLDER, "damaged", str(error)))
    report.findings.sort(key=lambda finding: finding.path)
    report.temporary = sorted(temporary)
    return report


class _Contents:
    """What the records of a store say about its files.

    Args:
        blobs: the store.
        present: its published files.

    Attributes:
        unfinished: files of writers that have not published their record yet.
    """

    def __init__(self, blobs: LocalBlobs, present: set[str]) -> None:
        self._blobs = blobs
        self._present = present
        self._commits: dict[str, CommitRecord] = {}
        self._known_segments: int | None = 0
        # Any will do where the manifest cannot say: a set's record does not depend on it.
        self._segment_rows = PAGE_ROWS
        self.unfinished: set[str] = set()

    def expected(self) -> Iterator[tuple[str, _Check]]:
        """Every file that the records answer for, with its check."""
        yield MANIFEST, lambda: len(read_manifest(self._blobs).encode())
        try:
            manifest = read_manifest(self._blobs)
        except StoreDamaged:
            manifest = None
            # Without it nobody can say which model files belong here.
            self.unfinished |= self._below("model/")
        for path in sorted(self._below("commits/")):
            if not path.endswith(".json"):
                continue
            yield path, partial(self._commit, path)
            if not path.endswith("/set.json"):
                with suppress(StoreDamaged):
                    self._commits[path] = CommitRecord.decode(self._blobs.read(path), path)
        yield from self._plans()
        for record in self._commits.values():
            yield from self._entries(record.files)
        if manifest is not None:
            self._segment_rows = manifest.segment_rows
            yield from self._entries(manifest.files)
            yield from self._sets(manifest.segment_rows)
        yield from self._derived()

    def _plans(self) -> Iterator[tuple[str, _Check]]:
        named = {record.plan[:_HASH_DIGITS]: path for path, record in self._commits.items()}
        folders = {"/".join(key.split("/")[:2]) for key in self._below(f"{PLAN_FOLDER}/")}
        for folder in sorted(folders):
            path = f"{folder}/{RECORD_FILE}"
            is_named = named.pop(folder.rpartition("-")[2], None) is not None
            if path not in self._present and not is_named:
                self.unfinished |= self._below(f"{folder}/")
                continue
            yield path, partial(self._plan, path)
            try:
                plan = Plan.open(self._blobs.root, folder)
            except ActstoreError:
                self._known_segments = None
                self.unfinished |= self._below(f"{folder}/")
                with suppress(ActstoreError):
                    record = PlanRecord.decode(self._blobs.read(path), path)
                    yield from self._entries(record.files)
                continue
            if self._known_segments is not None:
                end = plan.first_segment + plan.n_segments
                self._known_segments = max(self._known_segments, end)
            yield from self._entries(plan.files)
        for digits in named:
            yield f"{PLAN_FOLDER}/*-{digits}/{RECORD_FILE}", self._absent

    def _sets(self, segment_rows: int) -> Iterator[tuple[str, _Check]]:
        for folder in {path.rpartition("/")[0] for path in self._commits}:
            yield f"{folder}/set.json", partial(self._record, f"{folder}/set.json")
        try:
            sets = read_sets(self._blobs, segment_rows)
        except StoreDamaged:
            # Nobody can say which files of latents belong here.
            self.unfinished |= self._below(f"{LATENT_FOLDER}/")
            return
        for path in self._below(f"{LATENT_FOLDER}/"):
            # A set's own files come before its record, whose entries answer for them.
            if path.split("/")[1] not in sets:
                self.unfinished.add(path)
        for record in sets.values():
            yield from self._entries([*record.files, *(spec.file for spec in record.latents)])
            committed = {c.segment for c in self._commits.values() if c.set == record.name}
            for path in metadata_files(record, 0):
                # Written before the first commit, and lengthened before those of a new plan.
                if committed or path in self._present:
                    least = max(committed, default=-1) + 1
                    yield path, partial(self._metadata, path, record, least)
            for segment in range(self._known_segments or 0):
                if segment not in committed:
                    self.unfinished |= segment_files(record, segment) & self._present

    def _derived(self) -> Iterator[tuple[str, _Check]]:
        for path in sorted(filter(_is_derived, self._present)):
            if path.startswith("zones/"):
                yield path, partial(self._index, path)
                with suppress(StoreDamaged):
                    coverage = read_index_coverage(self._blobs.root, path)
                    yield from self._covered(coverage.to_json())
            elif path.endswith(".json"):
                yield path, partial(self._derived_record, path)
                database = path.removesuffix(".json") + ".duckdb"
                try:
                    fields = decode_record(self._blobs.read(path), path)
                    with well_formed(path):
                        entries = [FileEntry.from_json(e) for e in fields.get("files", [])]
                        coverage = Coverage.from_json(fields.get("coverage", []))
                except StoreDamaged:
                    self.unfinished.add(database)
                    continue
                yield from self._entries(entries)
                yield from self._covered(coverage.to_json())
            else:
                self.unfinished.add(path)

    def _covered(self, coverage: Iterable[list[Any]]) -> Iterator[tuple[str, _Check]]:
        """The commit records that a derived file was made from must be there."""
        for name, segment, _ in coverage:
            path = commit_path(name, segment)
            yield path, partial(self._commit, path)

    def _entries(self, entries: Iterable[FileEntry]) -> Iterator[tuple[str, _Check]]:
        for entry in entries:
            yield entry.path, partial(_whole, self._blobs, entry)

    def _below(self, prefix: str) -> set[str]:
        return {key for key in self._present if key.startswith(prefix)}

    def _record(self, path: str) -> int:
        data = self._blobs.read(path)
        decode_record(data, path)
        return len(data)

    def _commit(self, path: str) -> int:
        data = self._blobs.read(path)
        if not path.endswith("/set.json"):
            CommitRecord.decode(data, path)
        else:
            SetRecord.decode(data, path, self._segment_rows)
        return len(data)

    def _plan(self, path: str) -> int:
        data = self._blobs.read(path)
        PlanRecord.decode(data, path)
        return len(data)

    def _derived_record(self, path: str) -> int:
        data = self._blobs.read(path)
        if path.startswith(f"{SELFCHECK_FOLDER}/"):
            SelfCheck.decode(data, path)
            return len(data)
        fields = decode_record(data, path)
        with well_formed(path):
            own = f"catalog/{Coverage.from_json(fields['coverage']).hash}.json"
        if path != own:
            raise _damaged(path, f"is the record that belongs under {own}")
        return len(data)

    def _index(self, path: str) -> int:
        file = SectionFile(self._blobs.path(path), path)
        try:
            attributes = file.attributes
            coverage = Coverage.from_json(attributes.get("coverage", []))
            if path != f"zones/{attributes.get('array')}/index-{coverage.hash}.sections":
                raise _damaged(path, "is the index of another array or of other segments")
            return file.verify()
        finally:
            file.close()

    def _metadata(self, path: str, record: SetRecord, least: int) -> int:
        data = self._blobs.read(path)
        rows = token_rows(data, path)
        segments = rows // (*record.arrays, *record.copies)[0].segment_rows
        expected = metadata_files(record, segments)[path]
        too_many = self._known_segments is not None and segments > self._known_segments
        if data != expected or (rows and (segments < least or too_many)):
            raise _damaged(path, "is not the metadata that this store's records call for")
        return len(data)

    def _absent(self) -> int:
        raise StoreDamaged("There is no such file.", kind=ErrorKind.MISSING_FILE)


def _is_derived(path: str) -> bool:
    """Whether a file follows from the committed segments and may be made anew."""
    folder, _, name = path.rpartition("/")
    return folder in ("catalog", SELFCHECK_FOLDER) or (
        folder.startswith("zones/") and name.startswith("index-")
    )


def _whole(blobs: LocalBlobs, entry: FileEntry) -> int:
    size = checksum = 0
    with open(blobs.path(entry.path), "rb") as file:
        while piece := file.read(_PIECE):
            checksum = crc32c(piece, checksum)
            size += len(piece)
    if size != entry.size:
        raise _damaged(entry.path, f"has {size} bytes, its record says {entry.size}")
    if checksum != entry.crc32c:
        raise _damaged(entry.path, f"has crc32c {checksum:08x}, its record {entry.crc32c:08x}")
    return size


def _detail(error: Exception) -> str:
    """What an error says; one that was not raised on purpose also names its type."""
    if isinstance(error, ActstoreError | OSError):
        return str(error)
    return f"cannot be read: {type(error).__name__}: {error}"


def _damaged(path: str, what: str) -> StoreDamaged:
    return StoreDamaged(f"{path} {what}.", kind=ErrorKind.CHECKSUM_MISMATCH)
