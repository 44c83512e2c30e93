"""SQL over the metadata of an open store: documents, tokens, neurons, lists, statistics.

Queries run in DuckDB over a snapshot of what the reader sees. The connection is
read-only and reaches nothing outside the snapshot; that guards against mistakes of a
person at their own store, not against hostile queries.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, StoreDamaged
from actstore.store.reader import StoreReader
from actstore.store.snapshot import Snapshot, open_snapshot

__all__ = ["Sql"]

Parameters = Sequence[Any] | Mapping[str, Any] | None

_ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_UNIT_COLUMNS = {"neurons": "neuron", "heads": "head", "latents": "latent"}
_ROWS = "tokens JOIN sequences USING (sequence, document) JOIN documents USING (document)"


class Sql:
    """SQL over an open store.

    Args:
        reader: the store; the tables hold what it sees as committed.

    Raises:
        StoreDamaged: the snapshot, or a file that one is made from, fails its checksum.
    """

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
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
            goes wrong while it is fetched is DuckDB's own error.

        Raises:
            InvalidInput: the query is not valid; the message is DuckDB's.
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        cursor = self.connection.cursor()
        with _translated(query):
            statements = cursor.extract_statements(query)
            if len(statements) != 1:
                raise _invalid(f"{len(statements)} statements in {query!r}; give exactly one.")
            if statements[0].type not in _ALLOWED:
                kind = statements[0].type.name
                raise _invalid(
                    f"{query!r} is a {kind} statement; a store is only read: use SELECT."
                )
            return cursor.sql(query, params=parameters)

    def fetch(self, query: str, parameters: Parameters = None) -> pa.Table:
        """The whole result of one query; errors at run time are the store's own too.

        Args:
            query: as :meth:`relation` takes it.
            parameters: values of ``?`` (a list) or ``$name`` (a mapping).

        Raises:
            InvalidInput: the query is not valid, or fails on a value.
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        relation = self.relation(query, parameters)
        with _translated(query):
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
def _translated(query: str) -> Iterator[None]:
    """DuckDB's errors as the store's own."""
    try:
        yield
    except ActstoreError:
        raise
    except duckdb.Error as error:
        if str(error).startswith("Corrupt database file"):
            raise StoreDamaged(
                f"The snapshot is damaged: {error}. Run `actstore compact` to make it again.",
                kind=ErrorKind.CHECKSUM_MISMATCH,
            ) from error
        raise _invalid(f"{query!r} cannot be answered. {error}") from error


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_SQL)
