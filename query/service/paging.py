"""Tables a page at a time: filters, sort keys, and cursors that fit one question alone."""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import duckdb
import pyarrow as pa
from fastapi import Query, Response

from actstore.query.service.resources import Ask, columns_of
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["Cursor", "Limit", "Sort", "TableQuery", "Where", "page_response"]

_MAX_OFFSET = 2**40

Limit = Annotated[int, Query(ge=1, description="rows of a page")]
Cursor = Annotated[
    str | None, Query(max_length=300, description="`next` of the page before this one")
]
Sort = Annotated[
    str | None,
    Query(
        max_length=300, description="columns, separated by commas; `-` before one for descending"
    ),
]
Where = Annotated[
    str | None, Query(max_length=20_000, description="SQL predicate over the table's columns")
]


@dataclass(frozen=True)
class TableQuery:
    """Which rows of a table, in which order.

    Attributes:
        table: its name in SQL.
        keys: columns that tell its rows apart; the default order.
        filters: column -> value, or values of which any will do; None for any.
        where: a stranger's SQL predicate.
        sort: columns, as ``Sort`` has them.
    """

    table: str
    keys: tuple[str, ...]
    filters: dict[str, Any] = field(default_factory=dict)
    where: str | None = None
    sort: str | None = None

    def sql(self, columns: Sequence[str]) -> tuple[str, list[Any]]:
        """The query and the values of its parameters, in order."""
        conditions: list[str] = []
        values: list[Any] = []
        for name, wanted in self.filters.items():
            if isinstance(wanted, list):
                marks = ", ".join("?" * len(wanted))
                conditions.append(f"{_quoted(name)} IN ({marks})")
                values += wanted
            elif wanted is not None:
                conditions.append(f"{_quoted(name)} = ?")
                values.append(wanted)
        if self.where is not None:
            conditions.append(f"(\n{_predicate(self.where)}\n)")
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        order = ", ".join(self._order(columns))
        return f"SELECT * FROM {_quoted(self.table)}{where} ORDER BY {order}", values

    def _order(self, columns: Sequence[str]) -> list[str]:
        asked = [part.strip() for part in (self.sort or "").split(",") if part.strip()]
        order: dict[str, str] = {}
        for part in asked:
            name, direction = (part[1:], "DESC") if part.startswith("-") else (part, "ASC")
            if name not in columns:
                raise InvalidInput(
                    f"sort names {name!r}; this table is sorted by {', '.join(columns)}.",
                    kind=ErrorKind.INVALID_ARGUMENT,
                )
            order.setdefault(name, f"{_quoted(name)} {direction} NULLS LAST")
        for name in self.keys:
            order.setdefault(name, f"{_quoted(name)} ASC NULLS LAST")
        return list(order.values())

    def digest(self, state: str) -> str:
        """Names this question to this opening of the store."""
        parts = [self.table, sorted(self.filters.items()), self.where, self.sort, state]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def page_response(
    ask: Ask, query: TableQuery, limit: int, cursor: str | None, missing: str | None = None
) -> Response:
    """A page of a table.

    Args:
        ask: the request.
        query: the rows.
        limit: rows of the page.
        cursor: where it begins.
        missing: what to say when the store has no such table.

    Raises:
        InvalidInput: a sort key, predicate or cursor that does not fit, or too many rows.
    """
    limit = ask.limit(limit)
    digest = query.digest(ask.opening.tag)
    start = _start(cursor, digest)
    sortable = sortable_columns(ask, query.table)
    text, values = query.sql(sortable)
    # Whole numbers of our own; the worker takes one kind of parameters alone.
    text += f" LIMIT {limit + 1} OFFSET {start}"
    if query.where is None:
        found = ask.store.fetch(text, values)
    else:
        # One more row than a page says whether there is another page.
        found = ask.opening.sql.run(text, values, max_rows=limit + 1).table
    page = found.slice(0, limit)
    following = _cursor(start + limit, digest) if found.num_rows > limit else None
    headers = {}
    if following is not None:
        target = ask.request.url.include_query_params(cursor=following)
        headers["Link"] = f'<{target.path}?{target.query}>; rel="next"'
    return ask.table(page, {"columns": columns_of(page), "next": following}, headers)


def sortable_columns(ask: Ask, table: str) -> list[str]:
    """Columns of a table that hold one value each."""
    schema = ask.store.fetch(f"SELECT * FROM {_quoted(table)} LIMIT 0").schema
    return [one.name for one in schema if not pa.types.is_nested(one.type)]


def _predicate(where: str) -> str:
    """A predicate that is one expression, so that it stays between its brackets."""
    try:
        duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise InvalidInput(
            f"where={where[:200]!r} is no predicate. {error}", kind=ErrorKind.INVALID_SQL
        ) from error
    return where


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _cursor(start: int, digest: str) -> str:
    return base64.urlsafe_b64encode(f"{start}.{digest}".encode()).decode().rstrip("=")


def _start(cursor: str | None, digest: str) -> int:
    if cursor is None:
        return 0
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii")
        start, _, known = text.partition(".")
        if known == digest and start.isdigit() and int(start) < _MAX_OFFSET:
            return int(start)
    except (binascii.Error, ValueError):
        pass
    raise InvalidInput(
        "The cursor is of another question, or the store was renewed since. Begin again without it.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
