"""``documents.parquet``: one row per document of a plan, the caller's columns among them.

Rows wait in a spool until the plan is decided. Only then is the type of a column
known: whole numbers stay whole, a column of whole and other numbers is float64 where
that loses nothing, and anything mixed becomes text.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.spool import Spool

__all__ = ["RESERVED_COLUMNS", "DocumentRows", "DocumentSummary", "Scalar"]

Scalar = str | int | float | bool | None
"""A value of one of the caller's columns."""

RESERVED_COLUMNS = ("document", "source", "n_tokens")
"""Columns of ours; names are compared without case, as SQL does."""

_ROW_GROUP = 16384
_EXACT_INTEGERS = 2**53


@dataclass(frozen=True)
class DocumentSummary:
    """What the documents of one plan have in common.

    Attributes:
        count: rows.
        sources: sha256 over the names of their sources, in hex.
        schema: names and types of the file's columns.
    """

    count: int
    sources: str
    schema: pa.Schema


class DocumentRows:
    """Documents in the order of the corpus, waiting to be written.

    Args:
        folder: where their spool may lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spool = Spool(folder)
        self._names: dict[str, str] = {}
        self.count = 0

    def add(self, source: str, n_tokens: int, columns: Mapping[str, Scalar]) -> None:
        """Append a document.

        Raises:
            InvalidInput: a column has a reserved name, or differs from another only in case.
        """
        for name in columns:
            known = self._names.setdefault(name.lower(), name)
            if known != name or name.lower() in RESERVED_COLUMNS:
                rule = (
                    f"differs from {known!r} only in case, and SQL sees one name"
                    if known != name
                    else "is the name of a column of the store's own"
                )
                raise InvalidInput(
                    f"Column {name!r} of document {source!r} {rule}. Rename it, or leave it out "
                    "with `columns`.",
                    kind=ErrorKind.INVALID_CORPUS,
                )
        self._spool.write(json.dumps([source, n_tokens, dict(columns)]).encode() + b"\n")
        self.count += 1

    def summarise(self, first: int) -> DocumentSummary:
        """Decide the columns of the documents from number ``first`` on."""
        sources = hashlib.sha256()
        kinds: dict[str, set[str]] = {}
        count = 0
        for source, _, columns in self._rows(first):
            name = source.encode()
            sources.update(len(name).to_bytes(8, "little") + name)
            for column, value in columns.items():
                kinds.setdefault(column, set()).add(_kind(value))
            count += 1
        own = [
            pa.field("document", pa.int64(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("n_tokens", pa.int64(), nullable=False),
        ]
        others = [pa.field(column, _column_type(found)) for column, found in kinds.items()]
        return DocumentSummary(count, sources.hexdigest(), pa.schema(own + others))

    def encode(self, summary: DocumentSummary, first: int, number: int) -> Spool:
        """The Parquet file of the documents from ``first`` on.

        Args:
            summary: of the same documents.
            first: number of the first, as they were added.
            number: global number of the document ``first``.

        Returns:
            A spool with the file's bytes, equal for equal documents; the caller closes it.
        """
        file = Spool(self._folder)
        schema = summary.schema
        try:
            with parquet.ParquetWriter(file, schema, compression="zstd", version="2.6") as writer:
                rows: list[dict[str, Any]] = []
                for offset, (source, n_tokens, columns) in enumerate(self._rows(first)):
                    own = {"document": number + offset, "source": source, "n_tokens": n_tokens}
                    rows.append({**own, **columns})
                    if len(rows) == _ROW_GROUP:
                        writer.write_table(_table(rows, schema))
                        rows = []
                if rows:
                    writer.write_table(_table(rows, schema))
        except BaseException:
            file.close()
            raise
        return file

    def close(self) -> None:
        """Release the disk space."""
        self._spool.close()

    def _rows(self, first: int) -> Iterator[tuple[str, int, dict[str, Scalar]]]:
        for number, line in enumerate(self._spool.lines()):
            if number >= first:
                source, n_tokens, columns = json.loads(line)
                yield source, n_tokens, columns


def _kind(value: Scalar) -> str:
    if value is None:
        return "null"
    # A bool is an int to Python and not to a reader of the column.
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= _EXACT_INTEGERS:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "huge"
    return "float" if isinstance(value, float) else "text"


def _column_type(kinds: set[str]) -> pa.DataType:
    found = kinds - {"null"}
    if found == {"bool"}:
        return pa.bool_()
    if found and found <= {"int", "long"}:
        return pa.int64()
    if found and found <= {"int", "float"}:
        return pa.float64()
    return pa.string()


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.table(
        {
            field.name: pa.array(
                [_cast(row.get(field.name), field.type) for row in rows], field.type
            )
            for field in schema
        },
        schema,
    )


def _cast(value: Scalar, type_: pa.DataType) -> Scalar:
    if value is None:
        return None
    if pa.types.is_string(type_):
        return value if isinstance(value, str) else json.dumps(value)
    return float(value) if pa.types.is_floating(type_) else value
