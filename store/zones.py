"""Zone maps, segment lists, statistics and block checksums of one array's segment.

One checked file per (array, segment), computed from the bytes that are on disk:

=================  ==========================================  =======================
section            shape                                       meaning
=================  ==========================================  =======================
``checksums``      (layer, row_chunk, column_chunk, block)     crc32c of shard blocks
``page_max/min``   (layer, unit, page)                         keys, ordinary rows
``segment``        (layer, unit, 4)                            keys: max, min over
                                                               ordinary, then special rows
``top/low_key``    (layer, unit, 8)                            greatest and least keys
``top/low_row``    (layer, unit, 8)                            their rows in the segment
``moments``        (layer, unit, 4)                            mean, M2, M3, M4
``counts``         (layer, unit, 3)                            ordinary values, > 0, NaN
=================  ==========================================  =======================

Arrays without a node axis have ``checksums`` alone.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.histogram_sections import describe_histograms
from actstore.store.index_spec import HISTOGRAM, ZONES
from actstore.store.layout import ArraySpec
from actstore.store.shard_file import block_checksums
from actstore.store.shards import SegmentBuffer
from actstore.store.tiles import EMPTY_ROW, LIST_LENGTH, Tile
from actstore.store.unit_buffer import UnitBuffer
from actstore.store.unit_grid import UnitGrid

__all__ = [
    "EMPTY_ROW",
    "LIST_LENGTH",
    "SegmentDescription",
    "describe_segment",
    "describe_units",
    "zone_attributes",
]

_TILE_VALUES = 2**23
"""Values of a tile at most: a thread keeps up to 10 MB of it, 22 MB if all values tie."""

_TILE_UNITS = 512
"""Units of a tile at most, for the same reason: in a short segment they might be many."""

_Sections = dict[str, npt.NDArray[Any]]


def zone_attributes(spec: UnitGrid, segment: int, plan_hash: str) -> dict[str, Any]:
    """What a zone file says of itself, so that one in another's place is not believed."""
    return {"array": spec.key, "segment": segment, "plan": plan_hash}


def describe_segment(buffer: SegmentBuffer, special: npt.NDArray[np.bool_]) -> _Sections:
    """The sections of a segment's zone file, computed in this thread.

    Args:
        buffer: the segment's values, as they are on disk.
        special: ``(row,)`` over the filled rows; such rows are summarised apart.
    """
    layers = range(len(buffer.chunks))
    return _join([_join_tiles([part() for part in _parts(buffer, special, n)]) for n in layers])


def describe_units(
    buffer: UnitBuffer, special: npt.NDArray[np.bool_], parts: Collection[str]
) -> _Sections:
    """What an index keeps of a segment: no checksums, for it has no blocks.

    Args:
        buffer: the segment's values.
        special: ``(row,)`` over the filled rows; such rows are summarised apart.
        parts: of ``INDEX_PARTS``.
    """
    sections: _Sections = {}
    if ZONES in parts:
        layers = range(len(buffer.chunks))
        tiles = [[part() for part in _tiles(buffer, special, layer)] for layer in layers]
        sections |= _join([_join_tiles(found) for found in tiles])
    if HISTOGRAM in parts:
        sections |= describe_histograms(buffer, special)
    return sections


class SegmentDescription:
    """The sections of a segment's zone file, computed in other threads.

    They depend on the values alone: not on the number of threads, nor on their order.

    Args:
        buffer: the segment's values; not to be changed but by :meth:`replace`.
        special: ``(row,)`` over the filled rows; such rows are summarised apart.
        pool: the threads.
    """

    def __init__(
        self, buffer: SegmentBuffer, special: npt.NDArray[np.bool_], pool: Executor
    ) -> None:
        self._buffer = buffer
        self._special = special
        self._pool = pool
        self._layers = [self._start(layer) for layer in range(len(buffer.chunks))]

    def replace(self, layers: range, chunks: npt.NDArray[Any]) -> None:
        """Put other values in the place of some layers', and describe those.

        Args:
            layers: the layers.
            chunks: ``(layer, row_chunk, column_chunk, row, column)``.
        """
        begun = [future for layer in layers for future in self._layers[layer]]
        # None of them may read what is half replaced.
        wait([future for future in begun if not future.cancel()])
        self._buffer.chunks[layers.start : layers.stop] = chunks
        self._layers[layers.start : layers.stop] = [self._start(layer) for layer in layers]

    def sections(self) -> _Sections:
        """The sections, once they are complete."""
        return _join(
            [_join_tiles([future.result() for future in futures]) for futures in self._layers]
        )

    def _start(self, layer: int) -> list[Future[_Sections]]:
        return [self._pool.submit(part) for part in _parts(self._buffer, self._special, layer)]


def _parts(
    buffer: SegmentBuffer, special: npt.NDArray[np.bool_], layer: int
) -> list[Callable[[], _Sections]]:
    """What describes the tiles of a layer, and the layer's checksums."""
    spec, chunks = buffer.spec, buffer.chunks[layer]
    parts: list[Callable[[], _Sections]] = [partial(_checksums, spec, chunks)]
    return parts + (_tiles(buffer, special, layer) if spec.has_zones else [])


def _tiles(
    buffer: UnitBuffer, special: npt.NDArray[np.bool_], layer: int
) -> list[Callable[[], _Sections]]:
    """What describes the tiles of a layer."""
    spec, chunks = buffer.spec, buffer.chunks[layer]
    most = min(_TILE_VALUES // max(1, chunks[:, 0].size), _TILE_UNITS // spec.chunk_width)
    step = max(1, most)
    return [
        partial(_tile, spec, chunks, first, min(first + step, spec.column_chunks), special)
        for first in range(0, spec.column_chunks, step)
    ]


def _tile(
    spec: UnitGrid,
    chunks: npt.NDArray[Any],
    first: int,
    stop: int,
    special: npt.NDArray[np.bool_],
) -> _Sections:
    # Made only when a thread takes it on: it has buffers.
    return Tile(spec, chunks, first, stop, special).describe()


def _checksums(spec: ArraySpec, chunks: npt.NDArray[Any]) -> _Sections:
    return {"checksums": block_checksums(spec, chunks[None])[0]}


def _join_tiles(parts: list[_Sections]) -> _Sections:
    """The sections of a layer from those of its tiles, and its checksums as they are."""
    tiles = [part for part in parts if "checksums" not in part]
    names = tiles[0] if tiles else ()
    joined = {name: np.concatenate([tile[name] for tile in tiles]) for name in names}
    others = [part for part in parts if "checksums" in part]
    return {name: found for part in others for name, found in part.items()} | joined


def _join(layers: list[_Sections]) -> _Sections:
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
