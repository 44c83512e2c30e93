"""One child process that answers SQL, as its parent sees it; see ``sql_worker``."""

import json
import os
import select
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from actstore.query.service.sql_child import FRAME
from actstore.query.service.sql_limits import SqlLimits
from actstore.store.errors import (
    ActstoreError,
    ErrorKind,
    InvalidInput,
    NotAStore,
    StoreConflict,
    StoreDamaged,
    Unavailable,
)

__all__ = ["SqlProcess", "rebuilt_error"]

_CHILD = "actstore.query.service.sql_child"
_FRAME_MARGIN = 2**20
_PIECE = 2**16
_ERRORS: dict[str, type[ActstoreError]] = {
    error.__name__: error
    for error in (InvalidInput, NotAStore, StoreConflict, StoreDamaged, Unavailable)
}


class SqlProcess:
    """One child process and the two pipes to it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.was_ready = False
        self._ready: dict[str, Any] | None = None
        self._ending = threading.Lock()
        self._popen = subprocess.Popen(
            # -P: what lies in the working directory is not imported.
            [sys.executable, "-P", "-m", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        os.set_blocking(self._stdin.fileno(), False)
        # It fits the pipe, so nothing waits here and the store opens meanwhile.
        os.write(self._stdin.fileno(), _framed(json.dumps(settings).encode()))

    @property
    def id(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended; asked of one that is idle."""
        if self._popen.poll() is not None:
            return False
        # One that is idle has nothing to say, so what can be read is the end.
        return self._ready is None or not select.select([self._stdout], [], [], 0)[0]

    def ready(self, seconds: float) -> dict[str, Any]:
        """What the process says of the store once it is open.

        Raises:
            ActstoreError: it cannot be opened.
        """
        if self._ready is None:
            deadline = time.monotonic() + seconds
            try:
                header, _ = self._receive(deadline, _FRAME_MARGIN)
            except (_TooLate, _Ended):
                raise StoreDamaged(
                    "The process for SQL did not come up. Look at the store with `actstore sql` "
                    "on the server.",
                    kind=ErrorKind.MALFORMED_FILE,
                ) from None
            if "error" in header:
                raise rebuilt_error(header["error"])
            self._ready = header
            self.was_ready = True
        return self._ready

    def ask(
        self, request: bytes, deadline: float, limits: SqlLimits
    ) -> tuple[dict[str, Any], pa.Table | None]:
        """The header and the rows that answer a request; no rows, but an error in the header.

        Raises:
            InvalidInput: it took too long, or the process did not outlive it.
        """
        try:
            self._send(_framed(request), deadline)
            header, payload = self._receive(deadline, limits.result_bytes + _FRAME_MARGIN)
            return header, None if "error" in header else pa.ipc.open_stream(payload).read_all()
        except _TooLate:
            raise InvalidInput(
                f"The query ran longer than {limits.seconds:g} seconds and was stopped. Restrict "
                "it, to a layer or some tokens.",
                kind=ErrorKind.SQL_TIMEOUT,
            ) from None
        except (_Ended, pa.ArrowException):
            raise InvalidInput(
                "The query ended its process; most likely it needs more memory than the "
                f"{limits.memory_bytes >> 20} MiB that one may have.",
                kind=ErrorKind.SQL_TOO_LARGE,
            ) from None

    def kill(self) -> None:
        """Kill the process and wait for its end; whoever reads its answer finds none."""
        with self._ending:
            self._popen.kill()
            self._popen.wait()

    def end(self) -> None:
        """Kill the process and close the pipes."""
        self.kill()
        self._stdin.close()
        self._stdout.close()

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._stdin, selectors.EVENT_WRITE)
                while view:
                    _wait(selector, deadline)
                    view = view[os.write(self._stdin.fileno(), view) :]
            except (OSError, ValueError):
                raise _Ended from None

    def _receive(self, deadline: float, max_bytes: int) -> tuple[dict[str, Any], bytes]:
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._stdout, selectors.EVENT_READ)
                start = self._read(selector, FRAME.size, deadline)
                header_size, payload_size = FRAME.unpack(start)
                if header_size > _FRAME_MARGIN or payload_size > max_bytes:
                    raise _Ended
                header = json.loads(self._read(selector, header_size, deadline))
                return header, bytes(self._read(selector, payload_size, deadline))
            except (OSError, ValueError):
                raise _Ended from None

    def _read(self, selector: selectors.BaseSelector, size: int, deadline: float) -> bytearray:
        data = bytearray()
        while len(data) < size:
            _wait(selector, deadline)
            piece = os.read(self._stdout.fileno(), min(size - len(data), _PIECE))
            if not piece:
                raise _Ended
            data += piece
        return data


class _TooLate(Exception):
    """The deadline has passed."""


class _Ended(Exception):
    """The process is gone, or speaks no sense."""


def _wait(selector: selectors.BaseSelector, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or not selector.select(left):
        raise _TooLate


def _framed(header: bytes) -> bytes:
    return FRAME.pack(len(header), 0) + header


def rebuilt_error(fields: Mapping[str, str]) -> ActstoreError:
    """The error that a child met, from its type, kind and message."""
    made = _ERRORS.get(fields["type"], ActstoreError)
    return made(fields["message"], kind=ErrorKind(fields["kind"]))
