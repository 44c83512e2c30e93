"""DuckDB's way to read a Python object lazily, and nothing else: the one place that knows it.

DuckDB 2.0 scans Python sources through a protocol of its own (``duckdb._sources``), which offers
every predicate as a tree and lets the source take it. The protocol is not public, so a pyarrow
``Dataset`` stands beside it, which DuckDB reads through public calls: it hands over fewer
predicates, and as text. Whatever a source takes DuckDB does not look at again.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import duckdb
import pyarrow as pa
from pyarrow import dataset

from actstore.query.sql_predicates import (
    And,
    Comparison,
    IsNull,
    Membership,
    Or,
    Predicate,
    negated,
)

if TYPE_CHECKING:
    from duckdb._sources.nodes import Node

__all__ = ["LazyTable", "Offered", "has_source_protocol", "register_table"]

Offered = frozenset[str]
"""The predicates that a scan was given, as ``EXPLAIN`` writes them."""


class LazyTable(Protocol):
    """A table that is read when DuckDB scans it."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        ...

    def count(self) -> int | None:
        """Its rows, where that is known without reading."""
        ...

    def accepts(self, predicate: Predicate) -> bool:
        """Whether :meth:`batches` leaves out every row where a predicate is not true."""
        ...

    def batches(
        self, columns: Sequence[str], predicates: Sequence[Predicate], offered: Offered | None
    ) -> Iterator[pa.RecordBatch]:
        """The rows.

        Args:
            columns: the columns that are wanted, in this order; at least one.
            predicates: accepted ones, all of which are true in every row.
            offered: how a plan writes them; None where the route cannot tell.
        """
        ...


def has_source_protocol() -> bool:
    """Whether this DuckDB has the protocol that the faster route needs."""
    try:
        from duckdb._sources import ArrowScanSource, nodes
    except ImportError:
        return False
    parts = ("Binary", "Col", "In", "Lit", "Postfix", "Unary")
    return (
        hasattr(duckdb.DuckDBPyConnection, "_register_arrow_source")
        and hasattr(ArrowScanSource, "stream")
        and all(hasattr(nodes, name) for name in parts)
    )


def register_table(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    table: LazyTable,
    *,
    public: bool | None = None,
) -> None:
    """Make a table known to one connection; it lives as long as that does.

    Args:
        connection: the connection; its cursors do not see the table.
        name: the table's name.
        table: the table.
        public: use public calls alone; by default where DuckDB has no source protocol.
    """
    if has_source_protocol() if public is None else not public:
        register: Callable[[str, object], object] = connection._register_arrow_source
        register(name, _source(table))
    else:
        connection.register(name, _PublicDataset(table))


def _stream(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatchReader:
    """A reader whose first batch is read at once.

    What is wrong with a question mostly shows there, and DuckDB says it without a traceback.
    """
    found = _in_own_thread(batches)
    first = next(found, None)
    rest = found if first is None else chain([first], found)
    return pa.RecordBatchReader.from_batches(schema, rest)


def _in_own_thread(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, read by a thread that Python started.

    DuckDB scans in threads of its own and takes away their Python state afterwards. Torch keeps
    a note of that state, so reading there what torch computes ends in a crash.
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix="actstore-scan")
    try:
        while (batch := worker.submit(next, batches, None).result()) is not None:
            yield batch
    finally:
        worker.shutdown(wait=False)


def _narrowed(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in columns])


# The source protocol


def _source(table: LazyTable) -> Any:
    return _source_class()(table)


@cache
def _source_class() -> Any:
    # Defined when it is first needed: a DuckDB without the protocol has no such base.
    from duckdb._sources import ArrowScanSource

    class _TableSource(ArrowScanSource):
        schema_is_stable = True

        def __arrow_c_schema__(self) -> object:
            # Binding needs the columns; without this DuckDB would open a stream for them.
            return self.obj.schema.__arrow_c_schema__()

        def rows(self) -> int | None:
            table: LazyTable = self.obj
            return table.count()

        def accepts(self, predicate: "Node") -> bool:
            found = predicate_of(predicate)
            table: LazyTable = self.obj
            return found is not None and table.accepts(found)

        def stream(
            self, columns: Sequence[int] | None, filters: "Sequence[Node]"
        ) -> tuple[object, bool]:
            table: LazyTable = self.obj
            names = table.schema.names
            wanted = names if columns is None else [names[index] for index in columns]
            predicates = []
            for node in filters:
                found = predicate_of(node)
                # DuckDB trusts that this was applied; it was taken, so it can be.
                assert found is not None, f"{node.fragment()} was never accepted"
                predicates.append(found)
            offered = frozenset(node.fragment() for node in filters)
            batches = table.batches(wanted, predicates, offered)
            reader = _stream(_narrowed(table.schema, wanted), batches)
            return reader.__arrow_c_stream__(), columns is not None

    return _TableSource


def predicate_of(node: "Node") -> Predicate | None:
    """A node of DuckDB's predicate tree; None for what is no predicate of ours."""
    from duckdb._sources import nodes

    match node:
        case nodes.Binary(op="AND" | "OR" as operator, left=left, right=right):
            parts = predicate_of(left), predicate_of(right)
            if parts[0] is None or parts[1] is None:
                return None
            return And((parts[0], parts[1])) if operator == "AND" else Or((parts[0], parts[1]))
        case nodes.Binary(
            op=operator, left=nodes.Col(parts=(name,)), right=nodes.Lit() as constant
        ):
            return _comparison(name, operator, constant.value)
        case nodes.Unary(op="NOT", operand=inner):
            found = predicate_of(inner)
            return None if found is None else negated(found)
        case nodes.Postfix(
            op="IS NULL" | "IS NOT NULL" as operator, operand=nodes.Col(parts=(name,))
        ):
            return IsNull(name, operator == "IS NOT NULL")
        case nodes.In(operand=nodes.Col(parts=(name,)), values=values):
            constants = [one.value for one in values if isinstance(one, nodes.Lit)]
            numbers = tuple(value for value in constants if _is_number(value))
            texts = tuple(value for value in constants if isinstance(value, str))
            if not values or len(values) not in (len(numbers), len(texts)):
                return None
            return Membership(name, numbers or texts)
    return None


def _comparison(name: str, operator: str, constant: object) -> Predicate | None:
    if isinstance(constant, str):
        return Comparison(name, operator, constant) if operator in ("=", "!=") else None
    known = operator in ("=", "!=", "<", "<=", ">", ">=")
    return Comparison(name, operator, constant) if known and _is_number(constant) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not math.isnan(value)


# The public route


class _PublicDataset(dataset.Dataset):  # type: ignore[misc]
    """A table behind the face of a pyarrow dataset.

    The filter comes as an expression that can only be read from its text. What is understood
    spares reading; the expression itself is applied by pyarrow to every batch, so nothing
    hangs on understanding it.
    """

    def __init__(self, table: LazyTable) -> None:
        # The base class wants a dataset of its own, which there is none of.
        self._table = table

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self._table.schema

    def count_rows(self, **_: Any) -> int:
        """Its rows, where they are known; DuckDB plans with the number alone."""
        return self._table.count() or 1

    def scanner(
        self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any
    ) -> dataset.Scanner:
        """What DuckDB reads."""
        names = self._table.schema.names
        wanted = list(names if columns is None else columns)
        text = "" if filter is None else str(filter)
        needed = [n for n in names if n in wanted or re.search(rf"\b{re.escape(n)}\b", text)]
        predicates = [p for p in _understood(text, self.schema) if self._table.accepts(p)]
        found = self._table.batches(needed, predicates, None)
        batches = (
            (batch if filter is None else batch.filter(filter)).select(wanted) for batch in found
        )
        schema = _narrowed(self._table.schema, wanted)
        return dataset.Scanner.from_batches(_stream(schema, batches))


_ATOM = re.compile(r"\((\w+) (==|!=|<=|>=|<|>) ([^\s()]+)\)|is_valid\(\w+\)")
_BOTH = re.compile(r"\(@ and @\)")


def _understood(text: str, schema: pa.Schema) -> list[Predicate]:
    """Comparisons of whole numbers and truth values that every row of a filter passes.

    Only a filter that is wholly a conjunction of comparisons gives any.
    """
    rest, count = _ATOM.sub("@", text), 1
    while count:
        rest, count = _BOTH.subn("@", rest)
    if rest != "@":
        return []
    found: list[Predicate] = []
    for name, operator, constant in _ATOM.findall(text):
        if name not in schema.names or pa.types.is_floating(schema.field(name).type):
            continue
        if re.fullmatch(r"-?\d+|true|false", constant):
            value = {"true": True, "false": False}.get(constant)
            number = int(constant) if value is None else value
            found.append(Comparison(name, "=" if operator == "==" else operator, number))
    return found
