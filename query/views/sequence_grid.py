"""A sequence as a grid: tokens by layers, for one derived scalar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.views.colours import Scale
from actstore.query.views.strips import TokenStrip, strip_of
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = [
    "GRID_ROWS",
    "Column",
    "Grid",
    "GridCell",
    "SequenceView",
    "can_derive",
    "column_of",
    "grid_of",
    "scalars_of_tokens",
    "unit_path",
]

GRID_ROWS = 128
"""Tokens of one page of the grid: what a browser shows at once without waiting."""

_UNIT_PATHS = {Dimension.NEURON: "neurons", Dimension.HEAD: "heads"}


@dataclass(frozen=True)
class GridCell:
    """The value of one token in one layer.

    Attributes:
        value: None where there is none.
        step: on the grid's scale; None where there is no value.
        unit: whose value it is, of several; None where there is one alone.
    """

    value: float | None
    step: int | None
    unit: int | None


@dataclass(frozen=True)
class Grid:
    """Tokens by layers.

    Attributes:
        layers: of the columns; None outside the blocks.
        rows: cells by token, then layer.
        scale: of all cells but position 0's; what is beyond it has its outermost colour.
        unit: the unit that was asked for; None for the strongest at each place.
        units: how many units a layer has; 1 for a scalar of the token itself.
    """

    layers: tuple[int | None, ...]
    rows: tuple[tuple[GridCell, ...], ...]
    scale: Scale
    unit: int | None
    units: int


@dataclass(frozen=True)
class SequenceView:
    """A stored sequence with a scalar's values.

    Attributes:
        sequence, document, first_row, length: which it is.
        source: the document's name.
        scalar: whose values are shown.
        scalars: the names that can be chosen.
        layer: the layer of the strip.
        strip: the whole text, coloured by that layer.
        grid: tokens by layers, of a part of the text.
        start: position of the grid's first token.
        missing: why there are no values; empty where there are.
        sequences: how many the store has.
        previous, next: the neighbouring committed sequences.
        unit_path: where the units of the scalar have pages; empty where they have none.
    """

    sequence: int
    document: int
    first_row: int
    length: int
    source: str
    scalar: str
    scalars: tuple[str, ...]
    layer: int | None
    strip: TokenStrip
    grid: Grid | None
    start: int
    missing: str
    sequences: int
    previous: int | None
    next: int | None
    unit_path: str

    @classmethod
    def of(
        cls,
        store: "Store",
        sequence: int,
        *,
        scalar: str | None = None,
        layer: int | None = None,
        unit: int | None = None,
        start: int = 0,
    ) -> Self:
        """A sequence of an open store.

        Args:
            store: the store.
            sequence: which.
            scalar: a derived scalar; by default what the store has of neurons.
            layer: of the strip; the last one by default.
            unit: of which the values are; the strongest unit of each place by default.
            start: position of the grid's first token.

        Raises:
            InvalidInput: there is no such sequence, scalar, layer or unit.
            Unavailable: the sequence is not committed.
            StoreDamaged: a value's page fails its checksum.
        """
        place = store.row_map.sequence(sequence)
        choices = scalars_of_tokens(store)
        name = scalar or ("mlp_post_act" if "mlp_post_act" in choices else next(iter(choices)))
        declared = store.scalar(name)
        rows = store.row_map.of_sequences(sequence)
        texts = store.row_texts(rows)
        columns: dict[int | None, Column] = {}
        missing = ""
        known = store.layers_of(declared)
        _require_layer(declared, layer, known)
        try:
            for one in known:
                # A layer's values are many; of each token one is kept.
                found = store.derive_window(declared, sequence, one)
                columns[one if declared.has_layers else None] = column_of(found, unit, declared)
        except Unavailable as error:
            missing = str(error)
            columns = {}
        start = min(max(start, 0), max(place.length - 1, 0)) // GRID_ROWS * GRID_ROWS
        whole = grid_of(columns, unit) if columns else None
        shown = layer if layer is not None else max((k or 0 for k in columns), default=0)
        column = whole.layers.index(shown if declared.has_layers else None) if whole else 0
        strip = strip_of(
            texts,
            [row[column].value for row in whole.rows] if whole else [None] * len(texts),
            whole.scale if whole else Scale(1.0),
            first_row=place.first_token,
            token_ids=store.row_map.token_ids(rows).tolist(),
            sequence=sequence,
        )
        committed = store.row_map.committed_sequences
        at = int(np.searchsorted(committed, sequence))
        source = store.row_map.table(store.row_map.of_tokens(place.first_token), ["source"])
        return cls(
            sequence=sequence,
            document=place.document,
            first_row=place.first_token,
            length=place.length,
            source=str(source.column("source")[0].as_py()),
            scalar=name,
            scalars=tuple(choices),
            layer=shown if declared.has_layers else None,
            strip=strip,
            grid=None if whole is None else _part(whole, start),
            start=start,
            missing=missing,
            sequences=len(committed),
            previous=int(committed[at - 1]) if at else None,
            next=int(committed[at + 1]) if at + 1 < len(committed) else None,
            unit_path=unit_path(declared),
        )


def _require_layer(declared: DerivedScalar, layer: int | None, known: Sequence[int]) -> None:
    if layer is not None and declared.has_layers and layer not in known:
        raise InvalidInput(
            f"layer is {layer}; {declared.name} has {', '.join(map(str, known))}.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )


def _part(whole: Grid, start: int) -> Grid:
    rows = whole.rows[start : start + GRID_ROWS]
    return Grid(whole.layers, rows, whole.scale, whole.unit, whole.units)


def unit_path(declared: DerivedScalar) -> str:
    """The path under which a scalar's units have pages; empty where they have none."""
    return _UNIT_PATHS.get(declared.axes[0], "") if len(declared.axes) == 1 else ""


def scalars_of_tokens(store: "Store") -> Mapping[str, DerivedScalar]:
    """The forward scalars with values per token that the store can give, by name."""
    found: dict[str, DerivedScalar] = {}
    for declared in SCALARS.values():
        if declared.about is not None or declared.is_flattened or declared.latents is not None:
            continue
        if len(declared.axes) > 1 or Dimension.VOCABULARY in declared.axes:
            continue
        if can_derive(store, declared):
            found[declared.name] = declared
    return found


def can_derive(store: "Store", declared: DerivedScalar) -> bool:
    """Whether all that a scalar is made from is stored, or can be reconstructed."""
    inputs = set(store.sources._scalar_inputs(declared))
    kinds = {store.sources.kind(location, pass_type) for location, pass_type in inputs}
    return kinds <= {"stored", "reconstructed"}


@dataclass(frozen=True, eq=False)
class Column:
    """One value per token, of one unit or of the strongest.

    Attributes:
        values: ``(token,)``; NaN where there is none.
        which: whose they are, int64 ``(token,)``.
        units: how many there were.
    """

    values: npt.NDArray[np.floating]
    which: npt.NDArray[np.int64]
    units: int


def column_of(found: npt.NDArray[np.floating], unit: int | None, declared: DerivedScalar) -> Column:
    """A layer's column.

    Args:
        found: ``(token, unit)``; NaN where there is no value.
        unit: which one; the one of greatest magnitude at each token by default.
        declared: the scalar, for messages.

    Raises:
        InvalidInput: there is no such unit.
    """
    tokens, units = found.shape
    if unit is not None:
        if not 0 <= unit < units:
            raise InvalidInput(
                f"unit is {unit}; {declared.name} has 0 to {units - 1}.",
                kind=ErrorKind.UNKNOWN_UNIT,
            )
        return Column(found[:, unit].copy(), np.full(tokens, unit, np.int64), units)
    which = np.where(np.isnan(found), -1.0, np.abs(found)).argmax(axis=1)
    return Column(found[np.arange(tokens), which], which, units)


def grid_of(columns: Mapping[int | None, Column], unit: int | None) -> Grid:
    """A grid from columns by layer.

    Args:
        columns: layer -> its column.
        unit: that was asked for; None for the strongest at each place.
    """
    units = max(column.units for column in columns.values())
    # Position 0 is unlike all others in most models; it would leave them without colour.
    first = 1 if all(len(column.values) > 1 for column in columns.values()) else 0
    scale = Scale.over(
        float(value) for column in columns.values() for value in column.values[first:]
    )
    cells = [
        [
            GridCell(
                None if np.isnan(value) else float(value),
                scale.step(float(value)),
                int(number) if units > 1 else None,
            )
            for value, number in zip(column.values, column.which, strict=True)
        ]
        for column in columns.values()
    ]
    return Grid(tuple(columns), tuple(zip(*cells, strict=True)), scale, unit, units)
