"""The process that answers strangers' SQL, so that it can be killed; see ``sql_worker``.

It opens the store by itself and speaks frames over its standard input and output: a header
of JSON and a payload of Arrow IPC. Nothing is unpickled on either side. It ends when its
input does, whatever it is doing: a thread reads the input all the time.
"""

import io
import json
import os
import queue
import resource
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from actstore.query.session import Store
    from actstore.query.sql import Sql

__all__ = ["FRAME", "main", "write_frame"]

FRAME = struct.Struct(">IQ")
"""What a frame starts with: bytes of its header and of its payload."""

_BATCH_ROWS = 1024
_HEADROOM = 1536 * 2**20
"""Address space beyond DuckDB's own memory: Arrow's copies, and torch when a scalar needs it."""

_STATM = Path("/proc/self/statm")


def main() -> None:
    """Answer requests until the input ends; the first line says how the store is opened."""
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not get between the frames.
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    settings = json.loads(_read_frame(sys.stdin.buffer))
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    roots = _roots(settings["path"])
    try:
        worker = _Worker(settings)
    except ActstoreError as error:
        write_frame(answers, {"error": _fields(error, roots, "")})
        return
    opened = {"store": worker.identity, "coverage": worker.coverage, "rss": _resident_bytes()}
    write_frame(answers, opened)
    while True:
        request = requests.get()
        known = f"{request['query']} {request['parameters']}"
        try:
            header, payload = worker.answer(request)
        except ActstoreError as error:
            header, payload = {"error": _fields(error, roots, known)}, b""
        header |= {"spent": worker.is_spent, "rss": _resident_bytes()}
        write_frame(answers, header, payload)


def write_frame(stream: BinaryIO, header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Write a header and its payload."""
    encoded = json.dumps(header).encode()
    stream.write(FRAME.pack(len(encoded), len(payload)))
    stream.write(encoded)
    stream.write(payload)
    stream.flush()


def _read_frame(stream: BinaryIO) -> bytes:
    """The header of the next frame; requests have no payload.

    Raises:
        EOFError: the input has ended.
    """
    start = stream.read(FRAME.size)
    if len(start) < FRAME.size:
        raise EOFError
    return stream.read(FRAME.unpack(start)[0])


def _listen(stream: BinaryIO, requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    while True:
        try:
            requests.put(json.loads(_read_frame(stream)))
        except (EOFError, OSError, ValueError):
            # Whoever asks is gone. A query may be running, so nothing else can end it.
            os._exit(0)


class _Worker:
    """An open store, and the limits under which it answers.

    Attributes:
        is_spent: an error was met after which another process should go on.
        identity: what tells the store from another one at its path.
        coverage: hash of the commit records that the tables hold.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from actstore.query.service.sql_policy import SqlPolicy
        from actstore.query.session import Store

        self._limits = settings["limits"]
        self.is_spent = False
        self._store: Store = Store(settings["path"], objective=settings["objective"])
        self._sql = _guarded(self._store, self._limits)
        self._policy: SqlPolicy = SqlPolicy(self._sql.connection)
        plans = self._store.reader.plans
        first_plan = plans[0].hash if plans else ""
        self.identity = f"{self._store.reader.manifest.id}-{first_plan}"
        self.coverage = self._sql.snapshot.coverage.hash
        _confine(self._limits["memory_bytes"])

    def answer(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The header and the Arrow stream of an answer.

        Raises:
            ActstoreError: there is none.
        """
        import duckdb
        import pyarrow as pa

        started = time.perf_counter()
        self._sql.last = None
        try:
            statement = self._policy.admit(request["query"])
            relation = self._sql.relation(statement, request["parameters"])
            table, truncated = self._collect(relation, request["rows"])
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        except (InvalidInput, duckdb.Error, pa.ArrowException, OSError, MemoryError) as error:
            raise self._translated(error) from error
        seconds = time.perf_counter() - started
        return {"truncated": truncated, "seconds": seconds}, sink.getvalue()

    def _collect(
        self, relation: "duckdb.DuckDBPyRelation", max_rows: int
    ) -> tuple["pa.Table", bool]:
        """The first rows of a result, as many as the limits let through."""
        import pyarrow as pa

        reader = relation.to_arrow_reader(min(_BATCH_ROWS, max_rows + 1))
        rows = min(max_rows, max(1, self._limits["cells"] // max(1, len(reader.schema))))
        batches, found = [], 0
        for batch in _limited_bytes(reader, self._limits["result_bytes"]):
            batches.append(batch)
            found += batch.num_rows
            if found > rows:
                break
        table = pa.Table.from_batches(batches, reader.schema)
        return table.slice(0, rows), found > rows

    def _translated(self, error: BaseException) -> ActstoreError:
        """The store's error for what a query met while it ran."""
        import duckdb

        cause = error.__cause__ if isinstance(error.__cause__, duckdb.Error) else error
        text = str(error)
        if isinstance(cause, duckdb.OutOfMemoryException | MemoryError) or (
            "Out of Memory Error" in text or "bad_alloc" in text or "realloc of size" in text
        ):
            # DuckDB recovers from its own limit; from a failed allocation nobody knows.
            self.is_spent |= not isinstance(cause, duckdb.OutOfMemoryException)
            return InvalidInput(
                f"The query needs more memory than the {self._limits['memory_bytes'] >> 20} MiB "
                "that one may have. Ask for fewer rows, or aggregate them.",
                kind=ErrorKind.SQL_TOO_LARGE,
            )
        if isinstance(cause, duckdb.InterruptException) or "INTERRUPT Error" in text:
            return InvalidInput(
                f"The query ran longer than {self._limits['seconds']:g} seconds. Restrict it, to a "
                "layer or some tokens, or ask a derived scalar's table for less.",
                kind=ErrorKind.SQL_TIMEOUT,
            )
        if self._sql.last is not None and self._sql.last.error is not None:
            # What a derived scalar's table met, which DuckDB passes on as text.
            return self._sql.last.error
        if isinstance(error, ActstoreError):
            self.is_spent |= isinstance(cause, duckdb.FatalException | duckdb.InternalException)
            return error
        self.is_spent |= isinstance(error, duckdb.FatalException | duckdb.InternalException)
        return InvalidInput(f"The query cannot be answered. {text}", kind=ErrorKind.INVALID_SQL)


def _guarded(store: "Store", limits: Mapping[str, Any]) -> "Sql":
    """The store's SQL over a connection of our own, under our settings.

    The snapshot's own connection is locked with the settings of a person at their own store.
    """
    import duckdb

    from actstore.query.sql import Sql
    from actstore.store.snapshot import Snapshot
    from actstore.store.tables import fill_tables

    sql = Sql(store.reader, store)
    sql.max_cells = limits["scan_cells"]
    sql.seconds = limits["seconds"]
    found = sql.snapshot
    found.connection.close()
    options = _options(limits)
    if found.path is not None:
        connection = duckdb.connect(str(found.path), read_only=True, config=options)
    else:
        connection = duckdb.connect(":memory:", config=options)
        fill_tables(connection, store.reader)
    sql.snapshot = Snapshot(connection, found.coverage, found.place, found.path)
    return sql


def _limited_bytes(reader: "pa.RecordBatchReader", max_bytes: int) -> "Iterator[pa.RecordBatch]":
    total = 0
    for batch in reader:
        total += batch.nbytes
        if total > max_bytes:
            raise InvalidInput(
                f"The result is larger than {max_bytes >> 20} MiB. Ask for fewer rows or columns, "
                "or for shorter values.",
                kind=ErrorKind.SQL_TOO_LARGE,
            )
        yield batch


def _options(limits: Mapping[str, Any]) -> dict[str, Any]:
    """DuckDB's settings: nothing outside the database, and no more than the limits."""
    return {
        "enable_external_access": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "python_enable_replacements": False,
        "temp_directory": "",
        "memory_limit": f"{limits['memory_bytes']}B",
        "threads": limits["threads"],
        "max_execution_time": max(1, int(limits["seconds"] * 1000)),
        "lock_configuration": True,
    }


def _confine(memory_bytes: int) -> None:
    """Let this process grow by so much, write no file and leave no core."""
    pages = int(_STATM.read_text().split()[0]) if _STATM.exists() else 0
    if pages:
        space = pages * resource.getpagesize() + memory_bytes + _HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The server answers others meanwhile.
    os.nice(5)


def _resident_bytes() -> int:
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def _roots(path: str) -> dict[str, str]:
    """Directories that no message may name, the longest first, and what stands for each."""
    places = [
        str(Path(__file__).parents[2]),
        str(Path(__file__).resolve().parents[2]),
        str(Path.home()),
        tempfile.gettempdir(),
        sys.prefix,
        str(Path.cwd()),
    ]
    named = {place.rstrip("/"): "…" for place in places if len(place) > 2}
    named |= {place.rstrip("/"): "the store" for place in (path, str(Path(path).resolve()))}
    return dict(sorted(named.items(), key=lambda item: -len(item[0])))


def _fields(error: ActstoreError, roots: Mapping[str, str], known: str) -> dict[str, str]:
    """An error for the wire, without the server's paths.

    What the query itself says stays as it is: to replace it would tell that it was guessed.
    """
    message = str(error)
    for root, name in roots.items():
        if root not in known:
            message = message.replace(root, name)
    return {"type": type(error).__name__, "kind": error.kind.value, "message": message}


if __name__ == "__main__":
    main()
