"""What surrounds every answer: headers for browsers, HEAD, and errors nobody expected."""

import logging

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actstore.query.service.problems import error_of
from actstore.query.service.state import StoreHolder

__all__ = ["Envelope", "content_policy"]

_LOG = logging.getLogger("actstore.service")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def content_policy(framers: tuple[str, ...]) -> str:
    """The policy of every page: nothing from elsewhere, no script but files of this server.

    Styles may stand in the page: the colour of a token is a number that no style sheet knows.

    Args:
        framers: who may show a page in a frame.
    """
    return "; ".join(
        (
            "default-src 'self'",
            "script-src 'self'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            f"frame-ancestors {' '.join(framers)}",
        )
    )


class Envelope:
    """The outermost layer of the service.

    Args:
        app: what answers.
        holder: the store; a request keeps what it began with open.
        framers: who may show a page in a frame.
    """

    def __init__(self, app: ASGIApp, holder: StoreHolder, framers: tuple[str, ...]) -> None:
        self._app = app
        self._holder = holder
        self._headers = {**_HEADERS, "Content-Security-Policy": content_policy(framers)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}
        started = False

        async def finish(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400:
                    headers.setdefault("Cache-Control", "no-store")
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        number = self._holder.begin()
        try:
            await self._app(scope, receive, finish)
        except Exception as error:
            _LOG.exception("%s %s", scope["method"], scope["path"])
            if started:
                raise
            await error_of(error)(scope, receive, finish)
        finally:
            self._holder.end(number)
