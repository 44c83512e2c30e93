"""Commands that rank: `topk` and `examples`."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actstore.cli.display import count_text, fields_table, print_table, token_strip
from actstore.cli.options import (
    AsJson,
    Backward,
    Count,
    Distinct,
    Layers,
    OfObjective,
    Scalar,
    ScalarFiles,
    Special,
    StorePath,
    Tokens,
    Where,
    load_scalar_files,
)
from actstore.cli.output import console, print_json, reports_errors
from actstore.cli.words import unit_numbers, window_sizes
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from actstore.query.examples import Example, Examples
    from actstore.query.explanation import Explanation
    from actstore.query.results import Answer, Certificate

__all__ = ["certificate_line", "examples", "print_examples", "print_topk", "topk"]


@reports_errors
def topk(
    store: StorePath,
    scalar: Scalar,
    layer: Layers = None,
    neuron: Annotated[
        list[int] | None,
        typer.Option("--neuron", metavar="N", help="Only this neuron; repeatable."),
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option("--head", metavar="H", help="Only this head; repeatable.")
    ] = None,
    channel: Annotated[
        list[int] | None,
        typer.Option("--channel", metavar="C", help="Only this channel; repeatable."),
    ] = None,
    latent: Annotated[
        list[int] | None,
        typer.Option("--latent", metavar="N", help="Only this latent; repeatable."),
    ] = None,
    k: Count = 20,
    where: Where = None,
    units: Annotated[
        str | None,
        typer.Option("--units", metavar="SQL", help="Predicate over neurons (heads, latents)."),
    ] = None,
    token: Tokens = None,
    per: Annotated[
        str | None,
        typer.Option(
            "--per",
            metavar="KIND",
            help="K answers for each layer, neuron, head or latent; or token, with --token or "
            "--where.",
        ),
    ] = None,
    distinct: Distinct = None,
    least: Annotated[bool, typer.Option("--least", help="The least values.")] = False,
    by: Annotated[str, typer.Option("--by", metavar="KEY", help="value or magnitude.")] = "value",
    normalise: Annotated[
        str | None,
        typer.Option("--normalise", metavar="HOW", help="Compare units by max or by std."),
    ] = None,
    combine: Annotated[
        str | None,
        typer.Option(
            "--combine", metavar="HOW", help="One score of the units named: sum, mean, max or min."
        ),
    ] = None,
    special: Special = False,
    backward: Backward = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show the plan, how the answer was found, what it covers."),
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Show the plan and its estimate; rank nothing.")
    ] = False,
) -> None:
    """Rank every value of a scalar over layers, tokens and units; exact, ties included."""
    from actstore.query.derived import parse_scalar
    from actstore.query.session import Store

    load_scalar_files(scalar_files)
    declared, named_layer = parse_scalar(scalar)
    layers = layer or None
    if named_layer is not None:
        if layers not in (None, [named_layer]):
            raise InvalidInput(
                f"{scalar} names layer {named_layer}, --layer says {layers}; give one of them.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        layers = [named_layer]
    options: dict[str, Any] = {
        "k": k,
        "layers": layers,
        "neurons": neuron or None,
        "heads": head or None,
        "channels": channel or None,
        "latents": latent or None,
        "tokens": token or None,
        "where": where,
        "units": units,
        "per": per,
        "distinct": distinct,
        "largest": not least,
        "by": by,
        "normalise": normalise,
        "combine": combine,
        "special": special,
        "pass_type": "backward" if backward else "forward",
    }
    with Store(store, objective=objective) as opened:
        planned = opened.explain(declared.name, **options) if explain or plan_only else None
        if planned is not None and plan_only:
            print_plan(console(), planned, as_json=as_json)
            return
        found = opened.topk(declared.name, **options)
        # The text is looked up while the store is open.
        answer = found.to_json() if as_json else None
        if answer is not None:
            print_json(answer | ({"plan": planned.to_json()} if planned else {}))
            return
        if planned is not None:
            print_plan(console(), planned)
        print_topk(console(), found, explain=explain)


def print_plan(shown: "Console", planned: "Explanation", *, as_json: bool = False) -> None:
    """Print how a ranking would be answered."""
    if as_json:
        print_json({"plan": planned.to_json()})
    else:
        shown.print(Text(str(planned)))


@reports_errors
def examples(
    store: StorePath,
    scalar: Scalar,
    unit: Annotated[str, typer.Argument(metavar="UNIT", help="layer:unit, or layer:head:channel.")],
    k: Count = 20,
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help="top, bottom, random or quantile.")
    ] = "top",
    distinct: Annotated[
        str,
        typer.Option("--distinct", metavar="KIND", help="One per sequence, document or none."),
    ] = "sequence",
    window: Annotated[
        str, typer.Option("--window", metavar="B,A", help="Tokens shown before and after.")
    ] = "20,10",
    where: Where = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of a random draw.")] = 0,
    special: Special = False,
    backward: Backward = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
) -> None:
    """Show contexts of one unit, the tokens shaded by its value at each."""
    from actstore.query.session import Store

    numbers, shown = unit_numbers(unit), window_sizes(window)
    if distinct not in ("sequence", "document", "none"):
        raise InvalidInput(
            f"--distinct is {distinct!r}; use sequence, document or none.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    load_scalar_files(scalar_files)
    with Store(store, objective=objective) as opened:
        found = opened.examples(
            scalar,
            numbers,
            k=k,
            kind=kind,
            distinct=None if distinct == "none" else distinct,
            window=shown,
            where=where,
            special=special,
            pass_type="backward" if backward else "forward",
            seed=seed,
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_examples(console(), found)


def print_topk(shown: "Console", found: "Answer", *, explain: bool = False) -> None:
    """Print a ranking as a table, with how it was found."""
    names = found.table.column_names
    print_table(shown, names, [list(row.values()) for row in found.rows()])
    if explain:
        shown.print(fields_table(_certificate_fields(found.certificate)))
    else:
        shown.print(Text(certificate_line(found.certificate), "dim"))


def print_examples(shown: "Console", found: "Examples", *, title: str = "") -> None:
    """Print contexts, one a line, shaded on one scale."""
    unit = ":".join(map(str, found.unit))
    heading = f"{found.certificate.scalar} {unit}, {found.kind}{f': {title}' if title else ''}"
    shown.print(Text(heading, "bold"))
    if not len(found):
        shown.print("no row that may answer")
    strongest = max((abs(v) for row in found for v in row.values if math.isfinite(v)), default=0.0)
    values = [f"{row.value:#.4g}" for row in found]
    places = [f"{row.sequence}:{row.position}" for row in found]
    value_width = max(map(len, values), default=0)
    place_width = max(map(len, places), default=0)
    for row, value, place in zip(found, values, places, strict=True):
        prefix = f"{value:>{value_width}}  {place:>{place_width}}  "
        line = Text(prefix).append(_strip(row, strongest, shown, len(prefix)))
        shown.print(line, no_wrap=True, soft_wrap=not shown.is_terminal)
    shown.print(Text(certificate_line(found.certificate), "dim"))


def _strip(row: "Example", strongest: float, shown: "Console", used: int) -> Text:
    # A file has no edge; a terminal shows what is nearest to the token in focus.
    width = max(shown.width - used, 20) if shown.is_terminal else None
    return token_strip(row.texts, row.values, row.focus, strongest=strongest, width=width)


def certificate_line(certificate: "Certificate") -> str:
    """What an answer covers, in a line."""
    covered = f"{count_text(certificate.rows)} rows of {certificate.segments} segments"
    missing = certificate.segments_planned - certificate.segments
    parts = [
        f"exact over {covered}{f' ({missing} not ingested yet)' if missing else ''}",
        f"by {certificate.plan}",
        certificate.source,
        *(
            f"{count_text(count)} rows left out ({reason})"
            for reason, count in certificate.rows_excluded.items()
            if count
        ),
    ]
    return "; ".join(parts)


def _certificate_fields(certificate: "Certificate") -> dict[str, str]:
    total = certificate.pages_read + certificate.pages_pruned
    excluded = ", ".join(
        f"{reason} {count_text(count)}" for reason, count in certificate.rows_excluded.items()
    )
    bound = "none" if certificate.bound is None else f"{certificate.bound:.6g}"
    return {
        "scalar": certificate.scalar,
        "plan": certificate.plan,
        "source": certificate.source,
        "bounded by": certificate.bounded_by,
        "pages read": f"{count_text(certificate.pages_read)} of {count_text(total)}",
        "cells scanned": count_text(certificate.cells_scanned),
        "bound at the stop": bound,
        "segments": f"{certificate.segments} of {certificate.segments_planned}",
        "rows searched": count_text(certificate.rows),
        "rows left out": excluded or "none",
    }
