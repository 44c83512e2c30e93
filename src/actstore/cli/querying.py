"""Commands that ask a store: `topk`, `examples`, `derive` and `sql`."""

import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actstore.cli.display import count_text, data_table, fields_table, token_strip, visible
from actstore.cli.output import console, error_console, print_json, reports_errors
from actstore.cli.words import unit_numbers, window_sizes
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from actstore.query.examples import Example, Examples
    from actstore.query.results import Certificate, TopK
    from actstore.query.tensors import LabelledTensor

__all__ = ["derive", "examples", "print_examples", "print_topk", "sql", "topk"]

_JSON_VALUES = 5_000_000
"""Values that `derive --json` prints at most; a file holds any number."""

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: rows and certificate.")]

_Scalar = Annotated[
    str,
    typer.Argument(metavar="SCALAR", help="A derived scalar or a location: `actstore scalars`."),
]
_Layers = Annotated[
    list[int] | None, typer.Option("--layer", metavar="L", help="Only this layer; repeatable.")
]
_K = Annotated[int, typer.Option("-k", metavar="K", help="Number of answers.")]
_Where = Annotated[
    str | None,
    typer.Option("--where", metavar="SQL", help="Predicate over tokens, sequences and documents."),
]
_Special = Annotated[
    bool, typer.Option("--special", help="Let position 0 and special tokens answer too.")
]
_Distinct = Annotated[
    str | None,
    typer.Option("--distinct", metavar="KIND", help="One answer per sequence or document."),
]


class SqlFormat(StrEnum):
    """How the rows of a SQL query are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


@reports_errors
def topk(
    store: StorePath,
    scalar: _Scalar,
    layer: _Layers = None,
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
    k: _K = 20,
    where: _Where = None,
    units: Annotated[
        str | None,
        typer.Option("--units", metavar="SQL", help="Predicate over neurons (or heads)."),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option("--per", metavar="KIND", help="K answers for each layer, neuron or head."),
    ] = None,
    distinct: _Distinct = None,
    least: Annotated[bool, typer.Option("--least", help="The least values.")] = False,
    by: Annotated[str, typer.Option("--by", metavar="KEY", help="value or magnitude.")] = "value",
    special: _Special = False,
    as_json: AsJson = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how the answer was found and what it covers.")
    ] = False,
) -> None:
    """Rank every value of a scalar over layers, tokens and units; exact, ties included."""
    from actstore.query.derived import parse_scalar
    from actstore.query.session import Store

    declared, named_layer = parse_scalar(scalar)
    layers = layer or None
    if named_layer is not None:
        if layers not in (None, [named_layer]):
            raise InvalidInput(
                f"{scalar} names layer {named_layer}, --layer says {layers}; give one of them.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        layers = [named_layer]
    with Store(store) as opened:
        found = opened.topk(
            declared.name,
            k=k,
            layers=layers,
            neurons=neuron or None,
            heads=head or None,
            channels=channel or None,
            where=where,
            units=units,
            per=per,
            distinct=distinct,
            largest=not least,
            by=by,
            special=special,
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_topk(console(), found, explain=explain)


@reports_errors
def examples(
    store: StorePath,
    scalar: _Scalar,
    unit: Annotated[str, typer.Argument(metavar="UNIT", help="layer:unit, or layer:head:channel.")],
    k: _K = 20,
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
    where: _Where = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of a random draw.")] = 0,
    special: _Special = False,
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
    with Store(store) as opened:
        found = opened.examples(
            scalar,
            numbers,
            k=k,
            kind=kind,
            distinct=None if distinct == "none" else distinct,
            window=shown,
            where=where,
            special=special,
            seed=seed,
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_examples(console(), found)


@reports_errors
def derive(
    store: StorePath,
    scalar: _Scalar,
    sequence: Annotated[
        list[int], typer.Option("--sequence", "-s", metavar="N", help="A sequence; repeatable.")
    ],
    layer: _Layers = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the values to an .npz file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a scalar on whole sequences, from what is stored."""
    from actstore.query.session import Store

    if out is not None and out.suffix != ".npz":
        raise InvalidInput(
            f"--out is {str(out)!r}; its name must end in .npz.", kind=ErrorKind.INVALID_ARGUMENT
        )
    with Store(store) as opened:
        tensor = opened.derive(scalar, sequences=sequence, layers=layer or None)
        texts = opened.texts(opened.row_map.token_ids(tensor.rows))
    certificate = {
        "scalar": tensor.name,
        "source": tensor.source,
        "dims": list(tensor.dims),
        "shape": list(tensor.shape),
    }
    if out is not None:
        _write_npz(out, tensor)
    if as_json:
        rows = [] if out is not None else _derived_rows(tensor, texts)
        written = {} if out is None else {"out": str(out)}
        print_json({"rows": rows, "certificate": {**certificate, **written}})
    elif out is not None:
        console().print(f"{visible(repr(tensor))} -> {visible(str(out))}")
    else:
        _print_derived(console(), tensor, texts)


@reports_errors
def sql(
    store: StorePath,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="One SELECT.")],
    form: Annotated[
        SqlFormat, typer.Option("--format", "-f", help="Parquet needs --out.")
    ] = SqlFormat.TABLE,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the rows to a file."),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="Rows of a table; 0 for all.")
    ] = 100,
    as_json: AsJson = False,
) -> None:
    """Ask the tables of a store: tokens, sequences, documents, neurons and more."""
    chosen = SqlFormat.JSON if as_json else form
    if (chosen is SqlFormat.PARQUET) > (out is not None):
        raise InvalidInput(
            "--format parquet writes a file; add --out FILE.", kind=ErrorKind.INVALID_ARGUMENT
        )
    if chosen is SqlFormat.TABLE and out is not None:
        raise InvalidInput(
            "--out needs --format csv, json or parquet.", kind=ErrorKind.INVALID_ARGUMENT
        )
    limit = rows if chosen is SqlFormat.TABLE and rows > 0 else None
    table, certificate = _ask(store, query, limit)
    if chosen is SqlFormat.TABLE:
        _print_rows(console(), table, limit)
    elif chosen is SqlFormat.JSON:
        _put_text(out, _json_rows(table, certificate) + "\n")
    elif chosen is SqlFormat.CSV:
        _put_text(out, _csv(table, safe=out is None and console().is_terminal))
    else:
        assert out is not None
        _write_parquet(out, table)


def print_topk(shown: "Console", found: "TopK", *, explain: bool = False) -> None:
    """Print a ranking as a table, with how it was found."""
    names = found.table.column_names
    shown.print(data_table(names, [list(row.values()) for row in found.rows()]))
    if explain:
        shown.print(fields_table(_certificate_fields(found.certificate)))
    else:
        shown.print(Text(_certificate_line(found.certificate), "dim"))


def print_examples(shown: "Console", found: "Examples", *, title: str = "") -> None:
    """Print contexts, one a line, shaded on one scale."""
    unit = ":".join(map(str, found.unit))
    heading = f"{found.certificate.scalar} {unit}, {found.kind}{f': {title}' if title else ''}"
    shown.print(Text(heading, "bold"))
    if not len(found):
        shown.print("no row that may answer")
    strongest = max((abs(v) for row in found for v in row.values if not math.isnan(v)), default=0.0)
    values = [f"{row.value:.4g}" for row in found]
    places = [f"{row.sequence}:{row.position}" for row in found]
    value_width = max(map(len, values), default=0)
    place_width = max(map(len, places), default=0)
    for row, value, place in zip(found, values, places, strict=True):
        prefix = f"{value:>{value_width}}  {place:>{place_width}}  "
        line = Text(prefix).append(_strip(row, strongest, shown, len(prefix)))
        shown.print(line, no_wrap=True, soft_wrap=not shown.is_terminal)
    shown.print(Text(_certificate_line(found.certificate), "dim"))


def _strip(row: "Example", strongest: float, shown: "Console", used: int) -> Text:
    # A file has no edge; a terminal shows what is nearest to the token in focus.
    width = max(shown.width - used, 20) if shown.is_terminal else None
    return token_strip(row.texts, row.values, row.focus, strongest=strongest, width=width)


def _certificate_line(certificate: "Certificate") -> str:
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
        "pages read": f"{count_text(certificate.pages_read)} of {count_text(total)}",
        "cells scanned": count_text(certificate.cells_scanned),
        "bound at the stop": bound,
        "segments": f"{certificate.segments} of {certificate.segments_planned}",
        "rows searched": count_text(certificate.rows),
        "rows left out": excluded or "none",
    }


def _derived_rows(tensor: "LabelledTensor", texts: list[str]) -> list[dict[str, Any]]:
    """One row per layer and token, with its values as nested lists."""
    values = tensor.numpy()
    if values.size > _JSON_VALUES:
        raise InvalidInput(
            f"{tensor.name} has {values.size:,} values here, more than the {_JSON_VALUES:,} that "
            "JSON is made for. Write them with --out FILE.npz, or ask for fewer.",
            kind=ErrorKind.TOO_LARGE,
        )
    has_layers = tensor.layers is not None
    rows = tensor.rows
    return [
        {
            **({"layer": layer} if has_layers else {}),
            "token": int(rows.token[index]),
            "sequence": int(rows.sequence[index]),
            "position": int(rows.position[index]),
            "text": texts[index],
            "values": (values[number, index] if has_layers else values[index]).tolist(),
        }
        for number, layer in enumerate(tensor.layers or (None,))
        for index in range(len(rows))
    ]


def _print_derived(shown: "Console", tensor: "LabelledTensor", texts: list[str]) -> None:
    """One line per token: its one value, or the strongest of its units, for each layer."""
    import numpy as np

    values = tensor.numpy()
    by_layer = values if tensor.layers is not None else values[None]
    flat = by_layer.reshape(*by_layer.shape[:2], -1)
    unit_shape = by_layer.shape[2:]
    scalar_like = flat.shape[2] == 1
    # All NaN is the value of no unit.
    magnitude = np.where(np.isnan(flat), -1, np.abs(flat))
    best = magnitude.argmax(2)
    strongest = np.take_along_axis(flat, best[..., None], 2)[..., 0]
    names = ["" if layer is None else f"layer {layer}" for layer in tensor.layers or (None,)]
    columns = ["token", "position", "text"]
    for name in names:
        columns += [name or "value"] if scalar_like else [f"{name} strongest".strip(), "at"]
    rows: list[list[Any]] = []
    for index, text in enumerate(texts):
        row: list[Any] = [int(tensor.rows.token[index]), int(tensor.rows.position[index]), text]
        for number in range(len(names)):
            row.append(float(strongest[number, index]))
            if not scalar_like:
                at = np.unravel_index(int(best[number, index]), unit_shape)
                row.append(":".join(str(int(place)) for place in at))
        rows.append(row)
    shown.print(data_table(columns, rows))
    shown.print(Text(visible(repr(tensor)), "dim"))
    if not scalar_like:
        shown.print(
            Text("The strongest unit of each token; all values with --json or --out.", "dim")
        )


def _write_npz(out: Path, tensor: "LabelledTensor") -> None:
    import numpy as np

    arrays: dict[str, Any] = {
        "name": np.array(tensor.name),
        "dims": np.array(tensor.dims),
        "values": tensor.numpy(),
        **tensor.coordinates,
    }
    try:
        np.savez(out, **arrays)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _ask(store: Path, query: str, limit: int | None) -> "tuple[pa.Table, dict[str, Any]]":
    """The rows of a query, one more than the limit if there are more."""
    import duckdb

    from actstore.query.sql import Sql
    from actstore.store.reader import StoreReader

    reader = StoreReader(store)
    try:
        with Sql(reader) as asked:
            certificate = {
                "plan": "sql",
                "segments": len(reader.segments),
                "segments_planned": reader.planned_segments,
                "coverage": asked.snapshot.coverage.hash,
            }
            if limit is not None:
                try:
                    relation = asked.relation(query).limit(limit + 1)
                    return relation.to_arrow_table(), certificate
                except duckdb.Error:
                    # Not all that gives rows can be limited; what is wrong is said below.
                    pass
            return asked.fetch(query), certificate
    finally:
        reader.close()


def _print_rows(shown: "Console", table: "pa.Table", limit: int | None) -> None:
    more = limit is not None and table.num_rows > limit
    rows = table.slice(0, limit).to_pylist() if limit is not None else table.to_pylist()
    names = table.column_names
    if names == ["explain_key", "explain_value"]:
        for row in rows:
            for line in row["explain_value"].splitlines():
                shown.print(visible(line), soft_wrap=True)
        return
    shown.print(data_table(names, [[row[name] for name in names] for row in rows]))
    if more:
        note = f"the first {limit} rows; --rows 0 prints all, --format csv --out FILE keeps them"
        error_console().print(Text(note, "dim"))


def _json_rows(table: "pa.Table", certificate: dict[str, Any]) -> str:
    from actstore.cli.output import json_text

    return json_text(
        {"rows": table.to_pylist(), "certificate": {**certificate, "rows": table.num_rows}}
    )


def _csv(table: "pa.Table", *, safe: bool) -> str:
    """CSV with a header line; NULL is empty. ``safe`` spells control characters out."""
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_csv_cells(table.column_names, safe=safe))
    for row in table.to_pylist():
        writer.writerow(_csv_cells(row.values(), safe=safe))
    return buffer.getvalue()


def _csv_cells(values: Iterable[Any], *, safe: bool) -> list[str]:
    from actstore.cli.output import json_text

    texts = [
        "" if value is None else json_text(value) if isinstance(value, list | dict) else str(value)
        for value in values
    ]
    return [visible(text) for text in texts] if safe else texts


def _put_text(out: Path | None, text: str) -> None:
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise _cannot_write(out, error) from error


def _write_parquet(out: Path, table: "pa.Table") -> None:
    from pyarrow import parquet

    try:
        parquet.write_table(table, out)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"Cannot write {out}: {error.strerror or error}. Choose another --out.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
