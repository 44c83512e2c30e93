"""Answers as people get them: rows with the names of their units and places, and a certificate."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.derived import DerivedScalar
from actstore.query.planner import Outcome
from actstore.query.questions import Question
from actstore.query.ranking import Candidates
from actstore.query.results import Certificate
from actstore.query.rows import Rows
from actstore.query.selection import RowSelection
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["answer_table", "answer_values", "certify", "count_rows", "place_columns"]


def answer_table(question: Question, answer: Candidates, rows: Rows) -> pa.Table:
    """``layer, token, neuron`` (or ``head`` …), ``value, sequence, position``.

    With a normalisation or a magnitude the ranked number stands beside the value, as ``score``.
    """
    columns: dict[str, Any] = {}
    if question.combine is None:
        columns = place_columns(question.store, question.declared, answer, rows)
    else:
        columns["token"] = pa.array(answer.token, pa.int64())
    if question.normalise is not None and question.combine is None:
        columns["value"] = pa.array(answer_values(question, answer), pa.float32())
        columns["score"] = pa.array(answer.value, pa.float32())
    else:
        columns["value"] = pa.array(answer.value, pa.float32())
    columns["sequence"] = pa.array(rows.sequence, pa.int64())
    columns["position"] = pa.array(rows.position, pa.int32())
    return pa.table(columns)


def place_columns(
    store: "OpenStore", declared: DerivedScalar, answer: Candidates, rows: Rows
) -> dict[str, Any]:
    """The columns that name where each answer stands: layer, token and the units' axes."""
    columns: dict[str, Any] = {}
    if declared.has_layers:
        columns["layer"] = pa.array(answer.layer, pa.int32())
    columns["token"] = pa.array(answer.token, pa.int64())
    axes, shape = declared.ranked_axes, store.unit_shape(declared)
    for axis, values in zip(axes, np.unravel_index(answer.unit, shape), strict=True):
        if axis is Dimension.ATTENDED:
            columns["attended_token"] = pa.array(answer.token - rows.position + values, pa.int64())
        elif axis is not Dimension.SINGLETON:
            columns[axis.value] = pa.array(values, pa.int32())
    return columns


def answer_values(question: Question, answer: Candidates) -> npt.NDArray[np.float32]:
    """The scalar's own values at some places, float32 ``(answer,)``."""
    size = question.store.reader.segment_rows
    found = np.empty(len(answer), np.float32)
    for number in range(len(answer)):
        segment, offset = divmod(int(answer.token[number]), size)
        layer, unit = int(answer.layer[number]), int(answer.unit[number])
        found[number] = question.plain.values.cells(segment, layer, np.array([offset]), unit)[0]
    return found


def certify(question: Question, outcome: Outcome, bound: float | None) -> Certificate:
    """How an answer was found."""
    counted, excluded = count_rows(question.store, question.rows)
    reader = question.store.reader
    return Certificate(
        scalar=question.declared.name,
        plan=outcome.plan,
        source=outcome.source,
        bounded_by=question.scored.bounded_by,
        pages_read=outcome.effort.pages_read,
        pages_pruned=max(outcome.effort.pages_total - outcome.effort.pages_read, 0),
        cells_scanned=outcome.cells,
        bound=bound if bound is not None and np.isfinite(bound) else None,
        segments=len(reader.segments),
        segments_planned=reader.planned_segments,
        rows=counted,
        rows_excluded=excluded,
    )


def count_rows(store: "OpenStore", rows: RowSelection) -> tuple[int, dict[str, int]]:
    """How many rows may answer, and reason -> rows left out."""
    reader = store.reader
    total = reader.committed_rows
    special = store.special_count
    counted = rows.count(reader.segments, total - special)
    excluded = {} if rows.special else {"special": special}
    if rows.rows is not None:
        # A special row that the predicate drops as well is counted as special.
        excluded["where"] = total - counted - sum(excluded.values())
    return counted, excluded
