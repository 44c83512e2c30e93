"""One unit's derived scalars at the rows where it is strongest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.views.colours import Scale
from actstore.query.views.strips import StripToken
from actstore.store.errors import InvalidInput, Unavailable
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["DerivedRow", "DerivedTable", "derived_at_examples", "scalars_per_unit"]


@dataclass(frozen=True)
class DerivedRow:
    """One scalar at some rows.

    Attributes:
        name: the scalar.
        meaning: one line.
        definition: its formula.
        values: by row; empty where it cannot be had.
        steps: of the values, on the scalar's own scale.
        missing: why it cannot be had; empty where it can.
    """

    name: str
    meaning: str
    definition: str
    values: tuple[float, ...]
    steps: tuple[int | None, ...]
    missing: str


@dataclass(frozen=True)
class DerivedTable:
    """Scalars by rows.

    Attributes:
        tokens: the rows.
        sequences: of the rows.
        rows: the scalars that can be had, then those that cannot.
    """

    tokens: tuple[StripToken, ...]
    sequences: tuple[int, ...]
    rows: tuple[DerivedRow, ...]


def scalars_per_unit(axis: Dimension) -> tuple[DerivedScalar, ...]:
    """The scalars with one value per layer, row and unit of a kind, of no node in particular."""
    return tuple(
        declared
        for declared in SCALARS.values()
        if declared.axes == (axis,)
        and declared.has_layers
        and declared.about is None
        and declared.latents is None
        and not declared.is_flattened
    )


def derived_at_examples(
    store: "Store", scalar: str, axis: Dimension, layer: int, unit: int, *, k: int = 8
) -> DerivedTable:
    """Every derived scalar of a unit at its best rows.

    Args:
        store: the open store.
        scalar: what the rows are best by.
        axis: what the unit is.
        layer: its layer.
        unit: its number.
        k: rows.

    Raises:
        InvalidInput: there is no such unit.
        StoreDamaged: a value's page fails its checksum.
    """
    found = store.examples(scalar, (layer, unit), k=k, window=(0, 0))
    rows = [example.token for example in found]
    tokens = tuple(
        StripToken(
            text=example.texts[0],
            value=example.value,
            step=None,
            token_id=None,
            row=example.token,
            position=example.position,
        )
        for example in found
    )
    derived = [_row(store, declared, layer, unit, rows) for declared in scalars_per_unit(axis)]
    derived.sort(key=lambda row: bool(row.missing))
    return DerivedTable(tokens, tuple(example.sequence for example in found), tuple(derived))


def _row(
    store: "Store", declared: DerivedScalar, layer: int, unit: int, rows: Sequence[int]
) -> DerivedRow:
    values: tuple[float, ...] = ()
    missing = ""
    try:
        found = store.derive(declared, tokens=rows, layers=layer)
        values = tuple(float(value) for value in found.values[0, :, unit].tolist())
    except (Unavailable, InvalidInput) as error:
        missing = str(error)
    scale = Scale.over(values)
    return DerivedRow(
        name=declared.name,
        meaning=declared.meaning,
        definition=declared.definition,
        values=values,
        steps=tuple(scale.step(value) for value in values),
        missing=missing,
    )
