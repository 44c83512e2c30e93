"""Commands that read a corpus: `estimate`, `plan` and `ingest`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actstore.cli.options import (
    Append,
    AsReport,
    BatchTokens,
    Bos,
    Columns,
    Context,
    Device,
    Dtype,
    Gradients,
    Keep,
    LimitTokens,
    Locations,
    MaxBytes,
    MaybeOut,
    MaybeSources,
    ModelName,
    ObjectiveName,
    Out,
    Quiet,
    Revision,
    SegmentRows,
    SetName,
    Shuffle,
    Sources,
    Stride,
    TextColumn,
    Worker,
)
from actstore.cli.output import console, error_console, print_json, reports_errors
from actstore.cli.progress import PhaseProgress
from actstore.cli.summaries import (
    estimate_table,
    plan_table,
    print_next,
    print_report,
    refusal,
)
from actstore.cli.words import byte_size, keep_rules, token_count, worker_share
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.ingest.estimate import Estimate
    from actstore.ingest.preparation import Corpus
    from actstore.ingest.report import IngestReport
    from actstore.ingest.settings import IngestSettings

__all__ = ["estimate", "ingest", "plan"]

ARGUMENTS = "actstore.arguments"
"""Where the root command keeps what was typed, in the context's ``meta``."""


@reports_errors
def estimate(
    model: ModelName,
    corpus: Sources,
    out: MaybeOut = None,
    locations: Locations = None,
    keep: Keep = None,
    objective: ObjectiveName = None,
    gradients: Gradients = None,
    context: Context = None,
    stride: Stride = None,
    bos: Bos = "auto",
    dtype: Dtype = "auto",
    limit_tokens: LimitTokens = None,
    max_bytes: MaxBytes = None,
    append: Append = False,
    shuffle: Shuffle = None,
    text_column: TextColumn = "text",
    columns: Columns = None,
    revision: Revision = None,
    device: Device = "auto",
    segment_rows: SegmentRows = None,
    batch_tokens: BatchTokens = None,
    as_json: AsReport = False,
    quiet: Quiet = False,
) -> None:
    """Say what an ingest would write and take; write nothing."""
    settings = _settings(
        locations=locations,
        keep=keep,
        objective=objective,
        gradients=gradients,
        context=context,
        stride=stride,
        bos=bos,
        dtype=dtype,
        limit_tokens=limit_tokens,
        max_bytes=max_bytes,
        append=append,
        shuffle=shuffle,
        segment_rows=segment_rows,
        batch_tokens=batch_tokens,
    )
    read = _corpus(corpus, text_column, columns)
    from actstore.ingest.model import load_model
    from actstore.ingest.preview import preview

    loaded = load_model(model, device=device, revision=revision)
    with PhaseProgress(quiet=quiet) as progress:
        found = preview(loaded, read, out, settings, progress)
    if as_json:
        print_json(found.estimate.to_json())
        return
    shown = console()
    shown.print(estimate_table(found.estimate))
    reason = refusal(found.estimate, settings.max_bytes)
    if reason:
        shown.print(reason)


@reports_errors
def plan(
    model: ModelName,
    corpus: Sources,
    out: MaybeOut = None,
    locations: Locations = None,
    keep: Keep = None,
    objective: ObjectiveName = None,
    gradients: Gradients = None,
    context: Context = None,
    stride: Stride = None,
    bos: Bos = "auto",
    dtype: Dtype = "auto",
    limit_tokens: LimitTokens = None,
    append: Append = False,
    shuffle: Shuffle = None,
    text_column: TextColumn = "text",
    columns: Columns = None,
    revision: Revision = None,
    device: Device = "auto",
    segment_rows: SegmentRows = None,
    batch_tokens: BatchTokens = None,
    as_json: AsReport = False,
    quiet: Quiet = False,
) -> None:
    """Say how a corpus would be cut into sequences, batches and segments; write nothing."""
    settings = _settings(
        locations=locations,
        keep=keep,
        objective=objective,
        gradients=gradients,
        context=context,
        stride=stride,
        bos=bos,
        dtype=dtype,
        limit_tokens=limit_tokens,
        append=append,
        shuffle=shuffle,
        segment_rows=segment_rows,
        batch_tokens=batch_tokens,
    )
    read = _corpus(corpus, text_column, columns)
    from actstore.ingest.model import load_model
    from actstore.ingest.preview import preview

    loaded = load_model(model, device=device, revision=revision)
    with PhaseProgress(quiet=quiet) as progress:
        found = preview(loaded, read, out, settings, progress, measure=False)
    if as_json:
        print_json(found.plan.to_json())
        return
    console().print(plan_table(found.plan))


@reports_errors
def ingest(
    typed: typer.Context,
    model: ModelName,
    out: Out,
    corpus: MaybeSources = None,
    locations: Locations = None,
    keep: Keep = None,
    objective: ObjectiveName = None,
    gradients: Gradients = None,
    context: Context = None,
    stride: Stride = None,
    bos: Bos = "auto",
    dtype: Dtype = "auto",
    limit_tokens: LimitTokens = None,
    max_bytes: MaxBytes = None,
    append: Append = False,
    shuffle: Shuffle = None,
    text_column: TextColumn = "text",
    columns: Columns = None,
    revision: Revision = None,
    device: Device = "auto",
    segment_rows: SegmentRows = None,
    batch_tokens: BatchTokens = None,
    worker: Worker = "0/1",
    set_name: SetName = "base",
    index: Annotated[
        list[str] | None,
        typer.Option(
            "--index", metavar="SCALAR", help="Index this derived scalar afterwards; repeatable."
        ),
    ] = None,
    as_json: AsReport = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over a corpus and keep its activations; run it again to resume."""
    settings = _settings(
        locations=locations,
        keep=keep,
        objective=objective,
        gradients=gradients,
        context=context,
        stride=stride,
        bos=bos,
        dtype=dtype,
        limit_tokens=limit_tokens,
        max_bytes=max_bytes,
        append=append,
        shuffle=shuffle,
        segment_rows=segment_rows,
        batch_tokens=batch_tokens,
        worker=worker_share(worker),
        set_name=set_name,
    )
    if not corpus and set_name == "base":
        raise InvalidInput(
            "No corpus given. Name files, folders or globs after the model.",
            kind=ErrorKind.EMPTY_CORPUS,
        )
    from actstore.query.derived import scalar

    for name in index or []:
        # A name that nobody knows is better refused before the model has run.
        scalar(name)
    resume = f"actstore {shlex.join(typed.meta[ARGUMENTS])}"
    try:
        read = _corpus(corpus, text_column, columns)
        from actstore.ingest.model import load_model

        loaded = load_model(model, device=device, revision=revision)
        report, expected = run_ingest(loaded, read, out, settings, quiet=quiet)
        if index and not report.interrupted:
            _build(out, index, quiet=quiet)
    except KeyboardInterrupt:
        # Before the first segment, or a second time while the last one was being written.
        _print_stop(resume, as_json=as_json)
        return
    if as_json:
        print_json(
            {
                **report.to_json(),
                "estimate": expected.to_json() if expected else None,
                "resume": resume if report.interrupted else None,
            }
        )
        return
    if not quiet:
        print_report(report)
    if report.interrupted:
        _print_stop(resume, as_json=False)
    elif not quiet:
        print_next(out, report.missing)


def _build(out: Path, index: list[str], *, quiet: bool) -> None:
    """Index derived scalars of a store that has just been ingested."""
    from actstore.query.index_building import build_indexes

    with PhaseProgress("values", quiet=quiet) as progress:
        build_indexes(out, index, progress=progress)


def run_ingest(
    loaded: Any,
    corpus: "Corpus",
    out: Path,
    settings: "IngestSettings",
    *,
    quiet: bool,
    progress: PhaseProgress | None = None,
) -> "tuple[IngestReport, Estimate | None]":
    """Ingest with the estimate printed before the first segment, and progress.

    Args:
        loaded: the model, as :func:`actstore.ingest.model.load_model` gives it.
        corpus: what to read.
        out: the store's directory.
        settings: the choices.
        quiet: print nothing on the way.
        progress: shows the phases; a new one by default.
    """
    from actstore.ingest import pipeline
    from actstore.ingest.preview import remaining_work
    from actstore.store.manifest import MANIFEST

    shown = progress or PhaseProgress(quiet=quiet)
    expected: list[Estimate] = []
    is_new = not (out / MANIFEST).exists()

    def announce(phase: str, done: int, total: int) -> None:
        # The plan is on disk by the first forward pass, and no segment is.
        if phase == "forward" and not expected:
            expected.append(remaining_work(out, settings.set_name, is_new=is_new))
            if not quiet:
                error_console().print(estimate_table(expected[0]))
        shown(phase, done, total)

    with shown:
        report = pipeline.ingest(loaded, corpus, out, settings, announce)
    return report, expected[0] if expected else None


def _print_stop(resume: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"interrupted": True, "resume": resume})
        return
    error_console().print("Stopped. What is committed is safe; this goes on where it ended:")
    print(f"  {resume}")


def _settings(
    *,
    locations: str | None,
    keep: list[str] | None,
    limit_tokens: str | None,
    max_bytes: str | None = None,
    **choices: Any,
) -> "IngestSettings":
    from actstore.ingest.settings import IngestSettings

    return IngestSettings(
        locations=locations,
        keep=keep_rules(keep or []),
        limit_tokens=token_count(limit_tokens),
        max_bytes=byte_size(max_bytes),
        **choices,
    )


def _corpus(sources: list[str] | None, text_column: str, columns: str | None) -> "Corpus":
    from actstore.ingest.corpus import open_corpus

    kept = None
    if columns is not None:
        kept = tuple(name.strip() for name in columns.split(",") if name.strip())
    # Paths, whatever they look like: a corpus typed on the command line is files.
    paths = [Path(source) for source in sources or []]
    if paths:
        # A name that matches nothing is said before torch and a model are loaded.
        open_corpus(paths, text_column=text_column, columns=kept)
    from actstore.ingest.preparation import Corpus

    return Corpus(paths or None, text_column=text_column, columns=kept)
