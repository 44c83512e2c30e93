"""Exact search for the k best kept latents: by latent, in the order of bounds.

A latent is zero almost everywhere, and zeros are values too. The order of scores (values,
or negated values for the least) has three parts, searched one after another:

1. scores above zero. A cell is one latent in one segment; its bound is its greatest
   non-zero score. Cells are read by bound descending, then place ascending, until the next
   one cannot beat the k-th best: all later ones have a lower bound, or the same bound and a
   later place.
2. zeros, by layer, token, latent: rows in order, until the next row comes too late.
3. scores below zero, as the first part.

A layer whose cells are read too often is scanned instead: every entry once, by token.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.latent_sets import describe_kept
from actstore.query.ranking import Candidates, Ranking
from actstore.query.selection import RowSelection, UnitSelection

if TYPE_CHECKING:
    from actstore.query.planner import Outcome
    from actstore.store.latent_reader import LatentArray, LatentRows

__all__ = ["search_latents"]

_ENTRIES_OF_A_CELL = 600
"""Entries that a scan goes through while one cell is read."""

_LEAST_CELLS = 256
"""Cells that are read before a scan is thought of."""

_FEW_ROWS = 4096
"""Rows of a predicate that are read by token at once."""

_FEW_LATENTS = 64
"""Latents whose zeros are found by latent; those of more are found by token."""

_MANY_GROUPS = 32
"""Groups for which one scan is cheaper than a search each."""

_SPREAD = 8
"""Rows are picked from all between the first and the last if at least one in so many is asked for."""

_DENSE_CELLS = 4_000_000
_KEPT_MASKS = 64


def search_latents(
    arrays: "Mapping[int, LatentArray]",
    groups: Sequence[tuple[UnitSelection, Ranking]],
    rows: RowSelection,
    segments: Sequence[int],
    outcome: "Outcome",
) -> None:
    """Fill the ranking of every group of latents, exactly.

    Args:
        arrays: the kept latents by layer, of the same segments.
        groups: latents that may answer, with their rankings; changed.
        rows: rows that may answer.
        segments: the segments of all arrays, ascending.
        outcome: told what was done.
    """
    outcome.source = describe_kept(arrays.values())
    wanted = rows.segments(list(segments))
    few = rows.rows is not None and len(rows.rows) <= _FEW_ROWS
    for layer in sorted({layer for units, _ in groups for layer in units.layers}):
        chosen = [
            (kept[kept < arrays[layer].n_latents], ranking)
            for units, ranking in groups
            if layer in units.layers
            for kept in [units.of(layer)]
        ]
        search = _LayerSearch(arrays[layer], layer, rows, wanted, outcome)
        if few or len(chosen) > _MANY_GROUPS:
            search.scan(chosen)
            for latents, ranking in chosen:
                search.zeros(latents, ranking)
            continue
        for latents, ranking in chosen:
            search.run(latents, ranking)


class _LayerSearch:
    """The search of one layer."""

    def __init__(
        self,
        array: "LatentArray",
        layer: int,
        rows: RowSelection,
        segments: list[int],
        outcome: "Outcome",
    ) -> None:
        self._array = array
        self._layer = layer
        self._rows = rows
        self._segments = segments
        self._outcome = outcome
        self._size = array.segment_rows
        # A method's cache would keep every search alive.
        self._allowed = lru_cache(_KEPT_MASKS)(
            lambda segment: rows.allowed(segment, array.rows_of(segment))
        )

    def run(self, latents: npt.NDArray[np.int64], ranking: Ranking) -> None:
        """Cells above zero, zeros, cells below zero."""
        if not len(latents):
            return
        self._outcome.plans.add("column")
        score, segment, latent = self._cells(latents, ranking)
        self._outcome.effort.pages_total += len(score)
        above = int(np.searchsorted(-score, 0, side="left"))
        entries = sum(self._array.entries(number) for number in self._segments)
        budget = max(_LEAST_CELLS, entries // _ENTRIES_OF_A_CELL)
        for part in (slice(0, above), slice(above, None)):
            cells = zip(
                score[part].tolist(), segment[part].tolist(), latent[part].tolist(), strict=True
            )
            for bound, number, one in cells:
                if not ranking.beats(bound, self._layer, number * self._size, one):
                    break
                if budget == 0:
                    self.scan([(latents, ranking)])
                    self.zeros(latents, ranking)
                    return
                budget -= 1
                self._outcome.effort.pages_read += 1
                self._offer_cell(number, one, ranking)
            if part.start == 0:
                self.zeros(latents, ranking)

    def _cells(
        self, latents: npt.NDArray[np.int64], ranking: Ranking
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bounds, segments and latents of the cells that may hold an answer, in order.

        A bound is one of the cell's values unless a predicate leaves it out. Then the k-th
        greatest bound so far is no better than the k-th answer, and lower cells hold none.
        """
        scores, segments, found = [], [], []
        floor, best = ranking.threshold, np.empty(0, np.float32)
        is_reached = self._rows.rows is None and not ranking.is_distinct
        for segment in self._segments:
            extremes = self._array.extremes(segment, latents)
            columns = (0, 2) if ranking.largest else (1, 3)
            values = extremes[:, columns if self._rows.special else columns[:1]]
            score = (values if ranking.largest else -values).max(axis=1)
            kept = np.flatnonzero((score > -np.inf) & (score >= floor))
            scores.append(score[kept])
            if is_reached:
                best = np.concatenate([best, score[kept]])
                if len(best) >= ranking.k:
                    best = np.partition(best, -ranking.k)[-ranking.k :]
                    floor = max(floor, float(best[0]))
            segments.append(np.full(len(kept), segment))
            found.append(latents[kept])
        if not scores:
            return np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
        score, segment_of, latent = map(np.concatenate, (scores, segments, found))
        # Stable, and latents ascend within each segment already.
        order = np.argsort(-score, kind="stable")
        return score[order], segment_of[order], latent[order]

    def _offer_cell(self, segment: int, latent: int, ranking: Ranking) -> None:
        rows, values = self._array.by_latent(segment, latent)
        kept = self._allowed(segment)[rows]
        self._offer(values[kept], segment * self._size + rows[kept], latent, ranking)

    def _offer(
        self,
        values: npt.NDArray[np.float32],
        tokens: npt.NDArray[np.int64],
        latent: int | npt.NDArray[np.int64],
        ranking: Ranking,
    ) -> None:
        latents = np.broadcast_to(np.asarray(latent, np.int64), values.shape)
        ranking.offer(
            Candidates(values, np.full(len(values), self._layer, np.int64), tokens, latents)
        )

    def scan(self, groups: Iterable[tuple[npt.NDArray[np.int64], Ranking]]) -> None:
        """Offer every non-zero value of the rows that may answer, read by token."""
        groups = list(groups)
        whole = len(groups) > 1
        for tokens in self._row_groups():
            found = self._read(tokens)
            places, latents, values = tokens[found.index], found.latents, found.values
            self._outcome.plans.add("scan" if self._rows.rows is None else "rows")
            self._outcome.cells += len(values)
            if whole:
                # Sorted once, so that each group takes its latents' stretches.
                order = np.argsort(latents, kind="stable")
                places, latents, values = places[order], latents[order], values[order]
            for chosen, ranking in groups:
                if whole and len(chosen) == 1:
                    low, high = np.searchsorted(latents, [chosen[0], chosen[0] + 1])
                    kept: slice | npt.NDArray[np.bool_] = slice(low, high)
                elif len(chosen) == self._array.n_latents:
                    kept = slice(None)
                else:
                    kept = np.isin(latents, chosen)
                self._offer(values[kept], places[kept], latents[kept], ranking)

    def _read(self, tokens: npt.NDArray[np.int64]) -> "LatentRows":
        """Latents of ascending rows of one segment; many are picked from all between them."""
        if not len(tokens) or len(tokens) * _SPREAD < tokens[-1] + 1 - tokens[0]:
            return self._array.by_token(tokens)
        segment, start = divmod(int(tokens[0]), self._size)
        window = self._array.window(segment, start, int(tokens[-1]) + 1 - segment * self._size)
        return window.take(tokens - tokens[0])

    def _row_groups(self) -> Iterable[npt.NDArray[np.int64]]:
        """The rows that may answer, ascending, a segment at a time."""
        for segment in self._segments:
            yield segment * self._size + np.flatnonzero(self._allowed(segment))

    def zeros(self, latents: npt.NDArray[np.int64], ranking: Ranking) -> None:
        """Offer zeros in the order of their rows until no later one can enter."""
        if not len(latents):
            return
        first = int(latents[0])
        for tokens in self._row_groups():
            if not len(tokens):
                continue
            if not ranking.beats(0.0, self._layer, int(tokens[0]), first):
                return
            if len(latents) <= _FEW_LATENTS:
                self._zeros_by_latent(tokens, latents, ranking)
            else:
                self._zeros_by_token(tokens, latents, ranking)

    def _zeros_by_latent(
        self, tokens: npt.NDArray[np.int64], latents: npt.NDArray[np.int64], ranking: Ranking
    ) -> None:
        segment = int(tokens[0]) // self._size
        for latent in latents.tolist():
            rows, _ = self._array.by_latent(segment, latent)
            free = np.ones(self._size, bool)
            free[rows] = False
            zeros = tokens[free[tokens - segment * self._size]]
            self._outcome.effort.pages_read += 1
            self._offer(np.zeros(len(zeros), np.float32), zeros, latent, ranking)

    def _zeros_by_token(
        self, tokens: npt.NDArray[np.int64], latents: npt.NDArray[np.int64], ranking: Ranking
    ) -> None:
        step = 16
        start = 0
        while start < len(tokens):
            part = tokens[start : start + step]
            if not ranking.beats(0.0, self._layer, int(part[0]), int(latents[0])):
                return
            is_zero = self._read(part).dense(self._array.n_latents)[:, latents] == 0
            # More zeros of one row than answers are wanted cannot all be among them.
            is_zero &= is_zero.cumsum(axis=1) <= ranking.k
            row, column = np.nonzero(is_zero)
            self._outcome.cells += is_zero.size
            self._offer(np.zeros(len(row), np.float32), part[row], latents[column], ranking)
            start += step
            step = max(1, min(2 * step, _DENSE_CELLS // self._array.n_latents))
