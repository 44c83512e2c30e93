"""Arguments and options that several commands share, with their help."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Append",
    "AsJson",
    "AsReport",
    "Backward",
    "BatchTokens",
    "Bos",
    "Columns",
    "Context",
    "Count",
    "Device",
    "Distinct",
    "Dtype",
    "Gradients",
    "Keep",
    "Layers",
    "LimitTokens",
    "Locations",
    "MaxBytes",
    "MaybeOut",
    "MaybeSources",
    "ModelName",
    "ObjectiveName",
    "OfObjective",
    "Out",
    "Quiet",
    "Revision",
    "Scalar",
    "ScalarFiles",
    "SegmentRows",
    "SetName",
    "Shuffle",
    "Sources",
    "Special",
    "StorePath",
    "Stride",
    "TextColumn",
    "Tokens",
    "Units",
    "Where",
    "Worker",
    "load_scalar_files",
]

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: rows and certificate.")]

Scalar = Annotated[
    str,
    typer.Argument(metavar="SCALAR", help="A derived scalar or a location: `actstore scalars`."),
]
ScalarFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--scalars",
        metavar="FILE.py",
        envvar="ACTSTORE_SCALARS",
        help="Your own Python file that declares scalars, which is run; repeatable.",
    ),
]
Layers = Annotated[
    list[int] | None, typer.Option("--layer", metavar="L", help="Only this layer; repeatable.")
]
Count = Annotated[int, typer.Option("-k", metavar="K", help="Number of answers.")]
Where = Annotated[
    str | None,
    typer.Option("--where", metavar="SQL", help="Predicate over tokens, sequences and documents."),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option("--token", metavar="N", help="Only this token (a global row); repeatable."),
]
Units = Annotated[
    str | None,
    typer.Option("--units", metavar="SQL", help="Predicate over neurons (heads, latents)."),
]
Backward = Annotated[
    bool,
    typer.Option(
        "--backward", help="The gradient of the store's objective with respect to the scalar."
    ),
]
OfObjective = Annotated[
    str | None,
    typer.Option("--objective", metavar="NAME", help="Whose gradients, where several are stored."),
]
Special = Annotated[
    bool, typer.Option("--special", help="Let position 0 and special tokens answer too.")
]
Distinct = Annotated[
    str | None,
    typer.Option("--distinct", metavar="KIND", help="One answer per sequence or document."),
]

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or `demo` (the shipped model).")
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="CORPUS", help="Files, folders or globs: text, JSONL or Parquet."),
]
MaybeSources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CORPUS",
        help="Files, folders or globs: text, JSONL or Parquet. With --set, the store's own.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The store's directory.")]
MaybeOut = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="The store's directory; what it has is left out."
    ),
]
Locations = Annotated[
    str | None,
    typer.Option(
        "--locations",
        metavar="NAMES",
        help="A preset (minimal, neurons, attention, full) and locations, separated by commas, or "
        "none; neurons by default, none with --set and --objective.",
    ),
]
ObjectiveName = Annotated[
    str | None,
    typer.Option(
        "--objective",
        metavar="NAME",
        help="Keep gradients of this: next_token_log_prob, logit_diff(TARGET, DISTRACTOR), "
        "logit_minus_mean(TARGET), probabilities(TARGET); targets are token ids or columns.",
    ),
]
Gradients = Annotated[
    str | None,
    typer.Option(
        "--gradients",
        metavar="NAMES",
        help="Locations whose gradients are kept; by default those that all others follow from.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="LOC=raw|none", help="Add or leave out one location."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Tokens of a sequence; the model's own limit."),
]
Stride = Annotated[
    int | None,
    typer.Option(
        "--stride", metavar="N", help="Tokens between the starts of sequences; no overlap."
    ),
]
Bos = Annotated[
    str,
    typer.Option("--bos", metavar="POLICY", help="auto, document, sequence or none."),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="RULE", help="auto or a dtype for all, with loc=dtype exceptions."
    ),
]
LimitTokens = Annotated[
    str | None,
    typer.Option("--limit-tokens", metavar="N", help="Stop at so many tokens: 100k, 2M."),
]
MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help="Refuse to write more: 500MB, 10GB."),
]
Append = Annotated[
    bool, typer.Option("--append", help="Add this corpus to a store that holds another.")
]
Shuffle = Annotated[
    int | None,
    typer.Option("--shuffle", metavar="SEED", help="Permute the sequences; the corpus' order."),
]
TextColumn = Annotated[
    str, typer.Option("--text-column", metavar="NAME", help="Where tables have their text.")
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="NAMES", help="Columns to keep per document; all of them."),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda:1 …")]
SegmentRows = Annotated[
    int | None,
    typer.Option("--segment-rows", metavar="N", help="Rows of a segment; a multiple of 512."),
]
BatchTokens = Annotated[
    int | None,
    typer.Option("--batch-tokens", metavar="N", help="Padded tokens of one forward pass."),
]
SetName = Annotated[
    str,
    typer.Option(
        "--set",
        metavar="NAME",
        help="Add locations or gradients to a store, as a set of this name.",
    ),
]
Worker = Annotated[
    str,
    typer.Option("--worker", metavar="I/N", help="This is worker I of N on the same store."),
]
AsReport = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]


def load_scalar_files(files: list[Path] | None) -> None:
    """Run the files of ``--scalars``, so that their scalars are known by name.

    Raises:
        InvalidInput: a file is not there, raises, or declares nothing.
    """
    if files:
        from actstore.query.derived.loading import load_scalars

        for file in files:
            load_scalars(file)
