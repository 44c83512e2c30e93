"""Snapshots: one read-only DuckDB file with everything that SQL asks about.

A snapshot is made from committed segments and named by the records it covers:
``catalog/<coverage>.duckdb`` with a record beside it, ``catalog/<coverage>.json``, that
answers for its bytes. A reader takes the one that covers all it has seen. Where the
store has none, the reader makes its own in the user's cache, or in memory when the store
is small: opening never writes to the store. A snapshot whose tables have another form
(:data:`SCHEMA`) is passed over, and made anew by compaction.

Compaction keeps the newest alone. Older snapshots and index files are removed once the
new ones are published: whoever has one open keeps its file, and a reader that comes too
late makes its own.
"""

import errno
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb

from actstore.store.blobs import (
    TEMPORARY_MARK,
    LocalBlobs,
    missing_file,
    write_failed,
    writer_id,
)
from actstore.store.commits import lock_segment, read_commits
from actstore.store.coverage import Coverage
from actstore.store.errors import StoreDamaged, WriteFailed
from actstore.store.index_file import index_paths, publish_index, read_index_coverage
from actstore.store.manifest import FileEntry
from actstore.store.publishing import publish_file
from actstore.store.reader import StoreReader
from actstore.store.snapshot_record import (
    SCHEMA,
    SnapshotRecord,
    damaged_snapshot,
    encode_snapshot_record,
    file_entry,
    file_pieces,
    read_snapshot_record,
    snapshot_records,
)
from actstore.store.tables import fill_tables

__all__ = ["SCHEMA", "CompactionResult", "Snapshot", "compact", "newest_snapshot", "open_snapshot"]

CHECKED_BYTES = 256 * 2**20
"""Snapshots up to this size are checked whole when opened; DuckDB checks its blocks always."""

MEMORY_ROWS = 2**17
"""Stores up to this many rows get their snapshot in memory when they have none on disk."""

_FOLDER = "catalog"
_HASH_DIGITS = 12
_LOCK_SECONDS = 300


@dataclass(frozen=True)
class Snapshot:
    """An open snapshot.

    Attributes:
        connection: read-only SQL; nothing outside the database can be reached from it.
        coverage: the commit records that the tables hold.
        place: where the database is.
        path: its file; None in memory.
    """

    connection: duckdb.DuckDBPyConnection
    coverage: Coverage
    place: Literal["store", "cache", "memory"]
    path: Path | None


@dataclass(frozen=True)
class CompactionResult:
    """What compaction left behind.

    Attributes:
        coverage: hash of the records that the files cover.
        indexes: the index files, one for each array with zone maps.
        snapshot: the snapshot's file; None when nothing is committed.
        removed: older files that these ones supersede.
    """

    coverage: str
    indexes: tuple[str, ...]
    snapshot: str | None
    removed: tuple[str, ...]


def open_snapshot(reader: StoreReader) -> Snapshot:
    """A snapshot of everything that the reader sees, opened for reading.

    Taken from the store if one there covers everything; else from the user's cache
    (``XDG_CACHE_HOME/actstore/<store id>-<first plan>/<coverage>-<schema>.duckdb``), made
    there when missing; else, for a small store or an unwritable cache, made in memory.

    Raises:
        StoreDamaged: the snapshot, or a file that one is made from, fails its checksum.
    """
    coverage = Coverage.of_sets(reader.commits)
    found = newest_snapshot(reader)
    if found is not None and found[0] == coverage:
        connection = _connect_unless_gone(found[1])
        if connection is not None:
            return Snapshot(connection, coverage, "store", found[1])
    rows = sum(record.rows for record in reader.commits.get("base", {}).values())
    if rows > MEMORY_ROWS:
        try:
            path = _cached(reader, coverage)
            connection = _connect_unless_gone(path)
            if connection is not None:
                return Snapshot(connection, coverage, "cache", path)
        except WriteFailed:
            pass
    connection = duckdb.connect(":memory:", config=_options())
    fill_tables(connection, reader)
    return Snapshot(connection, coverage, "memory", None)


def newest_snapshot(reader: StoreReader) -> tuple[Coverage, Path] | None:
    """The store's snapshot that covers most of what the reader sees, verified.

    Returns:
        Its coverage and its file; None when the store has none that the reader may use.

    Raises:
        StoreDamaged: the snapshot or its record fails its checksum.
    """
    return _newest(reader.blobs, f"{_FOLDER}/", Coverage.of_sets(reader.commits))


def compact(reader: StoreReader) -> CompactionResult:
    """Publish the index of every array and the snapshot of what the reader sees.

    Doing it again changes nothing. What is there and damaged is made anew: these files
    follow from the committed segments.

    Raises:
        StoreDamaged: a file that they are made from fails its checksum.
        WriteFailed: the disk is full, read-only or failing.
    """
    coverage = Coverage.of_sets(reader.commits)
    if not len(coverage):
        return CompactionResult(coverage.hash, (), None, ())
    with _compaction_lock(reader.root) as is_alone:
        published = [publish_index(reader, array) for array in reader.every_described]
        indexes = tuple(path for path in published if path is not None)
        name = f"{_FOLDER}/{coverage.hash}"
        snapshot = _publish_snapshot(reader, reader.blobs, name, coverage)
        # A database that another process has just published may be about to get its record.
        removed = _remove_superseded(reader, coverage, indexes) if is_alone else []
    return CompactionResult(coverage.hash, indexes, snapshot, tuple(removed))


@contextmanager
def _compaction_lock(root: Path) -> Iterator[bool]:
    """Wait for the processes that compact this store; yields False when one takes too long."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        with ExitStack() as stack:
            try:
                is_ours = stack.enter_context(lock_segment(root, "compaction", 0))
            except OSError as error:
                raise write_failed(root, error) from error
            if is_ours or time.monotonic() > deadline:
                yield is_ours
                return
        time.sleep(0.1)


def _cached(reader: StoreReader, coverage: Coverage) -> Path:
    """The snapshot in the user's cache, made if it is not there or not sound."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    # Stores of one model and config share an id; what they hold begins with the first plan.
    first_plan = reader.plans[0].hash[:_HASH_DIGITS]
    blobs = LocalBlobs(base / "actstore" / f"{reader.manifest.id}-{first_plan}")
    try:
        found = _newest(blobs, "", coverage)
    except StoreDamaged:
        found = None
    if found is not None and found[0] == coverage:
        return found[1]
    path = _publish_snapshot(reader, blobs, f"{coverage.hash}-{SCHEMA}", coverage)
    _remove_narrower(blobs, coverage)
    return blobs.path(path)


def _newest(blobs: LocalBlobs, folder: str, committed: Coverage) -> tuple[Coverage, Path] | None:
    best: SnapshotRecord | None = None
    for path in snapshot_records(blobs, folder):
        try:
            record = read_snapshot_record(blobs, path)
        except StoreDamaged:
            # Compaction may remove what was listed: whoever finds nothing makes its own.
            if blobs.exists(path):
                raise
            continue
        is_wider = best is None or len(record.coverage) > len(best.coverage)
        is_usable = record.schema == SCHEMA and record.coverage.is_within(committed)
        if is_wider and is_usable and blobs.exists(record.entry.path):
            best = record
    if best is None:
        return None
    try:
        _verify(blobs, best.entry)
    except StoreDamaged:
        if blobs.exists(best.entry.path) and blobs.exists(best.path):
            raise
        return None
    return best.coverage, blobs.path(best.entry.path)


def _verify(blobs: LocalBlobs, entry: FileEntry) -> None:
    try:
        size = blobs.path(entry.path).stat().st_size
        found = file_entry(blobs, entry.path) if size <= CHECKED_BYTES else entry
    except FileNotFoundError as error:
        raise missing_file(entry.path) from error
    if size != entry.size:
        raise damaged_snapshot(entry.path, f"has {size} bytes, not {entry.size}")
    if found != entry:
        raise damaged_snapshot(entry.path, f"fails its checksum {entry.crc32c:08x}")


def _publish_snapshot(reader: StoreReader, blobs: LocalBlobs, name: str, coverage: Coverage) -> str:
    """Publish a snapshot and its record, unless they are there, sound and of our schema."""
    path, record = f"{name}.duckdb", f"{name}.json"
    if blobs.exists(record):
        if _is_current(blobs, record):
            return path
        blobs.delete(path)
        blobs.delete(record)
    # A database without a record is whole: its writer died, or is about to write the record.
    entry = file_entry(blobs, path) if blobs.exists(path) else _build(reader, blobs, path)
    blobs.publish(record, [encode_snapshot_record(coverage, entry)])
    return path


def _is_current(blobs: LocalBlobs, path: str) -> bool:
    try:
        record = read_snapshot_record(blobs, path)
        _verify(blobs, record.entry)
    except StoreDamaged:
        return False
    return bool(record.schema == SCHEMA)


def _build(reader: StoreReader, blobs: LocalBlobs, path: str) -> FileEntry:
    """Fill a database under a temporary name and publish it under ``path``."""
    name = f"{path}{TEMPORARY_MARK}{writer_id()}-{uuid.uuid4().hex}"
    temporary = blobs.path(name)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = duckdb.connect(str(temporary), config=_options())
            try:
                fill_tables(connection, reader)
                connection.execute("CHECKPOINT")
            finally:
                connection.close()
            return publish_file(blobs, path, file_pieces(temporary))
        finally:
            for suffix in ("", ".wal"):
                temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
    except duckdb.IOException as error:
        full = "space" in str(error).lower()
        cause = OSError(errno.ENOSPC if full else errno.EIO, str(error))
        raise write_failed(blobs.path(path), cause) from error
    except WriteFailed:
        raise
    except OSError as error:
        raise write_failed(blobs.path(path), error) from error


def _remove_superseded(
    reader: StoreReader, coverage: Coverage, indexes: tuple[str, ...]
) -> list[str]:
    """Delete derived files that the new ones make superfluous; list them.

    A file that covers a record nobody has any more goes too; one that covers more than we
    have seen belongs to a later compaction and stays.
    """
    blobs = reader.blobs
    committed = Coverage.of_sets({name: read_commits(blobs, name) for name in reader.sets})
    removed = _remove_snapshots(blobs, coverage, committed)
    for array in reader.every_described:
        for path in index_paths(reader.root, array.spec):
            try:
                stays = _stays(read_index_coverage(reader.root, path), coverage, committed)
            except StoreDamaged:
                stays = False
            if path not in indexes and not stays:
                blobs.delete(path)
                removed.append(path)
    return removed


def _remove_narrower(blobs: LocalBlobs, coverage: Coverage) -> None:
    """Delete the cached snapshots of our schema that a new one makes superfluous.

    A wider one, one of other commits or of another version may be some other reader's.
    """
    for path in snapshot_records(blobs, ""):
        try:
            found = read_snapshot_record(blobs, path)
        except StoreDamaged:
            continue
        is_ours = found.schema == SCHEMA and found.coverage.is_within(coverage)
        if is_ours and found.coverage != coverage:
            blobs.delete(found.entry.path)
            blobs.delete(path)


def _remove_snapshots(blobs: LocalBlobs, coverage: Coverage, committed: Coverage) -> list[str]:
    folder = f"{_FOLDER}/"
    removed: list[str] = []
    kept = {f"{folder}{coverage.hash}.json"}
    for record in snapshot_records(blobs, folder):
        try:
            if _stays(read_snapshot_record(blobs, record).coverage, coverage, committed):
                kept.add(record)
        except StoreDamaged:
            continue
    names = {path.name for path in blobs.path(folder).glob("*.duckdb")}
    databases = {f"{folder}{name}" for name in names}
    wanted = {f"{record.removesuffix('.json')}.duckdb" for record in kept}
    # The record first: a killed run then leaves a database that nobody names, and no damage.
    for path in [*sorted(set(snapshot_records(blobs, folder)) - kept), *sorted(databases - wanted)]:
        blobs.delete(path)
        removed.append(path)
    return removed


def _stays(found: Coverage, new: Coverage, committed: Coverage) -> bool:
    return found.is_within(committed) and not found.is_within(new)


def _connect(path: Path) -> duckdb.DuckDBPyConnection:
    try:
        return duckdb.connect(str(path), read_only=True, config=_options())
    except duckdb.Error as error:
        raise damaged_snapshot(path.name, f"cannot be opened: {error}") from error


def _connect_unless_gone(path: Path) -> duckdb.DuckDBPyConnection | None:
    """A connection; None when the file was removed since it was found."""
    try:
        return _connect(path)
    except StoreDamaged:
        if path.exists():
            raise
        return None


def _options() -> dict[str, Any]:
    """Settings that leave SQL nothing but the database, and no file beside it."""
    return {
        "enable_external_access": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "python_enable_replacements": False,
        # By default a large sort would spill into a folder next to the database.
        "temp_directory": str(Path(tempfile.gettempdir()) / f"actstore-sql-{os.getpid()}"),
        "lock_configuration": True,
    }
