"""The query engine against its peers on synthetic activations of one layer.

Up to 131,072 tokens every side answers every question; above, our engine and memmap alone,
since the other forms of the same values would not fit beside them.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actstore.query.index_building import build_indexes
from actstore.query.session import Store
from actstore.store.column_copies import copy_columns
from actstore.store.shards import SegmentBuffer
from actstore.store.snapshot import compact
from actstore.store.vocabulary import ActivationLocationType as Location
from actstore.store.zones import describe_segment
from benchmarks.harness import Options, Result, scratch
from benchmarks.peer_corpus import NAME, Corpus, synthetic_corpus, write_parquet, write_table
from benchmarks.peer_engine import GRADIENT_NAME, EngineSide, SqlSide, folder_bytes
from benchmarks.peer_questions import QUESTIONS, Question
from benchmarks.peer_sides import DuckDbSide, DuckDbTableSide, MemmapSide, Side, TorchSide, ZarrSide
from benchmarks.peer_study import Findings, Study
from benchmarks.stores import CONTEXT, SEGMENT_ROWS

FULL_SIZE = 8
"""Segments of 16,384 tokens; 32 and 128 are the larger corpora."""

_NEURONS = 3072
_HUGE = 128
"""Segments from which another copy would not fit on the disk, looking at every value takes minutes,
and memmap's aim holds."""
_BIG_QUESTIONS = (
    "one neuron, top 20",
    "one neuron, top 500",
    "one neuron, top 20 in 10 % of documents",
    "one neuron, top 20 in 1 % of documents",
    "one neuron, count above its 99.9 % quantile",
    "one token, top 20 neurons",
    "one layer, top 20",
)


def run(size: int, options: Options | None = None) -> Result:
    """Ask all sides on a corpus of ``size`` segments; 1 is one short segment of few neurons."""
    options = options or Options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    small, big = size == 1, size > FULL_SIZE
    neurons = 64 if small else _NEURONS
    segment_rows, context = (8192, 64) if small else (SEGMENT_ROWS, CONTEXT)
    rows = 8192 if small else size * segment_rows
    with scratch() as folder:
        costs: dict[str, Any] = {}
        corpus = synthetic_corpus(
            folder,
            rows,
            neurons,
            context,
            segment_rows,
            options.seed,
            grad=not big,
            costs=costs,
        )
        costs |= build_costs(corpus)
        sides: list[Side] = [
            EngineSide(corpus),
            SqlSide(corpus),
            MemmapSide(corpus, repeats=not big),
        ]
        if not big:
            costs["Parquet bytes, with gradients"] = write_parquet(corpus)
            costs["DuckDB's bytes, with gradients"] = write_table(corpus)
            sides += [
                TorchSide(corpus),
                ZarrSide(corpus),
                DuckDbSide(corpus, options.threads),
                DuckDbTableSide(corpus, options.threads),
            ]
        findings = Findings()
        study = Study(
            corpus,
            sides,
            options,
            seconds=0.01 if small else 1.0,
            most=1 if small else 9,
            places=1 if small else 5,
            memmap_aim=500.0 if size >= _HUGE else None,
        )
        products = [question for question in QUESTIONS if question.gradient and not big]
        study.ask((q for q in _asked(size) if q not in products), findings)
        if products:
            # Seconds each: once is enough.
            alone = replace(study, sides=sides[:1], places=1, most=1)
            alone.ask((_renamed(q, "before its index") for q in products), findings)
            costs |= _index(corpus)
            study.ask(products, findings)
        if size < _HUGE:
            costs |= _copy(corpus)
            copied = [
                _renamed(q, "column copy") for q in _asked(size) if q.over in ("neuron", "count")
            ]
            replace(study, sides=sides[:1]).ask((q for q in copied if not q.gradient), findings)
        for side in sides:
            side.close()
    findings.require("index, share of raw bytes", 100 * costs["index / raw"], 1, "%")
    return Result(
        "peers",
        size,
        {
            "array": f"1 layer x {rows:,} tokens x {neurons} neurons, float16, synthetic",
            "documents": f"{rows // context:,} of {context} tokens",
            "raw bytes": 2 * rows * neurons,
            "torch threads": torch.get_num_threads(),
            "cold": f"{options.cold}; stores, arrays and views opened before",
        },
        tuple(findings.timings.values()),
        tuple(findings.ratios),
        {"aims": findings.aims, "costs": costs, **findings.questions},
    )


def _asked(size: int) -> list[Question]:
    if size <= FULL_SIZE:
        return list(QUESTIONS)
    big = [question for question in QUESTIONS if question.name in _BIG_QUESTIONS]
    return [question for question in big if size < _HUGE or not question.slow]


def _renamed(question: Question, when: str) -> Question:
    return replace(question, name=f"{question.name}; {when}")


def _index(corpus: Corpus) -> dict[str, Any]:
    """Index the product; what that cost, its compaction included, and what it takes."""
    started = time.perf_counter()
    (built,) = build_indexes(corpus.store, [GRADIENT_NAME], parts=["zones"])
    took = 1e6 * (time.perf_counter() - started) / corpus.rows / corpus.layers
    share = folder_bytes(corpus.store / "zones" / GRADIENT_NAME) / corpus.raw_bytes
    return {
        "index of act x grad and compact, µs per token and layer": took,
        "index of act x grad / raw of one array": round(share, 5),
        "its segments": built.segments,
    }


def _copy(corpus: Corpus) -> dict[str, Any]:
    """Copy the activations column by column; what that cost and takes."""
    started = time.perf_counter()
    copy_columns(corpus.store, NAME)
    took = 1e6 * (time.perf_counter() - started) / corpus.rows / corpus.layers
    return {"column copy, µs per token and layer": took}


def build_costs(corpus: Corpus) -> dict[str, Any]:
    """Describe a segment again, compact the store; what both cost, and the index's size."""
    tokens = corpus.rows * corpus.layers
    with Store(corpus.store) as store:
        array = store.reader.array(Location.MLP_POST_ACT)
        spec, filled = array.spec, array.rows_of(0)
        buffer = SegmentBuffer(spec, filled)
        for layer in range(corpus.layers):
            buffer.put(layer, 0, array.reader.window(0, layer, 0, filled))
        started = time.perf_counter()
        describe_segment(buffer, store.reader.segment(0).special)
        described = (time.perf_counter() - started) / (filled * corpus.layers)
        before = _index_bytes(corpus.store)
        started = time.perf_counter()
        compact(store.reader)
        compacted = time.perf_counter() - started
        arrays = sum(1 for array in store.reader.every_array if array.spec.has_zones)
    return {
        "zones, lists, checksums at ingest, µs per token and layer": 1e6 * described,
        "compact, µs per token, layer and array": 1e6 * compacted / tokens / arrays,
        "catalog bytes": folder_bytes(corpus.store / "catalog"),
        "index / raw before compact": round(before / corpus.raw_bytes, 5),
        "index / raw": round(_index_bytes(corpus.store) / corpus.raw_bytes, 5),
    }


def _index_bytes(store: Path) -> int:
    return folder_bytes(store / "zones" / NAME / "forward")
