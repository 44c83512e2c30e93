"""Histograms of all units of a segment or of a store: counted, kept, read and added.

What a segment's file keeps, a block of 1024 units compressed at once (bins before units, so
that neighbours are alike):

===================  =====================  ===============================================
section              shape                  meaning
===================  =====================  ===============================================
``histogram``        (byte,)                zstd of the blocks, one after another; a block is
                                            the byte planes (4, bin, unit) of uint32 counts,
                                            NaN in the last place of the bins
``histogram_size``   (layer, block)         bytes of each block
``histogram_range``  (layer, unit, 2)       float32: least and greatest value
===================  =====================  ===============================================

What the compacted index keeps, so that one unit is one read: ``histograms.<layer>``, uint8
``(unit, byte)``: least and greatest value as float32, a bit per bin that says whether it
holds values, and the numbers of those that do, seven bits a byte, lowest first; then zeros.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from actstore.store.compression import decode_chunk
from actstore.store.histograms import BINS, Histogram, bins_of, quantiles
from actstore.store.layout import StoredDtype
from actstore.store.sections import SectionFile
from actstore.store.unit_buffer import UnitBuffer

__all__ = [
    "LayerHistograms",
    "describe_histograms",
    "pack_histograms",
    "read_histograms",
    "unpack_histograms",
]

_Sections = dict[str, npt.NDArray[Any]]

_PLACES = BINS + 1
_LEFT_OUT = _PLACES
"""Where rows are counted that do not count."""

_CODES = 2**16
_BLOCK_UNITS = 1024
_LEVEL = 3
_RANGE_BYTES = 8
_HEAD = _RANGE_BYTES + -(-_PLACES // 8)
_FOLDED = 32
"""Rows that are folded into one first; divides a page."""

_EMPTY = (np.inf, -np.inf)
"""Least and greatest of no values."""


@dataclass(frozen=True)
class LayerHistograms:
    """The histograms of some units of a layer.

    Attributes:
        counts: int64 ``(unit, bin + 1)``; the last place counts NaN.
        extremes: float32 ``(unit, 2)``: least and greatest value; of no values, plus and
            minus infinity.
    """

    counts: npt.NDArray[np.int64]
    extremes: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, units: int) -> "LayerHistograms":
        """Of no values."""
        return cls(
            np.zeros((units, _PLACES), np.int64), np.tile(np.array(_EMPTY, np.float32), (units, 1))
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, unit: int) -> Histogram:
        counts = self.counts[unit, :BINS]
        low, high = self.extremes[unit].tolist() if counts.any() else (np.nan, np.nan)
        return Histogram(counts, int(self.counts[unit, BINS]), low, high)

    def __add__(self, other: "LayerHistograms") -> "LayerHistograms":
        """The histograms of two disjoint samples of the same units together."""
        return LayerHistograms(
            self.counts + other.counts,
            np.stack(
                [
                    np.minimum(self.extremes[:, 0], other.extremes[:, 0]),
                    np.maximum(self.extremes[:, 1], other.extremes[:, 1]),
                ],
                axis=1,
            ),
        )

    def quantile(
        self, share: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Estimate, low and high of every unit; see :meth:`Histogram.quantile`."""
        return quantiles(self.counts[:, :BINS], self.extremes, share)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.counts.nbytes + self.extremes.nbytes


def describe_histograms(buffer: UnitBuffer, special: npt.NDArray[np.bool_]) -> _Sections:
    """The sections of a segment's file that are about histograms.

    Args:
        buffer: the segment's values.
        special: ``(row,)`` over the filled rows; such rows are not counted.
    """
    left_out = np.ones(buffer.chunks.shape[1] * buffer.spec.chunk_rows, bool)
    left_out[: len(special)] = special
    blocks: list[bytes] = []
    extremes = []
    for chunks in buffer.chunks:
        found = count_units(chunks, buffer.spec.dtype, np.flatnonzero(left_out))
        units = buffer.spec.columns
        blocks += [
            _compressed(found.counts[start : min(start + _BLOCK_UNITS, units)])
            for start in range(0, units, _BLOCK_UNITS)
        ]
        extremes.append(found.extremes[:units])
    sizes = np.array([len(block) for block in blocks], np.int64)
    return {
        "histogram": np.frombuffer(b"".join(blocks), np.uint8),
        "histogram_size": sizes.reshape(len(buffer.chunks), -1),
        "histogram_range": np.stack(extremes),
    }


def count_units(
    chunks: npt.NDArray[Any], dtype: StoredDtype, left_out: npt.NDArray[np.int64]
) -> LayerHistograms:
    """Count the values of a layer's units, padding columns included.

    Every value becomes a byte, its bin; then a unit's bytes are counted where they lie
    together. Nothing is faster without a compiler: a sort of bytes costs as much and has
    counted nothing yet.

    Args:
        chunks: storage dtype ``(row_chunk, column_chunk, row, column)``.
        dtype: how values are stored.
        left_out: rows that do not count, ascending.
    """
    row_chunks, column_chunks, rows, width = chunks.shape
    counts = np.empty((column_chunks * width, _PLACES), np.int64)
    extremes = np.empty((column_chunks, width, 2), np.float32)
    by_unit = np.empty((width, row_chunks * rows), np.uint8)
    groups = [left_out[left_out // rows == number] % rows for number in range(row_chunks)]
    work = np.empty((rows, width), np.float32)
    for chunk in range(column_chunks):
        reached = np.empty((row_chunks, 2, width), np.float32)
        for number, gone in enumerate(groups):
            stored = chunks[number, chunk]
            codes = _codes(stored, dtype, work.view(np.uint32))
            bins = _bins_by_code(dtype).take(codes, mode="clip")
            bins[gone] = _LEFT_OUT
            by_unit[:, number * rows : (number + 1) * rows] = bins.T
            np.copyto(work, dtype.to_float32(stored))
            reached[number] = _extremes(work, gone)
        # Adding 0 makes minus zero zero.
        extremes[chunk, :, 0] = reached[:, 0].min(axis=0) + np.float32(0)
        extremes[chunk, :, 1] = reached[:, 1].max(axis=0) + np.float32(0)
        for column in range(width):
            found = np.bincount(by_unit[column], minlength=_LEFT_OUT + 1)
            counts[chunk * width + column] = found[:_PLACES]
    return LayerHistograms(counts, extremes.reshape(-1, 2))


def _extremes(
    values: npt.NDArray[np.float32], gone: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Least and greatest of every column, NaN and some rows passed over; spoils the values."""
    width = values.shape[1]
    # Long rows fold fastest.
    folded = values.reshape(_FOLDED, -1)
    values[gone] = np.inf
    low = np.minimum.reduce(folded, axis=0).reshape(-1, width).min(axis=0)
    missing = np.isnan(values) if np.isnan(low).any() else None
    if missing is not None:
        values[missing] = np.inf
        low = values.min(axis=0)
        values[missing] = -np.inf
    values[gone] = -np.inf
    high = np.maximum.reduce(folded, axis=0).reshape(-1, width).max(axis=0)
    return low, high


def _codes(
    values: npt.NDArray[Any], dtype: StoredDtype, work: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint16]:
    """A number of 16 bits from which a value's bin follows.

    Of float32 the upper half, its lowest bit set where the lower half is not zero: edges
    have four bits of mantissa at most, so what is left says on which side of each a value lies.

    Args:
        values: storage dtype, ``(row, column)``, C-contiguous.
        dtype: how they are stored.
        work: of their shape, written to.
    """
    if dtype is not StoredDtype.FLOAT32:
        return values.view(np.uint16)
    bits = values.view(np.uint32)
    low = np.uint32(0xFFFF)
    # Of a lower half that is not zero the addition carries into the upper half's lowest bit.
    np.bitwise_and(bits, low, out=work)
    np.add(work, low, out=work)
    np.bitwise_or(work, bits, out=work)
    return work.view(np.uint16).reshape(*values.shape, 2)[..., 1]


@cache
def _bins_by_code(dtype: StoredDtype) -> npt.NDArray[np.uint8]:
    """The bin of every code, uint8 ``(65536,)``."""
    codes = np.arange(_CODES, dtype=np.uint16)
    if dtype is StoredDtype.FLOAT16:
        values = codes.view(np.float16).astype(np.float32)
    else:
        values = (codes.astype(np.uint32) << 16).view(np.float32)
    return bins_of(values).astype(np.uint8)


def _compressed(counts: npt.NDArray[np.int64]) -> bytes:
    """A block of units ``(unit, place)``."""
    by_bin = np.ascontiguousarray(counts.T.astype("<u4"))
    planes = np.ascontiguousarray(
        np.moveaxis(by_bin.view(np.uint8).reshape(*by_bin.shape, 4), 2, 0)
    )
    return bytes(Zstd(level=_LEVEL).encode(planes))


def read_histograms(
    file: SectionFile, layer: int, units: int, unit: int | None = None
) -> LayerHistograms:
    """The histograms that a segment's file has of a layer.

    Args:
        file: the file; it holds histograms.
        layer: the layer.
        units: units of a layer.
        unit: this one alone; its block is all that is read.

    Raises:
        StoreDamaged: a block of the file fails its checksum, or does not decode.
    """
    sizes = file.read("histogram_size")
    ends = np.cumsum(sizes).reshape(sizes.shape)
    wanted = range(sizes.shape[1]) if unit is None else [unit // _BLOCK_UNITS]
    parts = [np.empty((0, _PLACES), np.int64)]
    for block in wanted:
        end, size = int(ends[layer, block]), int(sizes[layer, block])
        held = min(_BLOCK_UNITS, units - block * _BLOCK_UNITS)
        data = file.slice("histogram", end - size, end).tobytes()
        decoded = decode_chunk(data, 4 * _PLACES * held, file.name)
        planes = np.frombuffer(decoded, np.uint8).reshape(4, _PLACES, held)
        by_bin = np.ascontiguousarray(np.moveaxis(planes, 0, 2)).view("<u4")[:, :, 0]
        parts.append(by_bin.T.astype(np.int64))
    counts = np.concatenate(parts)
    if unit is None:
        return LayerHistograms(counts, file.row("histogram_range", layer))
    one = slice(unit % _BLOCK_UNITS, unit % _BLOCK_UNITS + 1)
    return LayerHistograms(counts[one], file.row("histogram_range", layer, unit)[None])


def pack_histograms(histograms: LayerHistograms) -> npt.NDArray[np.uint8]:
    """The records of the compacted index, ``(unit, byte)``."""
    counts = histograms.counts
    units = len(counts)
    unit, place = np.nonzero(counts)
    number = counts[unit, place].astype(np.uint64)
    length = np.ones(len(number), np.int64)
    for bits in range(7, 64, 7):
        length += number >= np.uint64(1 << bits)
    ends = np.cumsum(length)
    used = np.bincount(unit, weights=length, minlength=units).astype(np.int64)
    first = ends - length - (np.cumsum(used) - used)[unit]
    records = np.zeros((units, _HEAD + int(used.max(initial=0))), np.uint8)
    records[:, :_RANGE_BYTES] = histograms.extremes.astype("<f4").view(np.uint8)
    records[:, _RANGE_BYTES:_HEAD] = np.packbits(counts > 0, axis=1, bitorder="little")
    for step in range(int(length.max(initial=0))):
        at = np.flatnonzero(length > step)
        seven = (number[at] >> np.uint64(7 * step)) & np.uint64(127)
        more = (length[at] > step + 1) * np.uint64(128)
        records[unit[at], _HEAD + first[at] + step] = seven | more
    return records


def unpack_histograms(records: npt.NDArray[np.uint8]) -> LayerHistograms:
    """The histograms of records ``(unit, byte)``."""
    records = np.ascontiguousarray(records)
    head = np.ascontiguousarray(records[:, :_RANGE_BYTES]).view("<f4")
    bitmap = records[:, _RANGE_BYTES:_HEAD]
    filled = np.unpackbits(bitmap, axis=1, count=_PLACES, bitorder="little").astype(bool)
    body = records[:, _HEAD:]
    is_last = body < 128
    # Numbers that end before a byte: the number in its record that the byte belongs to.
    index: npt.NDArray[np.int64] = np.cumsum(is_last, axis=1) - is_last
    unit, column = np.nonzero(index < filled.sum(1)[:, None])
    counts = np.zeros((len(records), _PLACES), np.int64)
    if len(unit):
        begins = np.flatnonzero(
            (np.diff(unit, prepend=-1) != 0) | (np.diff(index[unit, column], prepend=-1) != 0)
        )
        step = column - np.repeat(column[begins], np.diff(begins, append=len(unit)))
        parts = (body[unit, column].astype(np.int64) & 127) << (7 * step)
        counts[filled] = np.add.reduceat(parts, begins)
    return LayerHistograms(counts, head.astype(np.float32))
