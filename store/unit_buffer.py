"""A segment's values in memory, in blocks of the size that they are described and stored in."""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.unit_grid import UnitGrid

__all__ = ["UnitBuffer"]


class UnitBuffer:
    """One segment of a grid of values.

    Values are blocked as they arrive, so that describing and writing them is sequential.

    Args:
        spec: the grid.
        rows: filled token rows of the segment.

    Attributes:
        chunks: storage dtype ``(layer, row_chunk, column_chunk, row, column)``.
    """

    def __init__(self, spec: UnitGrid, rows: int) -> None:
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
