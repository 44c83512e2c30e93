"""The answer to a query: cells with links to what they name, and a chart where one fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from actstore.query.views.charts import (
    TOKEN_COLUMNS,
    ChartSuggestion,
    Drawing,
    can_draw,
    draw,
    suggest,
    suggested_chart,
)
from actstore.query.views.text import number, spelled

__all__ = ["EXAMPLE_QUERIES", "SqlCell", "SqlResult"]

EXAMPLE_QUERIES = (
    (
        "Neurons that are mostly quiet",
        (
            "SELECT layer, neuron, kurtosis, firing_rate, max, promoted[1:4] AS promotes\n"
            "FROM neurons\nWHERE NOT dead\nORDER BY kurtosis DESC, layer, neuron\nLIMIT 20"
        ),
    ),
    (
        "Firing rate by layer",
        (
            "SELECT layer, avg(firing_rate) AS firing_rate\nFROM neurons\nGROUP BY layer\n"
            "ORDER BY layer"
        ),
    ),
    (
        "Write norm and kurtosis of every neuron",
        "SELECT write_norm, kurtosis, layer, neuron\nFROM neurons\nWHERE kurtosis IS NOT NULL",
    ),
    (
        "Frequent tokens",
        (
            "SELECT text, count(*) AS rows\nFROM tokens\nGROUP BY text\nORDER BY rows DESC, text\n"
            "LIMIT 25"
        ),
    ),
    (
        "Tokens at which neurons are strongest",
        (
            "SELECT t.text, count(*) AS times\nFROM top_activations a JOIN tokens t USING (token)\n"
            "WHERE a.tail = 'top' AND a.rank = 1\nGROUP BY t.text\nORDER BY times DESC, t.text\n"
            "LIMIT 25"
        ),
    ),
    ("Documents", "FROM documents\nLIMIT 20"),
    (
        "Tables and their columns",
        (
            "SELECT table_name, column_name, data_type\n"
            "FROM duckdb_columns()\nWHERE NOT internal\nORDER BY table_name, column_index"
        ),
    ),
)
"""What to begin with -> the query."""

_TEXT_CHARACTERS = 400


@dataclass(frozen=True)
class SqlCell:
    """A value of a result.

    Attributes:
        shown: for people.
        is_number: whether it stands to the right.
        path: of the page of what it names; empty where it names nothing.
        is_null: whether it is NULL.
    """

    shown: str
    is_number: bool
    path: str = ""
    is_null: bool = False


@dataclass(frozen=True)
class SqlResult:
    """A query's answer.

    Attributes:
        columns: (name, type, whether its values are numbers) of each.
        rows: the cells.
        truncated: whether there are more rows than are shown.
        seconds: how long it took.
        suggestion: what could be drawn; None where nothing fits.
        drawing: of that; None where nothing fits.
    """

    columns: tuple[tuple[str, str, bool], ...]
    rows: tuple[tuple[SqlCell, ...], ...]
    truncated: bool
    seconds: float
    suggestion: ChartSuggestion | None
    drawing: Drawing | None

    @classmethod
    def of(cls, table: pa.Table, *, truncated: bool = False, seconds: float = 0.0) -> Self:
        """The view of an answer.

        Args:
            table: its rows.
            truncated: whether there were more.
            seconds: how long it took.
        """
        # Two columns may have one name, so nothing here goes by name alone.
        names = table.column_names
        columns = [column.to_pylist() for column in table.columns]
        rows = (
            [
                tuple(
                    _cell(name, value, dict(zip(names, row, strict=True)))
                    for name, value in zip(names, row, strict=True)
                )
                for row in zip(*columns, strict=True)
            ]
            if columns
            else []
        )
        suggestion = suggest(table) if len(set(names)) == len(names) else None
        return cls(
            columns=tuple(
                (name, str(kind), pa.types.is_integer(kind) or pa.types.is_floating(kind))
                for name, kind in zip(names, table.schema.types, strict=True)
            ),
            rows=tuple(rows),
            truncated=truncated,
            seconds=seconds,
            suggestion=suggestion,
            drawing=None if suggestion is None else _drawing(table, suggestion),
        )


def _drawing(table: pa.Table, wanted: ChartSuggestion) -> Drawing:
    title = wanted.x if wanted.y is None else f"{wanted.y} by {wanted.x}"
    # The table of the result stands beside it, so the chart brings none of its own.
    return Drawing(draw(suggested_chart(table, wanted)) if can_draw() else "", title, (), ())


def _cell(name: str, value: Any, row: dict[str, Any]) -> SqlCell:
    if value is None:
        return SqlCell("NULL", False, is_null=True)
    if isinstance(value, bool):
        return SqlCell(str(value).lower(), False)
    if isinstance(value, int):
        return SqlCell(f"{value}", True, _path(name, value, row))
    if isinstance(value, float):
        return SqlCell(number(value), True)
    if isinstance(value, str):
        return SqlCell(_short(spelled(value) if name in TOKEN_COLUMNS else value), False)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return SqlCell(_short("  ".join(_item(one) for one in value)), False)
    return SqlCell(_short(str(value)), False)


def _item(value: Any) -> str:
    return spelled(value) if isinstance(value, str) else "NULL" if value is None else str(value)


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 1] + "…"


def _path(name: str, value: int, row: dict[str, Any]) -> str:
    """The page of what an integer names, by its column and those beside it."""
    layer = row.get("layer")
    if name == "neuron" and isinstance(layer, int):
        return f"/neurons/{layer}/{value}"
    if name == "head" and isinstance(layer, int):
        return f"/heads/{layer}/{value}"
    if name == "latent" and isinstance(layer, int) and isinstance(row.get("set"), str):
        return f"/latents/{row['set']}/{layer}/{value}"
    return f"/sequences/{value}" if name == "sequence" else ""
