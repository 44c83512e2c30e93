"""The bytes of a shard file: as they are written, read back whole, and checksummed.

A shard is ordinary sharded Zarr v3: inner chunks in C order, then an index of their places
with a crc32c of its own.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import Part
from actstore.store.compression import compressed_shard, decode_chunk, parse_index
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.layout import ArraySpec

__all__ = ["block_checksums", "parse_shard", "shard_parts"]


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
