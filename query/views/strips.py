"""Strips of tokens with a value each, on one scale."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.query.views.colours import Scale
from actstore.query.views.text import Piece, number, pieces, spelled

if TYPE_CHECKING:
    from actstore.query.examples import Example, Examples
    from actstore.query.session import Store

__all__ = ["StripToken", "TokenStrip", "example_strips", "strip_of"]

_SPACE = "·"
"""A space between words that are read as text; lists of tokens have one that stands out more."""


@dataclass(frozen=True)
class StripToken:
    """One token of a strip.

    Attributes:
        text: its decoded piece.
        value: the value there; None where there is none.
        step: the value's step on the page's scale; None where there is no value.
        token_id: the vocabulary's number; None if unknown.
        row: the store's row; None for text that is not in the store.
        position: in its sequence.
        is_focus: whether the strip is about this token.
    """

    text: str
    value: float | None
    step: int | None
    token_id: int | None
    row: int | None
    position: int
    is_focus: bool = False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The text with visible spaces and escapes."""
        return pieces(self.text, _SPACE)

    @property
    def breaks(self) -> bool:
        """Whether a line of the text ends here."""
        return "\n" in self.text

    @property
    def tip(self) -> str:
        """What there is to say of the token, in one line."""
        parts = [f"“{spelled(self.text)}”", number(self.value), f"position {self.position}"]
        parts += [] if self.token_id is None else [f"id {self.token_id}"]
        parts += [] if self.row is None else [f"row {self.row}"]
        return " · ".join(parts)


@dataclass(frozen=True)
class TokenStrip:
    """Tokens side by side.

    Attributes:
        tokens: in order.
        value: what the strip is shown for: the value at its focus.
        sequence: the store's sequence; None for text that is not in the store.
        quantile: share of the rows that rank after the focus, of quantile examples.
        starts_inside, ends_inside: whether the sequence goes on before and after.
    """

    tokens: tuple[StripToken, ...]
    value: float | None = None
    sequence: int | None = None
    quantile: float | None = None
    starts_inside: bool = False
    ends_inside: bool = False

    @property
    def focus(self) -> StripToken | None:
        """The token that the strip is about."""
        return next((token for token in self.tokens if token.is_focus), None)

    @property
    def text(self) -> str:
        """The plain text."""
        return "".join(token.text for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)


def strip_of(
    texts: Sequence[str],
    values: Iterable[float | None],
    scale: Scale,
    *,
    first_row: int | None = None,
    first_position: int = 0,
    token_ids: Sequence[int] | None = None,
    focus: int | None = None,
    sequence: int | None = None,
    quantile: float | None = None,
    length: int | None = None,
) -> TokenStrip:
    """A strip of tokens that follow one another.

    Args:
        texts: decoded pieces.
        values: one per token.
        scale: the page's.
        first_row: the store's row of the first token.
        first_position: its position in the sequence.
        token_ids: the vocabulary's numbers.
        focus: index of the token that it is about.
        sequence: the store's sequence.
        quantile: of the focus.
        length: tokens of the sequence; those of the strip by default.
    """
    given = list(values)
    tokens = tuple(
        StripToken(
            text=text,
            value=value,
            step=scale.step(value),
            token_id=None if token_ids is None else int(token_ids[index]),
            row=None if first_row is None else first_row + index,
            position=first_position + index,
            is_focus=index == focus,
        )
        for index, (text, value) in enumerate(zip(texts, given, strict=True))
    )
    return TokenStrip(
        tokens,
        value=None if focus is None else given[focus],
        sequence=sequence,
        quantile=quantile,
        starts_inside=first_position > 0,
        ends_inside=length is not None and first_position + len(tokens) < length,
    )


def example_strips(store: "Store", found: "Examples", scale: Scale) -> tuple[TokenStrip, ...]:
    """Strips of examples, each context once.

    Args:
        store: the open store.
        found: examples of a unit.
        scale: the page's.
    """
    strips: list[TokenStrip] = []
    seen: set[tuple[tuple[str, ...], int]] = set()
    for example in found:
        context = (example.texts, example.focus)
        if context in seen:
            continue
        seen.add(context)
        strips.append(_example_strip(store, example, scale))
    return tuple(strips)


def _example_strip(store: "Store", example: "Example", scale: Scale) -> TokenStrip:
    rows = store.row_map.of_tokens(
        np.arange(example.first_token, example.first_token + len(example.texts))
    )
    return strip_of(
        example.texts,
        example.values,
        scale,
        first_row=example.first_token,
        first_position=example.position - example.focus,
        token_ids=store.row_map.token_ids(rows).tolist(),
        focus=example.focus,
        sequence=example.sequence,
        quantile=example.quantile,
        length=store.row_map.sequence(example.sequence).length,
    )
