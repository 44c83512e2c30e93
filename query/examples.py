"""Contexts of one unit: where it is strongest, weakest, anywhere, or in between."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.query.choices import allowed_rows
from actstore.query.derived import DerivedScalar
from actstore.query.questions import require_distinct
from actstore.query.results import Certificate
from actstore.query.scored import score
from actstore.query.selection import RowSelection
from actstore.query.topk import topk
from actstore.query.value_readers import ValueReader
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["Example", "Examples", "examples"]

Kind = Literal["top", "bottom", "random", "quantile"]


@dataclass(frozen=True)
class Example:
    """A row and the tokens around it, with the unit's value at each.

    Attributes:
        token: the row.
        sequence, position: where it stands.
        value: float32 value of the unit there.
        quantile: share of the rows that rank after it, for ``kind="quantile"``.
        first_token: the row of the window's first token.
        texts: decoded pieces of the window.
        values: float32 values of the window's tokens.
    """

    token: int
    sequence: int
    position: int
    value: float
    quantile: float | None
    first_token: int
    texts: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def focus(self) -> int:
        """Index of the row itself within the window."""
        return self.token - self.first_token

    def to_json(self) -> dict[str, Any]:
        """The example as JSON values."""
        return {
            "token": self.token,
            "sequence": self.sequence,
            "position": self.position,
            "value": self.value,
            "quantile": self.quantile,
            "focus": self.focus,
            "texts": list(self.texts),
            "values": list(self.values),
        }


@dataclass(frozen=True)
class Examples:
    """Examples of one unit, in rank order, with the certificate of how they were found."""

    unit: tuple[int, ...]
    kind: str
    rows: tuple[Example, ...]
    certificate: Certificate

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def _repr_html_(self) -> str | None:
        from actstore.query.notebooks import examples_html

        return examples_html(self)

    def to_json(self) -> dict[str, Any]:
        """``{"rows": [...], "certificate": {...}}``."""
        return {
            "unit": list(self.unit),
            "kind": self.kind,
            "rows": [row.to_json() for row in self.rows],
            "certificate": self.certificate.to_json(),
        }


def examples(
    store: "Store",
    name: str | DerivedScalar,
    unit: tuple[int, ...],
    *,
    k: int = 20,
    kind: Kind = "top",
    distinct: str | None = "sequence",
    window: tuple[int, int] = (20, 10),
    where: str | None = None,
    special: bool = False,
    pass_type: str = "forward",
    seed: int = 0,
) -> Examples:
    """Contexts of a unit.

    Args:
        store: the open store.
        name: a derived scalar with one value per (layer, token, unit).
        unit: (layer, neuron), (layer, head, channel) …
        k: number of examples.
        kind: ``top`` and ``bottom`` rank all rows; ``random`` draws rows uniformly;
            ``quantile`` takes the middle row of each of k equal shares of the ranking.
        distinct: ``sequence`` or ``document`` for at most one example from each; None for any.
        window: tokens shown before and after, within the sequence.
        where: SQL predicate over the columns of tokens, sequences and documents.
        special: let special rows be examples too.
        pass_type: ``backward`` for the gradient of the store's objective, where there is one.
        seed: of the random draw.

    Raises:
        InvalidInput: an unknown scalar, unit or kind.
        Unavailable: the store cannot derive the scalar.
    """
    declared = store.scalar(name, pass_type)
    store.require_committed()
    require_distinct(distinct)
    if not all(isinstance(index, int | np.integer) for index in _sequence(unit)):
        raise InvalidInput(
            f"unit is {unit!r}; give integers, such as (3, 712) for layer 3, neuron 712.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    if len(_sequence(window)) != 2 or not all(isinstance(n, int) for n in _sequence(window)):
        raise InvalidInput(
            f"window is {window!r}; give (tokens before, tokens after).",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    layer, *indices = unit if declared.has_layers else (0, *unit)
    shape = store.unit_shape(declared)
    if len(indices) != len(shape) or not all(
        0 <= index < size for index, size in zip(indices, shape, strict=True)
    ):
        raise InvalidInput(
            f"unit is {tuple(unit)}; {declared.name} has units (layer, *{shape}), counted from 0.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    if layer not in store.layers_of(declared):
        known = f"0 to {store.layer_count(declared) - 1}"
        if declared.layers is not None:
            known = str(list(store.layers_of(declared)))
        raise InvalidInput(
            f"unit names layer {layer}; {declared.name} has {known} in this store.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    if min(window) < 0 or k < 1:
        raise InvalidInput(
            f"k is {k} and window {window}; k must be positive, the window not negative.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    column = int(np.ravel_multi_index(indices, shape))
    restriction = store.unit_restriction(declared, indices)
    common: dict[str, Any] = {"layers": layer if declared.has_layers else None, **restriction}
    shares: Sequence[float | None]
    if kind in ("top", "bottom"):
        best = topk(
            store,
            declared,
            k=k,
            where=where,
            distinct=distinct,
            largest=kind == "top",
            special=special,
            **common,
        )
        tokens = np.array(best.column("token"), np.int64)
        shares = [None] * len(tokens)
        certificate = best.certificate
    elif kind in ("random", "quantile"):
        first = topk(store, declared, k=1, where=where, special=special, **common)
        value, token = unit_values(store, declared, layer, column, where, special)
        if kind == "random":
            tokens, shares = _random(store, token, k, distinct, seed)
        else:
            tokens, shares = _quantiles(store, value, token, k, distinct)
        certificate = Certificate(
            **{
                **first.certificate.to_json(),
                "plan": "scan",
                "cells_scanned": len(token),
                "bound": None,
                "pages_read": 0,
                "pages_pruned": 0,
            }
        )
    else:
        raise InvalidInput(
            f"kind is {kind!r}; use top, bottom, random or quantile.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    values = score(store, declared, few_units=True).values
    rows = tuple(
        _window(store, values, layer, column, int(token), share, window)
        for token, share in zip(tokens, shares, strict=True)
    )
    return Examples(tuple(unit), kind, rows, certificate)


def _sequence(value: object) -> Sequence[Any]:
    """``value`` if it is a sequence; else one that no check accepts."""
    return value if isinstance(value, Sequence) else (value,)


def unit_values(
    store: "Store",
    declared: DerivedScalar,
    layer: int,
    column: int,
    where: str | None,
    special: bool,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Every allowed value of one unit that is not NaN, with its row, by row."""
    reader = store.reader
    rows = RowSelection(reader, allowed_rows(store, where), special)
    found = score(store, declared, few_units=True).values
    chunk, inside = divmod(column, found.chunk_width)
    latents = store.latent_arrays(declared).get(layer)
    values: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)]
    tokens: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for segment in rows.segments(reader.segments):
        length = reader.commits["base"][segment].rows
        allowed = np.flatnonzero(rows.allowed(segment, length))
        if latents is not None and segment in latents.segments:
            value = np.zeros(length, np.float32)
            places, kept_values = latents.by_latent(segment, column)
            value[places] = kept_values
        else:
            value = found.block(segment, layer, 0, length, [chunk])[:, inside]
        kept = allowed[~np.isnan(value[allowed])]
        values.append(value[kept])
        tokens.append(kept + segment * reader.segment_rows)
    return np.concatenate(values), np.concatenate(tokens)


def _random(
    store: "Store", token: npt.NDArray[np.int64], k: int, distinct: str | None, seed: int
) -> tuple[npt.NDArray[np.int64], list[None]]:
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(token)
    drawn = _first_distinct(store, shuffled, distinct)[:k]
    return drawn, [None] * len(drawn)


def _quantiles(
    store: "Store",
    value: npt.NDArray[np.float32],
    token: npt.NDArray[np.int64],
    k: int,
    distinct: str | None,
) -> tuple[npt.NDArray[np.int64], list[float]]:
    """The middle row of each of k equal shares; with ``distinct``, the next fresh one."""
    k = min(k, len(token))
    order = np.lexsort((token, -(value + np.float32(0))))
    ranked = token[order]
    groups = ranked if distinct is None else _labels(store, ranked, distinct)
    used: set[int] = set()
    chosen: list[int] = []
    for share in range(k):
        start = (2 * share + 1) * len(ranked) // (2 * k)
        stop = (share + 1) * len(ranked) // k
        for place in [*range(start, stop), *range(start - 1, share * len(ranked) // k - 1, -1)]:
            if int(groups[place]) not in used:
                used.add(int(groups[place]))
                chosen.append(place)
                break
    places = np.array(chosen, np.int64)
    return ranked[places], [1 - (place + 0.5) / len(ranked) for place in chosen]


def _first_distinct(
    store: "Store", tokens: npt.NDArray[np.int64], distinct: str | None
) -> npt.NDArray[np.int64]:
    if distinct is None:
        return tokens
    first = np.unique(_labels(store, tokens, distinct), return_index=True)[1]
    return tokens[np.sort(first)]


def _labels(store: "Store", tokens: npt.NDArray[np.int64], distinct: str) -> npt.NDArray[np.int64]:
    first, label = store.row_groups(distinct)
    return label[np.searchsorted(first, tokens, side="right") - 1]


def _window(
    store: "Store",
    found: ValueReader,
    layer: int,
    column: int,
    token: int,
    quantile: float | None,
    window: tuple[int, int],
) -> Example:
    reader = store.reader
    segment = token // reader.segment_rows
    plan = reader.segment(segment)
    index = int(np.searchsorted(plan.first_token, token, side="right")) - 1
    first = int(plan.first_token[index])
    last = first + int(plan.length[index])
    start, stop = max(first, token - window[0]), min(last, token + window[1] + 1)
    chunk, inside = divmod(column, found.chunk_width)
    base = segment * reader.segment_rows
    values = found.block(segment, layer, start - base, stop - base, [chunk])[:, inside]
    texts = store.texts(plan.token_ids[start - plan.first_row : stop - plan.first_row])
    return Example(
        token=token,
        sequence=plan.first_sequence + index,
        position=token - first,
        value=float(values[token - start]),
        quantile=quantile,
        first_token=start,
        texts=tuple(texts),
        values=tuple(float(value) for value in values),
    )
