"""A page as a response: what every page has around what it is about."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response

from actstore.query.service.pages.templating import environment
from actstore.query.service.problems import public_text
from actstore.query.views.tables import Fetch

if TYPE_CHECKING:
    import pyarrow as pa

    from actstore.query.service.sql_worker import SqlAnswer
    from actstore.query.service.state import StoreHolder
    from actstore.query.session import Store

__all__ = [
    "ASSETS",
    "Crumb",
    "assets",
    "error_page",
    "open_store",
    "render",
    "revision",
    "run_sql",
    "worker",
]

_STATIC = Path(__file__).parent / "static"

ASSETS: Mapping[str, str] = {
    "viewer.css": "text/css; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "htmx-4.0.1.min.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The files that pages need -> their types; no other is served."""


@dataclass(frozen=True)
class Crumb:
    """A step of the way to a page."""

    text: str
    path: str | None = None


@cache
def assets() -> Mapping[str, bytes]:
    """The files that pages need, in memory."""
    return {name: (_STATIC / name).read_bytes() for name in ASSETS}


@cache
def revision() -> str:
    """Names the files and templates: a page is another one when they are."""
    digest = hashlib.sha256()
    for name, data in assets().items():
        digest.update(name.encode() + data)
    for template in sorted((_STATIC.parent / "templates").glob("*.html")):
        digest.update(template.read_bytes())
    return digest.hexdigest()[:12]


def open_store(request: Request) -> "Store":
    """The store that the server answers from."""
    store: Store = request.app.state.store
    return store


def worker(request: Request) -> Fetch:
    """Runs queries with text that somebody typed, in the service's own process for them."""

    def fetch(query: str) -> "pa.Table":
        return run_sql(request, query).table

    return fetch


def run_sql(request: Request, query: str, *, max_rows: int | None = None) -> "SqlAnswer":
    """The answer to a query that somebody typed.

    Raises:
        InvalidInput: the query is not valid, or passes a limit.
        StoreDamaged: a block of the snapshot fails its checksum.
    """
    holder: StoreHolder = request.app.state.holder
    return holder.current.sql.run(query, None, max_rows=max_rows)


def render(
    request: Request,
    template: str,
    *,
    crumbs: tuple[Crumb, ...] = (),
    status: int = 200,
    **context: Any,
) -> Response:
    """A page.

    Args:
        request: what was asked.
        template: the name of a template.
        crumbs: the way to the page; the last one is its title.
        status: of the response.
        context: what the template speaks of.
    """
    return HTMLResponse(
        environment().get_template(template).render(**_frame(request), crumbs=crumbs, **context),
        status,
        {"Cache-Control": "no-store"},
    )


def _frame(request: Request) -> dict[str, Any]:
    """What every page shows: the store's name, what there is to go to, where files are."""
    state = request.app.state
    base = str(request.scope.get("root_path", "")).rstrip("/")
    store = getattr(state, "store", None)
    return {
        "base": base,
        # Messages of the store's errors may name files; a page says no path of the server.
        "public": lambda text: public_text(text, getattr(state, "roots", ())),
        "revision": revision(),
        "path": request.url.path.removeprefix(base),
        "version": version("actstore"),
        "model": "" if store is None else store.model_name,
        "has_latents": store is not None and bool(store.kept_latents.sets),
        "has_prompt": getattr(state, "prompt", None) is not None,
        "store_id": "" if store is None else store.reader.manifest.id,
        "segments": 0 if store is None else len(store.reader.segments),
        "segments_planned": 0 if store is None else store.reader.planned_segments,
    }


def error_page(
    request: Request, problem: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    """A problem as a page.

    Args:
        request: what met it.
        problem: ``status``, ``title``, ``detail`` and ``kind`` of an RFC 9457 problem.
        headers: of the response that the page stands for, such as ``Retry-After``.
    """
    return HTMLResponse(
        environment()
        .get_template("problem.html")
        .render(**_frame(request), crumbs=(Crumb(str(problem["title"])),), problem=problem),
        int(problem["status"]),
        {**_kept(headers or {}), "Cache-Control": "no-store"},
    )


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that say something of the problem, and nothing of how it was written."""
    return {k: v for k, v in headers.items() if not k.lower().startswith(("content-", "cache-"))}
