"""Deciding an ingest: config, plan, dtypes and arrays, before anything is captured."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from actstore.ingest.corpus import open_corpus
from actstore.ingest.estimate import array_bytes, require_space, zone_bytes
from actstore.ingest.model import LoadedModel
from actstore.ingest.set_records import require_same_objective, set_record_of
from actstore.ingest.settings import IngestSettings, Progress, segment_rows_for
from actstore.ingest.targets import DocumentTargets
from actstore.ingest.tokenization import resolve_bos, special_token_ids, tokenize
from actstore.store.blobs import TEMPORARY_MARK, LocalBlobs
from actstore.store.commits import read_commits
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.layout import ArraySpec
from actstore.store.manifest import (
    MANIFEST,
    SetRecord,
    StoreManifest,
    read_manifest,
    read_sets,
    replaced_arrays,
)
from actstore.store.plan import Plan, PlanConfig, load_plans
from actstore.store.plan_publication import Approval
from actstore.store.planning import PlanOutcome, build_plan
from actstore.store.publishing import BASE_SET

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Corpus", "PlannedIngest", "plan_ingest"]

_CPU_BATCH_TOKENS = 4096
_ACCELERATOR_BATCH_TOKENS = 65536


@dataclass(frozen=True)
class Corpus:
    """What to read, as the caller named it.

    Attributes:
        source: paths or globs, or an iterable of strings, dicts or token-id lists.
        text_column: where the text is in tables and dicts.
        columns: the caller's columns to keep; all by default.
    """

    source: Any
    text_column: str = "text"
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PlannedIngest:
    """An ingest that is decided and has not begun.

    Attributes:
        manifest: what ``store.json`` says or will say (without files).
        outcome: the plans, and what of the corpus was dropped.
        set_record: the arrays.
        arrays: those of the set that are written: all but what another set replaces.
        is_new: whether the store has no ``store.json`` yet.
        remaining: segment -> filled rows, of the segments not committed.
    """

    loaded: LoadedModel
    settings: IngestSettings
    blobs: LocalBlobs
    manifest: StoreManifest
    outcome: PlanOutcome
    set_record: SetRecord
    arrays: tuple[ArraySpec, ...]
    is_new: bool
    remaining: dict[int, int] = field(default_factory=dict)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans of the store."""
        return self.outcome.plans


def plan_ingest(
    loaded: LoadedModel,
    corpus: Corpus,
    out: str | Path,
    settings: IngestSettings,
    progress: Progress | None = None,
    *,
    needs_room: bool = True,
) -> PlannedIngest:
    """Decide everything that an ingest needs; writes the plan and nothing else.

    What dead writers left is swept first. A plan is published only when there is room for
    what it asks for, so a refused ingest takes nothing from workers that share its plan.

    Args:
        loaded: the model.
        corpus: what to read.
        out: the store's directory.
        settings: locations, context, dtype and the rest.
        progress: told how far the planning is.
        needs_room: refuse what does not fit; an estimate only asks.

    Raises:
        StoreConflict: the path holds a store of another model, config or corpus.
        InvalidInput: the corpus or a setting cannot be used.
        IngestStopped: what remains to be written does not fit.
    """
    settings = settings.for_model(loaded.architecture.taps)
    blobs = LocalBlobs(out)
    existing = read_manifest(blobs) if blobs.exists(MANIFEST) else None
    if existing is None:
        _require_free(blobs)
    if existing is None and settings.set_name != BASE_SET:
        raise InvalidInput(
            f"{out} is not a store yet, and set {settings.set_name!r} is an addition to one. "
            "Ingest the base set first.",
            kind=ErrorKind.NOT_A_STORE,
        )
    config = _plan_config(loaded, settings, existing)
    manifest = _manifest(loaded, settings, config, existing)
    if existing is not None:
        require_same_objective(existing, settings, out)
        existing.require_same(manifest, out)
        manifest = existing
    blobs.sweep()
    works: list[_Work] = []

    def decide(plans: Sequence[Plan]) -> None:
        works.append(_work(loaded, settings, blobs, plans))
        if needs_room and works[-1].remaining:
            require_space(works[-1].size, blobs.root, settings.max_bytes)

    plans = load_plans(blobs.root)
    outcome = _planned_corpus(
        loaded, corpus, settings, blobs, config, plans, progress, lambda new: decide([*plans, new])
    )
    if outcome.created is None:
        decide(outcome.plans)
    work = works[-1]
    return PlannedIngest(
        loaded=loaded,
        settings=settings,
        blobs=blobs,
        manifest=manifest,
        outcome=outcome,
        set_record=work.set_record,
        arrays=work.arrays,
        is_new=existing is None,
        remaining=work.remaining,
    )


@dataclass(frozen=True)
class _Work:
    """What some plans ask for: the arrays of the set, over segments not committed."""

    set_record: SetRecord
    arrays: tuple[ArraySpec, ...]
    remaining: dict[int, int]

    @property
    def size(self) -> int:
        """Bytes of the shards and zone files still to be written."""
        rows = list(self.remaining.values())
        return sum(array_bytes(spec, rows) + zone_bytes(spec, rows) for spec in self.arrays)


def _work(
    loaded: LoadedModel, settings: IngestSettings, blobs: LocalBlobs, plans: Sequence[Plan]
) -> _Work:
    objective = settings.chosen_objective
    if objective is not None:
        vocabulary = loaded.dimensions.vocabulary_size
        DocumentTargets(objective, plans, loaded.tokenizer, vocabulary).check()
    sets = read_sets(blobs, plans[0].config.segment_rows)
    set_record = set_record_of(loaded, settings, blobs, plans[0], sets)
    replaced = replaced_arrays(sets)
    committed = read_commits(blobs, set_record.name)
    return _Work(
        set_record=set_record,
        arrays=tuple(spec for spec in set_record.arrays if spec.key not in replaced),
        remaining={
            number: int(rows)
            for plan in plans
            for number, rows in enumerate(plan.filled_rows(), plan.first_segment)
            if number not in committed
        },
    )


def _require_free(blobs: LocalBlobs) -> None:
    """A new store goes into an empty directory, or one where this very ingest began."""
    for key in blobs.listing():
        is_ours = key.split("/")[0] in ("plan", "model", "locks") or TEMPORARY_MARK in key
        # Another worker may have made the store since it was looked for.
        if not is_ours and not blobs.exists(MANIFEST):
            raise InvalidInput(
                f"{blobs.root} is not empty and not a store: it has {key}. Choose another --out.",
                kind=ErrorKind.NOT_A_STORE,
            )


def _plan_config(
    loaded: LoadedModel, settings: IngestSettings, existing: StoreManifest | None
) -> PlanConfig:
    """The plan's settings; what the caller left open follows the store, if there is one."""
    stored: Mapping[str, Any] = existing.config if existing is not None else {}
    longest = loaded.dimensions.n_positions
    context = settings.context or int(stored.get("context", longest))
    if context > longest:
        raise InvalidInput(
            f"context is {context}; {loaded.name} reads at most {longest} tokens.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    accelerated = loaded.device.type != "cpu"
    value_bytes = 4 if settings.dtype_rules[0] == "float32" else 2
    sizes = [(place, value_bytes) for place in settings.chosen]
    per_token = sum(
        size
        * (loaded.dimensions.n_layers if place.has_layers else 1)
        * math.prod(loaded.dimensions.unit_shape(place, context))
        for place, size in [*sizes, *((place, 4) for place in settings.chosen_gradients)]
    )
    rows = settings.segment_rows or stored.get("segment_rows")
    policy = settings.bos if settings.bos != "auto" or not stored else str(stored["bos"])
    bos, bos_token_id = resolve_bos(policy, loaded.tokenizer)
    vocabulary_size = loaded.dimensions.vocabulary_size
    batch = _ACCELERATOR_BATCH_TOKENS if accelerated else _CPU_BATCH_TOKENS
    return PlanConfig(
        vocabulary_size=vocabulary_size,
        context=context,
        stride=settings.stride
        or (int(stored["stride"]) if context == stored.get("context") else 0),
        bos=bos,
        bos_token_id=bos_token_id,
        special_token_ids=special_token_ids(loaded.tokenizer, vocabulary_size),
        segment_rows=segment_rows_for(
            replace(settings, segment_rows=rows), context, per_token, accelerated
        ),
        batch_tokens=settings.batch_tokens or int(stored.get("batch_tokens", batch)),
        limit_tokens=settings.limit_tokens,
        shuffle=settings.shuffle,
    )


def _planned_corpus(
    loaded: LoadedModel,
    corpus: Corpus,
    settings: IngestSettings,
    blobs: LocalBlobs,
    config: PlanConfig,
    plans: list[Plan],
    progress: Progress | None,
    approve: Approval,
) -> PlanOutcome:
    """The plans of the corpus; a further set may leave the corpus to the store's own plans."""
    if corpus.source is None and plans and settings.set_name != BASE_SET:
        counts = [plan.counts for plan in plans]
        return PlanOutcome(
            plans=tuple(plans),
            created=None,
            documents=sum(count.documents for count in counts),
            sequences=sum(count.sequences for count in counts),
            tokens=sum(count.tokens for count in counts),
            dropped={},
            limited=False,
        )
    documents = tokenize(
        open_corpus(corpus.source, text_column=corpus.text_column, columns=corpus.columns),
        loaded.tokenizer,
        vocabulary_size=config.vocabulary_size,
    )
    return build_plan(
        blobs,
        config,
        documents,
        plans,
        append=settings.append,
        progress=_planning(progress),
        approve=approve,
    )


def _manifest(
    loaded: LoadedModel,
    settings: IngestSettings,
    config: PlanConfig,
    existing: StoreManifest | None,
) -> StoreManifest:
    is_addition = existing is not None and settings.set_name != BASE_SET
    objective = settings.chosen_objective
    return StoreManifest(
        model={
            "name": loaded.name,
            "revision": loaded.revision,
            "architecture": loaded.architecture.name,
            "dimensions": loaded.dimensions.record(),
            "fingerprint": loaded.fingerprint,
            "run_dtype": str(loaded.dtype).removeprefix("torch."),
        },
        tokenizer={
            "vocabulary_size": config.vocabulary_size,
            "bos_token_id": config.bos_token_id,
            "special_token_ids": list(config.special_token_ids),
        },
        config={
            "context": config.context,
            "stride": config.stride,
            "bos": config.bos,
            "segment_rows": config.segment_rows,
            "batch_tokens": config.batch_tokens,
            "dtype": existing.config["dtype"] if existing and is_addition else settings.dtype,
            "objective": existing.config["objective"]
            if existing and is_addition
            else (objective.name if objective else None),
        },
        environment={
            "device": str(loaded.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


def _planning(progress: Progress | None) -> Any:
    if progress is None:
        return None
    return lambda documents, tokens: progress("plan", tokens, 0)
