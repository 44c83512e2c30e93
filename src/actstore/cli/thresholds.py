"""Commands about values beyond a threshold, `filter` and `count`, and the command `compare`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actstore.cli.display import count_text, print_table
from actstore.cli.options import (
    AsJson,
    Backward,
    Count,
    Layers,
    OfObjective,
    Scalar,
    ScalarFiles,
    Special,
    StorePath,
    Tokens,
    Units,
    Where,
    load_scalar_files,
)
from actstore.cli.output import console, print_json, reports_errors
from actstore.cli.querying import certificate_line, print_topk

if TYPE_CHECKING:
    from actstore.query.columnar import Columnar

__all__ = ["compare", "count", "filter_"]

Above = Annotated[
    float | None, typer.Option("--above", metavar="X", help="Values greater than this.")
]
Below = Annotated[float | None, typer.Option("--below", metavar="X", help="Values less than this.")]
Neurons = Annotated[
    list[int] | None, typer.Option("--neuron", metavar="N", help="Only this neuron; repeatable.")
]
Heads = Annotated[
    list[int] | None, typer.Option("--head", metavar="H", help="Only this head; repeatable.")
]
Latents = Annotated[
    list[int] | None, typer.Option("--latent", metavar="N", help="Only this latent; repeatable.")
]


@reports_errors
def filter_(
    store: StorePath,
    scalar: Scalar,
    above: Above = None,
    below: Below = None,
    layer: Layers = None,
    neuron: Neurons = None,
    head: Heads = None,
    latent: Latents = None,
    units: Units = None,
    token: Tokens = None,
    where: Where = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="Refuse to print more values than this.")
    ] = 10_000,
    special: Special = False,
    backward: Backward = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
) -> None:
    """List every value beyond a threshold, with its place."""
    from actstore.query.session import Store

    load_scalar_files(scalar_files)
    options = _options(above, below, layer, neuron, head, latent, units, token, where)
    with Store(store, objective=objective) as opened:
        found = opened.filter(
            scalar,
            limit=limit,
            special=special,
            pass_type="backward" if backward else "forward",
            **options,
        )
        if as_json:
            print_json(found.to_json())
        else:
            print_topk(console(), found)


@reports_errors
def count(
    store: StorePath,
    scalar: Scalar,
    above: Above = None,
    below: Below = None,
    layer: Layers = None,
    neuron: Neurons = None,
    head: Heads = None,
    latent: Latents = None,
    units: Units = None,
    token: Tokens = None,
    where: Where = None,
    special: Special = False,
    backward: Backward = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
) -> None:
    """Count each unit's values beyond a threshold."""
    from actstore.query.session import Store

    load_scalar_files(scalar_files)
    options = _options(above, below, layer, neuron, head, latent, units, token, where)
    with Store(store, objective=objective) as opened:
        found = opened.count(
            scalar,
            special=special,
            pass_type="backward" if backward else "forward",
            **options,
        )
    if as_json:
        print_json(found.to_json())
        return
    _print_rows(found)
    line = f"{count_text(found.total)} values; {certificate_line(found.certificate)}"
    console().print(Text(line, "dim"))


@reports_errors
def compare(
    store: StorePath,
    scalars: Annotated[
        list[str], typer.Argument(metavar="SCALAR SCALAR...", help="Scalars of the same units.")
    ],
    k: Count = 20,
    layer: Layers = None,
    neuron: Neurons = None,
    head: Heads = None,
    units: Units = None,
    token: Tokens = None,
    where: Where = None,
    special: Special = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
) -> None:
    """Show the best places of several scalars, with the values of all of them there."""
    from actstore.query.session import Store

    load_scalar_files(scalar_files)
    options = _options(None, None, layer, neuron, head, None, units, token, where)
    chosen = {name: value for name, value in options.items() if name not in ("above", "below")}
    with Store(store, objective=objective) as opened:
        found = opened.compare(scalars, k=k, special=special, **chosen)
    if as_json:
        print_json(found.to_json())
        return
    _print_rows(found)
    for name, certificate in found.certificates.items():
        console().print(Text(f"{name}: {certificate_line(certificate)}", "dim"))


def _options(
    above: float | None,
    below: float | None,
    layer: list[int] | None,
    neuron: list[int] | None,
    head: list[int] | None,
    latent: list[int] | None,
    units: str | None,
    token: list[int] | None,
    where: str | None,
) -> dict[str, Any]:
    return {
        "above": above,
        "below": below,
        "layers": layer or None,
        "neurons": neuron or None,
        "heads": head or None,
        "latents": latent or None,
        "units": units,
        "tokens": token or None,
        "where": where,
    }


def _print_rows(found: "Columnar") -> None:
    table = found.to_arrow()
    print_table(console(), table.column_names, [list(row.values()) for row in table.to_pylist()])
