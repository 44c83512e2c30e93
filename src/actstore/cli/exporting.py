"""The command `export`: answers and neuron pages as files for other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actstore.cli.display import count_text, visible
from actstore.cli.options import (
    AsJson,
    Layers,
    OfObjective,
    ScalarFiles,
    Special,
    StorePath,
    Where,
    load_scalar_files,
)
from actstore.cli.output import console, print_json, reports_errors
from actstore.cli.words import unit_numbers, window_sizes
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["export"]

_PAGES = ("neuron_viewer", "neuronpedia")


@reports_errors
def export(
    store: StorePath,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="The file; of neurons, the directory."),
    ],
    topk: Annotated[
        str | None, typer.Option("--topk", metavar="SCALAR", help="Rank this scalar.")
    ] = None,
    sql: Annotated[
        str | None, typer.Option("--sql", metavar="QUERY", help="The rows of one SELECT.")
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option("--examples", metavar="SCALAR", help="Contexts of one unit; see --unit."),
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            "--neurons",
            metavar="SCHEMA",
            help="Pages of units, as neuron_viewer or neuronpedia; see --unit and --units.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="csv, parquet, jsonl or arrow; by the file's ending if left out.",
        ),
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option("--unit", metavar="L:N", help="layer:unit; repeatable for --neurons."),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option("--units", metavar="SQL", help="Predicate over neurons (heads, latents)."),
    ] = None,
    scalar: Annotated[
        str,
        typer.Option("--scalar", metavar="SCALAR", help="Whose values the pages show."),
    ] = "mlp_post_act",
    layer: Layers = None,
    k: Annotated[
        int | None, typer.Option("-k", metavar="K", help="Number of answers, or of examples.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option("--kind", metavar="KIND", help="top, bottom, random or quantile examples."),
    ] = "top",
    window: Annotated[
        str | None,
        typer.Option("--window", metavar="B,A", help="Tokens before and after an example's own."),
    ] = None,
    where: Where = None,
    least: Annotated[bool, typer.Option("--least", help="The least values of a ranking.")] = False,
    special: Special = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of a random draw.")] = 0,
    creator: Annotated[
        str,
        typer.Option("--creator", metavar="ID", help="Neuronpedia's id of the rows' owner."),
    ] = "actstore",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
) -> None:
    """Write a ranking, a query's rows, contexts or neuron pages to files."""
    asked = {"--topk": topk, "--sql": sql, "--examples": examples, "--neurons": neurons}
    chosen = [name for name, value in asked.items() if value is not None]
    if len(chosen) != 1:
        raise _invalid(
            f"{' and '.join(chosen) or 'Nothing'} is asked for; give one of {', '.join(asked)}."
        )
    if neurons is not None and neurons not in _PAGES:
        raise _invalid(f"--neurons is {neurons!r}; use {' or '.join(_PAGES)}.")
    numbers = [unit_numbers(text) for text in unit or ()]
    shown = {} if window is None else {"window": window_sizes(window)}
    load_scalar_files(scalar_files)
    from actstore.query.session import Store

    with Store(store, objective=objective) as opened:
        if neurons is not None:
            examples_of = {} if k is None else {"top": k, "random": k}
            written = _export_pages(
                opened,
                out,
                neurons,
                _chosen_units(numbers, units),
                choice={**examples_of, **shown, "seed": seed},
                scalar=scalar,
                creator=creator,
                force=force,
            )
        else:
            count = {} if k is None else {"k": k}
            found: Any
            if topk is not None:
                found = opened.topk(
                    topk,
                    layers=layer or None,
                    units=units,
                    where=where,
                    largest=not least,
                    special=special,
                    **count,
                )
            elif examples is not None:
                if len(numbers) != 1:
                    raise _invalid(f"--examples needs one --unit layer:unit; {len(numbers)} given.")
                found = opened.examples(
                    examples,
                    numbers[0],
                    kind=kind,
                    where=where,
                    special=special,
                    seed=seed,
                    **count,
                    **shown,
                )
            else:
                found = opened.sql(str(sql))
            written = _export_table(found, out, form, force=force)
    files, count_of, noun = written
    if as_json:
        print_json({"rows": [{"file": file} for file in files], "certificate": {noun: count_of}})
    else:
        place = files[0] if len(files) == 1 else f"{len(files)} files below {out}"
        console().print(visible(f"{count_text(count_of)} {noun} -> {place}"), soft_wrap=True)


def _export_table(
    found: Any, out: Path, form: str | None, *, force: bool
) -> tuple[list[str], int, str]:
    """The files, and how much of what is in them."""
    from actstore.query.exports.tables import as_table, export_table

    table = as_table(found)
    export_table(table, out, form, force=force)
    return [str(out)], table.num_rows, "rows"


def _export_pages(
    store: "Store",
    out: Path,
    schema: str,
    units: Any,
    *,
    choice: dict[str, Any],
    scalar: str,
    creator: str,
    force: bool,
) -> tuple[list[str], int, str]:
    from actstore.query.exports.neurons import export_neurons
    from actstore.query.exports.unit_record import ExportChoice

    done = export_neurons(
        store,
        units,
        out,
        schema,
        scalar=scalar,
        choice=ExportChoice(**choice),
        creator=creator,
        force=force,
    )
    return [str(done.directory / file) for file in done.files], done.units, "units"


def _chosen_units(numbers: list[tuple[int, ...]], units: str | None) -> Any:
    if units is not None and numbers:
        raise _invalid("Both --unit and --units are given; give one of them.")
    return numbers if units is None else units


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
