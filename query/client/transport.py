"""Requests to a server: connections that are kept, answers that are kept, errors rebuilt."""

import http.client
import json
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from actstore.store.errors import (
    ActstoreError,
    ErrorKind,
    IngestStopped,
    InvalidInput,
    NotAStore,
    StoreConflict,
    StoreDamaged,
    Unavailable,
    WriteFailed,
)

__all__ = ["ARROW", "JSON", "Reply", "ServerRefusal", "ServerUnreachable", "Transport"]

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"

_PROBLEM = "application/problem+json"
_RETRIES = 3
_LONGEST_PAUSE = 5.0
_SLOW_DOWN = 429

_K = ErrorKind
_TYPES: dict[ErrorKind, type[ActstoreError]] = {
    _K.NOT_A_STORE: NotAStore,
    _K.NEWER_FORMAT: NotAStore,
    _K.NOT_STORED: Unavailable,
    _K.NOTHING_COMMITTED: Unavailable,
    _K.CONFIG_CONFLICT: StoreConflict,
    _K.CORPUS_CONFLICT: StoreConflict,
    _K.CHECKSUM_MISMATCH: StoreDamaged,
    _K.MISSING_FILE: StoreDamaged,
    _K.MALFORMED_FILE: StoreDamaged,
    _K.NUMERIC_OVERFLOW: IngestStopped,
    _K.CAPTURE_MISMATCH: IngestStopped,
    _K.DISK_FULL: WriteFailed,
    _K.WRITE_FAILED: WriteFailed,
    _K.READ_ONLY: WriteFailed,
}
"""Kind -> type of the error that an open store raises with it; the others are InvalidInput."""


class ServerRefusal(ActstoreError):
    """The server refuses the request for a reason that an open store does not have.

    Attributes:
        problem: the server's kind, such as ``unauthorized``, ``rate_limited``, ``busy``.
        status: of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind = ErrorKind.INVALID_ARGUMENT,
        problem: str = "",
        status: int = 0,
    ) -> None:
        super().__init__(message, kind=kind)
        self.problem = problem
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return _refusal, (str(self), self.kind, self.problem, self.status)


def _refusal(message: str, kind: ErrorKind, problem: str, status: int) -> ServerRefusal:
    return ServerRefusal(message, kind=kind, problem=problem, status=status)


class ServerUnreachable(NotAStore):
    """No server of a store answers at the address, or not in time."""


@dataclass(frozen=True)
class Reply:
    """A response.

    Attributes:
        body: its bytes.
        media_type: without parameters.
        tag: its entity tag; None without one.
    """

    body: bytes
    media_type: str
    tag: str | None


class Transport:
    """Requests to one server; may be used by several threads.

    Args:
        url: ``http://`` or ``https://`` address of the server.
        token: what the server asks for, if it asks.
        timeout: seconds to wait for a connection, and for each part of an answer.
        cache_bytes: answers kept, to be had again without the server sending them.
    """

    def __init__(self, url: str, token: str | None, timeout: float, cache_bytes: int) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise _invalid(f"{url!r} has no port that there is.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _invalid(f"{url!r} is no server's address; write http://host:port.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise _invalid(
                "The address holds more than scheme, host, port and path. Give a token as `token`."
            )
        if token is not None and not (token.isascii() and token.isprintable() and token):
            raise _invalid("The token holds characters that no header can; it is printable ASCII.")
        if timeout <= 0:
            raise _invalid(f"timeout is {timeout}; it must be positive.")
        self.url = url.rstrip("/")
        self._is_secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/")
        self._timeout = timeout
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: set[http.client.HTTPConnection] = set()
        self._kept: OrderedDict[tuple[str, str], Reply] = OrderedDict()
        self._kept_bytes = 0
        self._cache_bytes = cache_bytes

    def get(self, path: str, query: Sequence[tuple[str, str]], accept: str) -> Reply:
        """The answer to a GET.

        Args:
            path: below the server's address.
            query: keys and values.
            accept: the media type wanted.

        Raises:
            ActstoreError: the error that the server met, by its kind.
            ServerRefusal: the server's own reason.
            ServerUnreachable: nobody answers.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        with self._lock:
            kept = self._kept.get((target, accept))
        headers = {"Accept": accept}
        if kept is not None and kept.tag is not None:
            headers["If-None-Match"] = kept.tag
        reply = self._ask("GET", target, None, headers)
        if reply is None:
            assert kept is not None
            return kept
        self._keep((target, accept), reply)
        return reply

    def post(self, path: str, value: Mapping[str, Any], accept: str) -> Reply:
        """The answer to a POST of JSON; raises as :meth:`get`."""
        try:
            body = json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise _invalid(f"JSON cannot say what is given: {error}.") from error
        reply = self._ask("POST", path, body, {"Accept": accept, "Content-Type": JSON})
        assert reply is not None
        return reply

    def close(self) -> None:
        """Close every connection; a later request makes a new one."""
        with self._lock:
            connections, self._connections = self._connections, set()
            self._kept.clear()
            self._kept_bytes = 0
        for connection in connections:
            connection.close()

    def _ask(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Reply | None:
        """The reply; None where the server says that the kept one still holds."""
        for attempt in range(_RETRIES):
            status, fields, content = self._exchange(method, target, body, headers)
            if status == 200:
                media_type = fields.get("content-type", "").partition(";")[0].strip().lower()
                if media_type != headers["Accept"]:
                    raise self._not_ours(f"it answers with {media_type or 'no media type'}")
                return Reply(content, media_type, fields.get("etag"))
            if status == 304:
                return None
            error = self._problem(status, fields, content)
            pause = _seconds(fields.get("retry-after"))
            if status != _SLOW_DOWN or pause is None or attempt == _RETRIES - 1:
                raise error
            time.sleep(pause)
        raise AssertionError

    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; again on a new connection if the server has closed the kept one."""
        path = f"{self._prefix}{target}"
        while True:
            connection, is_new = self._connection()
            try:
                connection.request(method, path, body, {**self._headers, **headers})
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                self._drop(connection)
                was_closed = isinstance(error, ConnectionError | http.client.BadStatusLine)
                if was_closed and not is_new:
                    continue
                raise self._unreachable(error) from error
            fields = {name.lower(): value for name, value in response.getheaders()}
            return response.status, fields, content

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, and whether nothing was asked over it yet."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        with self._lock:
            if connection in self._connections and connection.sock is not None:
                return connection, False
            if self._is_secure:
                connection = http.client.HTTPSConnection(
                    self._host,
                    self._port,
                    timeout=self._timeout,
                    context=ssl.create_default_context(),
                )
            else:
                connection = http.client.HTTPConnection(
                    self._host, self._port, timeout=self._timeout
                )
            self._connections.add(connection)
        self._local.connection = connection
        return connection, True

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _keep(self, key: tuple[str, str], reply: Reply) -> None:
        if reply.tag is None or len(reply.body) > self._cache_bytes:
            return
        with self._lock:
            old = self._kept.pop(key, None)
            self._kept_bytes += len(reply.body) - (len(old.body) if old is not None else 0)
            self._kept[key] = reply
            while self._kept_bytes > self._cache_bytes:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1].body)

    def _problem(self, status: int, fields: Mapping[str, str], content: bytes) -> ActstoreError:
        if not fields.get("content-type", "").startswith(_PROBLEM):
            return self._not_ours(f"it answers with status {status}")
        try:
            found = json.loads(content)
            detail, kind = str(found["detail"]), str(found["kind"])
        except (ValueError, KeyError, TypeError):
            return self._not_ours("its problems cannot be read")
        try:
            known = ErrorKind(kind)
        except ValueError:
            return ServerRefusal(detail, problem=kind, status=status)
        return _TYPES.get(known, InvalidInput)(detail, kind=known)

    def _not_ours(self, reason: str) -> ServerUnreachable:
        return ServerUnreachable(
            f"{self.url} is no server of a store: {reason}. Use the address that `actstore serve` "
            "prints.",
            kind=ErrorKind.NOT_A_STORE,
        )

    def _unreachable(self, error: BaseException) -> ServerUnreachable:
        reason = (
            f"no answer within {self._timeout:g} seconds"
            if isinstance(error, TimeoutError)
            else str(error) or type(error).__name__
        )
        return ServerUnreachable(
            f"{self.url} cannot be reached: {reason}. Check that `actstore serve` runs there.",
            kind=ErrorKind.NOT_A_STORE,
        )


def _seconds(retry_after: str | None) -> float | None:
    """How long to wait before asking again; None where that is too long or not said."""
    if retry_after is None or not retry_after.isdigit() or int(retry_after) > _LONGEST_PAUSE:
        return None
    return float(retry_after)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
