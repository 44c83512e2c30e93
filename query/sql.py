"""SQL over an open store: its metadata, and every derived scalar as a table.

Queries run in DuckDB over a snapshot of what the reader sees. The connection is
read-only and reaches nothing outside the snapshot; that guards against mistakes of a
person at their own store, not against hostile queries. The tables of derived scalars
are read when a query scans them (:mod:`actstore.query.scalar_tables`); each query has a
connection of its own, to which those that it names are known.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.duckdb_source import register_table
from actstore.query.scalar_tables import Budget, Hint, named_scalars, register_scalars
from actstore.query.sql_hints import find_hint
from actstore.query.sql_promotion import EFFECTS_TABLE, PROMOTION_MACROS, Effects, EffectsTable
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, StoreDamaged
from actstore.store.reader import StoreReader
from actstore.store.snapshot import Snapshot, open_snapshot

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["SQL_CELLS", "Sql"]

SQL_CELLS = 200_000_000
"""Values of derived scalars that one query may look at unless told otherwise."""

Parameters = Sequence[Any] | Mapping[str, Any] | None

_ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_UNIT_COLUMNS = {"neurons": "neuron", "heads": "head", "latents": "latent"}
_ROWS = "tokens JOIN sequences USING (sequence, document) JOIN documents USING (document)"

# A macro's parameter may not share a column's name.
_TOP_TOKENS = """
CREATE OR REPLACE TEMP MACRO top_tokens(_layer, _neuron, _k) AS TABLE
    SELECT best.token, best.value, tokens.text, tokens.sequence, tokens.position
    FROM (
        SELECT token, value FROM mlp_post_act
        WHERE layer = _layer AND neuron = _neuron AND NOT special
        ORDER BY value DESC LIMIT _k
    ) AS best JOIN tokens ON tokens.token = best.token
    ORDER BY best.value DESC, best.token
"""
_KEPT_HINTS = 256
_MACRO, _MACRO_TABLE = "top_tokens", "mlp_post_act"


class Sql:
    """SQL over an open store.

    Besides the snapshot's tables and ``context(token, before, after)`` there are, with a
    store: every derived scalar with a ranking as a table, ``top_tokens(layer, neuron, k)``
    (the ordinary tokens at which a neuron is greatest, from ``mlp_post_act``),
    ``promotes(layer, neuron, text)`` and ``promotes_rank(layer, neuron, text)`` (what a neuron
    does to the logit of the token with that text), and their table ``neuron_effects``.

    A threshold that DuckDB passes on to a scan is a literal or ``CAST(? AS FLOAT)``: a bare
    parameter is a DOUBLE, which a FLOAT column is only compared with after it was read.

    Args:
        reader: the store; the tables hold what it sees as committed.
        store: the same, with its derived scalars; None for the metadata alone.

    Attributes:
        max_cells: values of derived scalars that one query may look at.
        seconds: longest time for which a scan of one may read; None for any.
        last: what the query that was asked last looked at; None before one named a scalar.

    Raises:
        StoreDamaged: the snapshot, or a file that one is made from, fails its checksum.
    """

    max_cells: int = SQL_CELLS
    seconds: float | None = None
    last: Budget | None = None

    def __init__(self, reader: StoreReader, store: "OpenStore | None" = None) -> None:
        self._reader = reader
        self._store = store
        self.snapshot: Snapshot = open_snapshot(reader)

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The read-only connection; take a ``cursor()`` of it for each thread."""
        return self.snapshot.connection

    def close(self) -> None:
        """Release the snapshot; relations made from it end."""
        self.snapshot.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def relation(self, query: str, parameters: Parameters = None) -> duckdb.DuckDBPyRelation:
        """The result of one query, not fetched yet.

        Args:
            query: one SELECT, or EXPLAIN, DESCRIBE, SHOW TABLES, SUMMARIZE.
            parameters: values of ``?`` (a list) or ``$name`` (a mapping).

        Returns:
            A relation with ``fetchall``, ``df``, ``pl``, ``to_arrow_table`` and more; what
            goes wrong while it is fetched is DuckDB's own error, which says why.

        Raises:
            InvalidInput: the query is not valid; the message is DuckDB's.
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        return self._prepared(query, parameters)[0]

    def _prepared(
        self, query: str, parameters: Parameters
    ) -> "tuple[duckdb.DuckDBPyRelation, Budget]":
        """The relation of a query, and what it may look at."""
        cursor = self.connection.cursor()
        budget = Budget(self.max_cells, self.seconds)
        with _translated(query):
            statements = cursor.extract_statements(query)
            if len(statements) != 1:
                raise _invalid(f"{len(statements)} statements in {query!r}; give exactly one.")
            if statements[0].type not in _ALLOWED:
                kind = statements[0].type.name
                raise _invalid(
                    f"{query!r} is a {kind} statement; a store is only read: use SELECT."
                )
            if self._store is not None:
                is_select = statements[0].type is duckdb.StatementType.SELECT
                self._register(self._store, cursor, query, parameters, budget, is_select)
            return cursor.sql(statements[0], params=parameters), budget

    def _register(
        self,
        store: "OpenStore",
        cursor: duckdb.DuckDBPyConnection,
        query: str,
        parameters: Parameters,
        budget: Budget,
        is_select: bool,
    ) -> None:
        """Make what a query names known to its connection, and look for how little it needs."""
        lowered = query.lower()
        macros = [macro for name, macro in PROMOTION_MACROS.items() if name in lowered]
        if macros or EFFECTS_TABLE in lowered:
            register_table(cursor, EFFECTS_TABLE, EffectsTable(self._effects, budget))
            self.last = budget
        for macro in macros:
            cursor.execute(macro)
        has_macro = _MACRO in lowered
        named = named_scalars(store, f"{query} {_MACRO_TABLE}" if has_macro else query)
        # What the snapshot has goes by its own name.
        named = {name: one for name, one in named.items() if name not in self._tables}
        if not named:
            return
        tables = register_scalars(cursor, store, named, budget)
        self.last = budget
        if has_macro:
            cursor.execute(_TOP_TOKENS)
        if is_select and (has_macro or ("limit" in lowered and "order" in lowered)):
            hint = self._hint(cursor, query, parameters, frozenset(named), has_macro)
            for table in tables:
                table.hint = hint

    def _hint(
        self,
        cursor: duckdb.DuckDBPyConnection,
        query: str,
        parameters: Parameters,
        scalars: frozenset[str],
        has_macro: bool,
    ) -> Hint | None:
        """How little a query needs; found once for queries that are asked again."""
        key = query, repr(parameters), scalars
        if key not in self._hints:
            while len(self._hints) >= _KEPT_HINTS:
                self._hints.pop(next(iter(self._hints)), None)
            macros = {_MACRO: True} if has_macro else {}
            try:
                self._hints[key] = find_hint(cursor, query, parameters, scalars, macros)
            except duckdb.Error:
                # What is wrong with the query is said when it is bound, in its own words.
                return None
        return self._hints.get(key)

    @cached_property
    def _hints(self) -> dict[tuple[str, str, frozenset[str]], Hint | None]:
        return {}

    @cached_property
    def _effects(self) -> Effects:
        return Effects(self._reader.root)

    @cached_property
    def _tables(self) -> frozenset[str]:
        """Names of the snapshot's tables and views."""
        rows = self.connection.cursor().execute("SELECT table_name FROM information_schema.tables")
        return frozenset(name.lower() for (name,) in rows.fetchall())

    def fetch(self, query: str, parameters: Parameters = None) -> pa.Table:
        """The whole result of one query; errors at run time are the store's own too.

        Args:
            query: as :meth:`relation` takes it.
            parameters: values of ``?`` (a list) or ``$name`` (a mapping).

        Raises:
            InvalidInput: the query is not valid, or fails on a value.
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        relation, budget = self._prepared(query, parameters)
        with _translated(query, budget):
            return relation.to_arrow_table()

    def rows_where(self, where: str) -> npt.NDArray[np.int64]:
        """The rows that a predicate allows.

        Args:
            where: SQL predicate over the columns of ``tokens``, ``sequences`` and
                ``documents`` together, such as ``position < 5 AND label = 'poem'``; a name
                that several of them have is written with its table.

        Returns:
            Ascending global rows, int64 ``(row,)``.

        Raises:
            InvalidInput: the predicate is not valid.
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        relation = self._where("where", where, f"SELECT tokens.token FROM {_ROWS}")
        with _translated(where):
            found = relation.fetchnumpy()["token"]
        return np.sort(np.asarray(found, np.int64))

    def units_where(
        self, units: str, table: str = "neurons", sets: Sequence[str] = ()
    ) -> list[tuple[int, int]]:
        """The units that a predicate allows.

        Args:
            units: SQL predicate over the columns of the table, such as ``write_norm > 2``.
            table: ``neurons``, ``heads`` or ``latents``.
            sets: the sets of latents that are meant; all by default.

        Returns:
            (layer, unit) pairs, ascending.

        Raises:
            InvalidInput: the predicate is not valid, or there is no such table of units.
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        if table not in _UNIT_COLUMNS:
            raise _invalid(f"table is {table!r}; units are in: {', '.join(_UNIT_COLUMNS)}.")
        column = _UNIT_COLUMNS[table]
        source = table
        if sets:
            names = ", ".join("'" + name.replace("'", "''") + "'" for name in sets)
            source = f'(SELECT * FROM {table} WHERE "set" IN ({names})) AS {table}'
        relation = self._where("units", units, f"SELECT layer, {column} FROM {source}")
        with _translated(units):
            return sorted(relation.fetchall())

    def _where(self, name: str, predicate: str, select: str) -> duckdb.DuckDBPyRelation:
        if not predicate.strip():
            raise _invalid(f"{name} is empty; give a predicate, or leave it out.")
        # Checked by itself first, so that nothing but a predicate gets between the brackets.
        with _translated(predicate):
            duckdb.SQLExpression(predicate)
        return self.relation(f"{select} WHERE (\n{predicate}\n)")


@contextmanager
def _translated(query: str, budget: Budget | None = None) -> Iterator[None]:
    """DuckDB's errors as the store's own."""
    try:
        yield
    except ActstoreError:
        raise
    except duckdb.Error as error:
        if budget is not None and budget.error is not None:
            raise budget.error from error
        if str(error).startswith("Corrupt database file"):
            raise StoreDamaged(
                f"The snapshot is damaged: {error}. Run `actstore compact` to make it again.",
                kind=ErrorKind.CHECKSUM_MISMATCH,
            ) from error
        raise _invalid(f"{query!r} cannot be answered. {error}") from error


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_SQL)
