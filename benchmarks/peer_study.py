"""Asking all sides the same questions, cold and warm, in one random order.

Answers are compared with brute force before anything is timed. A case is repeated as often as
a second allows, at least three times; twice if one takes more than 2 s, and once if it takes more
than 10 s.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, Options, Ratio, Timing, compare, evict, interleave
from benchmarks.peer_corpus import Corpus
from benchmarks.peer_engine import EngineSide, Read, ReadsAtOnce, SqlSide, traced_reads
from benchmarks.peer_questions import Answer, Place, Question, brute_force, draw_places
from benchmarks.peer_sides import Side

__all__ = ["Findings", "Study"]

Action = Callable[[], None]

OURS = EngineSide.name
AT_ONCE = "its reads at once"
_DISK = "disk"
_DISK_BYTES = 2**29
_DISK_STEP = 2**23
_TWICE = 2.0
_ONCE = 10.0
_QUERIED = "one neuron, top 20"


@dataclass
class Findings:
    """What a study found.

    Attributes:
        timings: by name, ``<question>: <side>, cold`` or ``warm``.
        ratios: of peers over ours, of ours over its reads, of SQL over the direct call.
        questions: question -> pages, bytes, floor.
        aims: what was asked for, what was found, whether that meets it.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    aims: list[dict[str, Any]] = field(default_factory=list)

    def require(self, what: str, found: float, limit: float, unit: str) -> None:
        """Note an upper limit and what was found."""
        self.aims.append(
            {"what": what, "found": round(found, 4), "at most": limit, "unit": unit}
            | {"met": found <= limit}
        )


@dataclass(frozen=True)
class Study:
    """Who is asked what, and how often.

    Attributes:
        corpus: what about.
        sides: our own among them.
        options: how to measure.
        seconds: for the repetitions of a case, of each question, cold and warm alike.
        most: repetitions of a case.
        places: units and tokens that the repetitions go around.
        memmap_aim: what memmap has to take cold over ours for one neuron.
    """

    corpus: Corpus
    sides: Sequence[Side]
    options: Options
    seconds: float = 5.0
    most: int = 15
    places: int = 5
    memmap_aim: float | None = None

    def ask(self, questions: Iterable[Question], findings: Findings) -> None:
        """Check and time every question, and compare the sides."""
        places = draw_places(self.corpus, self.places, self.options.seed + 2)
        for question in questions:
            askers = [side for side in self.sides if side.answers(question)]
            if askers:
                # A run takes a quarter of an hour; people want to see that it goes on.
                print(f"  asking: {question.name}", file=sys.stderr, flush=True)
                self._ask(question, askers, places, findings)

    def _ask(
        self, question: Question, askers: list[Side], places: list[Place], findings: Findings
    ) -> None:
        # A layer's answer is the same wherever one asks in it.
        checked = places[:1] if question.slow else places[:2]
        expected = [brute_force(self.corpus, question, place) for place in checked]
        took = {side.name: self._checked(question, side, checked, expected) for side in askers}
        facts, reads = self._watched(question, askers, places)
        findings.questions[question.name] = facts
        with ExitStack() as stack:
            at_once = [
                stack.enter_context(closing(ReadsAtOnce(part, self.corpus))) for part in reads
            ]
            facts["reads, mean"] = _mean(one.count for one in at_once)
            facts["bytes of reads, mean"] = _mean(one.bytes for one in at_once)
            self._time_cold(question, askers, places, at_once, took, findings)
        self._time_warm(question, askers, places, took, findings)
        rate = findings.timings[f"{question.name}: {_DISK}, cold"].rate
        assert rate is not None
        facts["bytes of all values asked about"] = self._asked_bytes(question)
        facts["floor, s: those bytes at the disk's rate"] = self._asked_bytes(question) / rate
        self._compare(question, askers, findings)

    def _checked(
        self, question: Question, side: Side, places: list[Place], expected: list[Answer]
    ) -> float:
        """Compare a side's cold answers with brute force; the seconds of the first."""
        seconds = 0.0
        for place, values in zip(places, expected, strict=True):
            side.forget(self._evict)
            started = time.perf_counter()
            found = side.ask(question, place)
            seconds = seconds or time.perf_counter() - started
            side.release()
            message = f"{side.name} on {question.name}, {place}"
            np.testing.assert_array_equal(found, values, err_msg=message)
        return seconds

    def _watched(
        self, question: Question, askers: list[Side], places: list[Place]
    ) -> tuple[dict[str, Any], list[list[Read]]]:
        """What our cold answers say of themselves, and what they read."""
        engine = next((side for side in askers if side.name == OURS), None)
        if not isinstance(engine, EngineSide):
            return {}, []
        certificates, every = [], []
        for place in places[:1] if question.slow else places:
            engine.forget(self._evict)
            with traced_reads() as reads:
                certificates.append(engine.certificate(question, place))
            every.append(reads)
        pages = [certificate.pages_read for certificate in certificates]
        facts = {
            "plans": sorted({certificate.plan for certificate in certificates}),
            "pages read, mean": round(float(np.mean(pages)), 1),
            "pages read, most": max(pages),
            "cells scanned, most": max(one.cells_scanned for one in certificates),
        }
        return facts, every

    def _time_cold(
        self,
        question: Question,
        askers: list[Side],
        places: list[Place],
        at_once: list[ReadsAtOnce],
        took: dict[str, float],
        findings: Findings,
    ) -> None:
        disk = min(_DISK_BYTES, self.corpus.raw_bytes)
        moved: dict[str, list[int]] = {}
        cases = [
            (
                self._counted(
                    f"{question.name}: {side.name}, cold",
                    partial(_ask_next, side, question, cycle(places)),
                    partial(side.forget, self._evict),
                    side.release,
                    moved,
                ),
                self._repetitions(took[side.name]),
            )
            for side in askers
        ]
        if at_once:
            again = cycle(at_once)
            cases.append(
                (
                    self._counted(
                        f"{question.name}: {AT_ONCE}, cold",
                        lambda: next(again).run(),
                        lambda: at_once[0].forget(self._evict),
                        at_once[0].release,
                        moved,
                    ),
                    self._repetitions(took[OURS]),
                )
            )
        cases.append(
            (
                Case(
                    f"{question.name}: {_DISK}, cold",
                    lambda: _read_through(self.corpus.raw, disk),
                    lambda: self._evict([self.corpus.raw]),
                    None,
                    disk,
                    "B",
                ),
                min(5, self.most),
            )
        )
        findings.timings |= _interleave_unevenly(cases, self.options.seed)
        findings.questions[question.name]["bytes from disk, cold"] = {
            name.removeprefix(f"{question.name}: ").removesuffix(", cold"): int(np.median(counts))
            for name, counts in moved.items()
        }

    def _counted(
        self,
        name: str,
        run: Action,
        prepare: Action,
        release: Action,
        moved: dict[str, list[int]],
    ) -> Case:
        """A case that also notes what the process had read from the disk."""
        before = 0

        def begin() -> None:
            nonlocal before
            prepare()
            before = _disk_bytes()

        def finish() -> None:
            moved.setdefault(name, []).append(_disk_bytes() - before)
            release()

        return Case(name, run, begin, finish)

    def _time_warm(
        self,
        question: Question,
        askers: list[Side],
        places: list[Place],
        took: dict[str, float],
        findings: Findings,
    ) -> None:
        cases = []
        for side in askers:
            # Whoever reads everything has all of it in memory after the first question.
            warming = places if took[side.name] < 1.0 and not question.slow else places[:1]
            started = time.perf_counter()
            for place in warming:
                side.ask(question, place)
            each = (time.perf_counter() - started) / len(warming)
            cases.append(
                (
                    Case(
                        f"{question.name}: {side.name}, warm",
                        partial(_ask_next, side, question, cycle(places)),
                    ),
                    self._repetitions(each),
                )
            )
        findings.timings |= _interleave_unevenly(cases, self.options.seed)

    def _repetitions(self, seconds: float) -> int:
        least = 3 if seconds <= _TWICE else 2 if seconds <= _ONCE else 1
        return min(self.most, max(least, int(self.seconds / max(seconds, 1e-4))))

    def _asked_bytes(self, question: Question) -> int:
        rows, neurons = self.corpus.rows, self.corpus.neurons
        values = {
            "neuron": rows,
            "count": rows,
            "token": neurons,
            "layer": rows * neurons,
            "store": rows * neurons * self.corpus.layers,
        }[question.over]
        return 2 * values * (2 if question.gradient else 1)

    def _compare(self, question: Question, askers: list[Side], findings: Findings) -> None:
        timings = findings.timings

        def of(side: str, state: str) -> Timing:
            return timings[f"{question.name}: {side}, {state}"]

        names = [side.name for side in askers]
        if OURS not in names:
            return
        ours = {state: of(OURS, state) for state in ("cold", "warm")}
        for name in names:
            if name in (OURS, SqlSide.name):
                continue
            for state in ("cold", "warm"):
                asked = question.name == _QUERIED and name.startswith("memmap") and state == "cold"
                findings.ratios.append(
                    compare(
                        f"{question.name}: {name} over {OURS}, {state}",
                        of(name, state),
                        ours[state],
                        aim=self.memmap_aim if asked else None,
                        at_least=True,
                    )
                )
        if f"{question.name}: {AT_ONCE}, cold" in timings:
            findings.ratios.append(
                compare(
                    f"{question.name}: {OURS} over {AT_ONCE}, cold",
                    ours["cold"],
                    of(AT_ONCE, "cold"),
                    aim=2.0 if question.over == "neuron" and not question.gradient else None,
                )
            )
        if SqlSide.name in names:
            extra = 1e3 * (of(SqlSide.name, "warm").median - ours["warm"].median)
            findings.require(f"{question.name}: SQL above the direct call, warm", extra, 3, "ms")
        if question.name == _QUERIED:
            findings.require(f"{question.name}, warm", 1e3 * ours["warm"].median, 1, "ms")

    def _evict(self, paths: Iterable[Path]) -> None:
        evict(paths, self.options)


def _ask_next(side: Side, question: Question, places: Iterator[Place]) -> None:
    side.ask(question, next(places))


def _interleave_unevenly(cases: Sequence[tuple[Case, int]], seed: int) -> dict[str, Timing]:
    """Time every case as often as its own number says, all in one random order."""
    copies = [
        Case(f"{number} {case.name}", case.run, case.prepare, case.finish, case.work, case.unit)
        for case, times in cases
        for number in range(times)
    ]
    found = interleave(copies, 1, seed)
    timings = {}
    for case, times in cases:
        parts = [found[f"{number} {case.name}"] for number in range(times)]
        seconds = tuple(part.seconds[0] for part in parts)
        cpu = tuple(part.cpu[0] for part in parts)
        timings[case.name] = Timing(case.name, seconds, case.work, case.unit, cpu)
    return timings


def _read_through(path: Path, size: int) -> None:
    """Read the beginning of a file in order."""
    buffer = bytearray(_DISK_STEP)
    with open(path, "rb", buffering=0) as file:
        while size > 0:
            size -= file.readinto(memoryview(buffer)[: min(size, _DISK_STEP)])


def _disk_bytes() -> int:
    """What this process had the disk read, read-ahead included; 0 where nobody counts."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(text.partition("\nread_bytes:")[2].split()[0])


def _mean(values: Iterable[int]) -> float:
    found = list(values)
    return round(float(np.mean(found)), 1) if found else 0.0
