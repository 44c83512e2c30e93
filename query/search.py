"""Exact search for the k best values of a scaled array: lists, then branch and bound.

The proof of exactness, in short. Cells (a page of rows of one unit) carry an upper
bound of their score. They are visited by bound descending, then place ascending, and
the k best elements seen are kept. The first cell that cannot beat the k-th best, by
value or by place at equal value, ends the search: every later cell has a lower bound,
or the same bound and a later place. Lists shorten this: an element outside the proven
part of a unit's list ranks after its last proven entry.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from actstore.query.bounds import derived_value, score_bounds
from actstore.query.ranking import Candidates, Ranking
from actstore.query.selection import RowSelection, UnitSelection
from actstore.store.index import UnitIndex
from actstore.store.keys import highest_key, key_values, lowest_key
from actstore.store.layout import PAGE_ROWS
from actstore.store.reader import StoredArray

__all__ = ["Effort", "ScaledArray", "search_bounds", "search_lists", "search_scan"]


@dataclass(frozen=True)
class ScaledArray:
    """A derived scalar that is a raw array times a coefficient per unit.

    Attributes:
        array: the stored raw array.
        index: its lists and zone maps.
        coefficients: layer -> float64 ``(unit,)``.
    """

    array: StoredArray
    index: UnitIndex
    coefficients: Callable[[int], npt.NDArray[np.float64]]


@dataclass
class Effort:
    """What a search did, for its certificate."""

    pages_read: int = 0
    pages_total: int = 0
    bound: float = float("-inf")
    segments: list[int] = field(default_factory=list)


def search_lists(
    source: ScaledArray, units: UnitSelection, rows: RowSelection, ranking: Ranking
) -> dict[int, npt.NDArray[np.int64]]:
    """Offer the proven entries of the units' lists.

    Returns:
        layer -> the units whose unseen elements might still enter; empty when the ranking
        is the answer.
    """
    dtype = source.array.spec.dtype
    ends: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
    for layer in units.layers:
        chosen = units.of(layer)
        if not len(chosen):
            continue
        c = source.coefficients(layer)[chosen]
        upward = (c >= 0) == ranking.largest
        end = np.full(len(chosen), np.inf, np.float32)
        for tail, members in (("top", upward), ("low", ~upward)):
            picked = np.flatnonzero(members)
            if not len(picked):
                continue
            lists = source.index.layer_lists(layer, tail, chosen[picked])
            depth = lists.keys.shape[1]
            proven = np.arange(depth) < lists.proven[:, None]
            value = derived_value(key_values(lists.keys, dtype), c[picked, None])
            allowed = proven & rows.contains(lists.rows.reshape(-1)).reshape(lists.rows.shape)
            unit, rank = np.nonzero(allowed)
            ranking.offer(
                Candidates(
                    value[unit, rank],
                    np.full(len(unit), layer, np.int64),
                    lists.rows[unit, rank].astype(np.int64),
                    chosen[picked[unit]],
                )
            )
            last = np.maximum(lists.proven - 1, 0)
            last_value = value[np.arange(len(picked)), last]
            score = last_value if ranking.largest else -last_value
            score = np.where(c[picked] == 0, np.float32(0), score)
            score = np.where(np.isnan(score) | (lists.proven == 0), np.float32(np.inf), score)
            # A list that holds every value of its unit leaves nothing unseen.
            end[picked] = np.where(lists.complete, np.float32(-np.inf), score)
        ends.append((layer, chosen, end))
    open_units = {}
    for layer, chosen, end in ends:
        still = (end >= ranking.threshold) & (end > -np.inf)
        if rows.special or still.any():
            open_units[layer] = chosen if rows.special else chosen[still]
    return open_units


def search_bounds(
    source: ScaledArray,
    units: UnitSelection,
    rows: RowSelection,
    ranking: Ranking,
    effort: Effort,
) -> None:
    """Branch and bound over segments, then pages; leaves the exact answer in ``ranking``."""
    for layer in units.layers:
        chosen = units.of(layer)
        if len(chosen):
            _search_layer(source, layer, chosen, rows, ranking, effort)
    effort.bound = ranking.threshold


def _search_layer(
    source: ScaledArray,
    layer: int,
    units: npt.NDArray[np.int64],
    rows: RowSelection,
    ranking: Ranking,
    effort: Effort,
) -> None:
    array = source.array
    spec = array.spec
    c = source.coefficients(layer)[units]
    low, high = lowest_key(spec.dtype), highest_key(spec.dtype)
    bounds = source.index.segment_bounds(layer, units)
    usable = {segment: number for number, segment in enumerate(bounds.segments)}
    wanted = [segment for segment in rows.segments(array.segments) if segment in usable]
    effort.segments = wanted
    pages = {s: rows.pages(s, array.rows_of(s)) for s in wanted} if rows.rows is not None else {}
    effort.pages_total += len(units) * sum(
        int(pages[s].sum()) if s in pages else -(-array.rows_of(s) // PAGE_ROWS) for s in wanted
    )
    columns = np.array([usable[segment] for segment in wanted], np.int64)
    numbers = np.array(wanted, np.int64)

    def score(
        maxima: npt.NDArray[np.signedinteger], minima: npt.NDArray[np.signedinteger],
        coefficient: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float32]:
        empty = maxima < minima
        safe_max = np.where(empty, 0, maxima)
        safe_min = np.where(empty, 0, minima)
        return score_bounds(
            key_values(safe_max, spec.dtype),
            key_values(safe_min, spec.dtype),
            empty | ((maxima == low) & (minima == high)),
            coefficient,
            ranking.largest,
        )

    nodes: list[tuple[float, int, int, int, int]] = []
    # A node: (-bound, first token, unit position, kind, segment); the kinds, in turn:
    whole_segment, page_of_rows, special_rows = 0, 1, 2
    segment_score = score(bounds.maximum[:, columns], bounds.minimum[:, columns], c)
    for kind, table in (
        (whole_segment, segment_score),
        *(
            [(special_rows, score(bounds.special_maximum[:, columns], bounds.special_minimum[:, columns], c))]
            if rows.special
            else []
        ),
    ):
        position, column = np.nonzero((table >= ranking.threshold) & (table > -np.inf))
        nodes += zip(
            (-table[position, column]).tolist(),
            (numbers[column] * spec.segment_rows).tolist(),
            position.tolist(),
            [kind] * len(position),
            numbers[column].tolist(),
            strict=True,
        )
    heapq.heapify(nodes)
    blocks: dict[tuple[int, int, int], npt.NDArray[np.float32]] = {}
    while nodes:
        bound, token, position, kind, segment = heapq.heappop(nodes)
        unit = int(units[position])
        if not ranking.beats(-bound, layer, token, unit):
            # The heap is ordered by (bound, token, unit) as the answers are within a layer.
            break
        if kind == whole_segment:
            zones = array.zones(segment)
            page_score = score(
                zones.row("page_max", layer, unit)[None], zones.row("page_min", layer, unit)[None],
                c[position : position + 1],
            )[0]
            for page in np.flatnonzero(page_score > -np.inf):
                if segment in pages and not (page < len(pages[segment]) and pages[segment][page]):
                    continue
                first = token + int(page) * PAGE_ROWS
                if ranking.beats(float(page_score[page]), layer, first, unit):
                    node = (-float(page_score[page]), first, position, page_of_rows, segment)
                    heapq.heappush(nodes, node)
            continue
        effort.pages_read += 1
        length = array.rows_of(segment)
        base = segment * spec.segment_rows
        special = rows.special_rows(segment)
        if kind == special_rows:
            offsets = np.flatnonzero(special & rows.within(segment, length)).astype(np.int64)
            raw = spec.dtype.to_float32(array.reader.cells(segment, layer, offsets, unit))
        else:
            start = token - base
            stop = min(start + PAGE_ROWS, length)
            chunk, inside = divmod(unit, spec.chunk_width)
            place = (segment, start, chunk)
            if place not in blocks:
                if len(blocks) >= 64:
                    blocks.pop(next(iter(blocks)))
                blocks[place] = spec.dtype.to_float32(
                    array.reader.window(segment, layer, start, stop, [chunk])
                )
            mask = ~special[start:stop]
            if rows.rows is not None:
                mask &= rows.within(segment, length)[start:stop]
            offsets = start + np.flatnonzero(mask)
            raw = blocks[place][mask, inside]
        ranking.offer(
            Candidates(
                derived_value(raw, c[position]),
                np.full(len(raw), layer, np.int64),
                base + offsets,
                np.full(len(raw), unit, np.int64),
            )
        )


Window = tuple[int, int, npt.NDArray[np.float32]]
"""Layer, first global row, and float32 values ``(row, unit)``."""


def search_scan(
    windows: Iterator[Window], segment_rows: int, units: UnitSelection, rows: RowSelection,
    ranking: Ranking,
) -> int:
    """Offer every value of a stream of windows; returns the cells looked at.

    A window must not cross a segment.
    """
    cells = 0
    for layer, first, values in windows:
        chosen = units.of(layer)
        segment, start = divmod(first, segment_rows)
        allowed = rows.allowed(segment, start + len(values))[start:]
        picked = values[np.ix_(np.flatnonzero(allowed), chosen)]
        cells += picked.size
        score = (picked if ranking.largest else -picked) + np.float32(0)
        with np.errstate(invalid="ignore"):
            row, column = np.nonzero(score >= np.float32(ranking.threshold))
        ranking.offer(
            Candidates(
                picked[row, column],
                np.full(len(row), layer, np.int64),
                first + np.flatnonzero(allowed)[row],
                chosen[column],
            )
        )
    return cells
