"""Bytes that wait on disk until it is known what becomes of them.

A plan is decided at the end of a corpus that may be larger than memory. What was read
meanwhile lies in files without a name, so that a killed run leaves nothing behind.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from actstore.store.blobs import TEMPORARY_MARK, make_durable, write_failed

__all__ = ["Spool"]

BUFFER_BYTES = 2**20
"""A spool below this size never touches the disk, so a refused corpus leaves no folder."""


class Spool:
    """An append-only sequence of bytes, read back at random.

    It is a binary file object as far as a Parquet writer needs one.

    Args:
        folder: where the file may lie; made when the first bytes go to disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._buffer = bytearray()
        self._written = 0
        self.closed = False

    def tell(self) -> int:
        """Bytes so far."""
        return self._written + len(self._buffer)

    def write(self, data: bytes) -> int:
        """Append ``data``.

        Raises:
            WriteFailed: the disk is full, read-only or failing.
        """
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            self._spill()
        return len(data)

    def flush(self) -> None:
        """Nothing: what is buffered is read from the buffer."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes ``offset:offset + size``; fewer at the end."""
        if self._file is None:
            return bytes(self._buffer[offset : offset + size])
        if self._buffer:
            self._spill()
        return os.pread(self._file.fileno(), size, offset)

    def parts(self) -> Iterator[bytes]:
        """All bytes, in pieces."""
        for offset in range(0, self.tell(), BUFFER_BYTES):
            yield self.read(offset, BUFFER_BYTES)

    def lines(self) -> Iterator[bytes]:
        """All lines, without their ends; the last one must have one."""
        rest = b""
        for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            yield from lines

    def close(self) -> None:
        """Release the disk space."""
        self.closed = True
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        try:
            if self._file is None:
                # Plans are published into this folder, and it may be the first in the store.
                make_durable(self._folder)
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed by close()
                    dir=self._folder, prefix=f"spool{TEMPORARY_MARK}", buffering=0
                )
            view = memoryview(bytes(self._buffer))
            while view:
                written = self._file.write(view)
                view = view[written:]
        except OSError as error:
            raise write_failed(self._folder, error) from error
        self._written += len(self._buffer)
        self._buffer.clear()
