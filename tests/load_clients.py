"""Many clients at once against a server on loopback, and what they were answered.

Clients are threads with one connection each that ask the next question when the last one is
answered. Counted and timed is everything; an answer that its question does not expect, or
that differs from an earlier one to the same address, is kept with its reason.
"""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from urllib.parse import urlencode, urlsplit

__all__ = [
    "RUNAWAY",
    "Question",
    "Tally",
    "descendants",
    "open_files",
    "questions_of",
    "resident_bytes",
    "run_load",
    "runaway_question",
    "running_server",
    "sql_path",
]

API = "/api/v1"
RUNAWAY = "runaway SQL"
_ANSWER_SECONDS = 120
_REFUSALS = ("429 busy", "503 busy")
_MAX_WRONG = 20


@dataclass(frozen=True)
class Question:
    """A kind of request.

    Attributes:
        kind: as reported.
        paths: one is taken at random each time.
        weight: how often, next to the others.
        answers: what may come back: a status, for a problem with its kind.
        is_steady: every answer to one path has the same bytes.
    """

    kind: str
    paths: tuple[str, ...]
    weight: int = 1
    answers: frozenset[str] = frozenset({"200"})
    is_steady: bool = True


@dataclass
class Tally:
    """What became of the requests of one kind.

    Attributes:
        seconds: of every answer that was expected, refusals apart.
        answers: status, with a problem's kind -> count.
        refused: how many were told to come back, and when.
        wrong: the first answers that nobody expected, with their reasons.
    """

    seconds: list[float] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Seconds within which a share of the answers came."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def sql_path(query: str) -> str:
    """The address of a query's answer."""
    return f"{API}/sql?{urlencode({'q': query})}"


def questions_of(layers: int, neurons: int, *, seed: int = 0, variants: int = 16) -> list[Question]:
    """The mix that a lab's browsers and notebooks ask of a store of neurons."""
    rng = random.Random(seed)
    units = [(rng.randrange(layers), rng.randrange(neurons)) for _ in range(variants)]
    numbers = [rng.randrange(neurons) for _ in range(variants)]
    return [
        Question(
            "top-k",
            (
                *(f"{API}/topk/mlp_post_act?k=10&layer={at}&neuron={n}" for at, n in units),
                f"{API}/topk/mlp_post_act?k=20&per=layer",
                f"{API}/topk/mlp_write_norm?k=20&layer=0",
            ),
            4,
        ),
        Question("top-k where", (f"{API}/topk/mlp_post_act?k=10&layer=0&where=position%3C20",), 1),
        Question("examples", tuple(f"{API}/neurons/{at}/{n}/examples?k=5" for at, n in units), 3),
        Question("neuron as JSON", tuple(f"{API}/neurons/{at}/{n}" for at, n in units), 3),
        Question(
            "SQL, metadata",
            (
                sql_path(
                    "SELECT layer, count(*) AS n, avg(mean) AS mean, max(max) AS most "
                    "FROM neurons GROUP BY layer ORDER BY layer"
                ),
            ),
            2,
            is_steady=False,
        ),
        Question(
            "SQL, derived scalar",
            tuple(
                sql_path(f"SELECT max(value) AS m FROM mlp_write_norm WHERE neuron = {n}")
                for n in numbers
            ),
            1,
            is_steady=False,
        ),
        Question("overview page", ("/",), 1),
        Question(
            "neuron table page",
            tuple(f"/neurons?sort={sort}&layer={at}" for sort in ("max", "mean") for at in (0, 1)),
            2,
        ),
        Question("neuron page", tuple(f"/neurons/{at}/{n}" for at, n in units), 2),
    ]


def runaway_question() -> Question:
    """Queries that end by no limit of their own: one that DuckDB stops, one that it cannot."""
    hashed = " || ".join(f"md5(repeat('{letter}', 200000000))" for letter in "abcdefghij" * 2)
    return Question(
        RUNAWAY,
        (
            sql_path("SELECT count(*) FROM range(10000000) a, range(10000000) b"),
            sql_path(f"SELECT {hashed}"),
            sql_path("SELECT repeat('a', 2000000000)"),
        ),
        answers=frozenset({"422 sql_timeout", "413 sql_too_large"}),
        is_steady=False,
    )


def run_load(
    url: str,
    questions: Sequence[Question],
    *,
    clients: int,
    seconds: float,
    runaway: Question | None = None,
    pause: float = 2.0,
    seed: int = 0,
) -> dict[str, Tally]:
    """Ask until the time is over, each client once at least; what is asked is waited for.

    Args:
        url: of the server.
        questions: what the clients take turns with.
        clients: at once, the one with runaways included.
        seconds: how long they begin new requests.
        runaway: what one of the clients asks, one path after the other.
        pause: seconds between one runaway's end and the next.
        seed: of what is asked when.

    Returns:
        Kind -> what became of it.
    """
    load = _Load(url, time.monotonic() + seconds)
    threads = [
        threading.Thread(target=load.ask_at_random, args=(questions, random.Random(seed + number)))
        for number in range(clients - (runaway is not None))
    ]
    if runaway is not None:
        threads.append(threading.Thread(target=load.ask_in_turn, args=(runaway, pause)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(load.tallies)


class _Load:
    """One run of many clients."""

    def __init__(self, url: str, until: float) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 0
        self._until = until
        self._lock = threading.Lock()
        self._first: dict[str, int] = {}
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)

    def ask_at_random(self, questions: Sequence[Question], rng: random.Random) -> None:
        """One client's requests."""
        connection = self._connected()
        weights = [question.weight for question in questions]
        while True:
            (question,) = rng.choices(questions, weights)
            self._ask(connection, question, rng.choice(question.paths))
            if time.monotonic() >= self._until:
                break
        connection.close()

    def ask_in_turn(self, question: Question, pause: float) -> None:
        """The requests of the client with runaways."""
        connection = self._connected()
        for path in cycle(question.paths):
            self._ask(connection, question, path)
            if time.monotonic() + pause >= self._until:
                break
            time.sleep(pause)
        connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=_ANSWER_SECONDS)

    def _ask(self, connection: http.client.HTTPConnection, question: Question, path: str) -> None:
        started = time.perf_counter()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with self._lock:
                self._note(question, path, f"no answer: {error!r}")
            return
        seconds = time.perf_counter() - started
        answer = _named(response.status, body)
        wait = response.getheader("Retry-After")
        if answer in _REFUSALS and wait is not None:
            with self._lock:
                self.tallies[question.kind].refused += 1
            time.sleep(min(float(wait), max(0.0, self._until - time.monotonic())))
            return
        with self._lock:
            self.tallies[question.kind].answers[answer] += 1
            if answer not in question.answers:
                self._note(question, path, f"{answer}: {body[:300]!r}")
            elif question.is_steady and self._first.setdefault(path, hash(body)) != hash(body):
                self._note(question, path, "another answer than before")
            else:
                self.tallies[question.kind].seconds.append(seconds)

    def _note(self, question: Question, path: str, reason: str) -> None:
        wrong = self.tallies[question.kind].wrong
        if len(wrong) < _MAX_WRONG:
            wrong.append(f"{path[:120]}: {reason}")


def _named(status: int, body: bytes) -> str:
    """A status, and the kind of a problem."""
    if status < 400:
        return str(status)
    try:
        return f"{status} {json.loads(body)['kind']}"
    except (ValueError, KeyError, TypeError):
        return str(status)


# The server's process


@contextmanager
def running_server(
    store: Path, *options: str, seconds: float = 120
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``actstore serve`` as a process of its own, and its address; killed if it is still there."""
    running = subprocess.Popen(
        [sys.executable, "-m", "actstore.cli", "serve", str(store), "-p", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    alarm = threading.Timer(seconds, running.kill)
    alarm.start()
    try:
        url = running.stdout.readline().strip()
        alarm.cancel()
        assert url, running.communicate()[1]
        yield running, url
    finally:
        alarm.cancel()
        if running.poll() is None:
            running.send_signal(signal.SIGINT)
            try:
                running.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                running.kill()
        running.communicate()


def descendants(process: int) -> list[int]:
    """Ids of a process' children and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in brackets may hold anything; what follows it does not.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def resident_bytes(process: int) -> int:
    """Memory of a process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(process: int) -> list[str]:
    """What a process' file descriptors refer to."""
    found = []
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:
            continue
    return found
