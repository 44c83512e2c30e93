"""The buffer that becomes a shard and the verified byte-range reader: the hot path.

Shards are ordinary sharded Zarr v3 without compression, so the place of every value
is arithmetic (``ArraySpec``) and a read fetches just the bytes it needs. Nothing read
is trusted: every 4 KiB block is checked against the crc32c that was published with
the segment's zone maps.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import missing_file
from actstore.store.compression import decode_chunk, parse_index
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.layout import ArraySpec
from actstore.store.unit_buffer import UnitBuffer

__all__ = [
    "Descriptors",
    "SegmentBuffer",
    "ShardReader",
]

_OPEN_FILES = 256
_READ_BYTES = 2**26


class SegmentBuffer(UnitBuffer):
    """One segment of one array in memory, already in the order of the shard file.

    Args:
        spec: the array.
        rows: filled token rows of the segment.
    """

    spec: ArraySpec

    def __init__(self, spec: ArraySpec, rows: int) -> None:
        super().__init__(spec, rows)

    def shard(self, number: int) -> npt.NDArray[Any]:
        """The chunks of one shard, ``(layer, row_chunk, column_chunk, row, column)``."""
        layers = self.spec.shard_layers(number)
        return self.chunks[layers.start : layers.stop]


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
        self._chunk_row = np.dtype((np.void, self._row_bytes))

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
        wanted = np.arange(spec.column_chunks) if chunks is None else np.array(chunks, np.int64)
        width = spec.chunk_width
        result = np.empty((max(stop - start, 0), len(wanted) * width), spec.dtype.storage)
        row = start
        while row < stop and len(wanted):
            row_chunk, offset = divmod(row, spec.chunk_rows)
            count = min(stop - row, spec.chunk_rows - offset)
            first, skip = divmod(offset, spec.checksum_rows)
            blocks = -(-(skip + count) // spec.checksum_rows)
            places = _Places(row_chunk, wanted, np.full(len(wanted), first), blocks)
            read = self._read(segment, layer, places)[:, skip : skip + count]
            # Copying a chunk's row as one item is the fastest way to put chunks side by side.
            target = result[row - start : row - start + count].view(self._chunk_row)
            target[...] = read.view(self._chunk_row)[:, :, 0].T
            row += count
        return result if chunks is not None else result[:, : spec.columns]

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """Announce the bytes that the same :meth:`window` reads; the disk may fetch them now.

        Of a compressed array nothing is announced: where its chunks are has to be read first.
        """
        spec = self.spec
        stop = min(stop, self._rows_of(segment))
        if spec.is_compressed or start >= stop:
            return
        descriptor = self._files.get(spec.shard_path(layer // spec.layers_per_shard, segment))
        wanted = np.array(chunks, np.int64)
        for row_chunk in range(start // spec.chunk_rows, (stop - 1) // spec.chunk_rows + 1):
            base = row_chunk * spec.chunk_rows
            first = max(start - base, 0) // spec.checksum_rows
            end = -(-min(stop - base, spec.chunk_rows) // spec.checksum_rows)
            starts = np.unique(self._starts(segment, layer, row_chunk, wanted, first))
            length = (end - first) * self._block_bytes
            for low, high in _adjoining(starts, length):
                at, size = int(starts[low]), (high - low) * length
                os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)

    def _starts(
        self,
        segment: int,
        layer: int,
        row_chunk: npt.NDArray[np.int64] | int,
        column_chunk: npt.NDArray[np.int64],
        first: npt.NDArray[np.int64] | int,
    ) -> npt.NDArray[np.int64]:
        """Where blocks begin in their shard's file, by chunk and number in the chunk."""
        spec = self.spec
        present = spec.present_row_chunks(self._rows_of(segment))
        row = (layer % spec.layers_per_shard) * present + row_chunk
        chunk = row * spec.column_chunks + column_chunk
        return chunk * spec.chunk_bytes + first * self._block_bytes

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
        step = max(1, _READ_BYTES // (spec.column_chunks * self._block_bytes))
        for part in np.split(np.arange(len(ordered)), edges):
            if not len(part):
                continue
            segment = int(segments[part[0]])
            offsets = ordered[part] - segment * spec.segment_rows
            self._check_filled(segment, int(offsets[-1]))
            blocks, inside = np.divmod(offsets, spec.checksum_rows)
            distinct, which = np.unique(blocks, return_inverse=True)
            for start in range(0, len(distinct), step):
                group = distinct[start : start + step]
                row_chunk, first = np.divmod(group, spec.chunk_rows // spec.checksum_rows)
                places = _Places(
                    np.repeat(row_chunk, spec.column_chunks),
                    np.tile(np.arange(spec.column_chunks), len(group)),
                    np.repeat(first, spec.column_chunks),
                    1,
                )
                read = self._read(segment, layer, places)
                read = read.reshape(len(group), spec.column_chunks, *read.shape[1:])
                low, high = np.searchsorted(which, [start, start + len(group)])
                found = read[which[low:high] - start, :, inside[low:high]]
                found = found.reshape(len(found), -1)[:, : spec.columns]
                result[order[part[low:high]]] = found
        return result

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], column: int
    ) -> npt.NDArray[Any]:
        """Values of one column at ascending rows of a segment; reads only their blocks."""
        spec = self.spec
        column_chunk, inside = divmod(column, spec.chunk_width)
        blocks, inverse = np.unique(offsets // spec.checksum_rows, return_inverse=True)
        row_chunk, first = np.divmod(blocks, spec.chunk_rows // spec.checksum_rows)
        places = _Places(row_chunk, np.full(len(blocks), column_chunk), first, 1)
        found = self._read(segment, layer, places)[:, :, inside]
        cells: npt.NDArray[Any] = found[inverse, offsets % spec.checksum_rows]
        return cells

    def _check_filled(self, segment: int, offset: int) -> None:
        if offset >= self._rows_of(segment):
            raise StoreDamaged(
                f"Row {offset} of segment {segment} of {self.spec.key} is not filled.",
                kind=ErrorKind.MALFORMED_FILE,
            )

    def _read(self, segment: int, layer: int, places: "_Places") -> npt.NDArray[Any]:
        """Verified values ``(place, row, column)``."""
        spec = self.spec
        checksums = self._checksums_of(segment, layer)
        shard = spec.shard_path(layer // spec.layers_per_shard, segment)
        data = np.empty((len(places.first), places.count * self._block_bytes), np.uint8)
        fetch = self._fetch_decoded if spec.is_compressed else self._fetch
        starts = fetch(segment, layer, places, shard, data)
        view, size = data.reshape(-1).data, self._block_bytes
        found = np.fromiter(
            (crc32c(view[at : at + size]) for at in range(0, len(view), size)),
            np.uint32,
            len(view) // size,
        )
        blocks = places.first[:, None] + np.arange(places.count)
        row_chunk = np.broadcast_to(places.row_chunk, len(blocks))[:, None]
        expected = checksums[row_chunk, places.column_chunk[:, None], blocks].reshape(-1)
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            place, block = divmod(int(wrong[0]), places.count)
            raise _damaged(shard, int(starts[place]) + block * size, "fails its checksum")
        values: npt.NDArray[Any] = data.view(spec.dtype.storage)
        return values.reshape(len(data), places.count * spec.checksum_rows, spec.chunk_width)

    def _fetch(
        self,
        segment: int,
        layer: int,
        places: "_Places",
        shard: str,
        data: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.int64]:
        """Fill ``data (place, byte)`` from the file; returns where each place begins in it."""
        starts = self._starts(segment, layer, places.row_chunk, places.column_chunk, places.first)
        length = data.shape[1]
        descriptor = self._files.get(shard)
        # Where each span is in the file, and where its bytes go.
        spans = [
            (int(starts[low]), low * length, high * length)
            for low, high in _adjoining(starts, length)
        ]
        if len(spans) > 1:
            # The disk gets to see all of them at once; the reads below then find them in memory.
            for start, low, high in spans:
                os.posix_fadvise(descriptor, start, high - low, os.POSIX_FADV_WILLNEED)
        flat = data.reshape(-1).data
        for start, low, high in spans:
            if os.preadv(descriptor, (flat[low:high],), start) != high - low:
                raise _damaged(shard, start, "is cut short")
        return starts

    def _fetch_decoded(
        self,
        segment: int,
        layer: int,
        places: "_Places",
        shard: str,
        data: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.int64]:
        """As :meth:`_fetch`, of compressed chunks: each is read whole."""
        spec = self.spec
        descriptor = self._files.get(shard)
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, spec.index_bytes, max(size - spec.index_bytes, 0))
        index = parse_index(tail, spec.index_shape, shard)
        inner = index[layer % spec.layers_per_shard, places.row_chunk, places.column_chunk]
        for place, (offset, length) in enumerate(inner.tolist()):
            chunk = decode_chunk(os.pread(descriptor, length, offset), spec.chunk_bytes, shard)
            start = int(places.first[place]) * self._block_bytes
            data[place] = np.frombuffer(chunk, np.uint8, data.shape[1], start)
        starts: npt.NDArray[np.int64] = inner[:, 0].astype(np.int64)
        return starts


@dataclass(frozen=True, eq=False)
class _Places:
    """Runs of equally many checksum blocks, each inside one chunk.

    Attributes:
        row_chunk: int64 ``(place,)``, or one for all.
        column_chunk: int64 ``(place,)``.
        first: the first block's number in its chunk, int64 ``(place,)``.
        count: blocks of each place.
    """

    row_chunk: npt.NDArray[np.int64] | int
    column_chunk: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    count: int


def _adjoining(starts: npt.NDArray[np.int64], length: int) -> list[tuple[int, int]]:
    """Ranges of places that follow each other in the file, up to 64 MiB in one."""
    most = max(1, _READ_BYTES // length)
    cuts = np.flatnonzero(np.diff(starts) != length) + 1
    spans = list(pairwise([0, *cuts.tolist(), len(starts)])) if len(starts) else []
    if len(starts) <= most:
        return spans
    return [(low, min(low + most, end)) for begin, end in spans for low in range(begin, end, most)]


def _damaged(key: str, offset: int, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"{key} {what} at byte {offset}; no value of it was returned. Run `actstore verify`.",
        kind=ErrorKind.CHECKSUM_MISMATCH,
    )
