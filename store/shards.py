"""The shard writer and the verified byte-range reader: the hot path.

Shards are ordinary sharded Zarr v3 without compression, so the place of every value
is arithmetic (``ArraySpec``) and a read fetches just the bytes it needs. Nothing read
is trusted: every 4 KiB block is checked against the crc32c that was published with
the segment's zone maps.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import Part, missing_file
from actstore.store.compression import compressed_shard, decode_chunk, parse_index
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.layout import ArraySpec

__all__ = [
    "Descriptors",
    "SegmentBuffer",
    "ShardReader",
    "block_checksums",
    "parse_shard",
    "shard_parts",
]

_OPEN_FILES = 256


class SegmentBuffer:
    """One segment of one array in memory, already in the order of the shard file.

    Values are blocked as they arrive, so writing is one sequential copy to the disk.

    Args:
        spec: the array.
        rows: filled token rows of the segment.
    """

    def __init__(self, spec: ArraySpec, rows: int) -> None:
        self.spec = spec
        self.rows = rows
        shape = (
            spec.layer_count,
            spec.present_row_chunks(rows),
            spec.column_chunks,
            spec.chunk_rows,
            spec.chunk_width,
        )
        # An anonymous map goes back to the system when the segment is done; a heap may not.
        size = int(np.prod(shape)) * spec.dtype.storage.itemsize
        self._map = mmap.mmap(-1, max(size, 1))
        self.chunks: npt.NDArray[Any] = np.frombuffer(
            self._map, spec.dtype.storage, int(np.prod(shape))
        ).reshape(shape)
        rest = rows % spec.chunk_rows
        if rest:
            self.chunks[:, -1, :, rest:] = spec.dtype.fill
        columns = spec.columns % spec.chunk_width
        if columns:
            self.chunks[:, :, -1, :, columns:] = spec.dtype.fill

    def put(self, layer: int, first_row: int, values: npt.NDArray[Any]) -> None:
        """Place consecutive rows.

        Args:
            layer: the layer, 0 for a place outside the blocks.
            first_row: the first row, counted from the segment's start.
            values: storage dtype ``(row, *unit_shape)``.
        """
        spec = self.spec
        flat = np.ascontiguousarray(values, spec.dtype.storage).reshape(len(values), spec.columns)
        whole = spec.columns // spec.chunk_width
        width = whole * spec.chunk_width
        # Copying a block's row as one item halves the time.
        item = np.dtype((np.void, spec.chunk_width * spec.dtype.storage.itemsize))
        done = 0
        while done < len(flat):
            chunk, offset = divmod(first_row + done, spec.chunk_rows)
            count = min(len(flat) - done, spec.chunk_rows - offset)
            target = self.chunks[layer, chunk, :, offset : offset + count]
            source = flat[done : done + count]
            if whole:
                target[:whole].view(item)[:, :, 0] = source[:, :width].view(item).T
            if width < spec.columns:
                target[whole, :, : spec.columns - width] = source[:, width:]
            done += count

    def shard(self, number: int) -> npt.NDArray[Any]:
        """The chunks of one shard, ``(layer, row_chunk, column_chunk, row, column)``."""
        layers = self.spec.shard_layers(number)
        return self.chunks[layers.start : layers.stop]


def shard_parts(spec: ArraySpec, shard: int, rows: int, chunks: npt.NDArray[Any]) -> Iterator[Part]:
    """The bytes of a shard file: chunks, then Zarr's index with its checksum."""
    if spec.is_compressed:
        yield from compressed_shard(chunks, spec.index_shape)
        return
    yield np.ascontiguousarray(chunks).reshape(-1).view(np.uint8).data
    index = spec.shard_index(shard, rows).astype("<u8").tobytes()
    yield index
    yield crc32c(index).to_bytes(4, "little")


def parse_shard(spec: ArraySpec, shard: int, rows: int, data: bytes, name: str) -> npt.NDArray[Any]:
    """The chunks of a shard file that was there before.

    Returns:
        Storage dtype ``(layer, row_chunk, column_chunk, row, column)``.

    Raises:
        StoreDamaged: the file is not a shard of ``rows`` rows of this array.
    """
    shape = (
        len(spec.shard_layers(shard)),
        spec.present_row_chunks(rows),
        spec.column_chunks,
        spec.chunk_rows,
        spec.chunk_width,
    )
    if not spec.is_compressed:
        index = spec.shard_index(shard, rows).astype("<u8").tobytes()
        trailer = index + crc32c(index).to_bytes(4, "little")
        if len(data) != spec.shard_bytes(shard, rows) or not data.endswith(trailer):
            raise StoreDamaged(
                f"{name} is not a shard of {rows} rows of {spec.key}. Run `actstore verify`, "
                "then repair its segment.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return np.frombuffer(data, spec.dtype.storage, int(np.prod(shape))).reshape(shape)
    index_table = parse_index(data, spec.index_shape, name)
    chunks = np.empty(shape, spec.dtype.storage)
    for place in np.ndindex(*shape[:3]):
        offset, length = (int(number) for number in index_table[place])
        decoded = decode_chunk(data[offset : offset + length], spec.chunk_bytes, name)
        chunks[place] = np.frombuffer(decoded, spec.dtype.storage).reshape(shape[3:])
    return chunks


def block_checksums(spec: ArraySpec, chunks: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """crc32c of every block of ``checksum_rows`` rows of every chunk.

    Args:
        spec: the array.
        chunks: ``(layer, row_chunk, column_chunk, row, column)``, C-contiguous.

    Returns:
        uint32 ``(layer, row_chunk, column_chunk, block)``.
    """
    size = spec.checksum_rows * spec.chunk_width * spec.dtype.storage.itemsize
    view = chunks.reshape(-1).view(np.uint8).data
    table = np.fromiter(
        (crc32c(view[start : start + size]) for start in range(0, len(view), size)),
        np.uint32,
        len(view) // size,
    )
    return table.reshape(*chunks.shape[:3], spec.chunk_rows // spec.checksum_rows)


class Descriptors:
    """Open files of a store, the least recently used closed first."""

    def __init__(self, root: Path, limit: int = _OPEN_FILES) -> None:
        self._root = root
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str) -> int:
        """A descriptor of the file ``key``.

        Raises:
            StoreDamaged: there is no such file.
        """
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            try:
                descriptor = os.open(self._root / key, os.O_RDONLY)
            except FileNotFoundError as error:
                raise missing_file(key) from error
            self._open[key] = descriptor
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
            return descriptor

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


@dataclass(frozen=True)
class _Range:
    """Consecutive checksum blocks of one chunk."""

    layer: int
    row_chunk: int
    column_chunk: int
    first_block: int
    last_block: int


class ShardReader:
    """Verified reads of one array of a store.

    Args:
        spec: the array.
        files: the store's open files.
        rows_of: filled rows of a committed segment; raises for any other.
        checksums_of: uint32 ``(row_chunk, column_chunk, block)`` of a segment and layer.
    """

    def __init__(
        self,
        spec: ArraySpec,
        files: Descriptors,
        rows_of: Callable[[int], int],
        checksums_of: Callable[[int, int], npt.NDArray[np.uint32]],
    ) -> None:
        self.spec = spec
        self._files = files
        self._rows_of = rows_of
        self._checksums_of = checksums_of
        self._row_bytes = spec.chunk_width * spec.dtype.storage.itemsize
        self._block_bytes = spec.checksum_rows * self._row_bytes

    def window(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of a segment.

        Args:
            segment: the segment's number.
            layer: the layer, 0 for a place outside the blocks.
            start: first row within the segment.
            stop: end row within the segment; clipped to the filled rows.
            chunks: column chunks to read; all by default.

        Returns:
            storage dtype ``(row, column)``, the columns of ``chunks`` side by side.
        """
        spec = self.spec
        stop = min(stop, self._rows_of(segment))
        wanted = range(spec.column_chunks) if chunks is None else chunks
        ranges: list[_Range] = []
        places: list[tuple[int, int, int, int]] = []
        row = start
        while row < stop:
            row_chunk, offset = divmod(row, spec.chunk_rows)
            count = min(stop - row, spec.chunk_rows - offset)
            first = offset // spec.checksum_rows
            last = (offset + count - 1) // spec.checksum_rows + 1
            for position, column_chunk in enumerate(wanted):
                ranges.append(_Range(layer, row_chunk, column_chunk, first, last))
                places.append((row - start, count, offset - first * spec.checksum_rows, position))
            row += count
        width = spec.chunk_width
        result = np.empty((max(stop - start, 0), len(wanted) * width), spec.dtype.storage)
        for (target, count, skip, position), block in zip(
            places, self._read(segment, ranges), strict=True
        ):
            columns = slice(position * width, (position + 1) * width)
            result[target : target + count, columns] = block[skip : skip + count]
        return result if chunks is not None else result[:, : spec.columns]

    def rows(self, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Any global rows, in any order, repeats allowed.

        Returns:
            storage dtype ``(row, column)``.
        """
        spec = self.spec
        result = np.empty((len(rows), spec.columns), spec.dtype.storage)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        segments = ordered // spec.segment_rows
        edges = np.flatnonzero(np.diff(segments)) + 1
        for part in np.split(np.arange(len(ordered)), edges):
            if not len(part):
                continue
            segment = int(segments[part[0]])
            offsets = ordered[part] - segment * spec.segment_rows
            self._check_filled(segment, int(offsets[-1]))
            blocks = offsets // spec.checksum_rows
            starts = np.concatenate([[0], np.flatnonzero(np.diff(blocks)) + 1, [len(blocks)]])
            per_chunk = spec.chunk_rows // spec.checksum_rows
            ranges = []
            for block in blocks[starts[:-1]]:
                row_chunk, within = divmod(int(block), per_chunk)
                ranges += [
                    _Range(layer, row_chunk, column_chunk, within, within + 1)
                    for column_chunk in range(spec.column_chunks)
                ]
            read = self._read(segment, ranges)
            for begin, end in pairwise(starts):
                inside = offsets[begin:end] % spec.checksum_rows
                target = order[part[begin:end]]
                for column_chunk in range(spec.column_chunks):
                    left = column_chunk * spec.chunk_width
                    right = min(left + spec.chunk_width, spec.columns)
                    result[target, left:right] = next(read)[inside, : right - left]
        return result

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], column: int
    ) -> npt.NDArray[Any]:
        """Values of one column at ascending rows of a segment; reads only their blocks."""
        spec = self.spec
        column_chunk, inside = divmod(column, spec.chunk_width)
        per_chunk = spec.chunk_rows // spec.checksum_rows
        blocks, inverse = np.unique(offsets // spec.checksum_rows, return_inverse=True)
        ranges = [
            _Range(
                layer, int(b) // per_chunk, column_chunk, int(b) % per_chunk, int(b) % per_chunk + 1
            )
            for b in blocks
        ]
        found = [block[:, inside] for block in self._read(segment, ranges)]
        if not found:
            return np.empty(0, spec.dtype.storage)
        return np.stack(found)[inverse, offsets % spec.checksum_rows]

    def _check_filled(self, segment: int, offset: int) -> None:
        if offset >= self._rows_of(segment):
            raise StoreDamaged(
                f"Row {offset} of segment {segment} of {self.spec.key} is not filled.",
                kind=ErrorKind.MALFORMED_FILE,
            )

    def _read(self, segment: int, ranges: Sequence[_Range]) -> Iterator[npt.NDArray[Any]]:
        """Verified blocks ``(row, column)``, one per range and in its order."""
        if not ranges:
            return
        checksums = self._checksums_of(segment, ranges[0].layer)
        fetch = self._fetch_decoded if self.spec.is_compressed else self._fetch
        block_bytes = self._block_bytes
        for item, (shard, start, data) in zip(ranges, fetch(segment, ranges), strict=True):
            expected = checksums[item.row_chunk, item.column_chunk]
            view = memoryview(data)
            if len(data) != (item.last_block - item.first_block) * block_bytes:
                raise _damaged(shard, start, "is cut short")
            for block in range(item.first_block, item.last_block):
                position = (block - item.first_block) * block_bytes
                if crc32c(view[position : position + block_bytes]) != expected[block]:
                    raise _damaged(shard, start + position, "fails its checksum")
            yield np.frombuffer(data, self.spec.dtype.storage).reshape(-1, self.spec.chunk_width)

    def _fetch_decoded(
        self, segment: int, ranges: Sequence[_Range]
    ) -> Iterator[tuple[str, int, bytes]]:
        """The file, place and bytes of ranges of compressed chunks; each chunk is read whole."""
        spec = self.spec
        shard = spec.shard_path(ranges[0].layer // spec.layers_per_shard, segment)
        descriptor = self._files.get(shard)
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, spec.index_bytes, max(size - spec.index_bytes, 0))
        index = parse_index(tail, spec.index_shape, shard)
        for item in ranges:
            place = (item.layer % spec.layers_per_shard, item.row_chunk, item.column_chunk)
            offset, length = (int(number) for number in index[place])
            data = decode_chunk(os.pread(descriptor, length, offset), spec.chunk_bytes, shard)
            start, stop = item.first_block * self._block_bytes, item.last_block * self._block_bytes
            yield shard, offset, data[start:stop]

    def _fetch(self, segment: int, ranges: Sequence[_Range]) -> Iterator[tuple[str, int, bytes]]:
        """The file, place and bytes of each range, all announced to the kernel first."""
        spec = self.spec
        present = spec.present_row_chunks(self._rows_of(segment))
        per_shard = spec.layers_per_shard
        block_bytes = self._block_bytes
        spans = []
        for item in ranges:
            within = item.layer % per_shard
            chunk = (within * present + item.row_chunk) * spec.column_chunks + item.column_chunk
            start = chunk * spec.chunk_bytes + item.first_block * block_bytes
            spans.append((start, (item.last_block - item.first_block) * block_bytes))
        shard = spec.shard_path(ranges[0].layer // per_shard, segment)
        descriptor = self._files.get(shard)
        if len(spans) > 1:
            for start, length in spans:
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
        for start, length in spans:
            yield shard, start, os.pread(descriptor, length, start)


def _damaged(key: str, offset: int, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"{key} {what} at byte {offset}; no value of it was returned. Run `actstore verify`.",
        kind=ErrorKind.CHECKSUM_MISMATCH,
    )
