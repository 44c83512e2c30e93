"""Tokens a second of an ingest, end to end and by phase, against bare forward passes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from actstore.ingest import pipeline, writer
from actstore.ingest.model import LoadedModel
from actstore.ingest.settings import IngestSettings
from actstore.ingest.writer import SegmentAssembly
from actstore.store.reader import StoreReader
from benchmarks.harness import Case, Options, Result, Timing, compare, interleave, scratch
from benchmarks.models import bare_forward, demo_model, random_model, standard_library

FULL_SIZE = 2
"""Hundreds of thousands of tokens."""

_PHASES = {
    "plan": (pipeline, "plan_ingest"),
    "segments": (pipeline, "_write_segments"),
    "writing, in its own thread": (writer, "publish_segment"),
    "compact": (pipeline, "compact"),
    "self-check": (pipeline, "check_store"),
}
"""Phase -> the function that is it. Writing overlaps the forward passes of the next segment."""


def run(size: int, options: Options | None = None) -> Result:
    """Ingest the standard library's source with the shipped model."""
    options = options or Options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if size == 1:
        loaded, model = random_model("tiny"), "tiny random model"
        tokens, segment_rows, repetitions = 2048, 512, 1
    else:
        loaded, model = demo_model()
        tokens, segment_rows, repetitions = size * 100_000, None, 2
    settings = IngestSettings(
        limit_tokens=tokens,
        segment_rows=segment_rows,
        batch_tokens=256 if size == 1 else 4096,
        locations="neurons",
    )
    corpus = standard_library(loaded)
    phases: dict[str, list[float]] = {name: [] for name in _PHASES}
    quarters: list[list[float]] = []
    with scratch() as folder:
        stores = iter(folder / str(number) for number in range(repetitions + 1))

        def whole() -> None:
            clock = _Clock()
            with _measured(phases):
                pipeline.ingest(loaded, corpus, next(stores), settings, clock)
            quarters.append(clock.quarters())

        whole()
        batches = _batches(folder / "0")
        stored = sum(int(batch.numel()) for batch in batches)
        # The first run is not counted: it loads what later ones find loaded.
        phases.update({name: [] for name in _PHASES})
        quarters.clear()
        timings = interleave(
            [
                Case("ingest, end to end", whole, None, None, tokens, "tokens"),
                Case(
                    "bare forward", lambda: _forward(loaded, batches), None, None, tokens, "tokens"
                ),
            ],
            repetitions,
            options.seed,
        )
    timings |= {
        f"phase: {name}": Timing(f"phase: {name}", tuple(seconds), tokens, "tokens")
        for name, seconds in phases.items()
    }
    end, bare = timings["ingest, end to end"], timings["bare forward"]
    return Result(
        "ingest",
        size,
        {
            "model": model,
            "locations": "neurons",
            "tokens": tokens,
            "padded tokens of the batches": stored,
            "corpus": "the standard library's source",
            "torch threads": torch.get_num_threads(),
        },
        tuple(timings.values()),
        (
            compare("end to end over bare forward", end, bare),
            compare("end to end over bare forward, CPU", end.on_cpu, bare.on_cpu),
            compare("segments over bare forward", timings["phase: segments"], bare),
        ),
        {
            "tokens/s by quarter of the corpus": [
                round(median(run[quarter] for run in quarters)) for quarter in range(4)
            ]
        },
    )


class _Clock:
    """Notes when how many tokens had passed the model."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == "forward":
            self.marks.append((time.perf_counter(), done))

    def quarters(self) -> list[float]:
        """Tokens a second in each quarter of the corpus."""
        last = len(self.marks) - 1
        cuts = [self.marks[number * last // 4] for number in range(5)]
        return [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(cuts)]


@contextmanager
def _measured(phases: dict[str, list[float]]) -> Iterator[None]:
    """Add the seconds spent in each phase's function, once per ingest."""
    spent = dict.fromkeys(_PHASES, 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for name, (module, function) in _PHASES.items():
            wrapped = timed(name, getattr(module, function))
            stack.enter_context(patch.object(module, function, wrapped))
        yield
    for name, seconds in spent.items():
        phases[name].append(seconds)


def _batches(store: Path) -> list[torch.Tensor]:
    reader = StoreReader(store)
    found = []
    for number in reader.segments:
        segment = reader.segment(number)
        assembly = SegmentAssembly((), segment)
        found += [assembly.input_ids(batch) for batch in segment.batches]
    return found


def _forward(loaded: LoadedModel, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        bare_forward(loaded, batch)
