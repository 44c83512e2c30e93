"""Slow questions wait among themselves, so that quick ones are answered meanwhile.

Handlers run in threads, of which there are few. Whoever waits here holds none: rankings and
values, SQL and predicates, and texts for the model each have a share of the threads, and the
rest is kept for what takes no time.
"""

import asyncio
from enum import Enum, auto
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from actstore.query.service.problems import HttpKind, problem_response

__all__ = ["Lane", "Lanes", "lane_of"]

_API = "/api/v1/"
_MAX_WAITING = 256
"""Requests that may wait in one lane; four times the clients that a lab has at once."""

_VALUES = (
    "topk",
    "explain",
    "compare",
    "filter",
    "count",
    "examples",
    "histogram",
    "scalars",
    "raw",
)
_OF_UNITS = ("/examples", "/histogram")
_PREDICATES = frozenset({"where", "units", "q"})


class Lane(Enum):
    """What a request may have to wait for."""

    QUICK = auto()
    VALUES = auto()
    SQL = auto()
    MODEL = auto()


_SHARES = {Lane.VALUES: 3 / 8, Lane.SQL: 2 / 8, Lane.MODEL: 1 / 8}
"""Of the threads."""


def lane_of(scope: Scope) -> Lane:
    """The lane of a request, by its path and its keys.

    >>> lane_of({"method": "GET", "path": "/api/v1/neurons", "query_string": b"where=dead"})
    <Lane.SQL: 3>
    >>> lane_of({"method": "GET", "path": "/api/v1/topk/mlp_post_act"})
    <Lane.VALUES: 2>
    >>> lane_of({"method": "GET", "path": "/api/v1/store"})
    <Lane.QUICK: 1>
    """
    path: str = scope["path"]
    posts = scope["method"] == "POST"
    if posts and path.rsplit("/", 1)[-1] == "prompt":
        return Lane.MODEL
    keys = {name for name, _ in parse_qsl(scope.get("query_string", b"").decode("latin-1"))}
    if keys & _PREDICATES or (posts and path.rsplit("/", 1)[-1] == "sql"):
        return Lane.SQL
    if path.startswith(_API):
        first, _, rest = path[len(_API) :].partition("/")
        is_list = first == "scalars" and not rest
        is_slow = rest.endswith(_OF_UNITS) or (first == "neurons" and rest.count("/") == 1)
        if (first in _VALUES and not is_list) or is_slow:
            return Lane.VALUES
        return Lane.QUICK
    is_page = not path.startswith(("/api", "/static", "/login", "/openapi.json"))
    return Lane.VALUES if is_page else Lane.QUICK


class Lanes:
    """Lets few slow requests of each kind run at once.

    Args:
        app: what answers.
        threads: that handlers run in, in all.
    """

    def __init__(self, app: ASGIApp, threads: int) -> None:
        self._app = app
        self._free = {
            lane: asyncio.Semaphore(max(1, int(threads * share))) for lane, share in _SHARES.items()
        }
        self._waiting = dict.fromkeys(_SHARES, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request when its turn comes, or refuse it if too many wait."""
        lane = lane_of(scope) if scope["type"] == "http" else Lane.QUICK
        if lane is Lane.QUICK:
            await self._app(scope, receive, send)
            return
        if self._waiting[lane] >= _MAX_WAITING:
            refusal = problem_response(
                HttpKind.BUSY,
                f"{_MAX_WAITING} requests of this kind wait already. Try again in a moment.",
                {"Retry-After": "1"},
            )
            await refusal(scope, receive, send)
            return
        self._waiting[lane] += 1
        try:
            await self._free[lane].acquire()
        finally:
            self._waiting[lane] -= 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._free[lane].release()
