"""Copies of stored arrays by column, for work that reads whole columns of single units.

A chunk of an array holds 32 columns, so one unit's column brings 31 others along. A copy has
chunks of one column and all rows of a segment: the same values, twice the disk. It is a set of its
own, made from verified reads, published without replacement and completed by making it again. Its
commit records name the bytes that they were made from (as their ``statistics``), so that the copy
of a segment that was ingested anew is not taken for one of what is there now.
"""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.commits import CommitRecord, commit_path, lock_segment, read_commits
from actstore.store.errors import ErrorKind, InvalidInput, StoreConflict, StoreDamaged
from actstore.store.layout import ArraySpec
from actstore.store.location_names import parse_location
from actstore.store.manifest import FileEntry, SetRecord
from actstore.store.publishing import commit, publish_file, publish_metadata, segment_files
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.sections import SectionFile, encode_sections
from actstore.store.shard_file import block_checksums, parse_shard, shard_parts
from actstore.store.shards import SegmentBuffer
from actstore.store.snapshot import compact
from actstore.store.unit_grid import PAGE_ROWS
from actstore.store.vocabulary import PassType
from actstore.store.zones import zone_attributes

__all__ = ["CopiedColumns", "copy_columns"]

Progress = Callable[[str, int, int], None]

_ROWS_AT_ONCE = 8 * PAGE_ROWS
_TILE = 256


@dataclass(frozen=True)
class CopiedColumns:
    """What a run did.

    Attributes:
        location: the array's location; ``<location>/backward`` for gradients.
        set: the copy's set.
        segments: segments that it has now.
        written: segments that this run wrote.
        bytes: bytes of the files that this run wrote.
    """

    location: str
    set: str
    segments: int
    written: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)


def copy_columns(
    path: str | Path,
    location: str,
    *,
    pass_type: str = "forward",
    objective: str | None = None,
    progress: Progress | None = None,
) -> CopiedColumns:
    """Copy a stored array by column, or complete such a copy.

    Args:
        path: the store's directory.
        location: its own or its TransformerLens name.
        pass_type: ``backward`` for the gradients of the objective.
        objective: which, of several.
        progress: called with ``columns``, values done and values in all.

    Raises:
        InvalidInput: an unknown location or pass, or one without units to copy.
        Unavailable: the location is not stored.
        StoreConflict: a set of that name holds something else.
        StoreDamaged: a block of the array fails its checksum.
        WriteFailed: the disk is full, read-only or failing.
    """
    found, layer = parse_location(location)
    if layer is not None or pass_type not in tuple(PassType):
        raise _invalid(
            f"{location!r}, {pass_type!r}: copy all layers of a location, forward or backward."
        )
    with closing(StoreReader(path, objective=objective)) as reader:
        array = reader.array(found, PassType(pass_type))
        if not array.spec.has_zones:
            raise _invalid(
                f"{array.spec.key} has no units that are read one by one, such as neurons: its "
                "rows lie together already."
            )
        reader.blobs.sweep()
        record = _publish_set(reader, array)
        (spec,) = record.copies
        publish_metadata(reader.blobs, record, reader.planned_segments)
        total = sum(array.rows_of(segment) for segment in array.segments) * spec.columns
        total *= spec.layer_count
        written = size = done = 0
        for segment in array.segments:
            if not _is_copied(reader, record, array, segment):
                with lock_segment(reader.root, record.name, segment) as is_ours:
                    # Looked at again: another process may have finished it since.
                    if is_ours and not _is_copied(reader, record, array, segment):
                        _remove_stale(reader, record, segment)
                        committed = _copy_segment(reader, record, array, segment)
                        written += 1
                        size += sum(entry.size for entry in committed.files)
            done += array.rows_of(segment) * spec.columns * spec.layer_count
            if progress is not None:
                progress("columns", done, total)
        label = found.label if pass_type == PassType.FORWARD else f"{found.label}/{pass_type}"
        segments = len(read_commits(reader.blobs, record.name))
    # Also where nothing was written: the last run may have been killed just before this.
    with closing(StoreReader(path)) as reader:
        compact(reader)
    return CopiedColumns(label, record.name, segments, written, size)


def _publish_set(reader: StoreReader, array: StoredArray) -> SetRecord:
    """The copy's set, published if it is new; it is named after what it was made from."""
    spec = array.spec
    digits = hashlib.sha256(spec.key.encode()).hexdigest()[:8]
    name = f"columns-{spec.location.label}-{digits}"
    record = SetRecord(name, (), {}, copies=(replace(spec, variant=name, copy_of=spec.key),))
    if not reader.blobs.publish(record.path, [record.encode()]):
        stored = SetRecord.decode(reader.blobs.read(record.path), record.path, spec.segment_rows)
        if stored != record:
            raise StoreConflict(
                f"Set {name!r} holds something else than a copy of {spec.key}.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )
    return record


def _is_copied(reader: StoreReader, record: SetRecord, array: StoredArray, segment: int) -> bool:
    """Whether the copy has a segment, made from the bytes that are there now."""
    where = commit_path(record.name, segment)
    if not reader.blobs.exists(where):
        return False
    found = CommitRecord.decode(reader.blobs.read(where), where)
    return found.statistics == array.digest(segment)


def _remove_stale(reader: StoreReader, record: SetRecord, segment: int) -> None:
    """Undo the copy of a segment that was ingested anew since.

    The record goes last: nobody reads what it names, and a run killed here is taken up again.
    """
    where = commit_path(record.name, segment)
    if reader.blobs.exists(where):
        for path in (*sorted(segment_files(record, segment)), where):
            reader.blobs.delete(path)


def _copy_segment(
    reader: StoreReader, record: SetRecord, array: StoredArray, segment: int
) -> CommitRecord:
    (spec,) = record.copies
    blobs, rows = reader.blobs, array.rows_of(segment)
    plan_hash = reader.plan_of(segment).hash
    files: list[FileEntry] = []
    checksums = []
    for shard in range(spec.shards):
        layers = spec.shard_layers(shard)
        path = spec.shard_path(shard, segment)
        buffer = _read_layers(spec, array, segment, layers)
        if not blobs.exists(path):
            blobs.publish(path, shard_parts(spec, shard, rows, buffer.chunks))
        # What is on disk decides, whoever wrote it.
        data = blobs.read(path)
        chunks = parse_shard(spec, shard, rows, data, path)
        if not np.array_equal(chunks.view(np.uint8), buffer.chunks.view(np.uint8)):
            raise StoreDamaged(
                f"{path} was there before this run and is no copy of {array.spec.key}. "
                "Run `actstore verify`.",
                kind=ErrorKind.CHECKSUM_MISMATCH,
            )
        files.append(FileEntry(path, len(data), crc32c(data)))
        checksums.append(block_checksums(spec, chunks))
    sections = {"checksums": np.concatenate(checksums)}
    attributes = zone_attributes(spec, segment, plan_hash)
    path = spec.zone_path(segment)
    files.append(publish_file(blobs, path, encode_sections(sections, attributes)))
    existing = SectionFile(blobs.path(path), path)
    try:
        is_ours = existing.attributes == attributes
        if not is_ours or not np.array_equal(existing.read("checksums"), sections["checksums"]):
            raise StoreDamaged(
                f"{path} was there before this run and does not describe its shards. "
                "Run `actstore verify`.",
                kind=ErrorKind.CHECKSUM_MISMATCH,
            )
    finally:
        existing.close()
    return commit(
        blobs,
        CommitRecord(
            set=record.name,
            segment=segment,
            plan=plan_hash,
            rows=rows,
            files=tuple(files),
            statistics=array.digest(segment),
        ),
    )


def _read_layers(spec: ArraySpec, array: StoredArray, segment: int, layers: range) -> SegmentBuffer:
    """Some layers of a segment by column, from verified reads of the array."""
    rows = array.rows_of(segment)
    buffer = SegmentBuffer(_of_layers(spec, len(layers)), rows)
    for number, layer in enumerate(layers):
        for start in range(0, rows, _ROWS_AT_ONCE):
            values = array.reader.window(segment, layer, start, start + _ROWS_AT_ONCE)
            # The copy's only row chunk: a column after another.
            _transpose(values, buffer.chunks[number, 0, :, start : start + len(values), 0])
    return buffer


def _transpose(values: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """Write ``(row, column)`` as ``(column, row)``, in tiles that stay in the processor's cache."""
    rows, columns = values.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = values[row : row + _TILE, column : column + _TILE]
            target[column : column + _TILE, row : row + _TILE] = tile.T


def _of_layers(spec: ArraySpec, layers: int) -> ArraySpec:
    return spec if spec.layers is None else replace(spec, layers=layers)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
