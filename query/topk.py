"""The k best values of a derived scalar over layers, tokens and units: exact, always.

The planner prefers what reads least: the units' proven lists, then branch and bound
over zone maps, then a scan under a budget of cells. All three keep their answer in one
:class:`Ranking`, so they agree to the last tie.
"""

from functools import partial
from typing import TYPE_CHECKING, Unpack

import numpy as np

from actstore.query.answers import answer_table, certify
from actstore.query.derived import DerivedScalar
from actstore.query.planner import SCAN_CELLS, Group, Outcome, rank
from actstore.query.questions import Question, QuestionOptions, ask
from actstore.query.ranking import Candidates
from actstore.query.results import Certificate, TopK
from actstore.query.token_ranking import rank_by_token

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["rank_question", "topk"]


def topk(
    store: "OpenStore",
    name: str | DerivedScalar,
    *,
    max_cells: int = SCAN_CELLS,
    **options: Unpack[QuestionOptions],
) -> TopK:
    """Rank every value of a derived scalar and return the k best.

    Args:
        store: the open store.
        name: a derived scalar, such as ``mlp_write_norm``, or a location's name; or a
            declaration, such as a projection's.
        max_cells: refuse a scan of more values than this.
        options: what is asked:

            * ``k``: number of answers; with ``per``, of each group. 20 by default.
            * ``layers``: layers that may answer; all by default.
            * ``neurons``, ``heads``, ``latents``, ``channels``: units that may answer, by the
              scalar's own axes; all by default. ``attended``: positions of attended tokens.
            * ``units``: SQL predicate over the columns of ``neurons`` (``heads``,
              ``latents``), or (layer, unit) pairs.
            * ``tokens``: global rows that may answer.
            * ``where``: SQL predicate over the columns of tokens, sequences and documents.
            * ``per``: ``layer``, the unit's own dimension (``neuron`` …) or ``token``, for k
              answers of each. ``token`` needs ``tokens`` or ``where``.
            * ``distinct``: ``sequence`` or ``document`` for at most one answer from each.
            * ``largest``: greatest values; False for the least.
            * ``by``: rank by ``value`` or by ``magnitude`` (absolute value; the value is
              returned).
            * ``normalise``: make units comparable over their ordinary rows: ``max`` divides
              by the unit's greatest magnitude, ``std`` takes the unit's mean away and divides
              by its standard deviation. Ranked by ``score``, with the value beside it.
            * ``combine``: one score per token from all the units that were named: ``sum``,
              ``mean``, ``max`` or ``min`` of their values.
            * ``special``: let special rows (position 0, special tokens) answer too.
            * ``pass_type``: ``backward`` ranks the gradient of the store's objective with
              respect to the scalar, where it has one.

    Returns:
        The answers by value descending (ascending for the least), then layer, token and
        unit ascending, with the certificate of how they were found. With ``per`` group after
        group.

    Raises:
        InvalidInput: an unknown scalar, layer or unit, a bad predicate, or a scan over budget.
        Unavailable: the store cannot derive the scalar.
    """
    question = ask(store, name, **options)
    answer, certificate = rank_question(question, max_cells)
    places = store.row_map.of_tokens(answer.token)
    table = answer_table(question, answer, places)
    return TopK(table, certificate, partial(store.row_texts, places))


def rank_question(question: Question, max_cells: int) -> tuple[Candidates, Certificate]:
    """The answers to a question, in order, and how they were found.

    Raises:
        InvalidInput: a scan of more values than ``max_cells`` would be needed.
        Unavailable: the store cannot derive the scalar.
    """
    outcome = Outcome()
    bound = None
    if question.per == "token":
        answer = rank_by_token(question, max_cells, outcome)
    else:
        found = _rank_groups(question, max_cells, outcome)
        if len(found) == 1 and len(found[0]) >= question.k:
            last = found[0].value[-1]
            bound = float(np.abs(last) if question.by == "magnitude" else last)
        answer = Candidates.join(found)
    return answer, certify(question, outcome, bound)


def _rank_groups(question: Question, max_cells: int, outcome: Outcome) -> list[Candidates]:
    """The best of every group."""
    groups = question.groups()
    rankings = [[question.ranking(end) for end in question.ends] for _ in groups]
    for number in range(len(question.ends)):
        pairs: list[Group] = [
            (units, kept[number]) for units, kept in zip(groups, rankings, strict=True)
        ]
        rank(question.scored, question.rows, pairs, max_cells, outcome)
    return [
        _by_magnitude(question, [ranking.best for ranking in kept])
        if question.by == "magnitude"
        else kept[0].best
        for kept in rankings
    ]


def _by_magnitude(question: Question, ends: list[Candidates]) -> Candidates:
    """The best of both ends by absolute value."""
    both = Candidates.join(ends)
    ranking = question.ranking(True)
    ranking.offer(Candidates(np.abs(both.value), both.layer, both.token, both.unit))
    place = {
        (layer, token, unit): value
        for value, layer, token, unit in zip(
            both.value, both.layer.tolist(), both.token.tolist(), both.unit.tolist(), strict=True
        )
    }
    best = ranking.best
    signed = [
        place[key]
        for key in zip(best.layer.tolist(), best.token.tolist(), best.unit.tolist(), strict=True)
    ]
    return Candidates(np.array(signed, np.float32), best.layer, best.token, best.unit)
