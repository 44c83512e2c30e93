"""Exact search for the k best values of a scaled array: lists, then branch and bound.

The proof of exactness, in short. Cells (a page of rows of one unit) carry an upper
bound of their score. They are visited by bound descending, then place ascending, and
the k best elements seen are kept. The first cell that cannot beat the k-th best, by
value or by place at equal value, ends the search: every later cell has a lower bound,
or the same bound and a later place. Lists shorten this: an element outside the proven
part of a unit's list ranks after its last proven entry.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from actstore.query.bounds import derived_value, score_bounds
from actstore.query.ranking import Candidates, Ranking
from actstore.query.selection import RowSelection, UnitSelection
from actstore.store.index import UnitIndex
from actstore.store.keys import key_values
from actstore.store.layout import PAGE_ROWS
from actstore.store.reader import StoredArray

if TYPE_CHECKING:
    from actstore.store.unit_lists import Tail

__all__ = ["Effort", "ScaledArray", "Window", "search_bounds", "search_lists", "search_windows"]

_KEPT_BLOCKS = 64


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


def search_lists(
    source: ScaledArray, units: UnitSelection, rows: RowSelection, ranking: Ranking
) -> dict[int, npt.NDArray[np.int64]]:
    """Offer the proven entries of the units' lists.

    Returns:
        layer -> the units whose unseen elements might still enter; empty when the ranking
        is the answer.
    """
    dtype = source.array.spec.dtype
    ends: list[
        tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.bool_]]
    ] = []
    for layer in units.layers:
        chosen = units.of(layer)
        if not len(chosen):
            continue
        c = source.coefficients(layer)[chosen]
        upward = (c >= 0) == ranking.largest
        end = np.full(len(chosen), np.inf, np.float32)
        complete = np.zeros(len(chosen), bool)
        tails: tuple[tuple[Tail, npt.NDArray[np.bool_]], ...] = (("top", upward), ("low", ~upward))
        for tail, members in tails:
            picked = np.flatnonzero(members)
            if not len(picked):
                continue
            lists = source.index.layer_lists(layer, tail, chosen[picked])
            if not lists.keys.shape[1]:
                continue
            value = derived_value(key_values(lists.keys, dtype), c[picked, None])
            # Entries beyond the proven depth are values of the unit all the same.
            exists = lists.rows >= 0
            allowed = exists & rows.contains(lists.rows.reshape(-1)).reshape(lists.rows.shape)
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
            end[picked] = np.where(np.isnan(score) | (lists.proven == 0), np.float32(np.inf), score)
            # A list that holds every value of its unit leaves nothing unseen.
            complete[picked] = lists.complete
        ends.append((layer, chosen, end, complete))
    open_units = {}
    for layer, chosen, end, complete in ends:
        still = (end >= ranking.threshold) & ~complete
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
            _LayerSearch(source, layer, chosen, rows, ranking, effort).run()
    effort.bound = ranking.threshold


class _Kind(IntEnum):
    """What a node of the search stands for; at equal bound and place the coarser goes first."""

    SEGMENT = 0
    PAGE = 1
    SPECIAL_ROWS = 2


class _Node(NamedTuple):
    """Cells still to be looked at, in the order of visiting them."""

    negative_bound: float
    token: int
    position: int
    kind: _Kind
    segment: int


class _LayerSearch:
    """Branch and bound over the segments and pages of one layer."""

    def __init__(
        self,
        source: ScaledArray,
        layer: int,
        units: npt.NDArray[np.int64],
        rows: RowSelection,
        ranking: Ranking,
        effort: Effort,
    ) -> None:
        self._array = source.array
        self._spec = source.array.spec
        self._layer = layer
        self._units = units
        self._rows = rows
        self._ranking = ranking
        self._effort = effort
        self._coefficients = source.coefficients(layer)[units]
        self._bounds = source.index.segment_bounds(layer, units)
        indexed = set(self._bounds.segments)
        self._segments = [s for s in rows.segments(self._array.segments) if s in indexed]
        # Without a predicate a page's own zone says whether it holds an ordinary row.
        restricted = self._segments if rows.rows is not None else []
        self._pages = {s: rows.pages(s, self._array.rows_of(s)) for s in restricted}
        self._blocks: OrderedDict[tuple[int, int, int], npt.NDArray[np.float32]] = OrderedDict()
        effort.pages_total += len(units) * sum(
            int(self._pages[s].sum())
            if s in self._pages
            else -(-self._array.rows_of(s) // PAGE_ROWS)
            for s in self._segments
        )

    def run(self) -> None:
        """Visit nodes by bound until none can enter the ranking."""
        nodes = self._first_nodes()
        heapq.heapify(nodes)
        while nodes:
            node = heapq.heappop(nodes)
            unit = int(self._units[node.position])
            if not self._ranking.beats(-node.negative_bound, self._layer, node.token, unit):
                # Nodes come by (bound, token, unit), as answers rank within a layer.
                return
            if node.kind is _Kind.SEGMENT:
                for page in self._page_nodes(node, unit):
                    heapq.heappush(nodes, page)
            else:
                self._effort.pages_read += 1
                raw, offsets = self._read(node, unit)
                self._ranking.offer(
                    Candidates(
                        derived_value(raw, self._coefficients[node.position]),
                        np.full(len(raw), self._layer, np.int64),
                        node.segment * self._spec.segment_rows + offsets,
                        np.full(len(raw), unit, np.int64),
                    )
                )

    def _first_nodes(self) -> list[_Node]:
        bounds = self._bounds
        place = {segment: number for number, segment in enumerate(bounds.segments)}
        columns = np.array([place[segment] for segment in self._segments], np.int64)
        numbers = np.array(self._segments, np.int64)
        tables = [(_Kind.SEGMENT, bounds.maximum, bounds.minimum)]
        if self._rows.special:
            tables.append((_Kind.SPECIAL_ROWS, bounds.special_maximum, bounds.special_minimum))
        nodes: list[_Node] = []
        for kind, maximum, minimum in tables:
            high, low = maximum[:, columns], minimum[:, columns]
            score = self._score(high, low, self._coefficients)
            # Empty is a property of the zone: minus infinity is a score like any other.
            position, column = np.nonzero((score >= self._ranking.threshold) & (high >= low))
            nodes += map(
                _Node,
                (-score[position, column]).tolist(),
                (numbers[column] * self._spec.segment_rows).tolist(),
                position.tolist(),
                [kind] * len(position),
                numbers[column].tolist(),
            )
        return nodes

    def _page_nodes(self, node: _Node, unit: int) -> Iterator[_Node]:
        zones = self._array.zones(node.segment)
        high = zones.row("page_max", self._layer, unit)
        low = zones.row("page_min", self._layer, unit)
        coefficient = self._coefficients[node.position : node.position + 1]
        score = self._score(high[None], low[None], coefficient)[0]
        filled = high >= low
        if node.segment in self._pages:
            allowed = self._pages[node.segment]
            filled[: len(allowed)] &= allowed
        for page in np.flatnonzero(filled).tolist():
            first = node.token + page * PAGE_ROWS
            if self._ranking.beats(float(score[page]), self._layer, first, unit):
                yield _Node(-float(score[page]), first, node.position, _Kind.PAGE, node.segment)

    def _read(
        self, node: _Node, unit: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Raw float32 values of a node's allowed rows, and those rows within the segment."""
        spec, segment = self._spec, node.segment
        length = self._array.rows_of(segment)
        special = self._rows.special_rows(segment)
        within = self._rows.within(segment, length)
        if node.kind is _Kind.SPECIAL_ROWS:
            offsets = np.flatnonzero(special & within)
            stored = self._array.reader.cells(segment, self._layer, offsets, unit)
            return spec.dtype.to_float32(stored), offsets
        start = node.token - segment * spec.segment_rows
        stop = min(start + PAGE_ROWS, length)
        chunk, inside = divmod(unit, spec.chunk_width)
        block = self._block(segment, start, stop, chunk)
        mask = (within & ~special)[start:stop]
        return block[mask, inside], start + np.flatnonzero(mask)

    def _block(self, segment: int, start: int, stop: int, chunk: int) -> npt.NDArray[np.float32]:
        """A page's rows of 32 units: what one read costs, kept for its other units."""
        key = (segment, start, chunk)
        if key not in self._blocks:
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
            stored = self._array.reader.window(segment, self._layer, start, stop, [chunk])
            self._blocks[key] = self._spec.dtype.to_float32(stored)
        return self._blocks[key]

    def _score(
        self,
        maximum: npt.NDArray[np.signedinteger],
        minimum: npt.NDArray[np.signedinteger],
        coefficient: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float32]:
        """Bounds on the score of zones, given the keys of their extremes."""
        dtype = self._spec.dtype
        empty = maximum < minimum
        return score_bounds(
            key_values(np.where(empty, 0, maximum), dtype),
            key_values(np.where(empty, 0, minimum), dtype),
            coefficient,
            self._ranking.largest,
        )


Window = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Layer, global rows that may answer, and their float32 values ``(row, unit)``."""


def search_windows(
    windows: Iterator[Window], groups: Sequence[tuple[UnitSelection, Ranking]]
) -> int:
    """Offer every value of a stream of windows to every group; returns the values looked at."""
    cells = 0
    for layer, tokens, values in windows:
        for units, ranking in groups:
            if layer not in units.layers:
                continue
            chosen = units.of(layer)
            picked = values[:, chosen]
            cells += picked.size
            score = (picked if ranking.largest else -picked) + np.float32(0)
            with np.errstate(invalid="ignore"):
                row, column = np.nonzero(score >= np.float32(ranking.threshold))
            ranking.offer(
                Candidates(
                    picked[row, column],
                    np.full(len(row), layer, np.int64),
                    tokens[row],
                    chosen[column],
                )
            )
    return cells
