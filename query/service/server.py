"""A running server: in the foreground, or beside the caller for notebooks and tests."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import uvicorn

from actstore.query.service.app import create_app
from actstore.query.service.settings import ServerSettings
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from fastapi import FastAPI

    from actstore.query.session import Store

__all__ = ["BackgroundServer", "background", "serve"]

_START_SECONDS = 60
_STOP_SECONDS = 10


def serve(
    store: "Store",
    settings: ServerSettings | None = None,
    *,
    prompt: Callable[[str], Any] | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Answer from a store until the process is interrupted.

    Args:
        store: the open store.
        settings: where to listen, who may ask, and how much.
        prompt: as for :func:`~actstore.query.service.app.create_app`.
        started: called with the address once the server listens.

    Raises:
        InvalidInput: the address cannot be listened at.
    """
    chosen = settings or ServerSettings()
    listening = _bound(chosen)
    app = create_app(store, chosen, prompt=prompt)

    def begin(url: str) -> None:
        # The first query need not wait for a process to open the store.
        app.state.holder.current.sql.start()
        if started is not None:
            started(url)

    server = _Server(_config(app), begin, _url(chosen, listening))
    with listening, suppress(KeyboardInterrupt):
        # Uvicorn shuts down on Ctrl-C, then raises it again for whoever called.
        server.run([listening])


def background(
    store: "Store",
    settings: ServerSettings | None = None,
    *,
    prompt: Callable[[str], Any] | None = None,
) -> "BackgroundServer":
    """Answer from a store in a thread, until the handle is closed.

    Args:
        store: the open store; the handle does not close it.
        settings: as for :func:`serve`.
        prompt: as for :func:`serve`.

    Returns:
        A handle with ``url`` and ``close()``; a context manager.

    Raises:
        InvalidInput: the address cannot be listened at.
    """
    return BackgroundServer(store, settings or ServerSettings(), prompt)


class BackgroundServer:
    """A server in a thread of this process.

    Attributes:
        url: its address, without a stroke at the end.
    """

    def __init__(
        self,
        store: "Store",
        settings: ServerSettings,
        prompt: Callable[[str], Any] | None,
    ) -> None:
        self._socket = _bound(settings)
        self.url = _url(settings, self._socket)
        ready = threading.Event()
        self._server = _Server(
            _config(create_app(store, settings, prompt=prompt)), lambda _: ready.set(), self.url
        )
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        if not ready.wait(_START_SECONDS) or not self._thread.is_alive():
            self.close()
            raise InvalidInput(
                f"The server at {self.url} did not start; its log says why.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )

    def _run(self, ready: threading.Event) -> None:
        try:
            self._server.run([self._socket])
        finally:
            ready.set()

    def close(self) -> None:
        """Stop answering, and wait until what is at work is done."""
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(_STOP_SECONDS)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BackgroundServer {self.url}>"


class _Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(
        self, config: uvicorn.Config, started: Callable[[str], None] | None, url: str
    ) -> None:
        super().__init__(config)
        self._when_started = started
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        if self.started and self._when_started is not None:
            self._when_started(self._url)


def _config(app: "FastAPI") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
        timeout_keep_alive=15,
        lifespan="on",
        ws="none",
    )


def _bound(settings: ServerSettings) -> socket.socket:
    """A socket at the address, so that the port is known before the server runs."""
    host = settings.host.strip("[]")
    try:
        entries = socket.getaddrinfo(
            host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = entries[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(settings, error) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except OSError as error:
        listening.close()
        raise _cannot_listen(settings, error) from error
    return listening


def _cannot_listen(settings: ServerSettings, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"Cannot listen at {settings.host or 'every address'}, port {settings.port}: "
        f"{error.strerror or error}. Choose another --port, or 0 for a free one.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )


def _url(settings: ServerSettings, listening: socket.socket) -> str:
    host = settings.host.strip("[]")
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
