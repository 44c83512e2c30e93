"""Attention heads: all of them, and what one attends to over a sequence."""

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from actstore.query.views.colours import Scale, ramp
from actstore.query.views.strips import TokenStrip, strip_of
from actstore.query.views.tables import fetch_rows
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["HeadEntry", "HeadTable", "HeadView", "attention_pattern", "pattern_image"]

PATTERN = "attn_qk_probs"


@dataclass(frozen=True)
class HeadEntry:
    """A head in the table, with its norms and their step among all heads."""

    layer: int
    head: int
    write_norm: float | None
    value_output_norm: float | None
    step: int | None


@dataclass(frozen=True)
class HeadTable:
    """Heads by layer.

    Attributes:
        rows: the heads of each layer.
        sql: the query that it was made from.
    """

    rows: tuple[tuple[HeadEntry, ...], ...]
    sql: str

    @classmethod
    def of(cls, store: "Store") -> Self:
        """All heads of an open store's model."""
        sql = "SELECT layer, head, write_norm, value_output_norm\nFROM heads\nORDER BY layer, head"
        found = fetch_rows(store, sql)
        steps = ramp(row["value_output_norm"] for row in found)
        entries = [HeadEntry(**row, step=step) for row, step in zip(found, steps, strict=True)]
        layers = sorted({entry.layer for entry in entries})
        by_layer = (tuple(e for e in entries if e.layer == layer) for layer in layers)
        return cls(tuple(by_layer), sql)


@dataclass(frozen=True)
class HeadView:
    """One head over one sequence.

    Attributes:
        layer, head: which.
        layers, heads: how many the model has.
        entry: its norms.
        sequence: over which sequence.
        length: its tokens.
        query: position of the token whose attention is shown.
        attends: the sequence, coloured by how much the query attends to each token.
        attended_by: the sequence, coloured by how much each token attends to the query.
        scale: of both strips.
        strongest: pairs (query, key, probability), the greatest first.
        texts: the tokens.
        missing: why there is no pattern; empty where there is.
        previous_sequence, next_sequence: the neighbouring committed sequences.
    """

    layer: int
    head: int
    layers: int
    heads: int
    entry: HeadEntry | None
    sequence: int
    length: int
    query: int
    attends: TokenStrip | None
    attended_by: TokenStrip | None
    scale: Scale
    strongest: tuple[tuple[int, int, float], ...]
    texts: tuple[str, ...]
    missing: str
    previous_sequence: int | None
    next_sequence: int | None

    @classmethod
    def of(
        cls, store: "Store", layer: int, head: int, sequence: int | None, query: int | None
    ) -> Self:
        """A head of an open store's model over one of its sequences.

        Args:
            store: the store.
            layer: the layer.
            head: the head.
            sequence: the sequence; the first committed one by default.
            query: position of a token; the last one by default.

        Raises:
            InvalidInput: there is no such head, sequence or position.
            Unavailable: nothing is committed, or the sequence is not.
            StoreDamaged: a value's page fails its checksum.
        """
        _require_head(store, layer, head)
        store.require_committed()
        committed = store.row_map.committed_sequences
        chosen = int(committed[0]) if sequence is None else sequence
        place = store.row_map.sequence(chosen)
        at = place.length - 1 if query is None else query
        if not 0 <= at < place.length:
            raise InvalidInput(
                f"query is {at}; sequence {chosen} has positions 0 to {place.length - 1}.",
                kind=ErrorKind.UNKNOWN_ROW,
            )
        rows = store.row_map.of_sequences(chosen)
        texts = store.row_texts(rows)
        attends = attended_by = None
        strongest: tuple[tuple[int, int, float], ...] = ()
        missing = ""
        scale = Scale(1.0)
        try:
            pattern = attention_pattern(store, layer, head, chosen)
        except Unavailable as error:
            missing = str(error)
        else:
            ids = store.row_map.token_ids(rows).tolist()
            # Position 0 takes what no other token wants; it would leave them without colour.
            scale = Scale.over([*pattern[at, 1:].tolist(), *pattern[:, max(at, 1)].tolist()])

            def strip(values: npt.NDArray[np.floating]) -> TokenStrip:
                shown = [None if np.isnan(value) else float(value) for value in values]
                first = place.first_token
                return strip_of(
                    texts, shown, scale, first_row=first, token_ids=ids, focus=at, sequence=chosen
                )

            attends, attended_by = strip(pattern[at]), strip(pattern[:, at])
            strongest = _strongest(pattern)
        number = int(np.searchsorted(committed, chosen))
        entry = next(
            (
                one
                for row in HeadTable.of(store).rows
                for one in row
                if one.layer == layer and one.head == head
            ),
            None,
        )
        return cls(
            layer=layer,
            head=head,
            layers=store.n_layers,
            heads=store.sources.dimensions.n_heads,
            entry=entry,
            sequence=chosen,
            length=place.length,
            query=at,
            attends=attends,
            attended_by=attended_by,
            scale=scale,
            strongest=strongest,
            texts=tuple(texts),
            missing=missing,
            previous_sequence=int(committed[number - 1]) if number else None,
            next_sequence=int(committed[number + 1]) if number + 1 < len(committed) else None,
        )

    @property
    def previous(self) -> tuple[int, int] | None:
        """The head before it in the model; None before the first."""
        return self._neighbour(-1)

    @property
    def next(self) -> tuple[int, int] | None:
        """The head after it in the model; None after the last."""
        return self._neighbour(1)

    def _neighbour(self, step: int) -> tuple[int, int] | None:
        number = self.layer * self.heads + self.head + step
        return divmod(number, self.heads) if 0 <= number < self.layers * self.heads else None


def _require_head(store: "Store", layer: int, head: int) -> None:
    heads = store.sources.dimensions.n_heads
    if not 0 <= layer < store.n_layers:
        raise InvalidInput(
            f"layer is {layer}; this model has 0 to {store.n_layers - 1}.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    if not 0 <= head < heads:
        raise InvalidInput(
            f"head is {head}; a layer has 0 to {heads - 1}.", kind=ErrorKind.UNKNOWN_UNIT
        )


def attention_pattern(
    store: "Store", layer: int, head: int, sequence: int
) -> npt.NDArray[np.float32]:
    """Attention probabilities ``(query, key)`` of a head; NaN where the key lies ahead.

    Raises:
        InvalidInput: there is no such head or sequence.
        Unavailable: the store cannot derive them, or the sequence is not committed.
        StoreDamaged: a value's page fails its checksum.
    """
    _require_head(store, layer, head)
    found = store.raw(PATTERN, sequences=sequence, layers=layer)
    values = np.moveaxis(found.numpy()[0], found.dims.index("head") - 1, 0)[head]
    length = store.row_map.sequence(sequence).length
    pattern: npt.NDArray[np.float32] = values[:length, :length].astype(np.float32)
    pattern[np.triu_indices(length, 1)] = np.nan
    return pattern


def _strongest(
    pattern: npt.NDArray[np.float32], count: int = 8
) -> tuple[tuple[int, int, float], ...]:
    """The pairs of different tokens with the most attention, but for those to position 0.

    Position 0 takes what no other token wants, in most heads; it would fill the list.
    """
    scores = np.where(np.isnan(pattern), -1.0, pattern)
    np.fill_diagonal(scores, -1.0)
    scores[:, 0] = -1.0
    order = np.argsort(-scores, axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(order, scores.shape), strict=True)
    return tuple(
        (int(query), int(key), float(pattern[query, key]))
        for query, key in places
        if scores[query, key] > 0
    )


def pattern_image(pattern: npt.NDArray[np.float32], colour: tuple[int, int, int]) -> bytes:
    """A pattern as a PNG, one pixel per pair, over whatever lies behind it.

    Opacity is the square root of the probability, so that weak attention is seen too.

    Args:
        pattern: probabilities ``(query, key)``; NaN is fully transparent.
        colour: of full attention.
    """
    opacity = np.sqrt(np.clip(np.nan_to_num(pattern, nan=0.0), 0.0, 1.0))
    pixels = np.empty((*pattern.shape, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = np.round(opacity * 255)
    height, width = pattern.shape
    lines = np.zeros((height, 1 + width * 4), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )
