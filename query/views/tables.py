"""Rows of the metadata for views, and the text of queries that people can run again."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["Fetch", "fetch_rows", "literal", "own_fetch", "require_predicate"]

Fetch = Callable[[str], pa.Table]
"""Runs one query. A server gives its worker's, for queries with text that a stranger typed."""


def own_fetch(store: "Store") -> Fetch:
    """The store's own SQL, for queries that hold nothing typed by a stranger."""
    return store._sql.fetch


def fetch_rows(store: "Store", query: str, fetch: Fetch | None = None) -> list[Mapping[str, Any]]:
    """The rows of a query as dictionaries.

    Raises:
        InvalidInput: the query is not valid.
        StoreDamaged: a block of the snapshot fails its checksum.
    """
    rows: list[Mapping[str, Any]] = (fetch or own_fetch(store))(query).to_pylist()
    return rows


def require_predicate(text: str) -> str:
    """A predicate that somebody typed, if it is one expression and nothing besides.

    Raises:
        InvalidInput: it is not.
    """
    try:
        duckdb.SQLExpression(text)
    except duckdb.Error as error:
        raise InvalidInput(
            f"{text!r} is no predicate. {error}", kind=ErrorKind.INVALID_SQL
        ) from error
    return text


def literal(text: str) -> str:
    """A text as SQL spells it.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + text.replace("'", "''") + "'"
