"""One neuron's search over thousands of segments: what opens, what is read, what it takes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from actstore.query.session import Store
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact
from benchmarks.harness import Case, Options, Ratio, Result, Timing, evict, interleave, scratch
from benchmarks.stores import build_store

FULL_SIZE = 10_000
"""Segments of 512 rows x 32 neurons; a tenth of them is measured beside. 1 means 40 segments."""

NAME = "mlp_post_act"
ROWS = 512
NEURONS = 32
CONTEXT = 128
K = 20
DEEP = 300


def run(size: int, options: Options | None = None) -> Result:
    """Build a store of many narrow segments and one of a tenth, compact both, and ask."""
    options = options or Options()
    counts = (4, 40) if size == 1 else (size // 10, size)
    timings: list[Timing] = []
    facts: dict[str, Any] = {}
    with scratch() as folder:
        for segments in counts:
            rng = np.random.default_rng(options.seed)
            values = rng.standard_normal((1, segments * ROWS, NEURONS)).astype(np.float16)
            with _unsynced():
                path = build_store(
                    folder / f"store-{segments}",
                    {NAME: values},
                    [CONTEXT] * (segments * ROWS // CONTEXT),
                    segment_rows=ROWS,
                )
            study = _Study(path, values[0], options, repetitions=2 if size == 1 else 9)
            found, said = study.measure()
            label = f"{segments:,} segments"
            timings += [Timing(f"{label}: {one.name}", one.seconds) for one in found]
            facts[label] = said
    few, many = (f"{segments:,} segments" for segments in counts)
    medians = {timing.name: timing.median for timing in timings}
    ratios = []
    for name, aim in ((f"top-{K}, warm", 2.0), (f"top-{K}, cold", None)):
        growth = medians[f"{many}: {name}"] / medians[f"{few}: {name}"]
        ratios.append(Ratio(f"{name}, ten times the segments", growth, growth, growth, aim))
    return Result(
        "segments",
        size,
        {
            "array": f"1 layer x {ROWS} rows a segment x {NEURONS} neurons, float16, normal",
            "cold": f"{options.cold}; a store opened before",
        },
        tuple(timings),
        tuple(ratios),
        facts,
    )


@contextmanager
def _unsynced() -> Iterator[None]:
    """Ten syncs a segment are most of what writing small ones takes; nobody keeps these."""
    with mock.patch.object(os, "fsync"):
        yield
    os.sync()


class _Study:
    """One store, before and after it is asked."""

    def __init__(
        self, path: Path, values: npt.NDArray[np.float16], options: Options, repetitions: int
    ) -> None:
        self._path, self._values = path, values
        self._options, self._repetitions = options, repetitions
        reader = StoreReader(path)
        self._compaction = interleave([Case("compact", partial(compact, reader))], 1, 0)
        reader.close()
        self._store = Store(path)
        self._neuron = 0

    def measure(self) -> tuple[list[Timing], dict[str, Any]]:
        """Timings, and how many files a search opens."""
        self._check()
        opened = {
            f"top-{K}": self._files_opened(partial(self._ask, K)),
            f"top-{DEEP}": self._files_opened(partial(self._ask, DEEP)),
        }
        pages = {
            f"top-{k}, pages read": self._store.topk(NAME, k=k, neurons=[3]).certificate.pages_read
            for k in (K, DEEP)
        }
        cold = [
            Case("open, cold", self._reopen, self._evict),
            Case(f"top-{K}, cold", partial(self._ask, K), self._forget),
            Case(f"top-{DEEP}, cold", partial(self._ask, DEEP), self._forget),
        ]
        # Pushing tens of thousands of files out takes longer than anything that is timed.
        timings = interleave(cold, min(3, self._repetitions), self._options.seed)
        self._ask(DEEP)
        warm = [
            Case("open, warm", self._reopen),
            Case(f"top-{K}, warm", partial(self._ask, K)),
            Case(f"top-{DEEP}, warm", partial(self._ask, DEEP)),
        ]
        # Opening begins with nothing in memory; what is asked warm was asked before.
        timings |= interleave(warm[:1], self._repetitions, self._options.seed)
        self._ask(DEEP)
        timings |= interleave(warm[1:], self._repetitions, self._options.seed)
        index = next((self._path / "zones").rglob("index-*"))
        self._store.close()
        return [*self._compaction.values(), *timings.values()], {
            "files opened": opened,
            **pages,
            "merged index, bytes": index.stat().st_size,
            "raw bytes": self._values.nbytes,
        }

    def _check(self) -> None:
        """Compare an answer with sorting the values themselves."""
        allowed = np.arange(len(self._values)) % CONTEXT > 0
        for k in (K, DEEP):
            best = np.sort(self._values[allowed, 3].astype(np.float32))[::-1][:k]
            found = self._store.topk(NAME, k=k, neurons=[3]).table["value"]
            np.testing.assert_array_equal(np.array(found), best)

    def _ask(self, k: int) -> None:
        self._neuron = (self._neuron + 7) % NEURONS
        self._store.topk(NAME, k=k, neurons=[self._neuron])

    def _files_opened(self, action: Callable[[], object]) -> int:
        """Files of the store that an action opens in a store that has just been opened."""
        self._reopen()
        seen: set[str] = set()
        original = os.open

        def watching(path: Any, *rest: Any, **options: Any) -> int:
            seen.add(str(path))
            return original(path, *rest, **options)

        with mock.patch.object(os, "open", watching):
            action()
        return len({path for path in seen if str(self._path) in path})

    def _forget(self) -> None:
        self._reopen()
        self._evict()

    def _evict(self) -> None:
        evict([self._path / part for part in ("arrays", "commits", "plan", "zones")], self._options)

    def _reopen(self) -> None:
        self._store.close()
        self._store = Store(self._path)
