"""Tokens and numbers as people read them."""

import math
import re
from dataclasses import dataclass

__all__ = ["Piece", "number", "percent", "pieces", "spelled"]

_RUNS = re.compile(r" {3,}|[^\S ]| +|[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\ufeff]")
_SIGNS = {"\n": "↵", "\t": "⇥"}
_FEW_SPACES = 2


@dataclass(frozen=True)
class Piece:
    """A part of a token's text.

    Attributes:
        text: what is shown.
        is_sign: whether it stands for characters that have no shape of their own.
        raw: the characters themselves.
    """

    text: str
    is_sign: bool
    raw: str


def pieces(text: str, space: str = "␣") -> tuple[Piece, ...]:
    r"""A token's text with visible spaces and escapes; long runs of spaces are counted.

    Args:
        text: the decoded piece.
        space: what stands for a space.

    >>> [piece.text for piece in pieces(" the")], [piece.text for piece in pieces("\n        ")]
    (['␣', 'the'], ['↵', '␣×8'])
    """
    found: list[Piece] = []
    at = 0
    for match in _RUNS.finditer(text):
        if match.start() > at:
            found.append(_plain(text[at : match.start()]))
        found.append(Piece(_sign(match.group(), space), True, match.group()))
        at = match.end()
    if at < len(text):
        found.append(_plain(text[at:]))
    return tuple(found) or (Piece("∅", True, ""),)


def _plain(text: str) -> Piece:
    return Piece(text, False, text)


def spelled(text: str) -> str:
    """A token's text in one line, as :func:`pieces` shows it."""
    return "".join(piece.text for piece in pieces(text))


def _sign(run: str, space: str) -> str:
    if run[0] == " ":
        few = len(run) <= _FEW_SPACES
        return space * len(run) if few else f"{space}\N{MULTIPLICATION SIGN}{len(run)}"
    return _SIGNS.get(run) or f"\\u{ord(run):04x}"


def number(value: float | None) -> str:
    """A number in four significant digits; whole ones of type int in full.

    >>> number(0.123456), number(1234567), number(None), number(-0.00001234), number(2.0)
    ('0.1235', '1,234,567', '—', '-1.234e-05', '2.000')
    """
    if value is None:
        return "—"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def percent(share: float | None) -> str:
    """A share in per cent, with as many digits as tell it from none and from all.

    >>> percent(0.25), percent(0.00042), percent(0.0), percent(None), percent(0.99999)
    ('25 %', '0.042 %', '0 %', '—', '99.999 %')
    """
    if share is None or math.isnan(share):
        return "—"
    size = share * 100
    if size in (0.0, 100.0):
        return f"{size:.0f} %"
    if size > 99:
        return f"{size:.{max(1, math.ceil(-math.log10(100 - size) - 1e-9))}f} %"
    return f"{size:.2g} %" if size < 10 else f"{size:.3g} %"
