"""What an ingest takes, timed on a few batches that are captured and published apart."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actstore.ingest.estimate import Estimate
from actstore.ingest.model import LoadedModel
from actstore.ingest.preparation import Corpus, PlannedIngest, plan_ingest
from actstore.ingest.recording import Recorder
from actstore.ingest.settings import Progress
from actstore.ingest.targets import DocumentTargets
from actstore.ingest.writer import SegmentAssembly
from actstore.store.blobs import LocalBlobs
from actstore.store.layout import PAGE_ROWS
from actstore.store.manifest import SetRecord
from actstore.store.plan import Plan, SegmentPlan
from actstore.store.publishing import BASE_SET, publish_segment
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["Sample", "measure_sample"]

_SAMPLE_SECONDS = 5.0
_SAMPLE_BATCHES = 2
_MOST_ROWS = 65536


@dataclass(frozen=True)
class Sample:
    """What a sample took.

    Attributes:
        forward: seconds of a padded token's pass, or passes, nothing kept.
        captured: the same with its values kept.
        published: seconds of a row's publication.
        overlap: whether capturing and publishing run beside each other.
        compression: array -> share of its bytes that compression leaves; compressed ones alone.
    """

    forward: float
    captured: float
    published: float
    overlap: bool
    compression: Mapping[str, float]

    def refine(self, estimate: Estimate, padded_tokens: float) -> Estimate:
        """The estimate with times, and compressed arrays at their measured size."""
        steps = (self.captured * padded_tokens, self.published * estimate.tokens)
        return replace(
            estimate,
            seconds=max(steps) if self.overlap else sum(steps),
            rerun_seconds=self.forward * padded_tokens,
            bytes_by_array={
                key: round(size * self.compression.get(key, 1.0))
                for key, size in estimate.bytes_by_array.items()
            },
        )


def measure_sample(planned: PlannedIngest, folder: Path, progress: Progress | None) -> Sample:
    """Ingest a few batches into a folder of their own."""
    plan = _sample_plan(planned, folder)
    segment = plan.segment(0)
    loaded = planned.loaded
    specs = tuple(
        replace(spec, segment_rows=plan.config.segment_rows, variant="") for spec in planned.arrays
    )
    assembly = SegmentAssembly(specs, segment)
    done = forward = captured = 0.0
    with Recorder(loaded, specs, planned.settings.chosen_objective, [plan]) as recorder:
        # The first pass of a shape is slower than those that follow.
        recorder.run(assembly, segment.batches[0], _ignore)
        for batch in segment.batches:
            started = _now(loaded)
            recorder.run(assembly, batch, _ignore)
            between = _now(loaded)
            recorder.record(assembly, batch)
            forward += between - started
            captured += _now(loaded) - between
            done += len(batch.members) * batch.padded_length
            if progress is not None:
                progress("measure", int(done), plan.counts.padded_tokens)
            if forward + captured > _SAMPLE_SECONDS:
                break
    blobs = LocalBlobs(folder)
    started = time.monotonic()
    record = SetRecord(BASE_SET, specs, {})
    committed = publish_segment(blobs, record, plan.hash, segment, assembly.buffers)
    published = time.monotonic() - started
    sizes = {entry.path: entry.size for entry in committed.files}
    return Sample(
        forward / done,
        captured / done,
        published / segment.n_rows,
        overlap=loaded.device.type != "cpu",
        compression={
            original.key: sizes[spec.shard_path(0, 0)] / spec.shard_bytes(0, segment.n_rows)
            for original, spec in zip(planned.arrays, specs, strict=True)
            if spec.is_compressed
        },
    )


def _sample_plan(planned: PlannedIngest, folder: Path) -> Plan:
    """A plan of some of the sequences that remain, in a segment of their own."""
    number = min(planned.remaining)
    plan = next(
        plan
        for plan in planned.outcome.plans
        if plan.first_segment <= number < plan.first_segment + plan.n_segments
    )
    config = plan.config
    least = max(4 * config.context, _SAMPLE_BATCHES * config.batch_tokens)
    rows = min(-(-least // PAGE_ROWS) * PAGE_ROWS, config.segment_rows, _MOST_ROWS)
    settings = replace(
        planned.settings,
        context=config.context,
        stride=None,
        bos="none",
        segment_rows=rows,
        batch_tokens=config.batch_tokens,
        # Of this plan the rows alone are wanted, so nothing need be probed.
        locations="minimal",
        keep={},
        dtype="float32",
        objective=None,
        gradients=None,
        set_name=BASE_SET,
        limit_tokens=rows,
        shuffle=None,
        append=False,
    )
    records = _sequences(planned, plan.segment(number), rows)
    sample = plan_ingest(planned.loaded, Corpus(records), folder, settings, needs_room=False)
    return sample.outcome.plans[0]


def _sequences(planned: PlannedIngest, segment: SegmentPlan, rows: int) -> list[dict[str, Any]]:
    """Whole batches from all over the segment, up to so many rows, with their targets."""
    objective, loaded = planned.settings.chosen_objective, planned.loaded
    targets = None
    if objective is not None:
        vocabulary = loaded.dimensions.vocabulary_size
        targets = DocumentTargets(objective, planned.plans, loaded.tokenizer, vocabulary)
    order = np.random.default_rng(0).permutation(len(segment.batches))
    chosen: list[dict[str, Any]] = []
    total = 0
    for number in order:
        members = segment.batches[number].members.tolist()
        columns = targets.of(segment, members) if targets is not None else None
        for member, own in zip(members, columns or [{}] * len(members), strict=True):
            length = int(segment.length[member])
            if total + length > rows and chosen:
                return chosen
            chosen.append({**own, "token_ids": segment.sequence_token_ids(member)})
            total += length
    return chosen


def _ignore(
    location: ActivationLocationType,
    layer: int | None,
    tensor: torch.Tensor,
    pass_type: PassType,
) -> None:
    """Keep nothing."""


def _now(loaded: LoadedModel) -> float:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.monotonic()
