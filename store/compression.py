"""Compressed inner chunks, for pair-shaped arrays alone.

Half of an attention pattern is zeros, so zstd pays there, where it does not for dense
activations (``docs/decisions/001-layout.md``). A chunk is read whole, then the same
4 KiB blocks are verified as everywhere: the checksums are of the decoded bytes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c
from numcodecs.zstd import Zstd

from actstore.store.blobs import Part
from actstore.store.errors import ErrorKind, StoreDamaged

__all__ = ["MISSING_CHUNK", "ZSTD_LEVEL", "compressed_shard", "decode_chunk", "parse_index"]

ZSTD_LEVEL = 1
"""The fastest: higher levels gained nothing on patterns."""

MISSING_CHUNK = 2**64 - 1
"""Offset and length of a chunk that is left out, as Zarr's shard index spells it."""


def compressed_shard(chunks: npt.NDArray[Any], index_shape: tuple[int, int, int]) -> Iterator[Part]:
    """The bytes of a shard of compressed chunks, then Zarr's index with its checksum.

    Args:
        chunks: ``(layer, row_chunk, column_chunk, row, column)``; those that are there.
        index_shape: chunks of a whole shard along layers, rows and columns.
    """
    codec = Zstd(level=ZSTD_LEVEL)
    index = np.full((*index_shape, 2), MISSING_CHUNK, "<u8")
    offset = 0
    for place in np.ndindex(*chunks.shape[:3]):
        data = bytes(codec.encode(np.ascontiguousarray(chunks[place])))
        index[place] = offset, len(data)
        offset += len(data)
        yield data
    yield index.tobytes()
    yield crc32c(index.tobytes()).to_bytes(4, "little")


def parse_index(tail: bytes, index_shape: tuple[int, int, int], name: str) -> npt.NDArray[Any]:
    """Zarr's shard index ``(layer, row_chunk, column_chunk, 2)`` from the end of a file.

    Raises:
        StoreDamaged: it fails its checksum.
    """
    size = 16 * int(np.prod(index_shape))
    body = tail[-size - 4 : -4]
    if len(body) != size or crc32c(body).to_bytes(4, "little") != tail[-4:]:
        raise _damaged(name, "fails the checksum of its index")
    return np.frombuffer(body, "<u8").reshape(*index_shape, 2)


def decode_chunk(data: bytes, size: int, name: str) -> bytes:
    """The ``size`` bytes of a compressed chunk.

    Raises:
        StoreDamaged: the data is not such a chunk.
    """
    try:
        decoded = bytes(Zstd().decode(data))
    except RuntimeError as error:
        raise _damaged(name, "holds a chunk that does not decode") from error
    if len(decoded) != size:
        raise _damaged(name, f"holds a chunk of {len(decoded)} bytes instead of {size}")
    return decoded


def _damaged(name: str, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"{name} {what}; no value of it was returned. Run `actstore verify`.",
        kind=ErrorKind.CHECKSUM_MISMATCH,
    )
