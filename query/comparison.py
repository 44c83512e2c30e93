"""Several scalars side by side: where each is greatest, and what the others are there."""

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pyarrow as pa

from actstore.query.answers import answer_values, place_columns
from actstore.query.columnar import Columnar
from actstore.query.planner import SCAN_CELLS
from actstore.query.questions import Question, QuestionOptions, ask
from actstore.query.ranking import Candidates
from actstore.query.results import Certificate
from actstore.query.topk import rank_question
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actstore.query.derived import DerivedScalar
    from actstore.query.opening import OpenStore

__all__ = ["Comparison", "compare"]


class Comparison(Columnar):
    """The best places of several scalars, with the values of all of them.

    Attributes:
        certificates: how each scalar's best were found, by its name.
    """

    def __init__(self, table: pa.Table, certificates: dict[str, Certificate]) -> None:
        self._table = table
        self.certificates = certificates

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.certificates)}, {len(self)} rows)"

    def to_arrow(self) -> pa.Table:
        """``layer, token, neuron`` (or ``head`` …), then ``NAME`` and ``NAME_rank`` of each scalar.

        A rank counts from 1; null where a place is not among the scalar's best.
        """
        return self._table

    def to_json(self) -> dict[str, Any]:
        """``{"rows": [...], "certificates": {...}}``."""
        found = {name: one.to_json() for name, one in self.certificates.items()}
        return {"rows": self.rows(), "certificates": found}


def compare(
    store: "OpenStore",
    names: "Sequence[str | DerivedScalar]",
    *,
    max_cells: int = SCAN_CELLS,
    **options: Unpack[QuestionOptions],
) -> Comparison:
    """The k best places of each of several scalars, and the values of all scalars there.

    Args:
        store: the open store.
        names: two scalars or more of the same units, such as ``mlp_write_norm`` and
            ``mlp_act_times_grad``.
        max_cells: refuse a scan of more values than this.
        options: as for ``topk``, but for ``per``, ``combine`` and ``normalise``.

    Returns:
        One row per place, in the order of the first scalar's ranks, then the second's …

    Raises:
        InvalidInput: fewer than two scalars, scalars of different units, or as for ``topk``.
        Unavailable: the store cannot derive a scalar.
    """
    refused = [name for name in ("per", "combine", "normalise") if options.get(name) is not None]
    if refused:
        raise _invalid(f"Scalars are compared value by value: leave out {', '.join(refused)}.")
    if isinstance(names, str):
        raise _invalid(f"Compare at least two different scalars; give a list, not {names!r}.")
    questions = [ask(store, name, **options) for name in names]
    _require_comparable(questions)
    ranked = [rank_question(question, max_cells) for question in questions]
    every = Candidates.join([answer for answer, _ in ranked])
    places = np.stack([every.layer, every.token, every.unit], axis=1)
    _, first, which = np.unique(places, axis=0, return_index=True, return_inverse=True)
    # In the order in which places were first found, not of their numbers.
    order = np.argsort(first)
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    chosen = every.take(first[order])
    rows = store.row_map.of_tokens(chosen.token)
    columns = place_columns(store, questions[0].declared, chosen, rows)
    start = 0
    for question, (answer, _) in zip(questions, ranked, strict=True):
        name = question.declared.name
        columns[name] = pa.array(answer_values(question, chosen), pa.float32())
        rank: list[int | None] = [None] * len(chosen)
        for number in range(len(answer)):
            rank[position[which[start + number]]] = number + 1
        columns[f"{name}_rank"] = pa.array(rank, pa.int32())
        start += len(answer)
    columns["sequence"] = pa.array(rows.sequence, pa.int64())
    columns["position"] = pa.array(rows.position, pa.int32())
    columns["text"] = pa.array(store.row_texts(rows), pa.string())
    certificates = {
        question.declared.name: certificate
        for question, (_, certificate) in zip(questions, ranked, strict=True)
    }
    return Comparison(pa.table(columns), certificates)


def _require_comparable(questions: "Sequence[Question]") -> None:
    names = [question.declared.name for question in questions]
    if len(questions) < 2 or len(set(names)) < len(names):
        raise _invalid(f"Compare at least two different scalars; these are {names}.")
    kinds = {
        (one.declared.ranked_axes, one.declared.has_layers, one.units.columns) for one in questions
    }
    if len(kinds) > 1:
        raise _invalid(
            f"{', '.join(names)} are not over the same units, so no place has a value of each."
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
