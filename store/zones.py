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

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.keys import highest_key, infinity_key, key_values, lowest_key, ordered_keys
from actstore.store.layout import PAGE_ROWS, ArraySpec
from actstore.store.shards import SegmentBuffer, block_checksums
from actstore.store.statistics import page_moments

__all__ = ["LIST_LENGTH", "describe_segment", "select_extremes"]

LIST_LENGTH = 8
"""Entries per tail and unit in a segment's list."""

EMPTY_ROW = 0xFFFF
"""Row of a list entry that does not exist; its key is the identity of the fold."""


def describe_segment(
    buffer: SegmentBuffer, special: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    """The sections of a segment's zone file.

    Args:
        buffer: the segment's values, as they are on disk.
        special: ``(row,)`` over the filled rows; such rows are summarised apart.
    """
    spec = buffer.spec
    sections: dict[str, npt.NDArray[Any]] = {"checksums": block_checksums(spec, buffer.chunks)}
    if not spec.has_zones:
        return sections
    per_layer = [_describe_layer(spec, rows, special) for rows in _layers(buffer)]
    sections.update({name: np.stack([part[name] for part in per_layer]) for name in per_layer[0]})
    return sections


def _layers(buffer: SegmentBuffer) -> Iterator[npt.NDArray[Any]]:
    """Row-major ``(row, unit)`` values of each layer."""
    spec = buffer.spec
    for chunks in buffer.chunks:
        rows = chunks.transpose(0, 2, 1, 3).reshape(-1, spec.column_chunks * spec.chunk_width)
        yield rows[: buffer.rows, : spec.columns]


def _describe_layer(
    spec: ArraySpec, values: npt.NDArray[Any], special: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    keys = ordered_keys(np.ascontiguousarray(values), spec.dtype)
    limit = infinity_key(spec.dtype)
    low, high = (
        spec.dtype.keys.type(lowest_key(spec.dtype)),
        spec.dtype.keys.type(highest_key(spec.dtype)),
    )
    has_nan = bool(keys.max(initial=0) > limit or keys.min(initial=0) < -limit - 1)
    missing = (keys > limit) | (keys < -limit - 1) if has_nan else None
    ordinary = ~special

    for_max, for_min = keys, keys.copy()
    special_keys = keys[special]
    if missing is not None:
        missing_special = missing[special]
        special_max = np.where(missing_special, low, special_keys)
        special_min = np.where(missing_special, high, special_keys)
        for_max[missing], for_min[missing] = low, high
    else:
        special_max = special_min = special_keys
    for_max[special], for_min[special] = low, high

    page_max = _fold_pages(for_max, spec.pages, np.maximum, low)
    page_min = _fold_pages(for_min, spec.pages, np.minimum, high)
    segment = np.stack(
        [
            page_max.max(1),
            page_min.min(1),
            special_max.max(0, initial=low),
            special_min.min(0, initial=high),
        ],
        axis=1,
    )
    top_key, top_row = select_extremes(for_max, page_max, LIST_LENGTH, low)
    # The least are the greatest of the complement, ties by row alike.
    low_key, low_row = select_extremes(~for_min, ~page_min, LIST_LENGTH, low)
    usable = np.broadcast_to(ordinary[:, None], keys.shape)
    if missing is not None:
        usable = usable & ~missing
    counts = np.stack(
        [
            usable.sum(0, dtype=np.uint32),
            (for_max > 0).sum(0, dtype=np.uint32),
            (
                missing[ordinary].sum(0, dtype=np.uint32)
                if missing is not None
                else np.zeros(spec.columns, np.uint32)
            ),
        ],
        axis=1,
    )
    decoded = key_values(np.where(usable, for_max, 0), spec.dtype)
    return {
        "page_max": page_max,
        "page_min": page_min,
        "segment": segment,
        "top_key": top_key,
        "top_row": top_row,
        "low_key": ~low_key,
        "low_row": low_row,
        "moments": page_moments(decoded, usable if missing is not None else ordinary),
        "counts": counts,
    }


def _fold_pages(
    keys: npt.NDArray[Any], pages: int, fold: np.ufunc, identity: Any
) -> npt.NDArray[Any]:
    """``(unit, page)`` fold of ``(row, unit)`` keys over pages of 512 rows."""
    folded = np.full((pages, keys.shape[1]), identity, keys.dtype)
    for page, start in enumerate(range(0, len(keys), PAGE_ROWS)):
        folded[page] = fold.reduce(keys[start : start + PAGE_ROWS], axis=0)
    return np.ascontiguousarray(folded.T)


def select_extremes(
    keys: npt.NDArray[Any], page_max: npt.NDArray[Any], count: int, identity: Any
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]:
    """The ``count`` greatest keys of every unit, then lower rows first.

    Args:
        keys: ``(row, unit)``; excluded rows hold ``identity``.
        page_max: ``(unit, page)`` maxima of the same keys: ``count`` pages reach their own
            maximum, so the ``count``-th greatest of those is a floor for the answer.
        count: entries per unit.
        identity: the key below every value.

    Returns:
        Keys ``(unit, count)`` in rank order and rows ``(unit, count)``; missing entries hold
        ``identity`` and ``0xFFFF``.
    """
    rows, units = keys.shape
    floor = np.full(units, identity, keys.dtype)
    if page_max.shape[1] >= count:
        floor = np.partition(page_max, page_max.shape[1] - count, axis=1)[:, -count]
    candidate = keys >= floor
    candidate &= keys > identity
    found = candidate.sum(0)
    top_key = np.full((units, count), identity, keys.dtype)
    top_row = np.full((units, count), EMPTY_ROW, np.uint16)
    heavy = found > 4 * count
    for unit in np.flatnonzero(heavy):
        # Many candidates (ties, short segments): one composite key orders value, then row.
        composite = (keys[:, unit].astype(np.int64) << 17) | (65536 - np.arange(rows))
        composite = composite[keys[:, unit] > identity]
        best = np.partition(composite, max(len(composite) - count, 0))[-count:]
        best = np.sort(best)[::-1]
        top_key[unit, : len(best)] = best >> 17
        top_row[unit, : len(best)] = 65536 - (best & 0x1FFFF)
    candidate[:, heavy] = False
    unit_of, row_of = np.nonzero(candidate.T)
    key_of = keys[row_of, unit_of]
    order = np.lexsort((row_of, -key_of.astype(np.int64), unit_of))
    unit_of, row_of, key_of = unit_of[order], row_of[order], key_of[order]
    first = np.searchsorted(unit_of, np.arange(units))
    rank = np.arange(len(unit_of)) - first[unit_of]
    keep = rank < count
    top_key[unit_of[keep], rank[keep]] = key_of[keep]
    top_row[unit_of[keep], rank[keep]] = row_of[keep]
    return top_key, top_row
