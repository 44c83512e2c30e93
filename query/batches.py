"""Batches of stored activations for training on them, shuffled in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.rows import RowMap
from actstore.query.sources import Sources
from actstore.store.layout import PAGE_ROWS
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["WINDOW_BYTES", "BatchReader"]

WINDOW_BYTES = 256 * 2**20
"""Float32 values that a shuffle window holds at most (one block at least)."""


@dataclass(frozen=True)
class BatchReader:
    """Reads one location at one layer as batches of rows.

    Rows come in blocks: pages of 512 rows of a stored array, whole sequences of a
    reconstructed one. A shuffle permutes all blocks of the store uniformly, fills a
    window with the next blocks, and permutes the window's rows uniformly; what is left of a
    window, less than a batch, joins the next. So every row comes exactly once, the order of
    distant blocks is uniform, and rows of one block share a window, but for those left.

    Attributes:
        sources: the open store.
        rows: its rows.
        location: which location.
        layer: which layer, None outside the blocks.
        window_bytes: memory of a window.
    """

    sources: Sources
    rows: RowMap
    location: ActivationLocationType
    layer: int | None
    window_bytes: int = WINDOW_BYTES

    def batches(
        self, size: int, seed: int | None, special: bool, dtype: "dtype"
    ) -> Iterator[tuple["Tensor", npt.NDArray[np.int64]]]:
        """Every committed row once.

        Args:
            size: rows of a batch; the last one may be shorter.
            seed: of the shuffle; None for the order of the rows.
            special: whether special rows come too.
            dtype: the values' torch dtype.

        Yields:
            Values ``(row, *unit axes)`` and their global rows, int64 ``(row,)``.
        """
        import torch

        rng = None if seed is None else np.random.Generator(np.random.PCG64(seed))
        rest: list[tuple[Tensor, npt.NDArray[np.int64]]] = []
        for window in self._windows(rng, size):
            parts = rest + [self._read(block, special, dtype) for block in window]
            values = torch.cat([part[0] for part in parts])
            rows = np.concatenate([part[1] for part in parts])
            order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
            whole = len(rows) - len(rows) % size
            for start in range(0, whole, size):
                chosen = order[start : start + size]
                yield values[torch.from_numpy(chosen)], rows[chosen]
            last = order[whole:]
            rest = [(values[torch.from_numpy(last)], rows[last])]
        if rest and len(rest[0][1]):
            yield rest[0]

    def _windows(
        self, rng: np.random.Generator | None, size: int
    ) -> Iterator[Sequence[tuple[int, int]]]:
        """Blocks ``(first row, rows)``, a window at a time."""
        blocks = self._blocks()
        if rng is not None:
            blocks = [blocks[index] for index in rng.permutation(len(blocks))]
        shape = self.sources.unit_shape(self.location.axes)
        budget = max(self.window_bytes // (4 * int(np.prod(shape))), size)
        window: list[tuple[int, int]] = []
        held = 0
        for block in blocks:
            if window and held + block[1] > budget:
                yield sorted(window)
                window, held = [], 0
            window.append(block)
            held += block[1]
        if window:
            yield sorted(window)

    def _blocks(self) -> list[tuple[int, int]]:
        reader = self.sources.reader
        array = reader.arrays.get((self.location, PassType.FORWARD))
        if array is not None:
            return [
                (
                    segment * reader.segment_rows + start,
                    min(PAGE_ROWS, array.rows_of(segment) - start),
                )
                for segment in array.segments
                for start in range(0, array.rows_of(segment), PAGE_ROWS)
            ]
        plans = [reader.segment(segment) for segment in reader.segments]
        return [
            (int(first), int(length))
            for plan in plans
            for first, length in zip(plan.first_token, plan.length, strict=True)
        ]

    def _read(
        self, block: tuple[int, int], special: bool, dtype: "dtype"
    ) -> tuple["Tensor", npt.NDArray[np.int64]]:
        import torch

        first, length = block
        reader = self.sources.reader
        segment, start = divmod(first, reader.segment_rows)
        rows = np.arange(first, first + length)
        array = reader.arrays.get((self.location, PassType.FORWARD))
        if array is not None:
            stored = array.reader.window(segment, self.layer or 0, start, start + length)
            values = torch.from_numpy(np.ascontiguousarray(array.spec.dtype.to_float32(stored)))
            values = values.reshape(length, *array.spec.unit_shape)
        else:
            sequence = int(self.rows.of_tokens(first).sequence[0])
            values = self.sources.sequence(self.rows.sequence(sequence)).raw(
                self.location, PassType.FORWARD, self.layer
            )
        values = values.to(dtype)
        if special:
            return values, rows
        kept = np.flatnonzero(~reader.segment(segment).special[start : start + length])
        return values[torch.from_numpy(kept)], rows[kept]
