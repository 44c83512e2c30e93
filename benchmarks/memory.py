"""Peak memory of an ingest against the bare forward pass, two segments and 300 MB."""

import json
import os
import subprocess
import sys

from benchmarks.harness import ROOT, Options, Ratio, Result, scratch

FULL_SIZE = 2
"""Hundreds of thousands of tokens of the larger corpus; the smaller has a quarter. 1 is one tiny
corpus."""

ALLOWANCE = 300 * 10**6


def run(size: int, options: Options | None = None) -> Result:
    """Ingest two corpora, each in a process of its own, and run the bare model over both."""
    options = options or Options()
    model, segment_rows = ("tiny", 512) if size == 1 else ("demo", 16384)
    corpora = (2048,) if size == 1 else (size * 25_000, size * 100_000)
    ratios: list[Ratio] = []
    facts = {}
    peaks = []
    with scratch() as folder:
        for tokens in corpora:
            store = folder / f"store-{tokens}"
            arguments = [str(store), "--model", model, "--tokens", str(tokens)]
            arguments += ["--segment-rows", str(segment_rows)]
            ingested = _child("ingest", arguments)
            bare = _child("forward", arguments)
            limit = bare["peak"] + 2 * ingested["segment_bytes"] + ALLOWANCE
            peaks.append(ingested["peak"])
            value = ingested["peak"] / limit
            name = f"{ingested['tokens']:,} tokens"
            ratios.append(Ratio(f"{name}: ingest over allowed", value, value, value, 1.0))
            facts[name] = {
                "ingest, MB": round(ingested["peak"] / 1e6),
                "bare forward, MB": round(bare["peak"] / 1e6),
                "two segments, MB": round(2 * ingested["segment_bytes"] / 1e6),
                "headroom, MB": round((limit - ingested["peak"]) / 1e6),
            }
    growth = peaks[-1] / peaks[0]
    ratios.append(Ratio("ingest, larger corpus over smaller", growth, growth, growth, 1.1))
    return Result(
        "memory",
        size,
        {
            "model": model,
            "locations": "neurons",
            "segment rows": segment_rows,
            "allowed": "peak of the bare forward passes + two segments + 300 MB",
        },
        (),
        tuple(ratios),
        facts,
    )


def _child(task: str, arguments: list[str]) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.child", task, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.child {task} failed:\n{done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
