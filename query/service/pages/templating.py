"""Templates and what they may call: one environment for pages and notebooks."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from actstore.query.views.charts import Drawing
from actstore.query.views.text import number, percent, pieces, spelled

__all__ = ["colour_class", "environment", "style_sheet"]

_FOLDER = Path(__file__).parent


@cache
def environment() -> Environment:
    """The templates, with every value escaped unless it is markup of our own."""
    made = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A package that is replaced under a running server does not change its pages halfway.
        auto_reload=False,
    )
    made.filters.update(
        number=number, percent=percent, pieces=pieces, spelled=spelled, bytes=_bytes
    )
    made.globals.update(colour=colour_class, svg=_svg, query_string=_query_string)
    return made


@cache
def style_sheet() -> str:
    """The one style sheet, for fragments that have no page around them."""
    return (_FOLDER / "static" / "viewer.css").read_text("utf-8")


def colour_class(step: int | None) -> str:
    """The style sheet's class of a step.

    >>> colour_class(3), colour_class(-8), colour_class(0), colour_class(None)
    ('up-3', 'down-8', 'level', 'missing')
    """
    if step is None:
        return "missing"
    if step == 0:
        return "level"
    return f"up-{step}" if step > 0 else f"down-{-step}"


def _svg(drawing: Drawing) -> Markup:
    # Made by vl-convert from our own specification, which escapes the texts in it.
    return Markup(drawing.svg)


def _query_string(parameters: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> str:
    """Parameters as the end of an address, without those that are None or empty."""
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    given = [(name, str(value)) for name, value in pairs if value not in (None, "")]
    return f"?{urlencode(given)}" if given else ""


def _bytes(size: int) -> str:
    """A size in binary units.

    >>> _bytes(512), _bytes(642 * 2**20)
    ('512 B', '642 MiB')
    """
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
