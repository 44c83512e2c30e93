"""Ingests in processes of their own, to be killed: a server that forks one when asked.

Importing torch takes seconds and a kill test needs hundreds of processes, so one process
imports it once and forks. Each child runs one whole ``ingest`` and may be given
*incidents*: things that happen at a chosen moment of a chosen file's publication.

The moments of a file that is not published yet, or that is replaced (``zarr.json``):

``before``   its temporary file is about to be written
``written``  the temporary file is complete and synced, and not linked
``linked``   it has its final name; the directory is not synced, the temporary name is there

What can happen: ``kill`` (SIGKILL to itself), ``fill`` (another program takes the rest of
the disk), ``limit`` (files longer than 8 bytes fail with EFBIG), ``pause`` (until the test goes on).
"""

import contextlib
import fnmatch
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Moment = Literal["before", "written", "linked"]
Action = Literal["kill", "fill", "limit", "pause"]

PATIENCE = 120.0
"""Seconds until a test gives up on a child: far more than any needs."""


@dataclass(frozen=True)
class Incident:
    """What happens to a child.

    Attributes:
        action: what happens.
        moment: when, in the publication of a file.
        files: which files count: a pattern of paths inside the store.
        number: which of those files, from 1.
        path: ``fill``: the file that takes the space; ``pause``: ``<path>.reached`` appears,
            and the child goes on when ``path`` does.
    """

    action: Action
    moment: Moment
    files: str = "*"
    number: int = 1
    path: str = ""


@dataclass(frozen=True)
class Order:
    """One ingest of the tests' corpus.

    Attributes:
        store: where to.
        settings: changes to ``tiny_settings``, and to the limit that makes four segments.
        incidents: what happens on the way.
        perturb: multiply captured values by 1 + 2^-6, as a device that is not
            deterministic might.
        lockless: let every lock be granted, as a file system without locks does.
        compact_every: segments between two compactions.
        sync: let files be synced to the disk. A killed process' writes are safe with the
            system, so kills do not need it, and it is most of an ingest's time.
        arguments: run the command line with these instead; the corpus is not implied.
    """

    store: str
    settings: dict[str, Any] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()
    perturb: bool = False
    lockless: bool = False
    compact_every: int = 3
    sync: bool = False
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        status: exit code, or minus the signal that killed it.
        error: name of the error's class, if it ended with one.
        kind: the error's kind.
        message: the error's message, or a traceback.
        report: the ingest's report as JSON values.
        output: what the command line printed.
    """

    status: int
    error: str | None = None
    kind: str | None = None
    message: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    output: str = ""

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL


class IngestServer:
    """The test's side. Use as a context manager.

    Args:
        folder: where outcomes and logs go.
        prefix: a command that runs the server, such as ``unshare -rm``.
    """

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._log = open(folder / "server.log", "w")  # noqa: SIM115 - closed by __exit__
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-W", "error", __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=Path(__file__).parent,
        )

    def __enter__(self) -> Self:
        self._ask({"ready": True})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()
        self._log.close()

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def start(self, store: Path, **choices: Any) -> int:
        """Begin an ingest; returns its process."""
        return int(self._ask({"start": asdict(Order(str(store), **choices))})["pid"])

    def wait(self, pid: int) -> Outcome:
        """Wait for an ingest to end."""
        return Outcome(**self._ask({"wait": pid}))

    def run(self, store: Path, **choices: Any) -> Outcome:
        """An ingest from beginning to end."""
        return self.wait(self.start(store, **choices))

    def mount(self, folder: Path, options: str) -> str | None:
        """Mount or remount a tmpfs where the server sees it; returns why it could not."""
        error: str | None = self._ask({"mount": [str(folder), options]})["error"]
        return error

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._log.flush()
            log = (self._folder / "server.log").read_text()
            raise AssertionError(f"The ingest server did not answer {request}. Its log:\n{log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"{path.name} did not appear within {PATIENCE:.0f} s")
        time.sleep(0.005)


# The server's side


def _serve(folder: Path) -> None:
    import pandas as pd  # pyarrow does on first use: once here, or in every child
    import tiny_ingest
    import torch

    assert pd
    torch.set_num_threads(1)
    loaded = tiny_ingest.tiny_model()
    outcomes: dict[int, Path] = {}
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "start" in request:
            outcome = folder / f"outcome-{number}.json"
            with warnings.catch_warnings():
                # Idle threads of the libraries' own are no danger to what the child does.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                try:
                    os._exit(_run_child(_order(request["start"]), loaded, outcome))
                finally:
                    os._exit(71)
            outcomes[pid] = outcome
            answer = {"pid": pid}
        elif "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            path = outcomes.pop(request["wait"])
            answer = json.loads(path.read_text()) if path.exists() else {}
            answer["status"] = os.waitstatus_to_exitcode(status)
        elif "mount" in request:
            target, options = request["mount"]
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", target]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            answer = {"error": done.stderr.strip() if done.returncode else None}
        print(json.dumps(answer), flush=True)


def _order(fields: dict[str, Any]) -> Order:
    incidents = tuple(Incident(**incident) for incident in fields.pop("incidents"))
    return Order(**{**fields, "incidents": incidents, "arguments": tuple(fields["arguments"])})


def _run_child(order: Order, loaded: Any, outcome: Path) -> int:
    # The server's own output carries the protocol.
    os.dup2(2, 1)
    found: dict[str, Any] = {}
    status = 0
    try:
        _install(order)
        if order.arguments:
            status, found["output"] = _command_line(order.arguments)
        else:
            found["report"] = _ingest(order, loaded)
    except BaseException as error:  # noqa: BLE001 - the parent judges
        from actstore.store.errors import ActstoreError

        known = isinstance(error, ActstoreError)
        found["error"] = type(error).__name__
        found["kind"] = str(error.kind) if isinstance(error, ActstoreError) else None
        found["message"] = str(error) if known else traceback.format_exc()
        status = error.exit_code if isinstance(error, ActstoreError) else 70
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    outcome.write_text(json.dumps(found))
    return status


def _ingest(order: Order, loaded: Any) -> dict[str, Any]:
    import tiny_ingest

    from actstore.ingest.pipeline import ingest
    from actstore.ingest.preparation import Corpus

    choices = {k: tuple(v) if isinstance(v, list) else v for k, v in order.settings.items()}
    settings = tiny_ingest.tiny_settings(**{"limit_tokens": 1700, **choices})
    report = ingest(loaded, Corpus(str(tiny_ingest.CORPUS)), order.store, settings)
    return report.to_json()


def _command_line(arguments: tuple[str, ...]) -> tuple[int, str]:
    from actstore.cli import main

    printed = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        sys.argv = ["actstore", *arguments]
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, printed.getvalue()


def _install(order: Order) -> None:
    from actstore.ingest import pipeline, writer
    from actstore.store import blobs

    pipeline._COMPACT_EVERY = order.compact_every
    if order.lockless:

        @contextlib.contextmanager
        def grant(root: Path, name: str, segment: int) -> Iterator[bool]:
            yield True

        pipeline.__dict__["lock_segment"] = grant
    if not order.sync:
        os.fsync = lambda fd: None
    if order.perturb:
        cast = writer.stored_array
        writer.stored_array = lambda tensor, dtype: cast(tensor * (1 + 2**-6), dtype)

    def strike(moment: str, path: Path) -> None:
        key = os.path.relpath(path, order.store)
        for position, incident in enumerate(order.incidents):
            if incident.moment == moment and fnmatch.fnmatch(key, incident.files):
                seen[position] += 1
                if seen[position] == incident.number:
                    _ACTIONS[incident.action](incident)

    seen = [0] * len(order.incidents)
    write, link, rename = blobs._write_synced, os.link, Path.rename

    def watched_write(path: Path, parts: Any) -> None:
        final = path.with_name(path.name.split(blobs.TEMPORARY_MARK)[0])
        is_new = not final.exists() or final.name == "zarr.json"
        if is_new:
            strike("before", final)
        write(path, parts)
        if is_new:
            strike("written", final)

    def watched_link(source: Path, target: Path, **options: Any) -> None:
        link(source, target, **options)
        strike("linked", target)

    def watched_rename(source: Path, target: Path) -> Path:
        renamed = rename(source, target)
        strike("linked", target)
        return renamed

    Path.rename = watched_rename  # type: ignore[method-assign,assignment]
    blobs._write_synced = watched_write
    os.link = watched_link  # type: ignore[assignment]


def _kill(_: Incident) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill(incident: Incident) -> None:
    with open(incident.path, "wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))


def _limit(_: Incident) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))


def _pause(incident: Incident) -> None:
    Path(f"{incident.path}.reached").touch()
    wait_for(Path(incident.path))


_ACTIONS: dict[str, Callable[[Incident], None]] = {
    "kill": _kill,
    "fill": _fill,
    "limit": _limit,
    "pause": _pause,
}

if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
