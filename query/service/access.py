"""Who may ask: host names, origins, the token, and the sessions of browsers.

The server holds one secret, its token. A program sends it as ``Authorization: Bearer``. A
person types it once into the login page and gets a session, a random name in a cookie
that other sites' requests do not carry, unless the user follows a link; the token itself is
in no address and no cookie.
"""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from actstore.query.service.problems import HttpKind, problem_response

__all__ = ["HostGuard", "Sessions", "SiteGuard", "TokenGuard", "host_name", "local_path"]

_SESSION_SECONDS = 12 * 3600
_MAX_SESSIONS = 256
_OPEN_PATHS = ("/login",)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class HostGuard:
    """Answers only under the server's own names.

    A page of another site can point its own name at this machine's address; then the browser
    takes the server for that site. The Host header gives it away.

    Args:
        app: what answers.
        names: of the server; lower case, without port.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http":
            given = Headers(scope=scope).getlist("host")
            if len(given) != 1 or host_name(given[0]) not in self._names:
                shown = ", ".join(given)[:200] or "missing"
                refusal = problem_response(
                    HttpKind.BAD_HOST,
                    f"The Host header is {shown!r}, which is none of this server's names. Add it "
                    "with --allow-host.",
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_name(header: str) -> str:
    """The name in a Host header, lower case; empty if it is malformed.

    >>> host_name("LocalHost:8000"), host_name("[::1]:80"), host_name("a.b@c"), host_name("x:y")
    ('localhost', '::1', '', '')
    """
    name, port = header.strip().lower(), ""
    if name.startswith("["):
        name, closed, port = name[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return ""
        port = port[1:]
    else:
        name, _, port = name.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return ""
    return "" if any(character in name for character in "@/\\?# \t") else name.rstrip(".")


class SiteGuard:
    """Refuses what other sites' pages ask for without the user's knowledge.

    Browsers say where a request comes from. Following a link and a frame are allowed, reading
    from an origin of ``--cors`` too; an image, a form or a script of another site is not: it
    could make the server work, if not read the answer.

    Args:
        app: what answers.
        origins: of other sites that may ask; ``*`` for all.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http" and not self._is_allowed(scope):
            refusal = problem_response(
                HttpKind.FORBIDDEN,
                "A page of another origin asked for this. Name its origin with --cors if it may.",
            )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None:
            if "*" in self._origins or origin in self._origins:
                return True
            # `null` is a page without origin, such as one in a sandbox.
            own = urlsplit(origin).netloc.lower() == headers.get("host", "").strip().lower()
            if not own and (scope["method"] not in _SAFE_METHODS or origin != "null"):
                return False
        site = headers.get("sec-fetch-site", "none")
        if site in ("none", "same-origin"):
            return True
        return scope["method"] in _SAFE_METHODS and headers.get("sec-fetch-mode") == "navigate"


class Sessions:
    """Browsers that have shown the token: random names, kept as digests, forgotten in time.

    Args:
        clock: seconds, never going back.
        max_sessions: kept at once; the oldest is forgotten first.

    Attributes:
        cookie: the cookie's name, this process' own: one host may run several servers.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, max_sessions: int = _MAX_SESSIONS
    ) -> None:
        self.cookie = f"actstore-{secrets.token_hex(4)}"
        self.seconds = _SESSION_SECONDS
        self._clock = clock
        self._max_sessions = max_sessions
        self._ends: OrderedDict[bytes, float] = OrderedDict()
        self._lock = Lock()

    def begin(self) -> str:
        """A new session's name."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            self._ends[_digest(name)] = self._clock() + self.seconds
            while len(self._ends) > self._max_sessions:
                self._ends.popitem(last=False)
        return name

    def holds(self, name: str) -> bool:
        """Whether a session of this name goes on."""
        with self._lock:
            return self._ends.get(_digest(name), -1.0) > self._clock()

    def end(self, name: str) -> None:
        """Forget a session."""
        with self._lock:
            self._ends.pop(_digest(name), None)


class TokenGuard:
    """Asks every request but the login page's for the token or a session.

    Args:
        app: what answers.
        token: the server's.
        sessions: of browsers.
    """

    def __init__(self, app: ASGIApp, token: str, sessions: Sessions) -> None:
        self._app = app
        self._digest = _digest(token)
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http" or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"]
        wants_page = "text/html" in headers.get("accept", "") and not path.startswith("/api/v")
        if scope["method"] == "GET" and wants_page:
            query = scope.get("query_string", b"").decode("latin-1")
            following = path + (f"?{query}" if query else "")
            page = RedirectResponse(f"/login?next={quote(following, safe='')}", 303)
            page.headers["Cache-Control"] = "no-store"
            await page(scope, receive, send)
            return
        refusal = problem_response(
            HttpKind.UNAUTHORIZED,
            "This server asks for its token: send `Authorization: Bearer TOKEN`, or log in at "
            "/login.",
            {"WWW-Authenticate": 'Bearer realm="actstore"'},
        )
        await refusal(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        if scope["path"] in _OPEN_PATHS:
            return True
        headers = Headers(scope=scope)
        given = headers.getlist("authorization")
        if given:
            scheme, _, token = given[0].partition(" ")
            is_bearer = len(given) == 1 and scheme.lower() == "bearer"
            return is_bearer and self.accepts(token.strip())
        cookies = cookie_parser(headers.get("cookie", ""))
        name = cookies.get(self._sessions.cookie)
        return name is not None and self._sessions.holds(name)

    def accepts(self, token: str) -> bool:
        """Whether this is the token; takes as long for one that begins alike."""
        return hmac.compare_digest(_digest(token), self._digest)


def local_path(target: str) -> str:
    r"""A path of this server to go on to; ``/`` for anything that leads elsewhere.

    >>> local_path("/neurons?layer=3"), local_path("//evil.example"), local_path("/\\evil")
    ('/neurons?layer=3', '/', '/')
    """
    is_plain = target.isprintable() and "\\" not in target
    return target if is_plain and target.startswith("/") and target[1:2] != "/" else "/"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
