"""Every derived scalar as a table of SQL, read when a query scans it.

Columns: ``layer`` (where there are layers), ``token``, the units' axes (``neuron``, ``head`` …),
``attended_token`` for pairs, ``special`` and ``value``; NaN is NULL. Only what the predicates
of a query leave is looked at, and no more than a budget allows.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.cells import CellBatch, CellEffort, ValueInterval, select_cells
from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.derived.backward import in_pass
from actstore.query.duckdb_source import Offered, register_table
from actstore.query.planner import Outcome, rank
from actstore.query.ranking import Candidates, Ranking
from actstore.query.scored import score
from actstore.query.sql_predicates import Predicate
from actstore.query.sql_pushdown import ATTENDED, Pushdown, axis_columns, can_push, push_down
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput
from actstore.store.unit_grid import PAGE_ROWS
from actstore.store.vocabulary import Dimension, PassType

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["Budget", "Hint", "ScalarTable", "named_scalars", "register_scalars"]

_FEW_UNITS = 32
_GRADIENT = "_gradient"
_WORD = re.compile(r"\w+")


@dataclass
class Budget:
    """What one query may look at, and what it has.

    Attributes:
        max_cells: most values.
        seconds: longest time from a scan's beginning; None for any.
        cells: values that were looked at.
        plans: how, scan by scan.
        error: what stopped the query.
    """

    max_cells: int
    seconds: float | None = None
    cells: int = 0
    plans: list[str] = field(default_factory=list)
    error: ActstoreError | None = None


@dataclass(frozen=True)
class Hint:
    """That a query needs only the best values of what a scan finds.

    Attributes:
        k: how many.
        largest: the greatest; False for the least.
        with_ties: all that equal the last of them too.
        special: only special rows, or only others; None for both.
        offered: the predicates of each scan that it holds for.
    """

    k: int
    largest: bool
    with_ties: bool
    special: bool | None
    offered: frozenset[Offered]


def named_scalars(store: "OpenStore", query: str) -> dict[str, DerivedScalar]:
    """The scalars with a ranking whose names stand anywhere in a query, be it as a table or not.

    A scalar's backward values are the table ``NAME_gradient``.

    Args:
        store: the open store, for its own projections.
        query: the query.
    """
    own: Mapping[str, DerivedScalar] = store.own_scalars
    found: dict[str, DerivedScalar] = {}
    for name in sorted({word.lower() for word in _WORD.findall(query)}):
        declared = own.get(name) or SCALARS.get(name)
        if declared is None and name.endswith(_GRADIENT):
            forward = SCALARS.get(name.removesuffix(_GRADIENT))
            if forward is not None and forward.gradient is not None:
                declared = in_pass(forward, PassType.BACKWARD)
        if declared is not None and declared.about is None:
            found[name] = declared
    return found


def register_scalars(
    connection: duckdb.DuckDBPyConnection,
    store: "OpenStore",
    scalars: Mapping[str, DerivedScalar],
    budget: Budget,
) -> "list[ScalarTable]":
    """Make scalars known as tables to one connection."""
    tables = [ScalarTable(store, declared, budget) for declared in scalars.values()]
    for name, table in zip(scalars, tables, strict=True):
        register_table(connection, name, table)
    return tables


class ScalarTable:
    """A derived scalar as a lazily read table.

    Args:
        store: the open store.
        declared: the scalar.
        budget: what may be looked at.

    Attributes:
        hint: that only the best values are needed; set before the query runs.
    """

    def __init__(self, store: "OpenStore", declared: DerivedScalar, budget: Budget) -> None:
        self._store = store
        self._declared = declared
        self._budget = budget
        self._axes = axis_columns(declared)
        self.hint: Hint | None = None
        fields = [("layer", pa.int32())] if declared.has_layers else []
        fields.append(("token", pa.int64()))
        fields += [
            (ATTENDED, pa.int64()) if axis is Dimension.ATTENDED else (axis.value, pa.int32())
            for axis in declared.ranked_axes
            if axis is not Dimension.SINGLETON
        ]
        self._schema = pa.schema([*fields, ("special", pa.bool_()), ("value", pa.float32())])

    @property
    def schema(self) -> pa.Schema:
        """The table's columns."""
        return self._schema

    def count(self) -> int | None:
        """About how many rows the table has; None where the store cannot derive the scalar."""
        try:
            units = int(np.prod(self._store.unit_shape(self._declared)))
            layers = len(self._store.layers_of(self._declared))
        except ActstoreError:
            return None
        commits = self._store.reader.commits.get("base", {})
        return sum(record.rows for record in commits.values()) * units * layers

    def accepts(self, predicate: Predicate) -> bool:
        """Whether :meth:`batches` leaves out every row where a predicate is not true."""
        return can_push(self._declared, predicate)

    def batches(
        self, columns: Sequence[str], predicates: Sequence[Predicate], offered: Offered | None
    ) -> Iterator[pa.RecordBatch]:
        """The rows that pass; see :class:`~actstore.query.duckdb_source.LazyTable`.

        Raises:
            InvalidInput: more values would have to be looked at than may, or for longer.
            Unavailable: the store cannot derive the scalar.
        """
        hint = self.hint
        if hint is not None and offered not in hint.offered:
            hint = None
        try:
            for batch in self._cells(predicates, hint):
                yield self._record(batch, columns)
        except ActstoreError as error:
            self._budget.error = _with_advice(error, self._declared, self._budget)
            raise self._budget.error from None

    def _cells(self, predicates: Sequence[Predicate], hint: Hint | None) -> Iterator[CellBatch]:
        self._store.require_committed()
        wanted = None if hint is None else hint.special
        push = push_down(self._store, self._declared, predicates, wanted)
        if push.is_empty:
            return
        best = None if hint is None else self._best(push, hint)
        if best is None:
            yield from self._selected(push, push.interval, push.later)
        elif hint is not None and hint.with_ties and len(best) >= hint.k:
            last = float(best.value[-1])
            beyond = ValueInterval(low=last) if hint.largest else ValueInterval(high=last)
            values = [one for one in predicates if one.columns == {"value"}]
            yield from self._selected(push, beyond, [*push.later, *values])
        else:
            yield from self._kept(_of_layers(best), predicates)

    def _best(self, push: Pushdown, hint: Hint) -> Candidates | None:
        """The k best values before value predicates; None where they do not suffice."""
        interval = push.interval
        # An end on the other side may leave fewer than k of the k best, as any other predicate may.
        other = interval and (interval.high if hint.largest else interval.low)
        if push.later or other is not None:
            return None
        outcome = Outcome()
        ranking = Ranking(hint.k, hint.largest)
        layers = push.units.layers
        few = all(len(push.units.of(layer)) < _FEW_UNITS for layer in layers)
        scored = score(self._store, self._declared, few_units=few)
        left = max(self._budget.max_cells - self._budget.cells, 0)
        rank(scored, push.rows, [(push.units, ranking)], left, outcome)
        self._budget.cells += outcome.cells + outcome.effort.pages_read * PAGE_ROWS
        self._budget.plans.append(outcome.plan)
        # With fewer than k values NULL comes into the answer.
        return ranking.best if ranking.is_full or interval is not None else None

    def _selected(
        self, push: Pushdown, interval: ValueInterval | None, later: Sequence[Predicate]
    ) -> Iterator[CellBatch]:
        budget, effort = self._budget, CellEffort()
        cells = select_cells(
            self._store,
            self._declared,
            push.units,
            push.rows,
            interval,
            max_cells=max(budget.max_cells - budget.cells, 0),
            deadline=None if budget.seconds is None else time.monotonic() + budget.seconds,
            effort=effort,
        )
        budget.plans.append(effort.plan)
        seen = 0
        for batch in self._kept(cells, later):
            budget.cells += effort.cells - seen
            seen = effort.cells
            yield batch
        budget.cells += effort.cells - seen

    def _kept(
        self, cells: Iterator[CellBatch], predicates: Sequence[Predicate]
    ) -> Iterator[CellBatch]:
        """What passes predicates; those on places were applied, but for ``attended_token``."""
        for batch in cells:
            mask = np.ones(len(batch.values), bool)
            for predicate in predicates:
                columns = {name: self._column(batch, name) for name in predicate.columns}
                mask &= predicate.holds(columns)
            if mask.all():
                yield batch
            else:
                yield CellBatch(
                    batch.layer, batch.tokens[mask], batch.units[mask], batch.values[mask]
                )

    def _column(self, batch: CellBatch, name: str) -> npt.NDArray[Any]:
        if name == "value":
            return batch.values
        if name == "token":
            return batch.tokens
        if name == "layer":
            return np.full(len(batch.tokens), batch.layer, np.int32)
        if name == "special":
            return self._special(batch.tokens)
        shape = self._store.unit_shape(self._declared)
        places = np.unravel_index(batch.units, shape)
        if name == ATTENDED:
            axis = self._declared.ranked_axes.index(Dimension.ATTENDED)
            rows, back = np.unique(batch.tokens, return_inverse=True)
            first = rows - self._store.row_map.of_tokens(rows).position
            attended: npt.NDArray[np.int64] = first[back] + places[axis]
            return attended
        return places[self._axes[name]].astype(np.int32)

    def _special(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        size = self._store.reader.segment_rows
        segments = tokens // size
        found = np.empty(len(tokens), bool)
        for segment in np.unique(segments).tolist():
            inside = segments == segment
            mask = self._store.reader.segment(segment).special
            found[inside] = mask[tokens[inside] - segment * size]
        return found

    def _record(self, batch: CellBatch, columns: Sequence[str]) -> pa.RecordBatch:
        arrays = []
        for name in columns:
            values = self._column(batch, name)
            mask = np.isnan(values) if name == "value" else None
            arrays.append(pa.array(values, self._schema.field(name).type, mask=mask))
        schema = pa.schema([self._schema.field(name) for name in columns])
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _of_layers(found: Candidates) -> Iterator[CellBatch]:
    """Candidates, layer by layer, in their order."""
    for layer in np.unique(found.layer).tolist():
        part = found.take(found.layer == layer)
        yield CellBatch(layer, part.token, part.unit, part.value)


def _with_advice(error: ActstoreError, declared: DerivedScalar, budget: Budget) -> ActstoreError:
    """What SQL can do about a scan that is too large; any other error as it is."""
    if error.kind is not ErrorKind.TOO_LARGE:
        return error
    units = [*(["layer"] if declared.has_layers else []), *axis_columns(declared), "token"]
    return InvalidInput(
        f"This query would look at more than {budget.max_cells:,} values of derived scalars: too "
        f"many of {declared.name}. Restrict {', '.join(units)} by constants in WHERE, or take "
        "`ORDER BY value DESC LIMIT k` in a subquery of that table alone and join its result. What "
        "a join or `IN (SELECT …)` leaves is not known before the scan: ask for that first, and "
        "give it as a list of constants.",
        kind=ErrorKind.TOO_LARGE,
    )
