"""Reading every byte of a store against its checksum."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crc32c import crc32c

from actstore.store.blobs import TEMPORARY_MARK, LocalBlobs
from actstore.store.commits import read_commits
from actstore.store.errors import ActstoreError, ErrorKind, StoreDamaged
from actstore.store.manifest import MANIFEST, FileEntry, read_manifest, read_sets
from actstore.store.plan import Plan
from actstore.store.plan_record import PLAN_FOLDER, RECORD_FILE
from actstore.store.publishing import metadata_files
from actstore.store.records import decode_record
from actstore.store.sections import SectionFile
from actstore.store.selfcheck import FOLDER as SELFCHECK_FOLDER

__all__ = ["Finding", "VerifyReport", "verify_store"]

_PIECE = 8 * 2**20


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
        temporary: files of writers that are at work or died; never read, harmless.
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
    report.temporary = sorted(key for key in present if TEMPORARY_MARK in key)
    present -= set(report.temporary)
    checks: dict[str, Callable[[], int]] = {}
    for path, check in _expected(blobs, present, report):
        checks.setdefault(path, check)
    for number, (path, check) in enumerate(sorted(checks.items())):
        if progress is not None:
            progress(number, len(checks))
        if path not in present:
            report.findings.append(Finding(path, "missing", "a record names it"))
            continue
        try:
            report.bytes += check()
            report.files += 1
        except ActstoreError as error:
            report.findings.append(Finding(path, "damaged", str(error)))
    named = {finding.path for finding in report.findings}
    report.findings += [
        Finding(path, "unknown", "no record names it")
        for path in sorted(present - set(checks) - named)
    ]
    report.findings.sort(key=lambda finding: finding.path)
    return report


def _expected(
    blobs: LocalBlobs, present: set[str], report: VerifyReport
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Every file that the records answer for, with its check."""
    yield MANIFEST, lambda: _record(blobs, MANIFEST)
    segment_rows = 0
    try:
        manifest = read_manifest(blobs)
        segment_rows = manifest.segment_rows
        yield from _entries(blobs, manifest.files)
    except StoreDamaged as error:
        report.findings.append(Finding(MANIFEST, "damaged", str(error)))
        # Without it nobody can say which model files belong here.
        for path in present:
            if path.startswith("model/"):
                yield path, lambda: 0
    segments = 0
    for folder in sorted(
        {"/".join(k.split("/")[:2]) for k in present if k.startswith(PLAN_FOLDER)}
    ):
        path = f"{folder}/{RECORD_FILE}"
        yield path, lambda path=path: _record(blobs, path)  # type: ignore[misc]
        try:
            plan = Plan.open(blobs.root, folder)
        except ActstoreError as error:
            report.findings.append(Finding(path, "damaged", str(error)))
            continue
        segments = max(segments, plan.first_segment + plan.n_segments)
        yield from _entries(blobs, plan.files)
    yield from _sets(blobs, present, report, segment_rows, segments)
    for path in sorted(present):
        folder, _, name = path.rpartition("/")
        if folder == "catalog" and name.endswith(".json"):
            yield path, lambda path=path: _record(blobs, path)  # type: ignore[misc]
            try:
                fields = decode_record(blobs.read(path), path)
                yield from _entries(blobs, [FileEntry.from_json(e) for e in fields["files"]])
            except StoreDamaged:
                yield path.replace(".json", ".duckdb"), lambda: 0
        elif folder == SELFCHECK_FOLDER and name.endswith(".json"):
            yield path, lambda path=path: _record(blobs, path)  # type: ignore[misc]
        elif folder.startswith("zones/") and name.startswith("index-"):
            yield path, lambda path=path: _sections(blobs, path)  # type: ignore[misc]


def _sets(
    blobs: LocalBlobs,
    present: set[str],
    report: VerifyReport,
    segment_rows: int,
    segments: int,
) -> Iterator[tuple[str, Callable[[], int]]]:
    if not segment_rows:
        return
    for path in sorted(key for key in present if key.startswith("commits/")):
        yield path, lambda path=path: _record(blobs, path)  # type: ignore[misc]
    try:
        sets = read_sets(blobs, segment_rows)
    except StoreDamaged:
        return
    for name, record in sets.items():
        for path, data in metadata_files(record, segments).items():
            yield path, lambda path=path, data=data: _same(blobs, path, data)  # type: ignore[misc]
        folder = f"commits/{name}/"
        for key in sorted(k for k in present if k.startswith(folder) and k != record.path):
            try:
                fields = decode_record(blobs.read(key), key)
            except StoreDamaged:
                continue
            yield from _entries(blobs, [FileEntry.from_json(e) for e in fields["files"]])
        try:
            read_commits(blobs, name)
        except StoreDamaged as error:
            report.findings.append(Finding(f"commits/{name}", "damaged", str(error)))


def _entries(
    blobs: LocalBlobs, entries: "tuple[FileEntry, ...] | list[FileEntry]"
) -> Iterator[tuple[str, Callable[[], int]]]:
    for entry in entries:
        yield entry.path, lambda entry=entry: _whole(blobs, entry)  # type: ignore[misc]


def _record(blobs: LocalBlobs, path: str) -> int:
    data = blobs.read(path)
    decode_record(data, path)
    return len(data)


def _same(blobs: LocalBlobs, path: str, expected: bytes) -> int:
    data = blobs.read(path)
    if data != expected:
        raise _damaged(path, "is not the metadata that this store's records call for")
    return len(data)


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


def _sections(blobs: LocalBlobs, path: str) -> int:
    file = SectionFile(blobs.path(path), path)
    try:
        return file.verify()
    finally:
        file.close()


def _damaged(path: str, what: str) -> StoreDamaged:
    return StoreDamaged(f"{path} {what}.", kind=ErrorKind.CHECKSUM_MISMATCH)
