"""Verified row reads against plain preads of a row-major file of the same values."""

import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actstore.store.reader import StoreReader
from actstore.store.vocabulary import ActivationLocationType as Location
from benchmarks.harness import (
    Case,
    Options,
    Result,
    Timing,
    compare,
    evict,
    interleave,
    is_cached,
    scratch,
)
from benchmarks.stores import CONTEXT, SEGMENT_ROWS, build_store, residuals

FULL_SIZE = 64
"""Thousands of token rows (1024 each)."""

COLUMNS = 4096
CHANNELS = 768
WINDOW = 256
SCATTERED = 1000

Read = tuple[float, npt.NDArray[np.float16]]


def run(size: int, options: Options | None = None) -> Result:
    """Time windows of a wide array of neurons and scattered rows of a residual array."""
    options = options or Options()
    rows = size * CONTEXT
    segment_rows = min(SEGMENT_ROWS, max(rows, 4 * 256))
    repetitions = 2 if size == 1 else 25
    rng = np.random.default_rng(options.seed)
    values = {
        "mlp_post_act": residuals(rows, COLUMNS, rng),
        "resid_post_mlp": residuals(4 * rows, CHANNELS, rng)[:, : 4 * rows],
    }
    # The residual array is four times as long: scattered rows then lie in different blocks.
    with scratch() as folder:
        stores, files = {}, {}
        for name, array in values.items():
            files[name] = folder / f"{name}.raw"
            array[0].tofile(files[name])
            lengths = [256] * (array.shape[1] // 256)
            stores[name] = build_store(
                folder / name, {name: array}, lengths, segment_rows=segment_rows
            )
        windows = _Windows(stores["mlp_post_act"], files["mlp_post_act"], values["mlp_post_act"][0])
        scattered = _Scattered(
            stores["resid_post_mlp"], files["resid_post_mlp"], values["resid_post_mlp"][0]
        )
        timings: dict[str, Timing] = {}
        evicted = None
        for reads in (windows, scattered):
            for cold in (True, False):
                evicted = _check_eviction(files["mlp_post_act"], options)
                timings |= reads.measure(cold, repetitions, rng, options)
    state = {True: "cold", False: "warm"}
    ratios = []
    for cold, aim in ((True, 2.0), (False, 6.0)):
        name = state[cold]
        ratios.append(
            compare(
                f"window over pread, {name}",
                timings[f"window, {name}"],
                timings[f"one pread, {name}"],
                aim=aim,
            )
        )
        ratios += [
            compare(
                f"scattered over {floor}, {name}",
                timings[f"scattered, {name}"],
                timings[f"{floor}, {name}"],
            )
            for floor in ("preads", "announced preads")
        ]
    return Result(
        "rows",
        size,
        {
            "window": f"{WINDOW} tokens of {rows:,} x {COLUMNS} float16, 32 columns a chunk",
            "scattered": f"{SCATTERED} rows of {4 * rows:,} x {CHANNELS} float16",
            "cold": options.cold,
        },
        tuple(timings.values()),
        tuple(ratios),
        {"cold reads found the file evicted": evicted},
    )


def _check_eviction(path: Path, options: Options) -> bool | None:
    evict([path], options)
    cached = [is_cached(path, offset) for offset in (0, path.stat().st_size // 2)]
    return None if None in cached else not any(cached)


class _Reads:
    """A pair of reads of the same values: through the store, and from the ideal file."""

    def __init__(self, store: Path, file: Path, values: npt.NDArray[np.float16]) -> None:
        self.store, self.file, self.values = store, file, values
        self.row_bytes = values[0].nbytes
        self.reader = StoreReader(store)
        self.descriptor = os.open(file, os.O_RDONLY)

    def reopen(self) -> None:
        """A reader that remembers nothing, not even checksums."""
        self.reader.close()
        self.reader = StoreReader(self.store)

    def pread(self, row: int, count: int) -> bytes:
        return os.pread(self.descriptor, count * self.row_bytes, row * self.row_bytes)

    def time(
        self,
        cases: dict[str, Iterator[object]],
        round_trip: int,
        cold: bool,
        repetitions: int,
        options: Options,
    ) -> dict[str, Timing]:
        """Time each case's next step; every cold one with evicted files and a new reader.

        The steps recur, so after one round of them everything warm is in memory.
        """

        def prepare() -> None:
            if cold:
                evict([self.store, self.file], options)
                self.reopen()

        suffix = "cold" if cold else "warm"
        if not cold:
            for steps in cases.values():
                for _ in range(round_trip):
                    next(steps)
        return interleave(
            [
                Case(f"{name}, {suffix}", steps.__next__, prepare, None, None)
                for name, steps in cases.items()
            ],
            repetitions,
            options.seed,
        )


class _Windows(_Reads):
    def measure(
        self, cold: bool, repetitions: int, rng: np.random.Generator, options: Options
    ) -> dict[str, Timing]:
        starts = rng.integers(0, len(self.values) - WINDOW, 3 * repetitions).tolist()
        segment_rows = self.reader.segment_rows
        starts = [s - max(0, s % segment_rows + WINDOW - segment_rows) for s in starts]
        for start in starts[:3]:
            expected = self.values[start : start + WINDOW]
            np.testing.assert_array_equal(self._window(start), expected)
            assert self.pread(start, WINDOW) == expected.tobytes()
        cases: dict[str, Iterator[object]] = {
            "window": (self._window(start) for start in cycle(starts)),
            "one pread": (self.pread(start, WINDOW) for start in cycle(starts)),
        }
        return self.time(cases, len(starts), cold, repetitions, options)

    def _window(self, start: int) -> npt.NDArray[np.float16]:
        array = self.reader.array(Location.MLP_POST_ACT)
        segment, first = divmod(start, self.reader.segment_rows)
        window: npt.NDArray[np.float16] = array.reader.window(segment, 0, first, first + WINDOW)
        return window


class _Scattered(_Reads):
    def measure(
        self, cold: bool, repetitions: int, rng: np.random.Generator, options: Options
    ) -> dict[str, Timing]:
        samples = [rng.integers(0, len(self.values), SCATTERED) for _ in range(5)]
        np.testing.assert_array_equal(self._rows(samples[0]), self.values[samples[0]])
        cases: dict[str, Iterator[object]] = {
            "scattered": (self._rows(rows) for rows in cycle(samples)),
            "preads": (self._preads(rows, announce=False) for rows in cycle(samples)),
            "announced preads": (self._preads(rows, announce=True) for rows in cycle(samples)),
        }
        return self.time(cases, len(samples), cold, repetitions, options)

    def _rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        found: npt.NDArray[np.float16] = self.reader.array(Location.RESID_POST_MLP).reader.rows(
            0, rows
        )
        return found

    def _preads(self, rows: npt.NDArray[np.int64], *, announce: bool) -> list[bytes]:
        size = self.row_bytes
        if announce:
            for row in rows.tolist():
                os.posix_fadvise(self.descriptor, row * size, size, os.POSIX_FADV_WILLNEED)
        return [self.pread(row, 1) for row in rows.tolist()]
