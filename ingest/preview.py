"""What an ingest would do and cost: planned beside its target, timed on a sample.

Nothing is written to the target. The plan is made for real in a temporary folder, so its
counts are those of the ingest; sizes follow from the layout's arithmetic; times come from
a few batches that are captured and published there.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore.ingest.estimate import Estimate, StoreSize, free_space
from actstore.ingest.model import LoadedModel
from actstore.ingest.preparation import Corpus, PlannedIngest, plan_ingest
from actstore.ingest.sampling import measure_sample
from actstore.ingest.settings import IngestSettings, Progress
from actstore.store.manifest import replaced_arrays
from actstore.store.model.readout import TOKENS_KEPT
from actstore.store.plan import Plan
from actstore.store.plan_record import PLAN_FOLDER, RECORD_FILE
from actstore.store.publishing import BASE_SET
from actstore.store.reader import StoreReader

__all__ = ["PlanSummary", "Preview", "preview", "remaining_work"]

_RECORD_BYTES = 4096


@dataclass(frozen=True)
class PlanSummary:
    """How a corpus is cut up: all plans of the store, those already in it included.

    Attributes:
        documents: source texts with at least one token.
        sequences: model contexts.
        tokens: token rows.
        segments: units of work and commit.
        batches: forward passes.
        padded_tokens: tokens of all batches with their padding.
        dropped: reason -> documents left out.
        limited: whether ``limit_tokens`` ended the reading.
        segments_committed: segments that need not be ingested again.
        config: context, stride, BOS policy, rows of a segment, tokens of a batch.
        arrays: ``location/pass`` -> dtype.
        objective: what the backward arrays are the gradients of; None without any.
    """

    documents: int
    sequences: int
    tokens: int
    segments: int
    batches: int
    padded_tokens: int
    dropped: Mapping[str, int]
    limited: bool
    segments_committed: int
    config: Mapping[str, Any]
    arrays: Mapping[str, str]
    objective: str | None = None

    @property
    def padding_share(self) -> float:
        """Share of the padded tokens that is padding, between 0 and 1."""
        return 1 - self.tokens / self.padded_tokens

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {**asdict(self), "padding_share": self.padding_share}


@dataclass(frozen=True)
class Preview:
    """A planned ingest that was not begun.

    Attributes:
        plan: how the corpus is cut up.
        estimate: what the ingest would still write and take.
    """

    plan: PlanSummary
    estimate: Estimate


def preview(
    loaded: LoadedModel,
    corpus: Corpus,
    out: str | Path | None,
    settings: IngestSettings,
    progress: Progress | None = None,
    *,
    measure: bool = True,
) -> Preview:
    """Plan an ingest and estimate it; writes nothing to the target.

    Args:
        loaded: the model.
        corpus: what to read; read once.
        out: the store's directory. What it holds already is not counted again. None for a
            new store.
        settings: as for the ingest.
        progress: told how far planning and measuring are, in tokens.
        measure: run a sample for the times; without it they are None.

    Raises:
        StoreConflict: the path holds a store of another model, config or corpus.
        InvalidInput: the corpus or a setting cannot be used.
    """
    target = Path.cwd() if out is None else Path(out)
    with tempfile.TemporaryDirectory(prefix="actstore-") as folder:
        root = Path(folder) / "store"
        root.mkdir()
        if out is not None:
            _mirror(target, root)
        planned = plan_ingest(loaded, corpus, root, settings, progress, needs_room=False)
        estimate = _size(planned).estimate(
            seconds=None, rerun_seconds=None, free_bytes=free_space(target)
        )
        if measure and planned.remaining and planned.arrays:
            sample = measure_sample(planned, Path(folder) / "sample", progress)
            estimate = sample.refine(
                estimate, _padded_tokens(planned.outcome.plans, planned.remaining)
            )
        return Preview(_summary(planned), estimate)


def remaining_work(path: str | Path, set_name: str, *, is_new: bool) -> Estimate:
    """What an ingest that has planned and begun writes, without times.

    Args:
        path: the store's directory.
        set_name: the set that it writes.
        is_new: count the model's and the plans' files too, which this ingest wrote.

    Raises:
        NotAStore: there is no store yet.
    """
    reader = StoreReader(path)
    try:
        record = reader.sets[set_name]
        replaced = replaced_arrays(reader.sets)
        committed = reader.commits[set_name]
        remaining = {
            number: int(rows)
            for plan in reader.plans
            for number, rows in enumerate(plan.filled_rows(), plan.first_segment)
            if number not in committed
        }
        size = StoreSize(
            arrays=tuple(spec for spec in record.arrays if spec.key not in replaced),
            segment_rows=reader.segment_rows,
            has_rows=set_name == BASE_SET,
            plans=tuple(reader.plans),
            remaining=remaining,
            n_layers=int(reader.manifest.model["dimensions"]["n_layers"]),
            neurons=int(reader.manifest.model["dimensions"]["d_mlp"]),
            vocabulary=int(reader.manifest.model["dimensions"]["vocabulary_size"]),
            model_bytes=sum(entry.size for entry in reader.manifest.files) if is_new else 0,
            model_files=len(reader.manifest.files),
            plan_bytes=(
                sum(entry.size for plan in reader.plans for entry in plan.files) if is_new else 0
            ),
            is_new=is_new,
            has_new_plan=is_new,
        )
        return size.estimate(seconds=None, rerun_seconds=None, free_bytes=free_space(reader.root))
    finally:
        reader.close()


def _mirror(target: Path, root: Path) -> None:
    """Show planning what the target holds, through links that it never writes through."""
    for entry in sorted(target.iterdir()) if target.is_dir() else []:
        if entry.name == PLAN_FOLDER:
            (root / PLAN_FOLDER).mkdir()
            # A folder without its record is one that planning would finish.
            for record in entry.glob(f"*/{RECORD_FILE}"):
                (root / PLAN_FOLDER / record.parent.name).symlink_to(record.parent.resolve())
        else:
            (root / entry.name).symlink_to(entry.resolve())


def _summary(planned: PlannedIngest) -> PlanSummary:
    counts = [plan.counts for plan in planned.outcome.plans]
    config = planned.outcome.plans[-1].config
    segments = sum(count.segments for count in counts)
    return PlanSummary(
        documents=sum(count.documents for count in counts),
        sequences=sum(count.sequences for count in counts),
        tokens=sum(count.tokens for count in counts),
        segments=segments,
        batches=sum(count.batches for count in counts),
        padded_tokens=sum(count.padded_tokens for count in counts),
        dropped=dict(planned.outcome.dropped),
        limited=planned.outcome.limited,
        segments_committed=segments - len(planned.remaining),
        config={
            "context": config.context,
            "stride": config.stride,
            "bos": config.bos,
            "segment_rows": config.segment_rows,
            "batch_tokens": config.batch_tokens,
            "shuffle": config.shuffle,
        },
        arrays={spec.key: spec.dtype.value for spec in planned.arrays},
        objective=planned.set_record.objective,
    )


def _size(planned: PlannedIngest) -> StoreSize:
    dimensions = planned.loaded.dimensions
    created = planned.outcome.created
    plan_bytes = sum(entry.size for entry in created.files) if created else 0
    model_bytes, model_files = _model_size(planned.loaded) if planned.is_new else (0, 0)
    return StoreSize(
        arrays=planned.arrays,
        segment_rows=planned.set_record.arrays[0].segment_rows,
        has_rows=planned.set_record.name == BASE_SET,
        plans=planned.outcome.plans,
        remaining=planned.remaining,
        n_layers=dimensions.n_layers,
        neurons=dimensions.d_mlp,
        vocabulary=dimensions.vocabulary_size,
        model_bytes=model_bytes,
        model_files=model_files,
        plan_bytes=plan_bytes,
        is_new=planned.is_new,
        has_new_plan=created is not None,
    )


def _model_size(loaded: LoadedModel) -> tuple[int, int]:
    """Bytes and number of the files that a store keeps of a model."""
    tokenizer: list[int] = []
    if loaded.tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            loaded.tokenizer.save_pretrained(folder)
            tokenizer = [path.stat().st_size for path in Path(folder).iterdir()]
    dimensions = loaded.dimensions
    # Three norms in float64, and twice the kept tokens with their scores, for every neuron.
    readout = dimensions.n_layers * dimensions.d_mlp * (3 * 8 + 2 * TOKENS_KEPT * (4 + 4))
    size = loaded.parameters.size + readout + sum(tokenizer) + _RECORD_BYTES
    # Parameters, readout, config and the record of them all.
    return size, len(tokenizer) + 4


def _padded_tokens(plans: Sequence[Plan], remaining: Mapping[int, int]) -> float:
    """Padded tokens of the segments that remain."""
    total = 0.0
    for plan in plans:
        numbers = range(plan.first_segment, plan.first_segment + plan.n_segments)
        rows = sum(remaining.get(number, 0) for number in numbers)
        total += plan.counts.padded_tokens * rows / plan.counts.tokens
    return total
