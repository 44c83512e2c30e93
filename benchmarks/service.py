"""The query service under 64 clients, and datasette serving the same metadata beside it.

The mix is that of ``tests/test_service_load.py``, one client's runaway SQL included. What both
servers can answer is then asked of each, one kind at a time, in turns. Clients are threads of
this process and wait for each answer, so that requests a second and latencies are two sides of
one number; the CPU time that a server's processes take for a request is hardly changed by what
else the machine does.
"""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa

from actstore.query.session import Store
from benchmarks.harness import Options, Ratio, Result, Timing, scratch
from benchmarks.stores import build_store

# The tests' own clients, which ``benchmarks.stores`` has put on the path.
from load_clients import (  # isort: skip
    Question,
    Tally,
    descendants,
    questions_of,
    resident_bytes,
    run_load,
    runaway_question,
    running_server,
    sql_path,
)

FULL_SIZE = 300
"""Seconds of the mix, and of each server's share of the comparison; 1 means a few seconds."""

CLIENTS = 64
_TABLES = ("neurons", "statistics", "tokens")
_AGGREGATE = (
    "SELECT layer, count(*) AS n, avg(mean) AS mean, max(max) AS most FROM neurons "
    "GROUP BY layer ORDER BY layer"
)
_ROUNDS = 2
_START_SECONDS = 60
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class _Server:
    """One side: a process that listens, and what it is asked."""

    name: str
    process: int
    url: str
    questions: Sequence[Question]


@dataclass
class _Measured:
    """What one kind of request came to, over all rounds."""

    tallies: list[Tally] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def latencies(self) -> tuple[float, ...]:
        """Of every answer."""
        return tuple(second for tally in self.tallies for second in tally.seconds)

    def figures(self) -> dict[str, Any]:
        """Latencies, rate and CPU time."""
        return {
            **_latencies(self.latencies),
            "requests/s": len(self.latencies) / self.seconds,
            "wrong": sum(
                count
                for tally in self.tallies
                for answer, count in tally.answers.items()
                if answer != "200"
            ),
            "server CPU, ms": 1000 * self.cpu / len(self.latencies),
        }


def run(size: int, options: Options | None = None) -> Result:
    """Build a store, serve it, export its metadata to SQLite, serve that, and ask."""
    options = options or Options()
    small = size == 1
    clients = 8 if small else CLIENTS
    layers, neurons, tokens = (2, 64, 512) if small else (12, 1024, 4096)
    facts: dict[str, Any] = {}
    with scratch() as folder, ExitStack() as stack:
        path = _store(folder / "store", layers, neurons, tokens, options.seed)
        process, url = stack.enter_context(running_server(path))
        ours = _Server("actstore", process.pid, url, _ours(layers, neurons))
        mix = questions_of(layers, neurons, seed=options.seed)
        # One of them takes ten seconds.
        runaway = None if small else runaway_question()
        run_load(url, mix, clients=clients, seconds=min(5, size), seed=1)
        idle = resident_bytes(process.pid)
        started = time.perf_counter()
        found = run_load(
            url, mix, clients=clients, seconds=size, runaway=runaway, pause=0.5, seed=2
        )
        took = time.perf_counter() - started
        facts["the mix"] = {
            kind: {
                **_latencies(tally.seconds),
                "answers": dict(tally.answers),
                "refused": tally.refused,
                "wrong": len(tally.wrong),
            }
            for kind, tally in sorted(found.items())
        }
        facts["the mix, requests/s"] = sum(len(tally.seconds) for tally in found.values()) / took
        facts["server's memory, growth over the mix, bytes"] = resident_bytes(process.pid) - idle
        sides = [ours]
        executable = os.environ.get("DATASETTE") or shutil.which("datasette")
        if executable is None:
            facts["datasette"] = "left out: no such command; name one in DATASETTE"
        else:
            database = folder / "metadata.db"
            facts["SQLite file, bytes"] = _export(path, database)
            sides.append(stack.enter_context(_datasette(executable, database, layers, neurons)))
            facts["datasette"] = _version(executable)
        facts["load average, after the mix"] = [round(load, 2) for load in os.getloadavg()]
        measured = _compare(sides, size, clients, options.seed)
        facts["compared"] = {name: one.figures() for name, one in measured.items()}
    return Result(
        "service",
        size,
        {
            "store": f"{layers} layers x {neurons} neurons, {tokens} tokens, float16",
            "clients": clients,
            "seconds": f"{size} of the mix; {size} of each server alone, in {_ROUNDS} rounds",
        },
        _timings(found, measured),
        tuple(_ratios(measured)),
        facts,
    )


def _store(path: Path, layers: int, neurons: int, tokens: int, seed: int) -> Path:
    """Normal activations; documents of 128 tokens."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((layers, tokens, neurons), np.float32).astype(np.float16)
    build_store(path, {"mlp_post_act": values}, [128] * (tokens // 128))
    return path


def _export(path: Path, database: Path) -> int:
    """The store's metadata as SQLite tables; the file's bytes."""
    connection = sqlite3.connect(database)
    with Store(path) as store:
        for name in _TABLES:
            table = store.sql(f"SELECT * FROM {name}").to_arrow_table()
            key = ", PRIMARY KEY (layer, neuron)" if name == "neurons" else ""
            columns = ", ".join(f'"{one.name}" {_sqlite_type(one.type)}' for one in table.schema)
            connection.execute(f"CREATE TABLE {name} ({columns}{key})")
            places = ", ".join("?" * table.num_columns)
            rows = zip(*(_plain(column.to_pylist()) for column in table.columns), strict=True)
            connection.executemany(f"INSERT INTO {name} VALUES ({places})", rows)
        connection.execute("CREATE INDEX neurons_by_max ON neurons (max)")
    connection.commit()
    connection.execute("ANALYZE")
    connection.commit()
    connection.close()
    return database.stat().st_size


def _sqlite_type(kind: pa.DataType) -> str:
    """The affinity without which a number in an address equals none in the table."""
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "INTEGER"
    return "REAL" if pa.types.is_floating(kind) else "TEXT"


def _plain(column: list[Any]) -> list[Any]:
    """Values that SQLite has types for."""
    return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in column]


@contextmanager
def _datasette(executable: str, database: Path, layers: int, neurons: int) -> Iterator[_Server]:
    """Datasette over an immutable file, without the facets that our page does not suggest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [executable, "serve", "-i", str(database), "--host", "127.0.0.1", "-p", str(port)]
    settings = {
        "suggest_facets": "off",
        "default_page_size": "50",
        # As long as ours may take.
        "sql_time_limit_ms": "10000",
    }
    for setting, value in settings.items():
        command += ["--setting", setting, value]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > until or running.poll() is not None:
                    raise
                time.sleep(0.1)
        yield _Server("datasette", running.pid, url, _theirs(database.stem, layers, neurons))
    finally:
        running.terminate()
        running.wait()


def _version(executable: str) -> str:
    found = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _units(layers: int, neurons: int) -> list[tuple[int, int]]:
    return [(number % layers, 7 * number % neurons) for number in range(64)]


def _ours(layers: int, neurons: int) -> list[Question]:
    units = _units(layers, neurons)
    return [
        Question(
            "neuron table page",
            tuple(f"/neurons?sort=max&layer={layer}" for layer in range(layers)),
        ),
        # The row alone: a neuron's own resource also has contexts and neighbours.
        Question(
            "neuron's row as JSON",
            tuple(f"/api/v1/neurons?layer={at}&neuron={n}" for at, n in units),
        ),
        Question("SQL aggregate", (sql_path(_AGGREGATE),), is_steady=False),
    ]


def _theirs(base: str, layers: int, neurons: int) -> list[Question]:
    units = _units(layers, neurons)
    return [
        Question(
            "neuron table page",
            tuple(f"/{base}/neurons?layer={n}&_sort_desc=max" for n in range(layers)),
            is_steady=False,
        ),
        Question(
            "neuron's row as JSON",
            tuple(f"/{base}/neurons/{at},{n}.json?_shape=array" for at, n in units),
            is_steady=False,
        ),
        Question(
            "SQL aggregate",
            (f"/{base}.json?{urlencode({'sql': _AGGREGATE, '_shape': 'array'})}",),
            is_steady=False,
        ),
    ]


def _compare(sides: Sequence[_Server], size: int, clients: int, seed: int) -> dict[str, _Measured]:
    """Every kind of every server by itself: many clients, and one."""
    measured: dict[str, _Measured] = {}
    kinds = len(sides[0].questions)
    for number in range(_ROUNDS):
        for count, share in ((clients, size), (1, size / 6)):
            seconds = share / kinds / _ROUNDS
            for place in range(kinds):
                # Each goes first as often as the other.
                for side in sides if number % 2 == 0 else reversed(sides):
                    question = side.questions[place]
                    who = "1 client" if count == 1 else f"{count} clients"
                    key = f"{question.kind}, {who}: {side.name}"
                    _ask(
                        side, question, count, seconds, seed, measured.setdefault(key, _Measured())
                    )
    return measured


def _ask(
    side: _Server, question: Question, count: int, seconds: float, seed: int, into: _Measured
) -> None:
    used, started = _cpu(side.process), time.perf_counter()
    found = run_load(side.url, [question], clients=count, seconds=seconds, seed=seed)
    into.seconds += time.perf_counter() - started
    # A tick at least: a short run may fall between two.
    into.cpu += max(_cpu(side.process) - used, 1 / _TICK)
    tally = found[question.kind]
    if not tally.seconds:
        raise RuntimeError(f"{side.name} does not answer as it should: {tally.wrong[0]}")
    into.tallies.append(tally)


def _cpu(process: int) -> float:
    """CPU seconds of a process and its children, those that have ended included."""
    ticks = 0
    for one in (process, *descendants(process)):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / _TICK


def _latencies(seconds: Sequence[float]) -> dict[str, Any]:
    given = Tally(list(seconds))
    return {
        "n": len(seconds),
        "p50, ms": 1000 * given.percentile(0.5) if seconds else None,
        "p99, ms": 1000 * given.percentile(0.99) if seconds else None,
    }


def _timings(mix: dict[str, Tally], measured: dict[str, _Measured]) -> tuple[Timing, ...]:
    """Percentiles, not every answer: there are tens of thousands."""
    found = [(f"mix: {kind}", tally.seconds) for kind, tally in sorted(mix.items())]
    found += [(name, list(one.latencies)) for name, one in measured.items()]
    return tuple(
        Timing(f"{name}, {label}", (Tally(seconds).percentile(share),))
        for name, seconds in found
        if seconds
        for label, share in (("p50", 0.5), ("p99", 0.99))
    )


def _ratios(measured: dict[str, _Measured]) -> Iterator[Ratio]:
    """Ours over datasette's, of medians and of CPU time."""
    for name, ours in measured.items():
        theirs = measured.get(name.replace(": actstore", ": datasette"))
        if theirs is None or theirs is ours:
            continue
        kind = name.removesuffix(": actstore")
        a, b = ours.figures(), theirs.figures()
        keys = {"p50": "p50, ms", "server CPU": "server CPU, ms"}
        for label, key in keys.items():
            value = a[key] / b[key]
            yield Ratio(f"{kind}, {label}: actstore over datasette", value, value, value)
