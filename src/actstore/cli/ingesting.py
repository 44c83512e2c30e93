"""Commands that read a corpus: `estimate`, `plan` and `ingest`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actstore.cli.display import byte_text, count_text, data_table, duration_text, fields_table
from actstore.cli.output import console, error_console, print_json, reports_errors
from actstore.cli.progress import PhaseProgress
from actstore.cli.words import byte_size, keep_rules, token_count, worker_share

if TYPE_CHECKING:
    from actstore.ingest.estimate import Estimate
    from actstore.ingest.pipeline import Corpus
    from actstore.ingest.preview import PlanSummary
    from actstore.ingest.report import IngestReport
    from actstore.ingest.settings import IngestSettings

__all__ = ["estimate", "ingest", "plan"]

ARGUMENTS = "actstore.arguments"
"""Where the root command keeps what was typed, in the context's ``meta``."""

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or `demo` (the shipped model).")
]
_Sources = Annotated[
    list[str],
    typer.Argument(metavar="CORPUS", help="Files, folders or globs: text, JSONL or Parquet."),
]
_Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The store's directory.")]
_MaybeOut = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="The store's directory; what it has is left out."
    ),
]
_Locations = Annotated[
    str,
    typer.Option(
        "--locations",
        metavar="NAMES",
        help="A preset (minimal, neurons, attention, full) and locations, separated by commas.",
    ),
]
_Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="LOC=raw|none", help="Add or leave out one location."),
]
_Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Tokens of a sequence; the model's own limit."),
]
_Stride = Annotated[
    int | None,
    typer.Option(
        "--stride", metavar="N", help="Tokens between the starts of sequences; no overlap."
    ),
]
_Bos = Annotated[
    str,
    typer.Option("--bos", metavar="POLICY", help="auto, document, sequence or none."),
]
_Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="RULE", help="auto or a dtype for all, with loc=dtype exceptions."
    ),
]
_LimitTokens = Annotated[
    str | None,
    typer.Option("--limit-tokens", metavar="N", help="Stop at so many tokens: 100k, 2M."),
]
_MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help="Refuse to write more: 500MB, 10GB."),
]
_Append = Annotated[
    bool, typer.Option("--append", help="Add this corpus to a store that holds another.")
]
_Shuffle = Annotated[
    int | None,
    typer.Option("--shuffle", metavar="SEED", help="Permute the sequences; the corpus' order."),
]
_TextColumn = Annotated[
    str, typer.Option("--text-column", metavar="NAME", help="Where tables have their text.")
]
_Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="NAMES", help="Columns to keep per document; all of them."),
]
_Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
]
_Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda:1 …")]
_SegmentRows = Annotated[
    int | None,
    typer.Option("--segment-rows", metavar="N", help="Rows of a segment; a multiple of 512."),
]
_BatchTokens = Annotated[
    int | None,
    typer.Option("--batch-tokens", metavar="N", help="Padded tokens of one forward pass."),
]
_Worker = Annotated[
    str,
    typer.Option("--worker", metavar="I/N", help="This is worker I of N on the same store."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]


@reports_errors
def estimate(
    model: _Model,
    corpus: _Sources,
    out: _MaybeOut = None,
    locations: _Locations = "neurons",
    keep: _Keep = None,
    context: _Context = None,
    stride: _Stride = None,
    bos: _Bos = "auto",
    dtype: _Dtype = "auto",
    limit_tokens: _LimitTokens = None,
    max_bytes: _MaxBytes = None,
    append: _Append = False,
    shuffle: _Shuffle = None,
    text_column: _TextColumn = "text",
    columns: _Columns = None,
    revision: _Revision = None,
    device: _Device = "auto",
    segment_rows: _SegmentRows = None,
    batch_tokens: _BatchTokens = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Say what an ingest would write and take; write nothing."""
    settings = _settings(
        locations=locations,
        keep=keep,
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
    refusal = _refusal(found.estimate, settings.max_bytes)
    if refusal:
        shown.print(refusal)


@reports_errors
def plan(
    model: _Model,
    corpus: _Sources,
    out: _MaybeOut = None,
    locations: _Locations = "neurons",
    keep: _Keep = None,
    context: _Context = None,
    stride: _Stride = None,
    bos: _Bos = "auto",
    dtype: _Dtype = "auto",
    limit_tokens: _LimitTokens = None,
    append: _Append = False,
    shuffle: _Shuffle = None,
    text_column: _TextColumn = "text",
    columns: _Columns = None,
    revision: _Revision = None,
    device: _Device = "auto",
    segment_rows: _SegmentRows = None,
    batch_tokens: _BatchTokens = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Say how a corpus would be cut into sequences, batches and segments; write nothing."""
    settings = _settings(
        locations=locations,
        keep=keep,
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
    console().print(_plan_table(found.plan))


@reports_errors
def ingest(
    typed: typer.Context,
    model: _Model,
    corpus: _Sources,
    out: _Out,
    locations: _Locations = "neurons",
    keep: _Keep = None,
    context: _Context = None,
    stride: _Stride = None,
    bos: _Bos = "auto",
    dtype: _Dtype = "auto",
    limit_tokens: _LimitTokens = None,
    max_bytes: _MaxBytes = None,
    append: _Append = False,
    shuffle: _Shuffle = None,
    text_column: _TextColumn = "text",
    columns: _Columns = None,
    revision: _Revision = None,
    device: _Device = "auto",
    segment_rows: _SegmentRows = None,
    batch_tokens: _BatchTokens = None,
    worker: _Worker = "0/1",
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Run a model over a corpus and keep its activations; run it again to resume."""
    settings = _settings(
        locations=locations,
        keep=keep,
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
    )
    resume = f"actstore {shlex.join(typed.meta[ARGUMENTS])}"
    try:
        read = _corpus(corpus, text_column, columns)
        from actstore.ingest.model import load_model

        loaded = load_model(model, device=device, revision=revision)
        report, expected = run_ingest(loaded, read, out, settings, quiet=quiet)
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
            expected.append(remaining_work(out, is_new=is_new))
            if not quiet:
                error_console().print(estimate_table(expected[0]))
        shown(phase, done, total)

    with shown:
        report = pipeline.ingest(loaded, corpus, out, settings, announce)
    return report, expected[0] if expected else None


def estimate_table(found: "Estimate") -> Any:
    """An estimate as names and values."""
    sizes = sorted(found.bytes_by_array.items(), key=lambda item: -item[1])
    parts = [f"{name.removesuffix('/forward')} {byte_text(size)}" for name, size in sizes]
    parts.append(f"index, catalog and model {byte_text(found.zone_bytes + found.other_bytes)}")
    fields = {
        "to ingest": f"{count_text(found.tokens)} tokens in {count_text(found.sequences)} "
        f"sequences of {count_text(found.documents)} documents; {found.segments} segments",
        "to write": f"{byte_text(found.total_bytes)} in {count_text(found.files)} files",
        "of these": ", ".join(parts),
        "free": byte_text(found.free_bytes),
    }
    if found.seconds is not None and found.rerun_seconds is not None:
        fields["time"] = f"about {duration_text(found.seconds)}"
        fields["without a store"] = (
            f"about {duration_text(found.rerun_seconds)} of forward passes for every question"
        )
    return fields_table(fields)


def print_report(report: "IngestReport") -> None:
    """Print what an ingest did."""
    shown = console()
    dropped = ", ".join(
        f"{count_text(count)} documents dropped ({reason})"
        for reason, count in report.dropped.items()
    )
    fields = {
        "stored": f"{count_text(report.stored)} of {count_text(report.planned)} tokens; "
        f"{count_text(report.missing)} missing; {dropped or 'no document dropped'}",
        "segments": f"{report.committed} of {report.segments} committed, {report.written} by "
        "this run",
    }
    if report.tokens_per_second is not None:
        fields["took"] = (
            f"{duration_text(report.seconds)}, {count_text(round(report.tokens_per_second))} "
            "tokens/s from forward pass to commit"
        )
        fields["wrote"] = byte_text(report.bytes_written)
    fields["peak memory"] = byte_text(report.peak_memory)
    shown.print(fields_table(fields))
    if report.errors:
        rows = [(location, f"{error:.2e}") for location, error in report.errors.items()]
        shown.print(data_table(["self-check", "largest error of a row, relative"], rows))


def print_next(out: Path, missing: int) -> None:
    """Print what to try on a store."""
    folder = shlex.quote(str(out))
    lines = [
        f"actstore info {folder}",
        f"actstore topk {folder} mlp_write_norm -k 10",
        f"actstore examples {folder} mlp_post_act 0:0",
        f'actstore sql {folder} "FROM neurons ORDER BY kurtosis DESC LIMIT 10"',
    ]
    if missing:
        lines.insert(0, f"actstore verify {folder}")
    console().print("next:")
    for line in lines:
        console().print(f"  {line}", soft_wrap=True)


def _print_stop(resume: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"interrupted": True, "resume": resume})
        return
    error_console().print("Stopped. What is committed is safe; this goes on where it ended:")
    print(f"  {resume}")


def _settings(
    *,
    locations: str,
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


def _corpus(sources: list[str], text_column: str, columns: str | None) -> "Corpus":
    from actstore.ingest.corpus import open_corpus

    kept = None
    if columns is not None:
        kept = tuple(name.strip() for name in columns.split(",") if name.strip())
    # Paths, whatever they look like: a corpus typed on the command line is files.
    paths = [Path(source) for source in sources]
    # A name that matches nothing is said before torch and a model are loaded.
    open_corpus(paths, text_column=text_column, columns=kept)
    from actstore.ingest.pipeline import Corpus

    return Corpus(paths, text_column=text_column, columns=kept)


def _plan_table(found: "PlanSummary") -> Any:
    dropped = ", ".join(f"{reason}: {count_text(n)}" for reason, n in found.dropped.items())
    config = found.config
    return fields_table(
        {
            "documents": f"{count_text(found.documents)}"
            f"{f' (dropped {dropped})' if dropped else ''}",
            "sequences": f"{count_text(found.sequences)} of up to {config['context']} tokens, "
            f"stride {config['stride']}, bos {config['bos']}",
            "tokens": f"{count_text(found.tokens)}{' (limited)' if found.limited else ''}",
            "batches": f"{count_text(found.batches)} of up to "
            f"{count_text(config['batch_tokens'])} tokens; {found.padding_share:.1%} padding",
            "segments": f"{count_text(found.segments)} of {count_text(config['segment_rows'])} "
            f"rows; {count_text(found.segments_committed)} committed already",
            "arrays": ", ".join(f"{key} {dtype}" for key, dtype in found.arrays.items()),
        }
    )


def _refusal(found: "Estimate", max_bytes: int | None) -> str:
    """Why ingest would refuse to write this much, or nothing."""
    if max_bytes is not None and found.total_bytes > max_bytes:
        return f"Ingest would refuse: more than --max-bytes {byte_text(max_bytes)}."
    if found.total_bytes > 0.8 * found.free_bytes:
        return "Ingest would refuse: more than 80 % of the free space."
    return ""
