"""Charts as Altair objects, and as SVG for pages.

Colours of axes and text are ``currentColor``, those of marks belong to the page's style
sheet, so one drawing serves light and dark. Altair and vl-convert are the ``viewer`` extra;
without it a page shows the numbers as a table.
"""

import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from actstore.query.views.text import spelled

if TYPE_CHECKING:
    import altair as alt

    from actstore.query.views.distribution import Distribution

__all__ = [
    "TOKEN_COLUMNS",
    "ChartSuggestion",
    "Drawing",
    "can_draw",
    "distribution_chart",
    "draw",
    "draw_distribution",
    "suggest",
    "suggested_chart",
]

ChartKind = Literal["bar", "line", "scatter", "histogram"]

TOKEN_COLUMNS = ("text", "piece")
"""Columns whose texts are tokens: their spaces and line breaks are made visible."""

_MAX_MARKS = 2000
_MAX_BARS = 60
_LABEL_CHARACTERS = 40


@dataclass(frozen=True)
class Drawing:
    """A chart as SVG; None of it where the extra is not installed.

    Attributes:
        svg: the markup; empty without the extra.
        title: what it shows.
        columns, rows: the same numbers as a table.
    """

    svg: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ChartSuggestion:
    """What of a result could be drawn.

    Attributes:
        kind: ``bar``, ``line``, ``scatter`` or ``histogram``.
        x: the column along the horizontal axis, or the bars' labels.
        y: the column of the vertical axis; None for a histogram.
    """

    kind: ChartKind
    x: str
    y: str | None


@cache
def can_draw() -> bool:
    """Whether the ``viewer`` extra is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("altair", "vl_convert"))


def draw(chart: "alt.TopLevelMixin") -> str:
    """A chart as SVG without scripts, styles or fixed size.

    Args:
        chart: an Altair chart.
    """
    return _svg(json.dumps(chart.to_dict(), sort_keys=True))


@lru_cache(maxsize=64)
def _svg(spec: str) -> str:
    import vl_convert

    svg = str(vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]))
    # The page scales it; its own size would not.
    return re.sub(r'^(<svg\b[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)


def _styled(chart: "alt.Chart") -> "alt.Chart":
    styled: alt.Chart = (
        chart.configure(background="transparent", font="inherit")
        .configure_axis(
            labelColor="currentColor",
            titleColor="currentColor",
            titleFontWeight="normal",
            domainColor="currentColor",
            domainOpacity=0.4,
            tickColor="currentColor",
            tickOpacity=0.4,
            gridColor="currentColor",
            gridOpacity=0.12,
            labelFontSize=11,
            titleFontSize=12,
        )
        .configure_view(stroke=None)
    )
    return styled


def distribution_chart(found: "Distribution", title: str) -> "alt.Chart":
    """A histogram with a logarithmic count: one bar per bin, empty bins have none.

    Args:
        found: the distribution of a unit's values.
        title: of the horizontal axis.
    """
    import altair as alt

    own = _of_distribution(found)
    chart = (
        alt.Chart(alt.InlineData(values=own.bars))
        .mark_bar()
        .encode(
            x=alt.X("from:Q", bin="binned", title=title, axis=alt.Axis(tickCount=8, grid=False)),
            x2="to:Q",
            y=alt.Y(
                "rows:Q",
                title="rows (log)",
                scale=alt.Scale(type="log", domain=own.domain, nice=False),
                axis=alt.Axis(values=own.ticks, format="~s"),
            ),
            y2="at:Q",
            tooltip=["from:Q", "to:Q", "rows:Q"],
            description="label:N",
        )
        .transform_calculate(
            label="format(datum.from, '.4~g') + ' to ' + format(datum.to, '.4~g') + ': '"
            " + format(datum.rows, ',') + (datum.rows == 1 ? ' row' : ' rows')"
        )
        .properties(width=520, height=130)
    )
    return _styled(chart)


def draw_distribution(found: "Distribution", title: str) -> str:
    """The histogram of :func:`distribution_chart` as SVG.

    Altair checks a chart against its schema, which takes longer than drawing it. So it checks
    one, and the numbers of others take the place of that one's.

    Args:
        found: the distribution of a unit's values.
        title: of the horizontal axis.
    """
    own = _of_distribution(found)
    spec: dict[str, Any] = json.loads(_checked_histogram())
    del spec["datasets"]
    spec["data"] = {"values": own.bars}
    spec["encoding"]["x"]["title"] = title
    spec["encoding"]["y"]["scale"]["domain"] = own.domain
    spec["encoding"]["y"]["axis"]["values"] = own.ticks
    return _svg(json.dumps(spec, sort_keys=True))


@cache
def _checked_histogram() -> str:
    from actstore.query.views.distribution import Distribution

    return json.dumps(distribution_chart(Distribution((0.0, 1.0), (1,)), "value").to_dict())


@dataclass(frozen=True)
class _Own:
    """What a histogram has of its own: bars, and the domain and ticks of their heights."""

    bars: list[dict[str, float]]
    domain: list[float]
    ticks: list[int]


def _of_distribution(found: "Distribution") -> _Own:
    bars = [
        {"from": low, "to": high, "rows": count, "at": 0.5}
        for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False)
        if count
    ]
    top = max(found.counts, default=1)
    ticks = [10**power for power in range(math.ceil(math.log10(max(top, 2))) + 1)]
    if top < 50:
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick <= top]
    return _Own(bars, [0.5, max(top, 2)], ticks)


def suggest(table: pa.Table) -> ChartSuggestion | None:
    """The chart that fits the types of a result's columns; None where none does.

    A label and a number make bars, two numbers points (a line where the first ascends), one
    number of many rows a histogram.
    """
    if table.num_rows < 2:
        return None
    labels = [name for name in table.column_names if _is_label(table.column(name).type)]
    numbers = [name for name in table.column_names if _is_number(table.column(name).type)]
    if labels and numbers and table.num_rows <= _MAX_BARS:
        return ChartSuggestion("bar", labels[0], numbers[-1])
    if len(numbers) >= 2:
        first = table.column(numbers[0]).to_pylist()
        known = [value for value in first if value is not None]
        ascends = len(known) == len(first) and all(one < other for one, other in pairwise(known))
        return ChartSuggestion("line" if ascends else "scatter", numbers[0], numbers[1])
    if numbers and table.num_rows >= 10:
        return ChartSuggestion("histogram", numbers[0], None)
    return None


def suggested_chart(table: pa.Table, wanted: ChartSuggestion) -> "alt.Chart":
    """A result drawn as suggested; the first 2000 rows of it.

    Args:
        table: the result.
        wanted: the kind of chart and its columns.
    """
    import altair as alt

    names = [wanted.x] if wanted.y is None else [wanted.x, wanted.y]
    columns = [table.column(name).to_pylist()[:_MAX_MARKS] for name in names]
    if wanted.x in TOKEN_COLUMNS:
        columns[0] = [None if text is None else spelled(text) for text in columns[0]]
    data = [_record(values) for values in zip(*columns, strict=True)]
    base = alt.Chart(alt.InlineData(values=[one for one in data if None not in one.values()]))
    text = "format(datum.x, '.4~g')" if wanted.kind != "bar" else "datum.x"
    base = base.transform_calculate(label=f"{text} + ': ' + format(datum.y, '.4~g')")
    flat = alt.Axis(grid=False)
    if wanted.kind == "histogram":
        drawn = (
            alt.Chart(alt.InlineData(values=[one for one in data if None not in one.values()]))
            .mark_bar()
            .encode(
                x=alt.X("x:Q", bin=alt.Bin(maxbins=40), title=wanted.x, axis=flat),
                y=alt.Y("count()", title="rows"),
            )
        )
    elif wanted.kind == "bar":
        drawn = base.mark_bar().encode(
            y=alt.Y("x:N", sort=None, title=wanted.x, axis=alt.Axis(labelLimit=200)),
            x=alt.X("y:Q", title=wanted.y),
            description="label:N",
        )
    else:
        marks = base.mark_line(point=True) if wanted.kind == "line" else base.mark_circle()
        zero = alt.Scale(zero=False)
        drawn = marks.encode(
            x=alt.X("x:Q", title=wanted.x, scale=zero, axis=_axis(table, wanted.x)),
            y=alt.Y("y:Q", title=wanted.y, scale=zero),
            description="label:N",
        )
    height = 16 * table.num_rows if wanted.kind == "bar" else 240
    return _styled(drawn.properties(width=520, height=height))


def _axis(table: pa.Table, name: str) -> "alt.Axis":
    """An axis without ticks between whole numbers, where a column has no others."""
    import altair as alt

    if pa.types.is_integer(table.column(name).type):
        return alt.Axis(grid=False, format="d", tickMinStep=1)
    return alt.Axis(grid=False)


def _record(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("x", "y"), (_plain(value) for value in values), strict=False))


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    text = str(value)
    return text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
