"""SQL: one SELECT over the store's tables, run by the worker under its limits."""

from typing import Annotated, Any

from fastapi import Query, Response

from actstore.query.service.models import SqlModel, SqlRequest
from actstore.query.service.negotiation import TABLE, Format
from actstore.query.service.resources import Ask, Asked, columns_of, new_router, resource

__all__ = ["PARAMETER_PREFIX", "router"]

router = new_router("SQL")

PARAMETER_PREFIX = "p."


@resource(router, "/sql", SqlModel, offers=TABLE, tagged=False, key_prefix=PARAMETER_PREFIX)
def sql(
    ask: Asked,
    q: Annotated[str, Query(min_length=1, max_length=100_000, description="one SELECT")],
    max_rows: Annotated[int | None, Query(ge=1, description="rows of the answer")] = None,
) -> Response:
    """The rows of a query; `p.name=value` is the text of `$name` in it."""
    prefix = len(PARAMETER_PREFIX)
    given = {
        name[prefix:]: value
        for name, value in ask.request.query_params.multi_items()
        if name.startswith(PARAMETER_PREFIX)
    }
    return _answer(ask, q, given or None, max_rows)


@resource(router, "/sql", SqlModel, offers=TABLE, tagged=False, method="POST")
def long_sql(ask: Asked, body: SqlRequest) -> Response:
    """The rows of a query that is too long for an address, with parameters of any type."""
    return _answer(ask, body.q, body.parameters, body.max_rows)


def _answer(
    ask: Ask, query: str, parameters: dict[str, Any] | list[Any] | None, max_rows: int | None
) -> Response:
    found = ask.opening.sql.run(query, parameters, max_rows=max_rows)
    beside = {
        "columns": columns_of(found.table),
        "truncated": found.truncated,
        "seconds": found.seconds,
    }
    headers = {"Server-Timing": f"sql;dur={1000 * found.seconds:.1f}"}
    if ask.form is Format.CSV and found.truncated:
        headers["Actstore-Truncated"] = "true"
    return ask.table(found.table, beside, headers, rows="arrays")
