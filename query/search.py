"""Exact search for the k best of bounded values: lists, then branch and bound.

The proof of exactness, in short. Cells (a page of rows of one unit) carry an upper
bound of their score. They are visited by bound descending, then place ascending, and
the k best elements seen are kept. The first cell that cannot beat the k-th best, by
value or by place at equal value, ends the search: every later cell has a lower bound,
or the same bound and a later place. Lists shorten this: an element outside the proven
part of a unit's list ranks after its last proven entry.

Cells are taken a batch at a time, so that a cold disk sees all of a batch's reads at once; what
a batch holds too much is announced and not read.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from actstore.query.ranking import Candidates, Ranking
from actstore.query.selection import RowSelection, UnitSelection
from actstore.query.zoned import Bounds, ZonedValues
from actstore.store.unit_grid import PAGE_ROWS

__all__ = ["Effort", "Window", "search_bounds", "search_lists", "search_windows"]

_KEPT_BLOCKS = 64
_LEAST_BATCH = 4
_LARGEST_BATCH = 32


@dataclass
class Effort:
    """What a search did, for its certificate."""

    pages_read: int = 0
    pages_total: int = 0
    bound: float = float("-inf")


def search_lists(
    source: ZonedValues, units: UnitSelection, rows: RowSelection, ranking: Ranking
) -> dict[int, npt.NDArray[np.int64]]:
    """Offer the entries of the units' lists.

    Returns:
        layer -> the units whose unseen elements might still enter; empty when the ranking
        is the answer.
    """
    ends: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.bool_]]] = []
    bounds: list[npt.NDArray[np.float32]] = []
    for layer in units.layers:
        chosen = units.of(layer)
        if not len(chosen):
            continue
        lists = source.lists(layer, chosen, ranking.largest)
        if lists is None:
            ends.append((layer, chosen, np.zeros(len(chosen), bool)))
            bounds.append(np.full(len(chosen), np.inf, np.float32))
            continue
        # Entries beyond the proven depth are values of the unit all the same.
        exists = lists.rows >= 0
        allowed = exists & rows.contains(lists.rows.reshape(-1)).reshape(lists.rows.shape)
        unit, rank = np.nonzero(allowed)
        ranking.offer(
            Candidates(
                lists.values[unit, rank],
                np.full(len(unit), layer, np.int64),
                lists.rows[unit, rank],
                chosen[unit],
            )
        )
        ends.append((layer, chosen, lists.complete))
        bounds.append(lists.bound)
    open_units = {}
    for (layer, chosen, complete), bound in zip(ends, bounds, strict=True):
        # A list that holds every value of its unit leaves nothing unseen.
        still = (bound >= ranking.threshold) & ~complete
        if rows.special or still.any():
            open_units[layer] = chosen if rows.special else chosen[still]
    return open_units


def search_bounds(
    source: ZonedValues,
    units: UnitSelection,
    rows: RowSelection,
    ranking: Ranking,
    effort: Effort,
    max_share: float | None = None,
) -> bool:
    """Branch and bound over segments, then pages; leaves the exact answer in ``ranking``.

    Args:
        source: the values.
        units: units that may answer.
        rows: rows that may answer.
        ranking: changed.
        effort: told what was done.
        max_share: give up once this share of a layer's pages has been read; None never.

    Returns:
        Whether the search came to its end; else the ranking holds good answers, not all.
    """
    for layer in units.layers:
        chosen = units.of(layer)
        if len(chosen) and not _LayerSearch(source, layer, chosen, rows, ranking, effort).run(
            max_share
        ):
            return False
    effort.bound = ranking.threshold
    return True


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
        source: ZonedValues,
        layer: int,
        units: npt.NDArray[np.int64],
        rows: RowSelection,
        ranking: Ranking,
        effort: Effort,
    ) -> None:
        self._source = source
        self._reader = source.reader
        self._width = source.reader.chunk_width
        self._layer = layer
        self._units = units
        self._rows = rows
        self._ranking = ranking
        self._effort = effort
        indexed = set(source.segments)
        self._segments = [s for s in rows.segments(source.segments) if s in indexed]
        # Without a predicate a page's own zone says whether it holds an ordinary row.
        restricted = self._segments if rows.rows is not None else []
        self._pages = {s: rows.pages(s, source.rows_of(s)) for s in restricted}
        self._blocks: OrderedDict[tuple[int, int, int], npt.NDArray[np.float32]] = OrderedDict()
        self._batch = min(max(ranking.k, _LEAST_BATCH), _LARGEST_BATCH)
        self._total = len(units) * sum(
            int(self._pages[s].sum()) if s in self._pages else -(-source.rows_of(s) // PAGE_ROWS)
            for s in self._segments
        )
        effort.pages_total += self._total

    def run(self, max_share: float | None) -> bool:
        """Visit nodes by bound until none can enter the ranking; whether it came so far."""
        nodes = self._first_nodes()
        heapq.heapify(nodes)
        limit = None if max_share is None else max(1, int(max_share * self._total))
        read = 0
        while batch := self._next_batch(nodes):
            if any(node.kind is _Kind.SEGMENT for node in batch):
                for node in batch:
                    if node.kind is _Kind.SEGMENT:
                        nodes.extend(self._page_nodes(node))
                    else:
                        nodes.append(node)
                heapq.heapify(nodes)
                continue
            self._announce(batch)
            for node in batch:
                if not self._may_enter(node):
                    # Nodes come by (bound, token, unit), as answers rank within a layer.
                    return True
                if limit is not None and read >= limit:
                    return False
                read += 1
                self._effort.pages_read += 1
                unit = int(self._units[node.position])
                values, offsets = self._read(node, unit)
                self._ranking.offer(
                    Candidates(
                        values,
                        np.full(len(values), self._layer, np.int64),
                        node.segment * self._source.segment_rows + offsets,
                        np.full(len(values), unit, np.int64),
                    )
                )
        return True

    def _may_enter(self, node: _Node) -> bool:
        unit = int(self._units[node.position])
        return self._ranking.beats(-node.negative_bound, self._layer, node.token, unit)

    def _next_batch(self, nodes: list[_Node]) -> list[_Node]:
        """The next nodes that may enter the ranking as it is now."""
        batch: list[_Node] = []
        while nodes and len(batch) < self._batch and self._may_enter(nodes[0]):
            batch.append(heapq.heappop(nodes))
        return batch

    def _announce(self, batch: Sequence[_Node]) -> None:
        """Let the disk see all of a batch's pages at once."""
        if len(batch) < 2:
            return
        for node in sorted(batch, key=lambda one: (one.segment, one.token)):
            if node.kind is _Kind.PAGE:
                start, stop = self._extent(node)
                chunk = int(self._units[node.position]) // self._width
                if (node.segment, start, chunk) not in self._blocks:
                    self._reader.prefetch(node.segment, self._layer, start, stop, [chunk])

    def _first_nodes(self) -> list[_Node]:
        place = {segment: number for number, segment in enumerate(self._source.segments)}
        columns = np.array([place[segment] for segment in self._segments], np.int64)
        numbers = np.array(self._segments, np.int64)
        kinds = [_Kind.SEGMENT, *([_Kind.SPECIAL_ROWS] if self._rows.special else [])]
        nodes: list[_Node] = []
        for kind in kinds:
            bounds = self._source.segment_bounds(
                self._layer, self._units, kind is _Kind.SPECIAL_ROWS
            )
            score = self._scores(bounds)[:, columns]
            # Empty is a property of the zone: minus infinity is a score like any other.
            reached = (score >= self._ranking.threshold) & bounds.filled[:, columns]
            position, column = np.nonzero(reached)
            nodes += map(
                _Node,
                (-score[position, column]).tolist(),
                (numbers[column] * self._source.segment_rows).tolist(),
                position.tolist(),
                [kind] * len(position),
                numbers[column].tolist(),
            )
        return nodes

    def _page_nodes(self, node: _Node) -> Iterator[_Node]:
        unit = int(self._units[node.position])
        bounds = self._source.page_bounds(node.segment, self._layer, np.array([unit]))
        score, filled = self._scores(bounds)[0], bounds.filled[0]
        if node.segment in self._pages:
            allowed = self._pages[node.segment]
            filled[: len(allowed)] &= allowed
        for page in np.flatnonzero(filled & (score >= self._ranking.threshold)).tolist():
            first = node.token + page * PAGE_ROWS
            if self._ranking.beats(float(score[page]), self._layer, first, unit):
                yield _Node(-float(score[page]), first, node.position, _Kind.PAGE, node.segment)

    def _extent(self, node: _Node) -> tuple[int, int]:
        """A page's rows within its segment."""
        start = node.token - node.segment * self._source.segment_rows
        return start, min(start + PAGE_ROWS, self._source.rows_of(node.segment))

    def _read(
        self, node: _Node, unit: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Values of a node's allowed rows, and those rows within the segment."""
        segment = node.segment
        length = self._source.rows_of(segment)
        special = self._rows.special_rows(segment)
        within = self._rows.within(segment, length)
        if node.kind is _Kind.SPECIAL_ROWS:
            offsets = np.flatnonzero(special & within)
            return self._reader.cells(segment, self._layer, offsets, unit), offsets
        start, stop = self._extent(node)
        inside = np.flatnonzero((within & ~special)[start:stop])
        if len(self._units) == 1:
            values = self._reader.column(segment, self._layer, start, stop, unit)
        else:
            chunk, column = divmod(unit, self._width)
            values = self._block(segment, start, stop, chunk)[:, column]
        return values[inside], start + inside

    def _block(self, segment: int, start: int, stop: int, chunk: int) -> npt.NDArray[np.float32]:
        """A page's rows of a chunk of units: what one read costs, kept for its other units."""
        key = (segment, start, chunk)
        if key not in self._blocks:
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
            self._blocks[key] = self._reader.block(segment, self._layer, start, stop, [chunk])
        return self._blocks[key]

    def _scores(self, bounds: Bounds) -> npt.NDArray[np.float32]:
        # Adding zero turns -0.0 into 0.0: at equal value the place decides.
        return bounds.scores(self._ranking.largest) + np.float32(0)


class Window(NamedTuple):
    """Some rows of a layer.

    Attributes:
        layer: the layer.
        tokens: global rows that may answer, int64 ``(row,)``.
        values: float32 ``(row, column)``.
        units: the unit of each column, ascending; None for all units.
    """

    layer: int
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    units: npt.NDArray[np.int64] | None = None

    def of(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The values of some of its units, ``(row, unit)``."""
        columns = chosen if self.units is None else np.searchsorted(self.units, chosen)
        return self.values[:, columns]


def search_windows(
    windows: Iterator[Window], groups: Sequence[tuple[UnitSelection, Ranking]]
) -> int:
    """Offer every value of a stream of windows to every group; returns the values looked at."""
    cells = 0
    for window in windows:
        layer, tokens = window.layer, window.tokens
        for units, ranking in groups:
            if layer not in units.layers:
                continue
            chosen = units.of(layer)
            picked = window.of(chosen)
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
