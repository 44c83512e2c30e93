"""The command that indexes derived scalars and copies arrays by column: `index`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actstore.cli.display import byte_text, count_text, print_table
from actstore.cli.ingesting import ARGUMENTS
from actstore.cli.options import (
    AsReport,
    Backward,
    OfObjective,
    Quiet,
    ScalarFiles,
    StorePath,
    load_scalar_files,
)
from actstore.cli.output import console, error_console, print_json, reports_errors
from actstore.cli.progress import PhaseProgress
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.store.column_copies import CopiedColumns

__all__ = ["index"]


@reports_errors
def index(
    ctx: typer.Context,
    store: StorePath,
    scalars: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SCALAR]...", help="Derived scalars or locations to index."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns", metavar="LOC", help="Copy this stored array unit by unit; repeatable."
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part", metavar="PART", help="zones, histogram; what is missing by default."
        ),
    ] = None,
    backward: Backward = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsReport = False,
    quiet: Quiet = False,
) -> None:
    """Index scalars so that ranking them reads little, and keep their histograms.

    Run again, it goes on where it stopped, and completes what was ingested since.
    """
    from actstore.query.index_building import build_indexes

    if not scalars and not columns:
        raise InvalidInput(
            "Nothing to index: name scalars, such as mlp_act_times_grad, or arrays with --columns.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    load_scalar_files(scalar_files)
    pass_type = "backward" if backward else "forward"
    try:
        with PhaseProgress("values", quiet=quiet) as progress:
            built = (
                build_indexes(
                    store,
                    scalars,
                    parts=part or None,
                    pass_type=pass_type,
                    objective=objective,
                    progress=progress,
                )
                if scalars
                else []
            )
            copied = _copy(store, columns or [], pass_type, progress)
    except KeyboardInterrupt:
        _print_stop(ctx, as_json=as_json)
        return
    if as_json:
        rows_of = [*(one.to_json() for one in built), *(one.to_json() for one in copied)]
        print_json({"rows": rows_of})
        return
    rows = [
        [
            one.scalar,
            " ".join(one.parts),
            f"{one.segments} ({one.written} new)",
            count_text(one.values),
            byte_text(one.bytes),
            one.set,
        ]
        for one in built
    ] + [
        [
            one.location,
            "columns",
            f"{one.segments} ({one.written} new)",
            "",
            byte_text(one.bytes),
            one.set,
        ]
        for one in copied
    ]
    print_table(console(), ["of", "holds", "segments", "values, new", "written", "set"], rows)


def _copy(
    store: Path, locations: list[str], pass_type: str, progress: PhaseProgress
) -> "list[CopiedColumns]":
    if not locations:
        return []
    from actstore.store.column_copies import copy_columns

    return [
        copy_columns(store, location, pass_type=pass_type, progress=progress)
        for location in locations
    ]


def _print_stop(ctx: typer.Context, *, as_json: bool) -> None:
    resume = f"actstore {shlex.join(ctx.meta[ARGUMENTS])}"
    if as_json:
        print_json({"interrupted": True, "resume": resume})
        return
    error_console().print("Stopped. What is committed is safe; this goes on where it ended:")
    print(f"  {resume}")
