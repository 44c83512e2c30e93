"""The page for queries, and the one for texts: what a person types."""

from urllib.parse import parse_qs

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from actstore.query.service.pages.rendering import Crumb, open_store, render, run_sql
from actstore.query.service.pages.routing import new_router
from actstore.query.service.problems import public_text
from actstore.query.views.prompt_view import DEFAULT_SCALAR, PromptView, prompt_scalars
from actstore.query.views.sql_result import EXAMPLE_QUERIES, SqlResult
from actstore.query.views.tables import fetch_rows
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable

__all__ = ["router"]

router = new_router()

_SHOWN_ROWS = 1000
_COLUMNS = (
    "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal "
    "ORDER BY table_name, column_index"
)


@router.get("/sql")
def sql(request: Request, q: str = "") -> Response:
    """A query and its answer; the address is all there is to share."""
    result = None
    problem = ""
    if q.strip():
        try:
            answer = run_sql(request, q, max_rows=_SHOWN_ROWS)
        except InvalidInput as error:
            problem = public_text(str(error), getattr(request.app.state, "roots", ()))
        else:
            result = SqlResult.of(answer.table, truncated=answer.truncated, seconds=answer.seconds)
    tables: dict[str, list[tuple[str, str]]] = {}
    for row in fetch_rows(open_store(request), _COLUMNS):
        tables.setdefault(row["table_name"], []).append((row["column_name"], row["data_type"]))
    return render(
        request,
        "sql.html",
        crumbs=(Crumb("SQL"),),
        status=422 if problem else 200,
        q=q,
        result=result,
        problem=problem,
        examples=EXAMPLE_QUERIES,
        tables=tables,
        shown=_SHOWN_ROWS,
    )


@router.get("/prompt")
def prompt_form(request: Request, scalar: str = DEFAULT_SCALAR) -> Response:
    """The form for a text."""
    _require_model(request)
    return _prompt_page(request, "", scalar, None)


@router.post("/prompt")
async def prompt(request: Request) -> Response:
    """A text, run through the model."""
    _require_model(request)
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=4)
    text = fields.get("text", [""])[0].replace("\r\n", "\n")
    scalar = fields.get("scalar", [DEFAULT_SCALAR])[0]
    limit = request.app.state.settings.max_text_characters
    if len(text) > limit:
        raise InvalidInput(
            f"The text has {len(text):,} characters; this server runs {limit:,} at most.",
            kind=ErrorKind.TOO_LARGE,
        )
    if not text:
        return _prompt_page(request, text, scalar, None)
    return await run_in_threadpool(_run_prompt, request, text, scalar)


def _run_prompt(request: Request, text: str, scalar: str) -> Response:
    state = request.app.state
    with state.prompt_turns.take():
        ran = state.prompt(text)
    view = PromptView.of(ran, open_store(request).texts, name=scalar)
    return _prompt_page(request, text, scalar, view)


def _prompt_page(request: Request, text: str, scalar: str, view: PromptView | None) -> Response:
    return render(
        request,
        "prompt.html",
        crumbs=(Crumb("Prompt"),),
        text=text,
        scalar=scalar,
        scalars=prompt_scalars(),
        view=view,
    )


def _require_model(request: Request) -> None:
    if getattr(request.app.state, "prompt", None) is None:
        raise Unavailable(
            "This server has no model to run a text through. Start it with one: "
            "`actstore serve STORE --model NAME`.",
            kind=ErrorKind.NOT_STORED,
        )
