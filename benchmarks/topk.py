"""Exact top-k of one neuron and of all, against streamed scans of the same values."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from actstore.query.results import TopK
from actstore.query.session import Store
from actstore.store.reader import StoredArray
from actstore.store.snapshot import compact
from actstore.store.vocabulary import ActivationLocationType as Location
from benchmarks.harness import Case, Options, Result, Timing, compare, evict, interleave, scratch
from benchmarks.stores import (
    CONTEXT,
    PARTS,
    SEGMENT_ROWS,
    activations,
    build_store,
    document_columns,
)

FULL_SIZE = 64
"""Segments of 16,384 tokens; 1 means one short segment."""

NAME = "mlp_post_act"
K = 20
DEEP = 500
"""More answers than a list can prove, so that pages are read."""

_SHARES = (1, 4, 16)
_SELECTIVITY = {"0.1": f"part < {PARTS // 10}", "0.01": "part = 0"}
_SCANS = ("zarr-python scan", "own verified scan")


def run(size: int, options: Options | None = None) -> Result:
    """Time top-k on a corpus of ``size`` segments, and on its first quarter and sixteenth."""
    options = options or Options()
    neurons = 64 if size == 1 else 512
    segment_rows = 2 * CONTEXT if size == 1 else SEGMENT_ROWS
    contexts = 256 if size == 1 else CONTEXT
    rows = size * segment_rows
    rng = np.random.default_rng(options.seed)
    values = activations(rows, neurons, rng)
    timings: dict[str, Timing] = {}
    facts: dict[str, Any] = {}
    with scratch() as folder:
        for share in _SHARES:
            if share > 1 and size < share:
                continue
            part = values[:, : rows // share]
            documents = part.shape[1] // contexts
            path = build_store(
                folder / f"store-{share}",
                {NAME: part},
                [contexts] * documents,
                segment_rows=segment_rows,
                columns=document_columns(documents),
            )
            study = _Study(path, part[0], contexts, options, repetitions=2 if size == 1 else 9)
            found, said = study.measure() if share == 1 else study.measure_compacted()
            tokens = f"{part.shape[1]:,} tokens"
            timings |= {f"{tokens}: {n}": timing for n, timing in _renamed(tokens, found)}
            facts[tokens] = said
    whole = f"{rows:,} tokens"
    ratios = []
    for state, aim in (("cold", 100.0), ("warm", None)):
        for scan in _SCANS:
            for stage in ("before compact", "compacted"):
                # The aim is for what a reader of a finished store gets.
                asked = aim if stage == "compacted" and scan == _SCANS[0] else None
                ratios.append(
                    compare(
                        f"{scan} over top-{K}, {stage}, {state}",
                        timings[f"{whole}: {scan}, {state}"],
                        timings[f"{whole}: top-{K}, {stage}, {state}"],
                        aim=asked,
                        at_least=True,
                    )
                )
    ratios.append(
        compare(
            f"scan of all neurons over top-{K} of all, warm",
            timings[f"{whole}: own verified scan of all neurons"],
            timings[f"{whole}: top-{K} of all neurons, compacted, warm"],
        )
    )
    return Result(
        "topk",
        size,
        {
            "array": f"1 layer x {rows:,} tokens x {neurons} neurons, float16, synthetic",
            "raw bytes": values.nbytes,
            "cold": f"{options.cold}; a store opened before",
        },
        tuple(timings.values()),
        tuple(ratios),
        facts,
    )


def _renamed(prefix: str, found: dict[str, Timing]) -> Iterator[tuple[str, Timing]]:
    for name, timing in found.items():
        yield name, Timing(f"{prefix}: {name}", timing.seconds, timing.work, timing.unit)


Question = Callable[[int], TopK | npt.NDArray[np.float32]]
"""Asks about a neuron."""


def _ask_next(question: Question, neurons: Iterator[int]) -> None:
    question(next(neurons))


class _Study:
    """The measurements on one store.

    Args:
        path: the store, not compacted.
        values: what it holds, ``(row, neuron)``.
        contexts: rows of every document; the first of each is special.
        options: how to measure.
        repetitions: of each case.
    """

    def __init__(
        self,
        path: Path,
        values: npt.NDArray[np.float16],
        contexts: int,
        options: Options,
        repetitions: int,
    ) -> None:
        self.path, self.values, self.contexts = path, values, contexts
        self.options, self.repetitions = options, repetitions
        rng = np.random.default_rng(options.seed + 1)
        self.neurons = rng.permutation(values.shape[1])[: 2 * repetitions + 3].tolist()
        self.store = Store(path)

    def measure(self) -> tuple[dict[str, Timing], dict[str, Any]]:
        """Scans and queries before compaction, then everything after it."""
        timings = self._both({f"top-{K}, before compact": self._query(k=K)})
        raw = self.values.nbytes
        index_before = self._index_bytes()
        # In the same random order as what they are compared with: the machine is never idle.
        scans: dict[str, Question] = {
            "zarr-python scan": self._zarr_scan,
            "own verified scan": self._own_scan,
        }
        later, facts = self.measure_compacted(scans)
        timings |= later
        timings |= interleave(
            [Case("own verified scan of all neurons", self._scan_all)],
            min(2, self.repetitions),
            self.options.seed,
        )
        found = np.array(self._query_all(0).table["value"])
        np.testing.assert_array_equal(found, self._scan_all()[::-1])
        facts["index, share of raw bytes"] = {
            "aim": 0.01,
            "before compact": round(index_before / raw, 5),
            "compacted": round(self._index_bytes() / raw, 5),
            "of which block checksums": round(self._checksum_bytes() / raw, 5),
        }
        return timings, facts

    def measure_compacted(
        self, scans: dict[str, Question] | None = None
    ) -> tuple[dict[str, Timing], dict[str, Any]]:
        """Queries of a compacted store, and scans among them."""
        compact(self.store.reader)
        self._reopen()
        queries = {f"top-{K}, compacted": self._query(k=K)}
        queries[f"top-{K} with text, compacted"] = self._query_text
        queries[f"top-{DEEP}, compacted"] = self._query(k=DEEP)
        for selectivity, where in _SELECTIVITY.items():
            queries[f"top-{K} where {selectivity}, compacted"] = self._query(k=K, where=where)
        everything: dict[str, Question] = {f"top-{K} of all neurons, compacted": self._query_all}
        opening = interleave(
            [Case("open, cold", self._reopen, self._evict)], self.repetitions, self.options.seed
        )
        timings = {**opening, **self._both({**queries, **everything, **(scans or {})})}
        certificates = {name: self._certificates(query) for name, query in queries.items()}
        all_neurons = self._query_all(0).certificate
        certificates[f"top-{K} of all neurons"] = {
            "plans": [all_neurons.plan],
            "pages read, mean": all_neurons.pages_read,
            "pages read, most": all_neurons.pages_read,
        }
        return timings, certificates

    def _both(self, cases: dict[str, Question]) -> dict[str, Timing]:
        """Cold and warm timings; the answers for one neuron are checked first."""
        self._check(cases)
        timings: dict[str, Timing] = {}
        for state, prepare in (("cold", self._forget), ("warm", None)):
            runs = []
            for name, case in cases.items():
                # Every case asks for the same neurons in the same order.
                neurons = cycle(self.neurons)
                if state == "warm":
                    case(next(neurons))
                runs.append(Case(f"{name}, {state}", partial(_ask_next, case, neurons), prepare))
            timings |= interleave(runs, self.repetitions, self.options.seed)
        return timings

    def _check(self, cases: dict[str, Question]) -> None:
        """Compare answers for one neuron with brute force over the values themselves."""
        neuron = self.neurons[0]
        document, position = np.divmod(np.arange(len(self.values)), self.contexts)
        part = document % PARTS
        for name, case in cases.items():
            if "all neurons" in name:
                # Compared with the scan of all neurons when that has run.
                continue
            allowed = position > 0
            if "where" in name:
                allowed &= part < (PARTS // 10 if "where 0.1," in name else 1)
            best = np.sort(self.values[allowed, neuron].astype(np.float32))[::-1]
            answer = case(neuron)
            values = np.array(answer.table["value"]) if isinstance(answer, TopK) else answer
            np.testing.assert_array_equal(values, best[: len(values)], err_msg=name)

    def _forget(self) -> None:
        """A store opened anew, with none of its files in memory."""
        self._reopen()
        self._evict()

    def _evict(self) -> None:
        evict([self.path], self.options)

    def _reopen(self) -> None:
        self.store.close()
        self.store = Store(self.path)

    def _query(self, **options: Any) -> Callable[[int], TopK]:
        return lambda neuron: self.store.topk(NAME, neurons=[neuron], **options)

    def _query_text(self, neuron: int) -> TopK:
        found = self.store.topk(NAME, neurons=[neuron], k=K)
        found.column("text")
        return found

    def _query_all(self, _: int) -> TopK:
        return self.store.topk(NAME, k=K)

    def _array(self) -> StoredArray:
        return self.store.reader.array(Location.MLP_POST_ACT)

    def _own_scan(self, neuron: int) -> npt.NDArray[np.float32]:
        array = self._array()
        chunk, column = divmod(neuron, array.spec.chunk_width)
        best = np.empty(0, np.float32)
        for segment in array.segments:
            window = array.reader.window(segment, 0, 0, array.rows_of(segment), [chunk])
            best = self._keep(best, window[:, column])
        return best

    def _zarr_scan(self, neuron: int) -> npt.NDArray[np.float32]:
        array = zarr.open_array(self.path / "arrays" / NAME / "forward", mode="r")
        step = self.store.reader.segment_rows
        best = np.empty(0, np.float32)
        for start in range(0, array.shape[1], step):
            best = self._keep(best, np.asarray(array[0, start : start + step, neuron]))
        return best

    def _keep(
        self, best: npt.NDArray[np.float32], column: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        # Documents fill segments exactly, so position 0 recurs from each segment's start.
        values = column.astype(np.float32)
        values[:: self.contexts] = -np.inf
        return np.sort(np.concatenate([best, np.partition(values, -K)[-K:]]))[: -K - 1 : -1]

    def _scan_all(self) -> npt.NDArray[np.float32]:
        array = self._array()
        best = np.empty(0, np.float32)
        for segment in array.segments:
            window = array.reader.window(segment, 0, 0, array.rows_of(segment))
            values = window.astype(np.float32)
            values[:: self.contexts] = -np.inf
            best = np.sort(np.concatenate([best, np.partition(values, -K, axis=None)[-K:]]))[-K:]
        return best

    def _certificates(self, query: Callable[[int], TopK]) -> dict[str, Any]:
        found = [query(neuron).certificate for neuron in self.neurons]
        read = [certificate.pages_read for certificate in found]
        return {
            "plans": sorted({certificate.plan for certificate in found}),
            "pages read, mean": round(float(np.mean(read)), 1),
            "pages read, most": max(read),
        }

    def _index_bytes(self) -> int:
        return sum(p.stat().st_size for p in (self.path / "zones").rglob("*") if p.is_file())

    def _checksum_bytes(self) -> int:
        array = self._array()
        return sum(array.zones(segment).read("checksums").nbytes for segment in array.segments)
