"""Latents of autoencoders: a set's table, and one latent with its contexts."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from actstore.query.views.colours import Scale
from actstore.query.views.distribution import Distribution
from actstore.query.views.strips import TokenStrip, strip_of
from actstore.query.views.tables import Fetch, fetch_rows, literal, require_predicate
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.session import Store
    from actstore.store.latent_reader import LatentArray, LatentSet

__all__ = ["LATENT_KINDS", "LATENT_SORTS", "LatentCard", "LatentQuery", "LatentTable"]

LatentKind = Literal["top", "random", "quantile"]
LATENT_KINDS: tuple[LatentKind, ...] = get_args(LatentKind)

LATENT_SORTS = {
    "latent": "by layer and number",
    "max": "greatest value at an ordinary row",
    "mean": "mean over ordinary rows, zeros included",
    "firing_rate": "share of ordinary rows where it is not zero",
    "kurtosis": "fourth moment",
    "decoder_norm": "length of its decoder row",
}
"""What the table can be sorted by -> what it means."""

_MAX_SIZE = 500
_BEFORE, _AFTER = 20, 10


@dataclass(frozen=True)
class LatentQuery:
    """Which latents, in which order.

    Attributes:
        set: the set.
        layer: of this layer; None for all.
        sort: one of ``LATENT_SORTS``.
        descending: the greatest first.
        alive: ``any``, ``live`` or ``dead``.
        where: SQL predicate over the columns of ``latents``.
        page: from 1.
        size: rows of a page.
    """

    set: str
    layer: int | None = None
    sort: str = "max"
    descending: bool = True
    alive: str = "any"
    where: str = ""
    page: int = 1
    size: int = 50

    def __post_init__(self) -> None:
        if self.sort not in LATENT_SORTS:
            raise _invalid(f"sort is {self.sort!r}; use {', '.join(LATENT_SORTS)}.")
        if self.page < 1 or not 1 <= self.size <= _MAX_SIZE:
            raise _invalid(
                f"page is {self.page} and size {self.size}; pages count from 1 and have at most "
                f"{_MAX_SIZE} rows."
            )

    @property
    def predicate(self) -> str:
        """The filters as one SQL predicate."""
        parts = [f'"set" = {literal(self.set)}']
        if self.layer is not None:
            parts.append(f"layer = {self.layer}")
        if self.alive != "any":
            parts.append("dead" if self.alive == "dead" else "NOT dead")
        if self.where.strip():
            parts.append(f"(\n{require_predicate(self.where.strip())}\n)")
        return " AND ".join(parts)

    @property
    def sql(self) -> str:
        """The query of this page."""
        way = "DESC" if self.descending else "ASC"
        order = (
            f"layer {way}, latent {way}"
            if self.sort == "latent"
            else f"{self.sort} {way} NULLS LAST, layer, latent"
        )
        return (
            "SELECT layer, latent, max, mean, firing_rate, kurtosis, decoder_norm, dead\n"
            f"FROM latents\nWHERE {self.predicate}\nORDER BY {order}\n"
            f"LIMIT {self.size} OFFSET {(self.page - 1) * self.size}"
        )

    def parameters(self, **changes: Any) -> dict[str, str]:
        """The members that differ from their defaults, as a link has them; the set always."""
        other, plain = replace(self, **changes), LatentQuery(self.set)
        return {
            name: str(getattr(other, name)).lower()
            if isinstance(getattr(other, name), bool)
            else str(getattr(other, name))
            for name in self.__dataclass_fields__
            if name == "set" or getattr(other, name) != getattr(plain, name)
        }


@dataclass(frozen=True)
class LatentRow:
    """A latent in the table."""

    layer: int
    latent: int
    max: float | None
    mean: float | None
    firing_rate: float | None
    kurtosis: float | None
    decoder_norm: float | None
    dead: bool | None


@dataclass(frozen=True)
class LatentTable:
    """A page of the table of a set's latents.

    Attributes:
        query: what was asked.
        rows: the latents.
        total: latents that the filters allow.
        sets: the store's sets.
        layers: of this set.
    """

    query: LatentQuery
    rows: tuple[LatentRow, ...]
    total: int
    sets: tuple[str, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, store: "Store", query: LatentQuery, fetch: Fetch | None = None) -> Self:
        """A page of an open store's latents.

        Args:
            store: the store.
            query: which.
            fetch: runs the queries; the store's own SQL by default.

        Raises:
            Unavailable: there is no such set.
            InvalidInput: a predicate that is not valid.
        """
        found = store.kept_latents.named(query.set)
        counted = f"SELECT count(*) AS n FROM latents WHERE {query.predicate}"
        total = int(fetch_rows(store, counted, fetch)[0]["n"])
        rows = tuple(LatentRow(**row) for row in fetch_rows(store, query.sql, fetch))
        sets = tuple(store.kept_latents.sets)
        return cls(query, rows, total, sets, tuple(found.layers))

    @property
    def pages(self) -> int:
        """How many pages there are, one at least."""
        return max(1, -(-self.total // self.query.size))

    @property
    def first(self) -> int:
        """Number of the first row shown, from 1; 0 where there is none."""
        return (self.query.page - 1) * self.query.size + 1 if self.rows else 0


@dataclass(frozen=True)
class LatentCard:
    """A latent as its page shows it.

    Attributes:
        set, location, autoencoder: whose.
        layer, latent: which.
        latents: how many the layer has.
        facts: its row of the table ``latents``.
        distribution: of its values that are not zero; None of a dead one.
        kind: which examples are shown.
        strips: the examples.
        scale: the page's.
        active: ordinary rows where it is not zero.
        segments, segments_planned: that the values are of.
        sql: the query for its row.
    """

    set: str
    location: str
    autoencoder: str
    layer: int
    latent: int
    latents: int
    facts: dict[str, Any]
    distribution: Distribution | None
    kind: LatentKind
    strips: tuple[TokenStrip, ...]
    scale: Scale
    active: int
    segments: int
    segments_planned: int
    sql: str

    @classmethod
    def of(
        cls,
        store: "Store",
        of: str,
        layer: int,
        latent: int,
        *,
        kind: LatentKind = "top",
        k: int = 12,
        seed: int = 0,
    ) -> Self:
        """A latent of an open store.

        Args:
            store: the store.
            of: the set.
            layer: the layer.
            latent: the latent.
            kind: ``top``, ``random`` or ``quantile``, among the rows where it is not zero.
            k: examples.
            seed: of random examples.

        Raises:
            Unavailable: there is no such set.
            InvalidInput: there is no such layer, latent or kind.
            StoreDamaged: a block fails its checksum.
        """
        found = store.kept_latents.named(of)
        array = _array(found, layer, latent)
        if kind not in LATENT_KINDS:
            raise _invalid(f"examples is {kind!r}; use {', '.join(LATENT_KINDS)}.")
        sql = (
            f'SELECT *\nFROM latents\nWHERE "set" = {literal(found.name)} AND layer = {layer} AND '
            f"latent = {latent}"
        )
        rows, values = _entries(array, latent)
        special = np.zeros(len(rows), bool)
        if len(rows):
            special = store.row_map.special(store.row_map.of_tokens(rows))
        ordinary = np.flatnonzero(~special)
        scale = Scale.over(values[ordinary].tolist())
        chosen = _choose(store, rows[ordinary], values[ordinary], kind, k, seed)
        known = dict(zip(rows.tolist(), values.tolist(), strict=True))
        return cls(
            set=found.name,
            location=found.location,
            autoencoder=str(array.spec.settings["name"]),
            layer=layer,
            latent=latent,
            latents=array.n_latents,
            facts=dict(fetch_rows(store, sql)[0]),
            distribution=Distribution.of_values(values[ordinary]) if len(ordinary) else None,
            kind=kind,
            strips=tuple(_strip(store, row, share, known, scale) for row, share in chosen),
            scale=scale,
            active=len(ordinary),
            segments=len(array.segments),
            segments_planned=store.reader.planned_segments,
            sql=sql,
        )


def _array(found: "LatentSet", layer: int, latent: int) -> "LatentArray":
    if layer not in found.layers:
        raise InvalidInput(
            f"Set {found.name!r} has no latents of layer {layer}; it has those of layers "
            f"{', '.join(map(str, found.layers))}.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    array = found.layers[layer]
    if not 0 <= latent < array.n_latents:
        raise InvalidInput(
            f"latent is {latent}; this layer has 0 to {array.n_latents - 1}.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    return array


def _entries(
    array: "LatentArray", latent: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows where a latent is not zero, ascending, and its values there."""
    rows, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for segment in array.segments:
        at, found = array.by_latent(segment, latent)
        rows.append(at + segment * array.segment_rows)
        values.append(found)
    return np.concatenate(rows), np.concatenate(values)


def _choose(
    store: "Store",
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    kind: LatentKind,
    k: int,
    seed: int,
) -> list[tuple[int, float | None]]:
    """Rows of one sequence each, with the share of the active rows below them."""
    order = np.lexsort((rows, -values))
    if kind == "random":
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    elif kind == "quantile":
        middles = (
            (2 * np.arange(min(k, len(rows))) + 1) * len(rows) // (2 * max(min(k, len(rows)), 1))
        )
        return [(int(rows[order[at]]), 1 - (int(at) + 0.5) / len(rows)) for at in middles.tolist()]
    chosen: list[tuple[int, float | None]] = []
    seen: set[int] = set()
    sequences = store.row_map.of_tokens(rows).sequence if len(rows) else rows
    for at in order.tolist():
        if len(chosen) == k:
            break
        if int(sequences[at]) not in seen:
            seen.add(int(sequences[at]))
            chosen.append((int(rows[at]), None))
    return chosen


def _strip(
    store: "Store", row: int, share: float | None, known: dict[int, float], scale: Scale
) -> TokenStrip:
    at = store.row_map.of_tokens(row)
    place = store.row_map.sequence(int(at.sequence[0]))
    first = max(place.first_token, row - _BEFORE)
    last = min(place.first_token + place.length, row + _AFTER + 1)
    rows = store.row_map.of_tokens(np.arange(first, last))
    return strip_of(
        store.row_texts(rows),
        [known.get(one, 0.0) for one in range(first, last)],
        scale,
        first_row=first,
        first_position=first - place.first_token,
        token_ids=store.row_map.token_ids(rows).tolist(),
        focus=row - first,
        sequence=place.sequence,
        quantile=share,
        length=place.length,
    )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
