"""SQL from strangers, answered by processes that can be killed.

DuckDB interrupts most queries at their time limit, but not a scalar function at work
(``repeat('a', 2000000000)``), nor a derived scalar's table between two batches. So
queries run in child processes: where the limit has passed, the process is killed, and
another one takes its place.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from actstore.query.service.sql_limits import SqlLimits
from actstore.query.service.sql_process import SqlProcess, rebuilt_error
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, StoreDamaged

__all__ = ["SqlAnswer", "SqlBusy", "SqlLimits", "SqlService"]

SqlParameters = Mapping[str, Any] | Sequence[Any] | None

_GRACE_SECONDS = 0.5
"""How much longer than DuckDB's own limit a process may take before it is killed."""


@dataclass(frozen=True)
class SqlAnswer:
    """The rows of a query.

    Attributes:
        table: the rows, at most as many as were asked for.
        truncated: the query has more rows than these.
        seconds: time that the query took, without waiting for a process.
        coverage: hash of the commit records that were asked.
    """

    table: pa.Table
    truncated: bool
    seconds: float
    coverage: str = ""


class SqlBusy(InvalidInput):
    """Too many queries wait already, or none of the processes came free in time."""


class SqlService:
    """Answers SQL over a store's tables under limits that hold whatever the query is.

    Processes are started when they are first needed. Every method may be called from any
    thread.

    Args:
        store_path: the store's directory.
        limits: what a query may take.
        objective: whose gradients are read, where sets of several objectives are stored.
    """

    def __init__(
        self,
        store_path: str | Path,
        limits: SqlLimits | None = None,
        objective: str | None = None,
    ) -> None:
        self.limits = limits or SqlLimits()
        self._settings = {
            "path": str(store_path),
            "objective": objective,
            "limits": asdict(self.limits),
        }
        self._changed = threading.Condition()
        self._idle: list[SqlProcess] = []
        self._all: set[SqlProcess] = set()
        self._running = 0
        self._waiting = 0
        self._is_closed = False
        self._store: str | None = None

    def start(self) -> None:
        """Start one process now, so that the first query finds it; does not wait for it."""
        with self._changed:
            if not self._is_closed and not self._all:
                self._idle.append(self._spawned())

    def run(
        self, query: str, parameters: SqlParameters = None, *, max_rows: int | None = None
    ) -> SqlAnswer:
        """Answer one query.

        Args:
            query: one SELECT, EXPLAIN, DESCRIBE, SUMMARIZE or SHOW TABLES.
            parameters: JSON values of ``?`` (a list) or ``$name`` (a mapping).
            max_rows: rows wanted; ``default_rows`` of the limits by default.

        Raises:
            InvalidInput: the query is not valid or not allowed (``invalid_sql``), takes too
                long (``sql_timeout``), or needs too much (``sql_too_large``).
            SqlBusy: too many others are asking; its kind is ``sql_timeout``.
            StoreDamaged: a block of the snapshot fails its checksum, or the store was replaced.
        """
        request = self._request(query, parameters, max_rows)
        process = self._taken()
        is_sound = False
        try:
            ready = process.ready(self.limits.start_seconds)
            self._require_same_store(ready["store"])
            deadline = time.monotonic() + self.limits.seconds + _GRACE_SECONDS
            header, table = process.ask(request, deadline, self.limits)
            is_sound = not header["spent"] and header["rss"] <= self._most_resident(ready)
            if table is None:
                raise rebuilt_error(header["error"])
            return SqlAnswer(table, header["truncated"], header["seconds"], ready["coverage"])
        except ActstoreError:
            if self._is_closed:
                raise _closed() from None
            raise
        finally:
            self._give_back(process, is_sound=is_sound)

    def close(self) -> None:
        """End every process; queries that run fail, and later ones are refused."""
        with self._changed:
            self._is_closed = True
            idle, running = self._idle, self._all.difference(self._idle)
            self._idle, self._all = [], set()
            self._changed.notify_all()
        for process in idle:
            process.end()
        for process in running:
            # Whoever waits for its answer closes the pipes.
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Ids of the processes that are there now."""
        with self._changed:
            return tuple(sorted(process.id for process in self._all))

    def _request(self, query: str, parameters: SqlParameters, max_rows: int | None) -> bytes:
        limits = self.limits
        if len(query) > limits.query_characters:
            raise InvalidInput(
                f"The query has {len(query):,} characters; {limits.query_characters:,} are read "
                "at most. Pass long lists as a parameter.",
                kind=ErrorKind.SQL_TOO_LARGE,
            )
        rows = limits.default_rows if max_rows is None else max_rows
        if not 1 <= rows <= limits.rows:
            raise InvalidInput(
                f"max_rows is {rows}; use 1 to {limits.rows:,}.", kind=ErrorKind.INVALID_ARGUMENT
            )
        given = dict(parameters) if isinstance(parameters, Mapping) else parameters
        fields = {"query": query, "parameters": given, "rows": rows}
        try:
            # A surrogate has no place in UTF-8, so none gets as far as DuckDB.
            return json.dumps(fields, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise InvalidInput(
                "The query or its parameters hold what JSON cannot say; use text, numbers, "
                "booleans, null, and lists or mappings of them.",
                kind=ErrorKind.INVALID_SQL,
            ) from None

    def _taken(self) -> SqlProcess:
        """A process for one query; waits for one where all are at work."""
        with self._changed:
            if not self._may_take() and self._waiting >= self.limits.waiting:
                raise SqlBusy(
                    f"{self._waiting} queries wait already. Try again in a moment.",
                    kind=ErrorKind.SQL_TIMEOUT,
                )
            self._waiting += 1
            try:
                came = self._changed.wait_for(self._may_take, self.limits.wait_seconds)
            finally:
                self._waiting -= 1
            if self._is_closed:
                raise _closed()
            if not came:
                raise SqlBusy(
                    f"No process came free within {self.limits.wait_seconds:g} seconds. Try "
                    "again in a moment.",
                    kind=ErrorKind.SQL_TIMEOUT,
                )
            while self._idle and not self._idle[-1].is_alive:
                dead = self._idle.pop()
                self._all.discard(dead)
                dead.end()
            process = self._idle.pop() if self._idle else self._spawned()
            self._running += 1
            return process

    def _may_take(self) -> bool:
        return self._is_closed or self._running < self.limits.processes

    def _give_back(self, process: SqlProcess, *, is_sound: bool) -> None:
        with self._changed:
            self._running -= 1
            is_kept = is_sound and not self._is_closed
            if is_kept:
                self._idle.append(process)
            else:
                self._all.discard(process)
                # The next one opens the store while nobody waits for it yet.
                if not self._is_closed and process.was_ready and not self._idle:
                    self._idle.append(self._spawned())
            self._changed.notify()
        if not is_kept:
            # Outside the lock: the end of a process with much memory takes its time.
            process.end()

    def _spawned(self) -> SqlProcess:
        process = SqlProcess(self._settings)
        self._all.add(process)
        return process

    def _require_same_store(self, identity: str) -> None:
        with self._changed:
            if self._store is None:
                self._store = identity
            is_same = self._store == identity
        if not is_same:
            raise StoreDamaged(
                "Another store stands where the one that is served was. Start the server again.",
                kind=ErrorKind.MALFORMED_FILE,
            )

    def _most_resident(self, ready: Mapping[str, Any]) -> int:
        """Memory above which a process is not used again."""
        return int(ready["rss"]) + self.limits.memory_bytes


def _closed() -> InvalidInput:
    return InvalidInput("The SQL service is closed.", kind=ErrorKind.INVALID_ARGUMENT)
