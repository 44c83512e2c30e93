"""Tables and token strips for people, on terminals that may have no colour.

Whatever comes from a corpus, a tokenizer or a path goes through :func:`visible`, so no
control character of it reaches the terminal.
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "byte_text",
    "count_text",
    "duration_text",
    "fields_table",
    "print_table",
    "token_strip",
    "visible",
]

_IDENTIFIERS = frozenset(
    {
        "attended",
        "attended_token",
        "channel",
        "document",
        "first_token",
        "head",
        "head_channel",
        "id",
        "latent",
        "layer",
        "neuron",
        "position",
        "segment",
        "sequence",
        "token",
        "token_id",
        "unit",
    }
)
"""Columns whose numbers are names: people copy them, so they get no separators."""

_SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_HIGH = (255, 140, 0)
_LOW = (64, 132, 255)
_BASE = (44, 44, 44)
_FAINT = 0.08
"""Share of the strongest value under which a token is not shaded."""

_LONGEST_CELL = 200
_LEAST = 8
"""Columns that a text is left with in a narrow table."""

_GAP = "   "


def visible(text: str) -> str:
    r"""A text on one line, with everything that a terminal might obey spelled out.

    >>> visible("a\n\x1b[31mb\u202e")
    'a↵\\x1b[31mb\\u202e'
    """
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else _SHOWN.get(character) or _escaped(ord(character))
        for character in text
    )


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def count_text(number: int) -> str:
    """A count with thousands separators.

    >>> count_text(119808)
    '119,808'
    """
    return f"{number:,}"


def byte_text(number: int) -> str:
    """A number of bytes in the unit that suits it.

    >>> byte_text(999), byte_text(1_500_000)
    ('999 B', '1.50 MB')
    """
    size = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{number} B" if unit == "B" else f"{size:,.{_decimals(size)}f} {unit}"


def duration_text(seconds: float) -> str:
    """A duration in the units that suit it.

    >>> duration_text(0.0042), duration_text(75), duration_text(9000)
    ('4 ms', '1 min 15 s', '2 h 30 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def _decimals(largest: float) -> int:
    """Decimals that give a number of this size three significant digits."""
    return max(0, 2 - int(math.log10(largest))) if largest >= 1 else 2


def fields_table(fields: Mapping[str, Any]) -> Table:
    """Names and values, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(name), value if isinstance(value, Text) else Text(visible(str(value))))
    return table


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under their columns' names; numbers to the right, long texts give way.

    A number is never cut short, since it would read as another one: where even the numbers
    are too wide, the terminal breaks the lines.

    Args:
        console: where to; its width is respected.
        columns: names.
        rows: values as Python has them.
    """
    members = list(rows)
    heads = [visible(name) for name in columns]
    texts: list[list[str]] = []
    numeric: list[bool] = []
    for number, name in enumerate(columns):
        values = [_plain(row[number]) for row in members]
        numeric.append(_is_numeric(values))
        texts.append(_number_texts(name, values) if numeric[-1] else [*map(_cell_text, values)])
    widths = [
        max(map(cell_len, [head, *column])) for head, column in zip(heads, texts, strict=True)
    ]
    _fit_columns(widths, numeric, console.width - len(_GAP) * (len(widths) - 1))

    def line(cells: Sequence[str], style: str = "") -> Text:
        made = Text(style=style)
        for cell, width, is_number in zip(cells, widths, numeric, strict=True):
            part = Text(cell)
            part.truncate(width, overflow="ellipsis")
            made.append(_GAP if made else "")
            part.align("right" if is_number else "left", width)
            made.append(part)
        made.rstrip()
        return made

    console.print(line(heads, "bold"), soft_wrap=True)
    console.print(Text("─" * (sum(widths) + len(_GAP) * (len(widths) - 1)), "dim"), soft_wrap=True)
    for row in zip(*texts, strict=True):
        console.print(line(row), soft_wrap=True)


def _fit_columns(widths: list[int], numeric: Sequence[bool], room: int) -> None:
    """Narrow the widest texts, in place, until the columns fit or nothing may give way."""
    while sum(widths) > room:
        yielding = [
            number for number, width in enumerate(widths) if not numeric[number] and width > _LEAST
        ]
        if not yielding:
            return
        widths[max(yielding, key=lambda number: widths[number])] -= 1


def _plain(value: Any) -> Any:
    """A value with Python's own numbers; sums of whole numbers come as decimals."""
    if not isinstance(value, Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)


def _is_numeric(values: Sequence[Any]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in present
    )


def _number_texts(name: str, values: Sequence[Any]) -> list[str]:
    """The numbers of a column, in one form."""
    whole = not any(isinstance(value, float) for value in values)
    if whole:
        form = "d" if name in _IDENTIFIERS else ",d"
    else:
        sizes = [abs(v) for v in values if v and math.isfinite(v)]
        plain = not sizes or (max(sizes) < 1e6 and min(sizes) >= 1e-3)
        form = f",.{max(0, 4 - int(math.log10(max(sizes, default=1.0))))}f" if plain else ".4g"
    return ["" if value is None else _number_text(value, form) for value in values]


def _number_text(value: Any, form: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return format(value, form)


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else str(value)
    shown = visible(text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…")
    # Blank cells say nothing; a blank token is a token.
    return shown.replace(" ", "␠") if text and text.isspace() else shown


def token_strip(
    texts: Sequence[str],
    values: Sequence[float],
    focus: int,
    *,
    strongest: float | None = None,
    width: int | None = None,
) -> Text:
    """Tokens on one line, shaded by their values, the one in focus in «guillemets».

    Args:
        texts: decoded pieces.
        values: the value at each; NaN is not shaded.
        focus: index of the token that the line is about.
        strongest: magnitude that gets the full shade; the greatest of these by default.
        width: columns to fill at most; tokens far from the focus are left out for it.
    """
    shown = [visible(text) for text in texts]
    # Only there would a blank token leave nothing to see.
    shown[focus] = f"«{shown[focus].replace(' ', '␠') if shown[focus].isspace() else shown[focus]}»"
    first, last = _fitting([cell_len(text) for text in shown], focus, width)
    finite = [abs(value) for value in values if math.isfinite(value)]
    scale = strongest or max(finite, default=0.0) or 1.0
    strip = Text(no_wrap=True, overflow="ellipsis")
    if first > 0:
        strip.append("…", "dim")
    for index in range(first, last):
        style = _shade(values[index] / scale)
        strip.append(shown[index], f"bold {style}".strip() if index == focus else style)
    if last < len(shown):
        strip.append("…", "dim")
    return strip


def _fitting(widths: Sequence[int], focus: int, width: int | None) -> tuple[int, int]:
    """The tokens around the focus that fit, the left side first: it is what causes."""
    first, last = focus, focus + 1
    if width is None:
        return 0, len(widths)
    room = width - widths[focus] - 2
    grown = True
    while grown:
        grown = False
        for _ in range(2):
            if first > 0 and widths[first - 1] <= room:
                first -= 1
                room -= widths[first]
                grown = True
        if last < len(widths) and widths[last] <= room:
            room -= widths[last]
            last += 1
            grown = True
    return first, last


def _shade(share: float) -> str:
    """A style for a value between -1 and 1: towards orange above 0, towards blue below."""
    if not math.isfinite(share) or abs(share) < _FAINT:
        return ""
    target = _HIGH if share > 0 else _LOW
    strength = min(abs(share), 1.0)
    red, green, blue = (
        round(base + (end - base) * strength) for base, end in zip(_BASE, target, strict=True)
    )
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    return f"{'white' if is_dark else 'black'} on #{red:02x}{green:02x}{blue:02x}"
