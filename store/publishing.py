"""Publishing a segment: shards, zone files, the part, and the commit record last.

What is on disk decides. A name that is taken keeps its bytes, and everything computed
afterwards (zone maps, lists, statistics, checksums) is computed from those; so two
writers of one segment, or a writer that comes back late, end with one consistent store.

Values are described in threads while their shards are on the way to the disk. If it turns out
that another writer's shard is there already, its layers are described once more.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import LocalBlobs, Part
from actstore.store.commits import CommitRecord, publish_commit
from actstore.store.compression import MISSING_CHUNK
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.layout import (
    TOKEN_ID_FILL,
    array_metadata,
    group_metadata,
    token_id_metadata,
)
from actstore.store.manifest import FileEntry, SetRecord
from actstore.store.parts import encode_part, part_path
from actstore.store.plan import SegmentPlan
from actstore.store.sections import SectionFile, encode_sections
from actstore.store.shard_file import parse_shard, shard_parts
from actstore.store.shards import SegmentBuffer
from actstore.store.zones import SegmentDescription, zone_attributes

__all__ = [
    "commit",
    "metadata_files",
    "publish_file",
    "publish_metadata",
    "publish_segment",
    "segment_files",
    "token_id_path",
    "token_rows",
]

BASE_SET = "base"
"""The set that ingest writes first; parts and ``token_id`` are among its files."""

_SLICE = 4 * 2**20

_MOST_THREADS = 8
"""Threads that describe a segment; each holds 10 MB or so, and 22 MB where all values tie."""


def publish_segment(
    blobs: LocalBlobs,
    set_record: SetRecord,
    plan_hash: str,
    segment_plan: SegmentPlan,
    buffers: Mapping[str, SegmentBuffer],
    threads: int | None = None,
) -> CommitRecord:
    """Publish everything a segment of a set consists of, the commit record last.

    Args:
        blobs: the store.
        set_record: the set; an array of it that another set replaces has no buffer.
        plan_hash: hash of the plan that fixed the segment's rows.
        segment_plan: the segment's rows.
        buffers: ``ArraySpec.key`` -> the segment's values. Where a shard was on disk before,
            its bytes replace the buffer's.
        threads: threads that describe the values while they are written, up to one per
            processor by default. The files are the same for any number.

    Returns:
        The record that is now published, by this call or by an earlier writer.

    Raises:
        WriteFailed: the disk is full, read-only or failing; nothing was committed.
        StoreDamaged: a file under one of the segment's names is not what its name promises.
    """
    segment = segment_plan.number
    specs = [spec for spec in set_record.arrays if spec.key in buffers]
    pool = ThreadPoolExecutor(threads or _default_threads(), "actstore-describer")
    try:
        descriptions = {
            spec.key: SegmentDescription(buffers[spec.key], segment_plan.special, pool)
            for spec in specs
        }
        # All that needs no description comes first: the disk is not to wait for it.
        entries = {
            spec.key: [
                _publish_shard(blobs, buffers[spec.key], shard, segment, descriptions[spec.key])
                for shard in range(spec.shards)
            ]
            for spec in specs
        }
        others: list[FileEntry] = []
        if set_record.name == BASE_SET:
            parts = _token_id_parts(segment_plan.token_ids, set_record.arrays[0].segment_rows)
            others.append(_publish(blobs, token_id_path(segment), parts)[0])
            others.append(_publish(blobs, part_path(segment), [encode_part(segment_plan)])[0])
        digest = hashlib.sha256()
        for spec in specs:
            attributes = zone_attributes(spec, segment, plan_hash)
            sections = descriptions.pop(spec.key).sections()
            entry, sections = _publish_zones(blobs, spec.zone_path(segment), sections, attributes)
            entries[spec.key].append(entry)
            _add_statistics(digest, spec.key, sections)
    finally:
        # After a failed write nobody waits for the rest.
        pool.shutdown(cancel_futures=True)
    files = [entry for spec in specs for entry in entries[spec.key]] + others
    record = CommitRecord(
        set=set_record.name,
        segment=segment,
        plan=plan_hash,
        rows=segment_plan.n_rows,
        files=tuple(files),
        statistics=digest.hexdigest(),
    )
    return commit(blobs, record)


def commit(blobs: LocalBlobs, record: CommitRecord) -> CommitRecord:
    """Publish a commit record, or find that an earlier writer published the same.

    Raises:
        WriteFailed: the disk is full, read-only or failing.
        StoreDamaged: the record that is there describes other files.
    """
    if publish_commit(blobs, record):
        return record
    existing = CommitRecord.decode(blobs.read(record.path), record.path)
    if existing != record:
        raise StoreDamaged(
            f"{record.path} was committed before and does not describe the files on disk. "
            "Run `actstore verify`.",
            kind=ErrorKind.MALFORMED_FILE,
        )
    return existing


def token_id_path(segment: int) -> str:
    """The shard of ``arrays/token_id`` that holds a segment."""
    return f"arrays/token_id/c.{segment}"


def segment_files(set_record: SetRecord, segment: int) -> set[str]:
    """The paths of all that a segment of a set consists of, but its commit record."""
    stored = [*set_record.arrays, *set_record.copies]
    paths = {spec.zone_path(segment) for spec in stored}
    paths |= {spec.zone_path(segment) for spec in set_record.indexes}
    paths |= {set_record.latent_path(spec.layer, segment) for spec in set_record.latents}
    for spec in stored:
        paths |= {spec.shard_path(shard, segment) for shard in range(spec.shards)}
    if set_record.name == BASE_SET:
        paths |= {token_id_path(segment), part_path(segment)}
    return paths


def metadata_files(set_record: SetRecord, segments: int) -> dict[str, bytes]:
    """Every ``zarr.json`` that a set answers for, by path.

    Args:
        set_record: the set.
        segments: segments of all plans: the length of the token axis in segments.
    """
    stored = [*set_record.arrays, *set_record.copies]
    files = {"arrays/zarr.json": group_metadata()} if stored else {}
    for spec in stored:
        files[f"arrays/{spec.location.label}/zarr.json"] = group_metadata()
        files[f"arrays/{spec.key}/zarr.json"] = array_metadata(spec, segments)
    if set_record.name == BASE_SET:
        rows = set_record.arrays[0].segment_rows
        files["arrays/token_id/zarr.json"] = token_id_metadata(rows, segments)
    return files


def publish_file(blobs: LocalBlobs, path: str, parts: Iterable[Part]) -> FileEntry:
    """Publish one file, or keep the one under its name; describe what is there now."""
    return _publish(blobs, path, parts)[0]


def publish_metadata(blobs: LocalBlobs, set_record: SetRecord, segments: int) -> None:
    """Write the Zarr metadata of a set, or lengthen it; an array never gets shorter.

    Raises:
        WriteFailed: the disk is full, read-only or failing.
        StoreDamaged: a ``zarr.json`` is not JSON.
    """
    for path, data in metadata_files(set_record, segments).items():
        if not blobs.exists(path):
            blobs.publish(path, [data])
        elif token_rows(data, path) > token_rows(blobs.read(path), path):
            blobs.replace(path, data)


def _default_threads() -> int:
    # Not all systems tell which processors this process may use.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, _MOST_THREADS)


def _publish_shard(
    blobs: LocalBlobs,
    buffer: SegmentBuffer,
    shard: int,
    segment: int,
    description: SegmentDescription,
) -> FileEntry:
    """Publish a shard, or describe the one that is there instead."""
    spec = buffer.spec
    path = spec.shard_path(shard, segment)
    # Looking first saves a resumed run from writing what link would refuse.
    if not blobs.exists(path):
        parts = shard_parts(spec, shard, buffer.rows, buffer.shard(shard))
        entry, is_new = _publish(blobs, path, parts)
        if is_new:
            return entry
    data = blobs.read(path)
    description.replace(spec.shard_layers(shard), parse_shard(spec, shard, buffer.rows, data, path))
    return FileEntry(path, len(data), crc32c(data))


def _publish(blobs: LocalBlobs, path: str, parts: Iterable[Part]) -> tuple[FileEntry, bool]:
    """Publish a file; describe what is under its name now and whether it is ours."""
    written = _Measured(parts)
    if not blobs.exists(path) and blobs.publish(path, written):
        return FileEntry(path, written.size, written.checksum), True
    data = blobs.read(path)
    return FileEntry(path, len(data), crc32c(data)), False


class _Measured:
    """Parts on their way to disk, with their size and checksum so far.

    Large parts pass in slices, so that the copy to the page cache finds what the checksum
    has just brought into the processor's cache.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = parts
        self.size = 0
        self.checksum = 0

    def __iter__(self) -> Iterator[memoryview]:
        for part in self._parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _SLICE):
                piece = view[start : start + _SLICE]
                self.checksum = crc32c(piece, self.checksum)
                self.size += len(piece)
                yield piece


def _publish_zones(
    blobs: LocalBlobs,
    path: str,
    sections: dict[str, npt.NDArray[Any]],
    attributes: Mapping[str, Any],
) -> tuple[FileEntry, dict[str, npt.NDArray[Any]]]:
    """Publish a zone file; describe what is under its name now, and its sections."""
    entry, is_new = _publish(blobs, path, encode_sections(sections, attributes))
    if is_new:
        return entry, sections
    return entry, _existing_zones(blobs, path, sections["checksums"], attributes)


def _existing_zones(
    blobs: LocalBlobs,
    path: str,
    checksums: npt.NDArray[np.uint32],
    attributes: Mapping[str, Any],
) -> dict[str, npt.NDArray[Any]]:
    """The sections of a zone file that was there before, if it belongs to the shards."""
    file = SectionFile(blobs.path(path), path)
    sections = {name: file.read(name) for name in file.names}
    file.close()
    same = np.array_equal(sections.get("checksums", np.empty(0)), checksums)
    if not same or file.attributes != attributes:
        raise StoreDamaged(
            f"{path} was there before this run and does not describe its shards. "
            "Run `actstore verify`, then repair the segment.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    return sections


def _add_statistics(
    digest: "hashlib._Hash", key: str, sections: Mapping[str, npt.NDArray[Any]]
) -> None:
    for name in sorted(sections.keys() - {"checksums"}):
        digest.update(f"{key}/{name}\n".encode())
        digest.update(np.ascontiguousarray(sections[name]).reshape(-1).view(np.uint8).data)


def _token_id_parts(token_ids: npt.NDArray[Any], segment_rows: int) -> Iterator[Part]:
    """The bytes of a ``token_id`` shard: filled chunks, then Zarr's index."""
    shape = json.loads(token_id_metadata(segment_rows, 1))
    chunk = shape["codecs"][0]["configuration"]["chunk_shape"][0]
    present = -(-len(token_ids) // chunk)
    values = np.full(present * chunk, TOKEN_ID_FILL, "<i4")
    values[: len(token_ids)] = token_ids
    yield values.view(np.uint8).data
    index = np.full((segment_rows // chunk, 2), MISSING_CHUNK, "<u8")
    index[:present, 0] = np.arange(present) * 4 * chunk
    index[:present, 1] = 4 * chunk
    yield index.tobytes()
    yield crc32c(index.tobytes()).to_bytes(4, "little")


def token_rows(data: bytes, path: str) -> int:
    """Length of the token axis in a ``zarr.json``; 0 for a group.

    Raises:
        StoreDamaged: it is not Zarr metadata.
    """
    try:
        fields = json.loads(data)
        names = fields.get("dimension_names", [])
        return int(fields["shape"][names.index("token")]) if names else 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(
            f"{path} is not Zarr metadata. Run `actstore verify`.", kind=ErrorKind.MALFORMED_FILE
        ) from error
