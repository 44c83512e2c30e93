"""Commands that list: `info`, `locations` and `scalars`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actstore.cli.display import (
    byte_text,
    count_text,
    fields_table,
    print_table,
    visible,
)
from actstore.cli.options import AsReport, ScalarFiles, StorePath, load_scalar_files
from actstore.cli.output import console, print_json, reports_errors

if TYPE_CHECKING:
    from rich.console import Console

    from actstore.query.inventory import LocationInfo, StoreInfo

__all__ = ["info", "locations", "print_info", "scalars"]


@reports_errors
def info(store: StorePath, as_json: AsReport = False) -> None:
    """Say what a store holds, also while ingest runs."""
    from actstore.query.session import Store

    with Store(store) as opened:
        found = opened.info()
    if as_json:
        print_json(found.to_json())
    else:
        print_info(console(), found)


@reports_errors
def locations(
    store: Annotated[
        Path | None,
        typer.Argument(metavar="[STORE]", help="Say where this store takes each from."),
    ] = None,
    as_json: AsReport = False,
) -> None:
    """List the places in the forward pass whose tensors can be kept."""
    from actstore.store.location_names import PRESETS
    from actstore.store.vocabulary import FORWARD_LOCATIONS

    if store is not None:
        _store_locations(store, as_json=as_json)
        return
    rows = [
        {
            "location": place.label,
            "axes": [*(["layer"] if place.has_layers else []), "token", *map(str, place.axes)],
            "presets": [name for name, members in PRESETS.items() if place in members],
            "transformer_lens": place.lens_name,
            "meaning": place.meaning,
        }
        for place in FORWARD_LOCATIONS
    ]
    if as_json:
        print_json({"rows": rows})
        return
    columns = ["location", "axes", "presets", "meaning"]
    print_table(console(), columns, [[_joined(row[name]) for name in columns] for row in rows])


@reports_errors
def scalars(
    scalar: Annotated[
        str | None, typer.Argument(metavar="[SCALAR]", help="Show the page of this one.")
    ] = None,
    scalar_files: ScalarFiles = None,
    as_json: AsReport = False,
) -> None:
    """List the derived scalars that can be computed, ranked and read, or explain one."""
    from actstore.query.derived import SCALARS, parse_scalar
    from actstore.query.derived.pages import scalar_page

    load_scalar_files(scalar_files)
    if scalar is not None and not as_json:
        page = scalar_page(parse_scalar(scalar)[0])
        # A user's own docstring is shown as any other text that is not ours.
        print("\n".join(visible(line) for line in page.splitlines()))
        return
    rows = [
        {
            "scalar": declared.name,
            "axes": [
                *(["layer"] if declared.has_layers else []),
                "token",
                *map(str, declared.axes),
            ],
            "node": declared.node_type.value,
            "dependence": type(declared.dependence).__name__.lower(),
            "definition": declared.definition,
            "origin": declared.origin,
            "meaning": declared.meaning,
        }
        for declared in (SCALARS.values() if scalar is None else [parse_scalar(scalar)[0]])
    ]
    if as_json:
        print_json({"rows": rows})
        return
    columns = ["scalar", "axes", "meaning"]
    if any(row["origin"] is not None for row in rows):
        columns.append("origin")
    print_table(console(), columns, [[_joined(row[name]) for name in columns] for row in rows])


def print_info(shown: "Console", found: "StoreInfo") -> None:
    """Print what a store holds."""
    missing = ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in found.missing
    )
    segments = f"{found.segments_committed} of {found.segments_planned} committed, "
    segments += f"{count_text(found.segment_rows)} rows each"
    gradients = ", ".join(f"{name} (set {of})" for of, name in found.objectives.items())
    shown.print(
        fields_table(
            {
                "store": f"{found.path} (id {found.id})",
                "model": f"{found.model}: {found.architecture}, {found.layers} layers",
                "tokens": f"{count_text(found.tokens)} of {count_text(found.tokens_planned)} "
                f"planned, in {count_text(found.sequences)} sequences of "
                f"{count_text(found.documents)} documents",
                "segments": f"{segments}{f'; missing {missing}' if missing else ''}",
                **({"gradients of": gradients} if gradients else {}),
            }
        )
    )
    rows = [
        [
            entry.name,
            entry.dtype,
            " x ".join(entry.axes),
            byte_text(entry.bytes),
            "" if entry.measured_error is None else f"{entry.measured_error:.1e}",
        ]
        for entry in found.locations.values()
    ]
    print_table(shown, ["stored", "dtype", "per token", "size", "self-check"], rows)
    if found.latents:
        rows = [
            [
                one.name,
                one.location,
                " ".join(map(str, one.latents)),
                " ".join(map(count_text, dict.fromkeys(one.latents.values()))),
                f"{one.segments} of {found.segments_committed}",
                byte_text(one.bytes),
            ]
            for one in found.latents.values()
        ]
        names = ["latents", "of", "layers", "per layer", "segments", "size"]
        print_table(shown, names, rows)


def _store_locations(store: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from actstore.query.session import Store

    with Store(store) as opened:
        found: list[LocationInfo] = list(opened.locations.values())
    if as_json:
        print_json({"rows": [asdict(entry) for entry in found]})
        return
    rows = [
        [
            entry.name,
            entry.kind,
            "" if entry.steps is None else str(entry.steps),
            "" if entry.inputs_error is None else f"{entry.inputs_error:.0e}",
            entry.source,
            entry.meaning,
        ]
        for entry in found
    ]
    print_table(console(), ["location", "kind", "steps", "error", "source", "meaning"], rows)


def _joined(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value
