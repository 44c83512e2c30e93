"""The corpus: documents, sequences, and the tokens of one sequence."""

from typing import Annotated

from fastapi import Path, Query, Response

from actstore.query.service.models import SequenceModel, TableModel
from actstore.query.service.negotiation import TABLE
from actstore.query.service.paging import Cursor, Limit, Sort, TableQuery, Where, page_response
from actstore.query.service.resources import Asked, new_router, resource
from actstore.query.service.routes.parameters import MAX_ROW, Rows

__all__ = ["router"]

router = new_router("corpus")


@resource(router, "/documents", TableModel, offers=TABLE)
def documents(
    ask: Asked,
    document: Rows = None,
    where: Where = None,
    sort: Sort = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """The documents, with the columns that the corpus brought along."""
    query = TableQuery("documents", ("document",), {"document": document}, where, sort)
    return page_response(ask, query, limit, cursor)


@resource(router, "/sequences", TableModel, offers=TABLE)
def sequences(
    ask: Asked,
    document: Annotated[int | None, Query(ge=0, le=MAX_ROW)] = None,
    where: Where = None,
    sort: Sort = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """The sequences: where each lies, and of which document it is."""
    query = TableQuery("sequences", ("sequence",), {"document": document}, where, sort)
    return page_response(ask, query, limit, cursor)


@resource(router, "/sequences/{sequence}", SequenceModel, offers=TABLE)
def sequence(ask: Asked, sequence: Annotated[int, Path(ge=0, le=MAX_ROW)]) -> Response:
    """One sequence: its text, and its tokens one by one."""
    store = ask.store
    store.require_committed()
    rows = store.row_map.of_sequences(sequence)
    place = store.row_map.sequence(sequence)
    table = store.row_map.table(rows)
    beside = {
        "sequence": place.sequence,
        "document": place.document,
        "segment": place.segment,
        "first_token": place.first_token,
        "length": place.length,
        "text": "".join(store.row_texts(rows)),
    }
    return ask.table(table, beside)
