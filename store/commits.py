"""Commit records: a segment of a set is there if and only if its record is.

The record is published last, after every file it names is on disk, and holds neither
time nor host nor process, so that two writers of one segment write the same record.
Locks only save work; correctness rests on publishing without replacement.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crc32c import crc32c

from actstore.store.blobs import LocalBlobs, make_durable, write_failed
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.manifest import FileEntry
from actstore.store.records import decode_record, encode_record, well_formed

__all__ = ["CommitRecord", "lock_segment", "publish_commit", "read_commits"]

_READ_AT_ONCE = 64
_READERS = 8


@dataclass(frozen=True)
class CommitRecord:
    """What a committed segment of a set consists of.

    Attributes:
        set: the set's name.
        segment: the segment's global number.
        plan: hash of the plan that fixed its rows.
        rows: filled token rows.
        files: every file of the segment, with size and crc32c.
        statistics: sha256 of its statistics and lists.
    """

    set: str
    segment: int
    plan: str
    rows: int
    files: tuple[FileEntry, ...]
    statistics: str

    @property
    def path(self) -> str:
        """The record's path inside the store."""
        return commit_path(self.set, self.segment)

    def encode(self) -> bytes:
        """The bytes of the record."""
        return encode_record(
            {
                "set": self.set,
                "segment": self.segment,
                "plan": self.plan,
                "rows": self.rows,
                "files": [entry.to_json() for entry in self.files],
                "statistics": self.statistics,
            }
        )

    @cached_property
    def checksum(self) -> int:
        """crc32c of the record's bytes."""
        return crc32c(self.encode())

    @classmethod
    def decode(cls, data: bytes, name: str) -> "CommitRecord":
        """Parse and verify a record.

        Raises:
            StoreDamaged: it fails its checksum, is a record of another sort, or stands under a
                name that is not its own.
        """
        fields: dict[str, Any] = decode_record(data, name)
        with well_formed(name):
            record = cls(
                set=fields["set"],
                segment=fields["segment"],
                plan=fields["plan"],
                rows=fields["rows"],
                files=tuple(FileEntry.from_json(entry) for entry in fields["files"]),
                statistics=fields["statistics"],
            )
            path = record.path
        if path != name:
            raise StoreDamaged(
                f"{name} holds the record of {path}. Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        # A record has one encoding, which these bytes were just compared with.
        vars(record)["checksum"] = crc32c(data)
        return record


def commit_path(name: str, segment: int) -> str:
    """The path of a commit record."""
    return f"commits/{name}/{segment:06d}.json"


def publish_commit(blobs: LocalBlobs, record: CommitRecord) -> bool:
    """Commit a segment; False when another writer did so first."""
    return blobs.publish(record.path, [record.encode()])


def read_commits(blobs: LocalBlobs, name: str) -> dict[int, CommitRecord]:
    """The committed segments of a set at this moment, by number."""
    folder = blobs.path(f"commits/{name}")
    entries = sorted(os.listdir(folder)) if folder.is_dir() else []
    keys = [f"commits/{name}/{e}" for e in entries if e.endswith(".json") and e != "set.json"]
    records = {}
    for key, data in zip(keys, _read_all(blobs, keys), strict=True):
        record = CommitRecord.decode(data, key)
        records[record.segment] = record
    return records


def _read_all(blobs: LocalBlobs, keys: Sequence[str]) -> Iterator[bytes]:
    """Many small files, several at a time: a cold disk then has something to choose from."""
    if len(keys) <= _READ_AT_ONCE:
        yield from map(blobs.read, keys)
        return
    parts = [keys[at : at + _READ_AT_ONCE] for at in range(0, len(keys), _READ_AT_ONCE)]
    with ThreadPoolExecutor(_READERS) as pool:
        for part in pool.map(lambda part: [*map(blobs.read, part)], parts):
            yield from part


@contextmanager
def lock_segment(root: Path, name: str, segment: int) -> Iterator[bool]:
    """Hold the advisory lock of a segment; yields False when another process has it.

    Where the file system has no locks every caller gets one: work is done twice, and nothing
    else happens.

    Raises:
        WriteFailed: the disk is full, read-only or failing.
    """
    path = root / "locks" / f"{name}-{segment:06d}.lock"
    try:
        make_durable(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise write_failed(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise write_failed(path, error) from error
        try:
            yield True
        finally:
            # The lock itself goes with the descriptor; a file left behind costs nothing, while
            # an error here would hide the one that made the disk read-only.
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)
