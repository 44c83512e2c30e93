"""Checked files: named arrays in one file, every 4 KiB under a checksum.

Plans, zone maps and indexes are kept in this form. A reader fetches just the bytes
of a slice and verifies the blocks that hold them, so a flipped bit in an index is an
error and never a wrong answer. The layout::

    data            sections one after another, each from a multiple of 4096
    checksums       uint32 little-endian crc32c of every 4096 bytes of data
    footer          JSON: {"sections": {name: [dtype, shape, offset]}, "blocks": n, "attributes"}
    trailer         crc32c(checksums + footer), len(footer) as uint32, magic "actsec01"
"""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import missing_file
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.records import canonical_json

__all__ = ["BLOCK", "SectionFile", "encode_sections"]

BLOCK = 4096
"""Bytes under one checksum: a disk page, so a verified read costs no extra I/O."""

_MAGIC = b"actsec01"
_TRAILER = 4 + 4 + len(_MAGIC)
_TAIL = 4 * BLOCK
"""Bytes read at once from a file's end: trailer, footer and checksums of up to 12 MB of data."""


def encode_sections(
    arrays: Mapping[str, npt.NDArray[Any]], attributes: Mapping[str, Any] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a checked file, in parts, ready to publish.

    Args:
        arrays: name -> array of a fixed-size little-endian dtype.
        attributes: JSON values kept in the footer.
    """
    checksums: list[npt.NDArray[np.uint32]] = []
    sections: dict[str, list[Any]] = {}
    offset = 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        sections[name] = [array.dtype.str, list(array.shape), offset]
        padding = bytes(-len(flat) % BLOCK)
        checksums.append(_block_checksums(flat))
        offset += len(flat) + len(padding)
        yield flat.data
        yield padding
    table = np.concatenate(checksums) if checksums else np.empty(0, np.uint32)
    footer = canonical_json(
        {"sections": sections, "blocks": len(table), "attributes": dict(attributes or {})}
    )
    tail = table.astype("<u4").tobytes() + footer
    yield tail
    yield crc32c(tail).to_bytes(4, "little") + len(footer).to_bytes(4, "little") + _MAGIC


class SectionFile:
    """A checked file opened for verified reads.

    Args:
        path: the file.
        name: its key inside the store, for messages.

    Raises:
        StoreDamaged: the file is missing, or its trailer, footer or checksum table is bad.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.name = name
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise missing_file(name) from error
        size = os.fstat(self._descriptor).st_size
        end = os.pread(self._descriptor, _TAIL, max(size - _TAIL, 0))
        trailer = end[-_TRAILER:]
        length = int.from_bytes(trailer[4:8], "little")
        if len(trailer) < _TRAILER or trailer[8:] != _MAGIC or length > size:
            raise self._damaged("has no valid trailer", ErrorKind.MALFORMED_FILE)
        # The table's length follows from the file's, so the checksum is tested before any parse.
        tail = size - _TRAILER - length
        blocks = tail // (BLOCK + 4)
        if tail % (BLOCK + 4) or tail < 0:
            raise self._damaged("has an impossible length", ErrorKind.MALFORMED_FILE)
        rest = 4 * blocks + length
        body = (
            end[-_TRAILER - rest : -_TRAILER]
            if rest + _TRAILER <= len(end)
            else os.pread(self._descriptor, rest, blocks * BLOCK)
        )
        if crc32c(body).to_bytes(4, "little") != trailer[:4]:
            raise self._damaged("fails the checksum of its footer", ErrorKind.CHECKSUM_MISMATCH)
        self._checksums = np.frombuffer(body[: 4 * blocks], "<u4")
        footer = json.loads(body[4 * blocks :])
        self.attributes: dict[str, Any] = footer["attributes"]
        self._sections: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {
            key: (np.dtype(dtype), tuple(shape), offset)
            for key, (dtype, shape, offset) in footer["sections"].items()
        }

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        # At the end of the process `os` may be gone before we are; the files go with it.
        if hasattr(self, "_descriptor") and os is not None:
            self.close()

    def __contains__(self, section: str) -> bool:
        return section in self._sections

    @property
    def names(self) -> list[str]:
        """The sections' names."""
        return list(self._sections)

    def shape(self, section: str) -> tuple[int, ...]:
        """The shape of a section."""
        return self._sections[section][1]

    def read(self, section: str) -> npt.NDArray[Any]:
        """A whole section, verified."""
        _, shape, _ = self._sections[section]
        return self.slice(section, 0, prod(shape)).reshape(shape)

    def row(self, section: str, *index: int) -> npt.NDArray[Any]:
        """``section[index]`` for leading indices, verified; reads only those bytes."""
        _, shape, _ = self._sections[section]
        rest = shape[len(index) :]
        count = prod(rest)
        start = int(np.ravel_multi_index(index, shape[: len(index)])) * count if index else 0
        return self.slice(section, start, start + count).reshape(rest)

    def slice(self, section: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements ``start:stop`` of the flattened section, verified.

        Raises:
            StoreDamaged: a block that holds them fails its checksum.
        """
        dtype, shape, offset = self._sections[section]
        stop = min(stop, prod(shape))
        if stop <= start:
            return np.empty(0, dtype)
        first = (offset + start * dtype.itemsize) // BLOCK
        last = (offset + stop * dtype.itemsize - 1) // BLOCK + 1
        data = self._blocks(first, last)
        skip = offset + start * dtype.itemsize - first * BLOCK
        return np.frombuffer(data, dtype, stop - start, skip)

    def take(self, section: str, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Elements at any places of the flattened section, verified.

        Reads each block that holds one once, in the order of the file, after telling the
        kernel about all of them.

        Args:
            section: a section whose elements have a power of 2 bytes.
            places: in ``range(size)``, in any order, repeats allowed; int64 ``(place,)``.

        Raises:
            StoreDamaged: a block that holds one fails its checksum.
        """
        dtype, _, offset = self._sections[section]
        assert BLOCK % dtype.itemsize == 0, f"an element of {section} may lie in two blocks"
        first, per_block = offset // BLOCK, BLOCK // dtype.itemsize
        block, inside = np.divmod(places, per_block)
        distinct = np.unique(block)
        starts = distinct[np.diff(distinct, prepend=-2) != 1]
        stops = distinct[np.diff(distinct, append=distinct[-1:] + 2) != 1] + 1
        runs = list(zip((starts + first).tolist(), (stops + first).tolist(), strict=True))
        if len(runs) > 1:
            for start, stop in runs:
                size = (stop - start) * BLOCK
                os.posix_fadvise(self._descriptor, start * BLOCK, size, os.POSIX_FADV_WILLNEED)
        values = np.frombuffer(b"".join([self._blocks(*run) for run in runs]), dtype)
        found: npt.NDArray[Any] = values[np.searchsorted(distinct, block) * per_block + inside]
        return found

    def _blocks(self, first: int, last: int) -> bytes:
        """The bytes of blocks ``first:last``, verified."""
        data = os.pread(self._descriptor, (last - first) * BLOCK, first * BLOCK)
        if len(data) != (last - first) * BLOCK:
            raise self._damaged("is shorter than its footer says", ErrorKind.MALFORMED_FILE)
        view = memoryview(data)
        expected = self._checksums[first:last].tolist()
        for number, checksum in enumerate(expected):
            if crc32c(view[number * BLOCK : (number + 1) * BLOCK]) != checksum:
                raise self._damaged(
                    f"fails the checksum of block {first + number}", ErrorKind.CHECKSUM_MISMATCH
                )
        return data

    def verify(self) -> int:
        """Check every block; returns the bytes of the file.

        Raises:
            StoreDamaged: a block fails its checksum.
        """
        for number, expected in enumerate(self._checksums):
            block = os.pread(self._descriptor, BLOCK, number * BLOCK)
            if crc32c(block) != expected:
                raise self._damaged(
                    f"fails the checksum of block {number}", ErrorKind.CHECKSUM_MISMATCH
                )
        return os.fstat(self._descriptor).st_size

    def _damaged(self, what: str, kind: ErrorKind) -> StoreDamaged:
        return StoreDamaged(f"{self.name} {what}. Run `actstore verify`.", kind=kind)


def open_sections(root: Path, key: str) -> SectionFile:
    """Open the checked file ``key`` below ``root``."""
    return SectionFile(root / key, key)


def _block_checksums(flat: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    whole = len(flat) // BLOCK
    view = flat.data
    table = [crc32c(view[n * BLOCK : (n + 1) * BLOCK]) for n in range(whole)]
    if len(flat) % BLOCK:
        rest = bytes(view[whole * BLOCK :])
        table.append(crc32c(rest + bytes(BLOCK - len(rest))))
    return np.array(table, np.uint32)
