"""Where files live: a local directory behind one small interface.

Publishing never replaces. A file is written under a temporary name, synced, then
linked to its final name, and its directory is synced; so a final name appears once,
whole, and a writer that comes late finds the name taken and changes nothing.
"""

import errno
import os
import platform
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from zlib import crc32

from actstore.store.errors import ErrorKind, StoreDamaged, WriteFailed

__all__ = ["TEMPORARY_MARK", "Blobs", "LocalBlobs", "Part", "make_durable"]

Part = bytes | bytearray | memoryview
"""A piece of a file on its way to disk."""

TEMPORARY_MARK = ".partial-"
"""In the name of every file that is not published yet; such files are never read."""


class Blobs(Protocol):
    """The operations a store needs from its medium; keys are ``/``-separated paths."""

    def read(self, key: str) -> bytes:
        """The whole of a published blob."""
        ...

    def publish(self, key: str, parts: Iterable[Part]) -> bool:
        """Write ``parts`` under ``key`` unless it exists; tell whether this call did."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Swap a mutable blob (only ``zarr.json``) for another, atomically."""
        ...

    def exists(self, key: str) -> bool:
        """Whether ``key`` is published."""
        ...

    def listing(self, prefix: str = "") -> Iterator[str]:
        """All keys below the folder ``prefix``, temporary ones included, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove a blob; no error when it is not there."""
        ...


class LocalBlobs:
    """Blobs in a directory of a local file system.

    Args:
        root: the directory; made on the first write.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.root / key

    def read(self, key: str) -> bytes:
        """The whole of a published blob.

        Raises:
            StoreDamaged: there is no such file.
        """
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError as error:
            raise missing_file(key) from error

    def exists(self, key: str) -> bool:
        """Whether ``key`` is published."""
        return self.path(key).is_file()

    def publish(self, key: str, parts: Iterable[Part]) -> bool:
        """Write, sync, link, sync the directory; keep what is there already.

        Raises:
            WriteFailed: the disk is full, read-only or failing; nothing is left behind.
        """
        final = self.path(key)
        temporary = final.with_name(f"{final.name}{TEMPORARY_MARK}{writer_id()}-{uuid.uuid4().hex}")
        try:
            make_durable(final.parent)
            try:
                _write_synced(temporary, parts)
                try:
                    os.link(temporary, final)
                    is_new = True
                except FileExistsError:
                    is_new = False
                # Also for another writer's file: it may have died between link and sync, and
                # what we publish next may rest on this name.
                _sync_directory(final.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise write_failed(final, error) from error
        return is_new

    def replace(self, key: str, data: bytes) -> None:
        """Swap a mutable file for another, atomically and durably."""
        final = self.path(key)
        temporary = final.with_name(f"{final.name}{TEMPORARY_MARK}{writer_id()}-{uuid.uuid4().hex}")
        try:
            make_durable(final.parent)
            try:
                _write_synced(temporary, [data])
                temporary.rename(final)
                _sync_directory(final.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise write_failed(final, error) from error

    def listing(self, prefix: str = "") -> Iterator[str]:
        """All keys below a folder, sorted."""
        base = self.root / prefix
        found = [
            os.path.relpath(os.path.join(folder, name), self.root)
            for folder, _, names in os.walk(base)
            for name in names
        ]
        yield from sorted(key.replace(os.sep, "/") for key in found)

    def sweep(self) -> list[str]:
        """Remove the temporary files of this machine's dead writers; list them.

        Those of live processes and of other machines are left alone.
        """
        swept = []
        for key in self.listing():
            name = key.rsplit("/", 1)[-1]
            if TEMPORARY_MARK in name and _is_dead(name.split(TEMPORARY_MARK, 1)[1]):
                self.delete(key)
                swept.append(key)
        return swept

    def delete(self, key: str) -> None:
        """Remove a file; no error when it is not there."""
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise write_failed(self.path(key), error) from error


def missing_file(key: str) -> StoreDamaged:
    """The error for a file that a record names and the store lacks."""
    return StoreDamaged(
        f"{key} is missing. Run `actstore verify` to see what else is.",
        kind=ErrorKind.MISSING_FILE,
    )


def write_failed(path: Path, error: OSError) -> WriteFailed:
    """Translate an operating-system error of a write, keeping its cause."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, rule = ErrorKind.DISK_FULL, "the disk is full; make room, then run ingest again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        kind, rule = ErrorKind.READ_ONLY, "the target is not writable; choose another path"
    else:
        kind, rule = ErrorKind.WRITE_FAILED, "check the disk, then run ingest again"
    reason = error.strerror or str(error)
    return WriteFailed(
        f"Cannot write {path}: {reason}. What is committed is intact: {rule}.", kind=kind
    )


def writer_id() -> str:
    """This process, as temporary names spell it: a hash of the machine's name and the pid."""
    return f"{crc32(platform.node().encode()):08x}-{os.getpid()}"


def _is_dead(mark: str) -> bool:
    machine, process, *_ = [*mark.split("-"), "", ""]
    if machine != writer_id().split("-")[0] or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _write_synced(path: Path, parts: Iterable[Part]) -> None:
    with open(path, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def make_durable(folder: Path) -> None:
    """Make a directory; sync the parent of each one that was not there.

    Every directory of a store is made here: what is published below one later only syncs the
    names that were missing then.
    """
    made = []
    missing = folder
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    if not made:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for directory in reversed(made):
        # Outside the store a parent may be writable and yet not readable, so not syncable. And
        # another run may have removed what was empty: then whoever needs it fails, or repeats.
        with suppress(PermissionError, FileNotFoundError):
            _sync_directory(directory.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
