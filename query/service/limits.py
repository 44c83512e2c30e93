"""How much one client may ask: requests per minute, and bytes of a body."""

import asyncio
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actstore.query.service.problems import HttpKind, problem_response

__all__ = ["BodyLimit", "RateLimit", "TokenBuckets", "client_of"]

_MAX_CLIENTS = 4096
"""Clients whose buckets are kept; the one not seen for longest is forgotten first."""


@dataclass
class _Bucket:
    level: float
    at: float


class TokenBuckets:
    """A token bucket per client, of a minute's requests; memory is bounded.

    Args:
        per_minute: requests of a client.
        clock: seconds, never going back.
        max_clients: buckets kept.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        max_clients: int = _MAX_CLIENTS,
    ) -> None:
        self._size = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._max_clients = max_clients
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: str) -> float:
        """Take one request's token.

        Returns:
            0 if there was one; else the seconds until there is.
        """
        now = self._clock()
        with self._lock:
            bucket = self._buckets.get(client)
            if bucket is None:
                bucket = self._buckets[client] = _Bucket(self._size, now)
                if len(self._buckets) > self._max_clients:
                    self._buckets.popitem(last=False)
            self._buckets.move_to_end(client)
            gained = (now - bucket.at) * self._per_second
            bucket.level, bucket.at = min(self._size, bucket.level + gained), now
            if bucket.level < 1:
                return (1 - bucket.level) / self._per_second
            bucket.level -= 1
            return 0.0


def client_of(scope: Scope) -> str:
    """Whose requests are counted together: an address, of IPv6 its network of 64 bits."""
    found = scope.get("client")
    host = str(found[0]) if found else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


class RateLimit:
    """Refuses a client's requests above a number per minute.

    Args:
        app: what answers the others.
        per_minute: requests of a client.
    """

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app = app
        self._buckets = TokenBuckets(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http":
            wait = self._buckets.take(client_of(scope))
            if wait:
                seconds = math.ceil(wait)
                refusal = problem_response(
                    HttpKind.RATE_LIMITED,
                    f"Too many requests of one client; try again in {seconds} s.",
                    {"Retry-After": str(seconds)},
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large or too slow, whether or not their length is declared.

    Args:
        app: what answers the others; it gets the whole body at once.
        max_bytes: of a body.
        seconds: for the whole body to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then answer the request or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        body: bytes | None = None
        if declared.isdigit() and int(declared) <= self._max_bytes:
            try:
                async with asyncio.timeout(self._seconds):
                    body = await self._read(receive)
            except TimeoutError:
                detail = f"The body did not arrive within {self._seconds:g} s."
                refusal = problem_response(HttpKind.BODY_TOO_SLOW, detail, {"Connection": "close"})
                await refusal(scope, receive, send)
                return
        if body is None:
            detail = f"A body holds {self._max_bytes:,} bytes at most."
            refusal = problem_response(HttpKind.BODY_TOO_LARGE, detail, {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return given.pop() if given else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None once it is too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)
