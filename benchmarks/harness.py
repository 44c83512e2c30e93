"""Interleaved measurements against a floor, and how their results are shown.

The repetitions of all cases of a measurement run in one random order, so that what else
the machine does falls on all of them alike. Reported are medians and quartiles.
"""

import ctypes
import gc
import json
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = [
    "Case",
    "Options",
    "Ratio",
    "Result",
    "Timing",
    "compare",
    "evict",
    "interleave",
    "is_cached",
    "machine_facts",
    "measured_peak",
    "render",
    "scratch",
]

ROOT = Path(__file__).resolve().parents[1]
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_LIBRARIES = ("numpy", "torch", "transformers", "zarr", "duckdb", "pyarrow")


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        seed: of the order and of all random choices.
        drop_caches: also ask the kernel to drop its whole page cache before a cold
            measurement; needs root, and slows whatever else the machine does.
        threads: of torch; its own choice by default. One is steadier on a busy machine.
    """

    seed: int = 0
    drop_caches: bool = False
    threads: int | None = None

    @property
    def cold(self) -> str:
        """What cold means here, for the report."""
        method = "posix_fadvise(DONTNEED) after fsync on every file involved"
        return f"{method}, then drop_caches" if self.drop_caches else method


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: as reported.
        run: what is timed.
        prepare: runs before, untimed.
        finish: runs after, untimed.
        work: units of work of one run, such as bytes, for a rate.
        unit: what they are.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    finish: Callable[[], object] | None = None
    work: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Timing:
    """The repetitions of a case, in the order they ran.

    Attributes:
        name: as reported.
        seconds: wall time.
        work: units of work of one run.
        unit: what they are.
        cpu: seconds of all the process' threads; empty where they were not counted.
    """

    name: str
    seconds: tuple[float, ...]
    work: float | None = None
    unit: str = ""
    cpu: tuple[float, ...] = ()

    @property
    def on_cpu(self) -> "Timing":
        """The same repetitions by their CPU seconds, which other processes hardly change."""
        return Timing(f"{self.name}, CPU", self.cpu, self.work, self.unit)

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the seconds."""
        return _quartiles(self.seconds)

    @property
    def rate(self) -> float | None:
        """Units of work a second, at the median."""
        return None if self.work is None else self.work / self.median


@dataclass(frozen=True)
class Ratio:
    """A comparison with a floor.

    Attributes:
        name: what over what.
        value: of the medians.
        low, high: quartiles of the ratio, repetition by repetition.
        aim: what it should be; None where nothing is asked.
        at_least: whether the aim is a lower limit.
    """

    name: str
    value: float
    low: float
    high: float
    aim: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the aim is met."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        benchmark: its name.
        size: how large it was run.
        parameters: shapes and counts that the size stands for.
        timings: all cases.
        ratios: comparisons with floors.
        facts: other numbers.
        machine: where it ran; see :func:`machine_facts`.
    """

    benchmark: str
    size: int
    parameters: Mapping[str, Any]
    timings: tuple[Timing, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=lambda: machine_facts())

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        fields = asdict(self)
        for entry, timing in zip(fields["timings"], self.timings, strict=True):
            entry.update(median=timing.median, quartiles=timing.quartiles, rate=timing.rate)
        for entry, ratio in zip(fields["ratios"], self.ratios, strict=True):
            entry["met"] = ratio.met
        return fields


def interleave(cases: Sequence[Case], repetitions: int, seed: int) -> dict[str, Timing]:
    """Time every case so many times, all in one random order.

    Returns:
        Case name -> timing.
    """
    order = [case for case in cases for _ in range(repetitions)]
    random.Random(seed).shuffle(order)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    cpu: dict[str, list[float]] = {case.name: [] for case in cases}
    # What exists by now need not be gone through before each run.
    gc.collect()
    gc.freeze()
    for case in order:
        if case.prepare is not None:
            case.prepare()
        gc.collect()
        try:
            started, used = time.perf_counter(), time.process_time()
            case.run()
            seconds[case.name].append(time.perf_counter() - started)
            cpu[case.name].append(time.process_time() - used)
        finally:
            if case.finish is not None:
                case.finish()
    gc.unfreeze()
    return {
        case.name: Timing(
            case.name, tuple(seconds[case.name]), case.work, case.unit, tuple(cpu[case.name])
        )
        for case in cases
    }


def compare(
    name: str,
    over: Timing,
    under: Timing,
    *,
    aim: float | None = None,
    at_least: bool = False,
) -> Ratio:
    """The ratio of two timings' medians.

    Where both have a rate the ratio is of seconds per unit of work.
    """
    scale = 1.0
    if over.work is not None and under.work is not None:
        scale = under.work / over.work
    pairs = [scale * a / b for a, b in zip(over.seconds, under.seconds, strict=False)]
    low, high = _quartiles(pairs)
    return Ratio(name, scale * over.median / under.median, low, high, aim, at_least)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def evict(paths: Iterable[Path], options: Options) -> None:
    """Push files out of the page cache; directories stand for all their files."""
    for path in paths:
        files = (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,)
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                # Only clean pages can be dropped.
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    if options.drop_caches:
        _DROP_CACHES.write_text("1\n")


def can_drop_caches() -> bool:
    """Whether this process may ask the kernel to drop its page cache."""
    return os.access(_DROP_CACHES, os.W_OK)


def is_cached(path: Path, offset: int = 0) -> bool | None:
    """Whether the page at an offset can be had without the disk; None if nobody can say."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
    finally:
        os.close(descriptor)


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder, removed at the end. ``TMPDIR`` says on which disk."""
    with tempfile.TemporaryDirectory(prefix="actstore-benchmark-") as folder:
        yield Path(folder)


def measured_peak(action: Callable[[], object]) -> tuple[object, float, int]:
    """What an action returns, its seconds, and its peak of resident bytes above those before.

    Memory freed before goes back to the kernel first, so that the peak is the action's own.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5\n")  # the kernel's peak begins anew
    started = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - started
    return result, seconds, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def machine_facts() -> dict[str, Any]:
    """What a ratio may depend on: processor, memory, load, versions; nothing that names it."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_bytes": pages * page,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def render(result: Result) -> str:
    """The result as tables for people."""
    lines = [f"{result.benchmark}, size {result.size}"]
    lines += [f"  {name}: {_plain(value)}" for name, value in result.parameters.items()]
    timings = [
        [
            timing.name,
            _duration(timing.median),
            " to ".join(_duration(bound) for bound in timing.quartiles),
            "" if timing.rate is None else f"{_number(timing.rate)} {timing.unit}/s",
            str(len(timing.seconds)),
        ]
        for timing in result.timings
    ]
    if timings:
        lines += ["", *_columns(["case", "median", "quartiles", "rate", "n"], timings)]
    ratios = [
        [
            ratio.name,
            f"{ratio.value:.3g}",
            f"{ratio.low:.3g} to {ratio.high:.3g}",
            "" if ratio.aim is None else f"{'≥' if ratio.at_least else '≤'} {ratio.aim:g}",
            {None: "", True: "met", False: "missed"}[ratio.met],
        ]
        for ratio in result.ratios
    ]
    if ratios:
        lines += ["", *_columns(["ratio", "value", "quartiles", "aim", ""], ratios)]
    if result.facts:
        lines += ["", *(f"  {name}: {_plain(value)}" for name, value in result.facts.items())]
    lines += ["", "  machine: " + ", ".join(f"{k} {_plain(v)}" for k, v in result.machine.items())]
    return "\n".join(lines)


def _columns(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[number]) for row in [head, *rows]) for number in range(len(head))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _duration(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def _number(value: float) -> str:
    for scale, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g} "


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else json.dumps(value)
