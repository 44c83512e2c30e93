"""The command `sql`: one statement over a store's tables, printed or written to a file."""

import csv
import io
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actstore.cli.display import print_table, visible
from actstore.cli.options import AsJson, StorePath
from actstore.cli.output import (
    cannot_write,
    console,
    error_console,
    json_text,
    reports_errors,
)
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

__all__ = ["csv_text", "sql"]


class SqlFormat(StrEnum):
    """How the rows of a SQL query are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


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
    if chosen is SqlFormat.PARQUET and out is None:
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
        _put_text(out, csv_text(table, safe=out is None and console().is_terminal))
    else:
        assert out is not None
        _write_parquet(out, table)


def _ask(store: Path, query: str, limit: int | None) -> "tuple[pa.Table, dict[str, Any]]":
    """The rows of a query, one more than the limit if there are more."""
    import duckdb

    from actstore.query.session import Store

    with Store(store) as opened:
        asked = opened.statements
        certificate = {
            "plan": "sql",
            "segments": len(opened.reader.segments),
            "segments_planned": opened.reader.planned_segments,
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


def _print_rows(shown: "Console", table: "pa.Table", limit: int | None) -> None:
    more = limit is not None and table.num_rows > limit
    rows = table.slice(0, limit).to_pylist() if limit is not None else table.to_pylist()
    names = table.column_names
    if names == ["explain_key", "explain_value"]:
        for row in rows:
            for line in row["explain_value"].splitlines():
                shown.print(visible(line), soft_wrap=True)
        return
    print_table(shown, names, [[row[name] for name in names] for row in rows])
    if more:
        note = f"the first {limit} rows; --rows 0 prints all, --format csv --out FILE keeps them"
        error_console().print(Text(note, "dim"))


def _json_rows(table: "pa.Table", certificate: dict[str, Any]) -> str:
    return json_text(
        {"rows": table.to_pylist(), "certificate": {**certificate, "rows": table.num_rows}}
    )


def csv_text(table: "pa.Table", *, safe: bool) -> str:
    """CSV with a header line; NULL is empty. ``safe`` spells control characters out."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_csv_cells(table.column_names, safe=safe))
    for row in table.to_pylist():
        writer.writerow(_csv_cells(row.values(), safe=safe))
    return buffer.getvalue()


def _csv_cells(values: Iterable[Any], *, safe: bool) -> list[str]:
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
        raise cannot_write(out, error) from error


def _write_parquet(out: Path, table: "pa.Table") -> None:
    from pyarrow import parquet

    try:
        parquet.write_table(table, out)
    except OSError as error:
        raise cannot_write(out, error) from error
