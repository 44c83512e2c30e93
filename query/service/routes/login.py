"""The login page: where a person types the token once, and gets a session."""

from html import escape
from importlib.resources import files
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse, RedirectResponse

from actstore.query.service.access import Sessions, TokenGuard, local_path
from actstore.query.service.limits import TokenBuckets, client_of
from actstore.query.service.problems import HttpKind, ServiceError

__all__ = ["login_router"]

_TRIES_PER_MINUTE = 10
"""Tokens one client may try: a person's typing errors, and no guessing."""


def login_router(guard: TokenGuard, sessions: Sessions) -> APIRouter:
    """The login page of a server with a token.

    Args:
        guard: knows the token.
        sessions: of browsers.
    """
    router = APIRouter(include_in_schema=False)
    tries = TokenBuckets(_TRIES_PER_MINUTE)

    @router.get("/login")
    def page(next: str = "/") -> Response:
        return _page(local_path(next), 200, "")

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        wait = tries.take(client_of(request.scope))
        if wait:
            raise ServiceError(
                HttpKind.RATE_LIMITED,
                f"Too many tries; try again in {wait:.0f} s.",
                {"Retry-After": str(int(wait) + 1)},
            )
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
        following = local_path(fields.get("next", ["/"])[0])
        if not guard.accepts(fields.get("token", [""])[0].strip()):
            return _page(following, 401, "That is not this server's token.")
        response = RedirectResponse(following, 303)
        response.headers["Cache-Control"] = "no-store"
        response.set_cookie(
            sessions.cookie,
            sessions.begin(),
            max_age=sessions.seconds,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return response

    @router.post("/logout")
    def log_out(request: Request) -> Response:
        sessions.end(request.cookies.get(sessions.cookie, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(sessions.cookie, httponly=True, samesite="lax")
        return response

    return router


def _page(following: str, status: int, message: str) -> Response:
    text = (files("actstore.query.service") / "static" / "login.html").read_text("utf-8")
    filled = text.replace("{next}", escape(following)).replace("{message}", escape(message))
    return HTMLResponse(filled, status, {"Cache-Control": "no-store"})
