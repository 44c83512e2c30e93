"""The query engine against its peers on a real model's activations, forward alone.

The shipped model reads the standard library's source; the store is as ``actstore demo`` makes
it, and the peers get the same values from it.
"""

import time
from typing import Any

import torch

from actstore.ingest.pipeline import ingest
from actstore.ingest.settings import IngestSettings
from benchmarks.harness import Options, Result, scratch
from benchmarks.models import demo_model, random_model, standard_library
from benchmarks.peer_corpus import corpus_of_store, write_parquet, write_table
from benchmarks.peer_engine import EngineSide, SqlSide
from benchmarks.peer_questions import QUESTIONS
from benchmarks.peer_sides import DuckDbSide, DuckDbTableSide, MemmapSide, Side, TorchSide, ZarrSide
from benchmarks.peer_study import Findings, Study
from benchmarks.peers import build_costs

FULL_SIZE = 5
"""Hundreds of thousands of tokens; 1 is 4096 of a tiny random model."""


def run(size: int, options: Options | None = None) -> Result:
    """Ingest, then ask all sides."""
    options = options or Options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    small = size == 1
    loaded, name = (random_model("tiny"), "tiny random model") if small else demo_model()
    settings = IngestSettings(
        limit_tokens=4096 if small else size * 100_000,
        segment_rows=512 if small else None,
        batch_tokens=256 if small else 4096,
        locations="neurons",
    )
    with scratch() as folder:
        started = time.perf_counter()
        ingest(loaded, standard_library(loaded), folder / "store", settings)
        costs: dict[str, Any] = {"ingest, s": time.perf_counter() - started}
        corpus = corpus_of_store(folder / "store", folder)
        costs |= build_costs(corpus)
        costs["Parquet bytes"] = write_parquet(corpus)
        costs["DuckDB's bytes"] = write_table(corpus)
        sides: list[Side] = [
            EngineSide(corpus),
            SqlSide(corpus),
            MemmapSide(corpus),
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
        )
        study.ask(QUESTIONS, findings)
        for side in sides:
            side.close()
    findings.require("index, share of raw bytes", 100 * costs["index / raw"], 1, "%")
    layers, rows, neurons = corpus.shape
    return Result(
        "peer_model",
        size,
        {
            "model": name,
            "array": f"{layers} layers x {rows:,} tokens x {neurons} neurons, float16",
            "documents": int(corpus.document.max()) + 1,
            "raw bytes": corpus.raw_bytes,
            "torch threads": torch.get_num_threads(),
            "cold": f"{options.cold}; stores, arrays and views opened before",
        },
        tuple(findings.timings.values()),
        tuple(findings.ratios),
        {"aims": findings.aims, "costs": costs, **findings.questions},
    )
