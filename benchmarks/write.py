"""Durable segment write against a raw sequential write of the same bytes, both synced."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from actstore.store.blobs import LocalBlobs
from actstore.store.layout import ArraySpec, StoredDtype
from actstore.store.manifest import SetRecord
from actstore.store.plan import SegmentPlan
from actstore.store.plan_record import PlanConfig
from actstore.store.planning import build_plan
from actstore.store.publishing import publish_file, publish_segment
from actstore.store.shard_file import shard_parts
from actstore.store.shards import SegmentBuffer
from actstore.store.token_stream import TokenizedDocument
from actstore.store.vocabulary import ActivationLocationType as Location
from actstore.store.vocabulary import PassType
from actstore.store.zones import describe_segment
from benchmarks.harness import Case, Options, Result, compare, interleave, scratch

FULL_SIZE = 12
"""Layers; 1 also means short segments."""

NEURONS, CHANNELS = 512, 128
_SLICE = 4 * 2**20
_CONTEXT = 256
_BATCH_ROWS = 256


def run(size: int, options: Options | None = None) -> Result:
    """Time one segment of the default preset's arrays, ``size`` layers of them."""
    options = options or Options()
    rows = 2048 if size == 1 else 16384
    repetitions = 2 if size == 1 else 11
    specs = tuple(
        ArraySpec(location, PassType.FORWARD, size, (width,), StoredDtype.FLOAT16, rows)
        for location, width in (
            (Location.MLP_POST_ACT, NEURONS),
            (Location.RESID_POST_MLP, CHANNELS),
        )
    )
    record = SetRecord("base", specs, {spec.location.label: "raw" for spec in specs})
    rng = np.random.default_rng(options.seed)
    values = {
        spec.key: rng.standard_normal((rows, spec.columns), np.float32).astype(np.float16)
        for spec in specs
    }
    buffers = {spec.key: SegmentBuffer(spec, rows) for spec in specs}
    shard_bytes = sum(buffer.chunks.nbytes for buffer in buffers.values())

    def put() -> None:
        for spec in specs:
            for layer in range(size):
                for start in range(0, rows, _BATCH_ROWS):
                    batch = values[spec.key][start : start + _BATCH_ROWS]
                    buffers[spec.key].put(layer, start, batch)

    def zones() -> None:
        for buffer in buffers.values():
            describe_segment(buffer, plan.special)

    with scratch() as folder:
        target = folder / "target"
        plan = _segment_plan(folder / "plan", rows, rng)

        def make() -> None:
            target.mkdir()

        def remove() -> None:
            shutil.rmtree(target)

        def raw() -> None:
            with open(target / "raw", "xb", buffering=0) as file:
                file.writelines(_slices(buffers))
                os.fsync(file.fileno())

        def shards() -> None:
            blobs = LocalBlobs(target)
            for spec in specs:
                for number in range(spec.shards):
                    parts = shard_parts(spec, number, rows, buffers[spec.key].shard(number))
                    publish_file(blobs, spec.shard_path(number, 0), parts)

        def segment() -> None:
            publish_segment(LocalBlobs(target), record, "0" * 16, plan, buffers)

        put()
        make()
        segment()
        files = [path for path in target.rglob("*") if path.is_file()]
        total = sum(path.stat().st_size for path in files)
        remove()
        timings = interleave(
            [
                Case("raw write + fsync", raw, make, remove, shard_bytes, "B"),
                Case("shards published", shards, make, remove, shard_bytes, "B"),
                Case("segment published", segment, make, remove, total, "B"),
                Case("zones, lists, checksums alone", zones, None, None, shard_bytes, "B"),
                Case("rows put into the buffers", put, None, None, shard_bytes, "B"),
            ],
            repetitions,
            options.seed,
        )
    raw_timing = timings["raw write + fsync"]
    describing = timings["zones, lists, checksums alone"].median
    return Result(
        "write",
        size,
        {
            "arrays": f"{size} layers of {NEURONS} neurons and {CHANNELS} channels, float16",
            "rows": rows,
            "bytes": total,
            "files": len(files),
        },
        tuple(timings.values()),
        (
            compare(
                "shards, share of the raw rate",
                raw_timing,
                timings["shards published"],
                aim=0.9,
                at_least=True,
            ),
            compare(
                "segment, share of the raw rate",
                raw_timing,
                timings["segment published"],
                aim=0.9,
                at_least=True,
            ),
        ),
        {
            "zones, µs per token and layer": 1e6 * describing / rows / size,
            "zones, share of the segment's time": describing / timings["segment published"].median,
        },
    )


def _slices(buffers: dict[str, SegmentBuffer]) -> Iterator[memoryview]:
    for buffer in buffers.values():
        view = buffer.chunks.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _SLICE):
            yield view[start : start + _SLICE]


def _segment_plan(folder: Path, rows: int, rng: np.random.Generator) -> SegmentPlan:
    config = PlanConfig(
        context=_CONTEXT, vocabulary_size=4096, segment_rows=rows, batch_tokens=4096
    )
    documents = (
        TokenizedDocument(rng.integers(0, 4096, _CONTEXT).astype(np.int32), f"{number}", {})
        for number in range(rows // _CONTEXT)
    )
    outcome = build_plan(LocalBlobs(folder), config, documents, [], append=False)
    return outcome.plans[0].segment(0)
