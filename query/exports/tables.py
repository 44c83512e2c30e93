"""Top-k, SQL and examples as CSV, Parquet, JSON lines and Arrow files.

Parquet and Arrow keep types, NaN and infinities exactly, and carry the certificate in the
schema's metadata. CSV spells numbers so that they read back the same, with lists as JSON;
JSON lines have null for what JSON cannot say.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pyarrow as pa

from actstore.query.columnar import Columnar
from actstore.query.examples import Examples
from actstore.query.exports.files import new_file
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    import duckdb

__all__ = ["CERTIFICATE", "TableFormat", "as_table", "export_table", "json_ready"]

CERTIFICATE = b"actstore.certificate"
"""Key of the certificate in the schema's metadata."""

_BATCH_ROWS = 4096


class TableFormat(StrEnum):
    """Formats of tables."""

    CSV = "csv"
    PARQUET = "parquet"
    JSONL = "jsonl"
    ARROW = "arrow"


_SUFFIXES = {
    ".csv": TableFormat.CSV,
    ".parquet": TableFormat.PARQUET,
    ".pq": TableFormat.PARQUET,
    ".jsonl": TableFormat.JSONL,
    ".ndjson": TableFormat.JSONL,
    ".arrow": TableFormat.ARROW,
    ".feather": TableFormat.ARROW,
}


def export_table(
    found: "Columnar | Examples | pa.Table | duckdb.DuckDBPyRelation",
    path: str | PathLike[str],
    format: str | None = None,
    *,
    force: bool = False,
) -> Path:
    """Write an answer to a file, whole or not at all.

    Args:
        found: a top-k, examples, the relation of a query, or an Arrow table.
        path: the file.
        format: ``csv``, ``parquet``, ``jsonl`` or ``arrow``; told by the file's ending if None.
        force: replace a file that is there.

    Returns:
        The path.

    Raises:
        InvalidInput: the format is unknown, or the file exists.
        WriteFailed: the disk is full, read-only or failing.
    """
    target = Path(path).expanduser()
    writer = _WRITERS[_format_of(target, format)]
    table = as_table(found)
    with new_file(target, force=force) as temporary:
        writer(table, temporary)
    return target


def as_table(found: "Columnar | Examples | pa.Table | duckdb.DuckDBPyRelation") -> pa.Table:
    """An answer as an Arrow table, with its certificate in the metadata where it has one.

    Examples have one row each: ``layer``, the unit's numbers as ``unit``, ``token, sequence,
    position, value, quantile, focus``, and the lists ``texts`` and ``values``.
    """
    if isinstance(found, pa.Table):
        return found
    if isinstance(found, Examples):
        table = _examples_table(found)
    elif isinstance(found, Columnar):
        table = found.to_arrow()
    else:
        return found.to_arrow_table()
    certificate = getattr(found, "certificate", None)
    if certificate is None:
        return table
    text = json.dumps(json_ready(certificate.to_json()), allow_nan=False)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), CERTIFICATE: text})


def json_ready(value: Any) -> Any:
    """The nearest JSON value: NaN and infinities become null, dates and the like text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(member) for member in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    return str(value)


def _examples_table(found: Examples) -> pa.Table:
    rows = [row.to_json() for row in found]
    schema = pa.schema(
        {
            "unit": pa.list_(pa.int64()),
            "token": pa.int64(),
            "sequence": pa.int64(),
            "position": pa.int32(),
            "value": pa.float32(),
            "quantile": pa.float64(),
            "focus": pa.int32(),
            "texts": pa.list_(pa.string()),
            "values": pa.list_(pa.float32()),
        }
    )
    return pa.Table.from_pylist([{"unit": list(found.unit), **row} for row in rows], schema)


def _format_of(path: Path, named: str | None) -> TableFormat:
    try:
        return _SUFFIXES[path.suffix.lower()] if named is None else TableFormat(named.lower())
    except KeyError:
        raise _invalid(
            f"The ending of {path.name!r} names no format; use {', '.join(_SUFFIXES)}, or give "
            "the format."
        ) from None
    except ValueError:
        raise _invalid(f"The format is {named!r}; use {', '.join(TableFormat)}.") from None


def _write_csv(table: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(table.column_names)
        for rows in _row_batches(table):
            writer.writerows([_csv_cell(value) for value in row.values()] for row in rows)


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(json_ready(value), ensure_ascii=False)
    if isinstance(value, float):
        return repr(value)
    ready = json_ready(value)
    return ready if isinstance(ready, str) else str(value)


def _write_jsonl(table: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        for rows in _row_batches(table):
            for row in rows:
                stream.write(json.dumps(json_ready(row), allow_nan=False, ensure_ascii=False))
                stream.write("\n")


def _row_batches(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        yield batch.to_pylist()


def _write_parquet(table: pa.Table, path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(table, path)


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


_WRITERS: dict[TableFormat, Callable[[pa.Table, Path], None]] = {
    TableFormat.CSV: _write_csv,
    TableFormat.PARQUET: _write_parquet,
    TableFormat.JSONL: _write_jsonl,
    TableFormat.ARROW: _write_arrow,
}


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
