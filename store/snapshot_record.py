"""The records of snapshots: which commit records a database holds, and what its bytes must be.

A record stands beside its database: ``<name>.json`` answers for ``<name>.duckdb``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crc32c import crc32c

from actstore.store.blobs import TEMPORARY_MARK, LocalBlobs
from actstore.store.coverage import Coverage
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.manifest import FileEntry
from actstore.store.records import decode_record, encode_record

__all__ = [
    "SCHEMA",
    "SnapshotRecord",
    "damaged_snapshot",
    "encode_snapshot_record",
    "file_entry",
    "file_pieces",
    "read_snapshot_record",
    "snapshot_records",
]

SCHEMA = 3
"""The form of the tables. Raise it whenever :mod:`actstore.store.tables` changes what it makes."""

_PIECE = 8 * 2**20


class SnapshotRecord(NamedTuple):
    """What a snapshot's record says.

    Attributes:
        path: the record's own path.
        coverage: the commit records that the tables hold.
        entry: the database's path, size and checksum.
        schema: the form of the tables; anything in a record of another version.
    """

    path: str
    coverage: Coverage
    entry: FileEntry
    schema: Any


def snapshot_records(blobs: LocalBlobs, folder: str) -> list[str]:
    """The paths of the records in a folder, whose name ends in a slash or is empty."""
    names = (path.name for path in blobs.path(folder).glob("*.json"))
    return sorted(f"{folder}{name}" for name in names if TEMPORARY_MARK not in name)


def encode_snapshot_record(coverage: Coverage, entry: FileEntry) -> bytes:
    """The bytes of the record of a database of this version's tables."""
    fields = {"coverage": coverage.to_json(), "schema": SCHEMA, "files": [entry.to_json()]}
    return encode_record(fields)


def read_snapshot_record(blobs: LocalBlobs, path: str) -> SnapshotRecord:
    """Read and verify a record.

    Raises:
        StoreDamaged: it is missing, fails its checksum, or is not the record of that snapshot.
    """
    fields = decode_record(blobs.read(path), path)
    try:
        coverage = Coverage.from_json(fields["coverage"])
        (entry,) = (FileEntry.from_json(one) for one in fields["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_snapshot(path, "is not the record of a snapshot") from error
    if path != f"{entry.path.removesuffix('.duckdb')}.json" or coverage.hash not in path:
        raise damaged_snapshot(path, "holds the record of another snapshot")
    return SnapshotRecord(path, coverage, entry, fields.get("schema"))


def file_entry(blobs: LocalBlobs, path: str) -> FileEntry:
    """The size and checksum of a file."""
    size = checksum = 0
    for piece in file_pieces(blobs.path(path)):
        size += len(piece)
        checksum = crc32c(piece, checksum)
    return FileEntry(path, size, checksum)


def file_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, 8 MiB at a time."""
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def damaged_snapshot(path: str, what: str) -> StoreDamaged:
    """The error of a snapshot that is not what its record or name promises."""
    return StoreDamaged(
        f"{path} {what}. Run `actstore compact` to make it again.",
        kind=ErrorKind.CHECKSUM_MISMATCH,
    )
