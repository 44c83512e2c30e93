"""The k best units of each of some tokens: rows are read, nothing is searched."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from actstore.query.planner import Outcome
from actstore.query.questions import Question
from actstore.query.ranking import Candidates
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["rank_by_token"]

_ROWS_AT_ONCE = 512


def rank_by_token(question: Question, max_cells: int, outcome: Outcome) -> Candidates:
    """The answers by token, then by rank.

    Args:
        question: with ``per="token"``.
        max_cells: most values that may be looked at.
        outcome: told what was done.

    Raises:
        InvalidInput: the rows hold more values than that.
        Unavailable: the store cannot derive the scalar.
    """
    store, scored = question.store, question.scored
    outcome.plans.add("rows")
    outcome.source = scored.source
    tokens = np.concatenate([np.empty(0, np.int64), *question.rows.tokens(store.reader.segments)])
    cells = len(tokens) * question.units.columns * len(question.units.layers)
    if cells > max_cells:
        raise InvalidInput(
            f"{len(tokens):,} tokens have {cells:,} values of {question.declared.name}, more than "
            f"max_cells={max_cells:,}. Name fewer tokens or layers, or raise max_cells.",
            kind=ErrorKind.TOO_LARGE,
        )
    outcome.cells += cells
    parts = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        part = tokens[start : start + _ROWS_AT_ONCE]
        best: list[Candidates] = []
        for candidates in _by_layer(question, part):
            best = [_best(question, [*best, candidates])]
        parts += best
    return Candidates.join(parts)


def _by_layer(question: Question, tokens: npt.NDArray[np.int64]) -> Iterator[Candidates]:
    """The values of some rows that may be among a layer's k best."""
    for layer in question.units.layers:
        chosen = question.units.of(layer)
        if not len(chosen):
            continue
        values = question.scored.values.rows(layer, tokens)[:, chosen]
        with np.errstate(invalid="ignore"):
            score = np.where(np.isnan(values), np.float32(-np.inf), _score(question, values))
        k = min(question.k, len(chosen))
        floor = np.partition(score, len(chosen) - k, axis=1)[:, len(chosen) - k]
        row, unit = np.nonzero((score >= floor[:, None]) & ~np.isnan(values))
        yield Candidates(
            values[row, unit], np.full(len(row), layer, np.int64), tokens[row], chosen[unit]
        )


def _score(question: Question, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if question.by == "magnitude":
        return np.abs(values)
    return (values if question.ends[0] else -values) + np.float32(0)


def _best(question: Question, parts: Sequence[Candidates]) -> Candidates:
    """The k best of each token, by token."""
    found = Candidates.join(list(parts))
    score = _score(question, found.value)
    order = np.lexsort((found.unit, found.layer, -score, found.token))
    found = found.take(order)
    place = np.arange(len(found)) - np.searchsorted(found.token, found.token)
    return found.take(place < question.k)
