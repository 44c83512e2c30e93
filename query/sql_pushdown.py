"""From SQL predicates on a scalar's table to the units, rows and values that are looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.cells import ValueInterval
from actstore.query.derived import DerivedScalar
from actstore.query.selection import RowSelection, UnitSelection
from actstore.query.sql_predicates import And, Predicate, interval_of
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["ATTENDED", "Pushdown", "axis_columns", "can_push", "push_down"]

ATTENDED = "attended_token"
_ALONE = ({"token"}, {"special"}, {"value"}, {ATTENDED})
_MOST_ROWS = 2**24
"""Rows that are named one by one; a predicate that leaves more is applied to what was read."""

_MOST_ATTENDED = 2**12


@dataclass(frozen=True)
class Pushdown:
    """What a scan looks at.

    Attributes:
        units: layers and units.
        rows: rows.
        interval: of the values; None for all, NULL among them.
        later: predicates that are still to be applied to what was found.
        is_empty: nothing can pass.
    """

    units: UnitSelection
    rows: RowSelection
    interval: ValueInterval | None
    later: tuple[Predicate, ...]
    is_empty: bool


def axis_columns(declared: DerivedScalar) -> dict[str, int]:
    """Column -> number of the unit axis that it names; an attended axis has none."""
    return {
        axis.value: number
        for number, axis in enumerate(declared.ranked_axes)
        if axis not in (Dimension.ATTENDED, Dimension.SINGLETON)
    }


def can_push(declared: DerivedScalar, predicate: Predicate) -> bool:
    """Whether a predicate restricts what is looked at, or is applied to it exactly."""
    places = {*axis_columns(declared), *(["layer"] if declared.has_layers else [])}
    columns = predicate.columns
    return columns <= places or columns in _ALONE


def push_down(
    store: "OpenStore",
    declared: DerivedScalar,
    predicates: Sequence[Predicate],
    special: bool | None = None,
) -> Pushdown:
    """What is to be looked at for predicates that :func:`can_push` allows.

    Args:
        store: the open store.
        declared: the scalar.
        predicates: all of which hold.
        special: only special rows, or only others; None for both.
    """
    of: dict[frozenset[str], list[Predicate]] = {}
    for predicate in predicates:
        of.setdefault(predicate.columns, []).append(predicate)
    later: list[Predicate] = []
    rows = _choose_rows(store, of, special, later)
    units = _choose_units(store, declared, of)
    interval = None
    values = of.get(frozenset({"value"}))
    if values:
        interval, is_exact = interval_of(And(tuple(values)), "value")
        if not is_exact:
            later += values
    no_rows = rows is None or (rows.rows is not None and not len(rows.rows))
    return Pushdown(
        units=units,
        rows=RowSelection(store.reader, None, False) if rows is None else rows,
        interval=interval,
        later=tuple(later),
        is_empty=no_rows or not any(len(units.of(layer)) for layer in units.layers),
    )


def _choose_units(
    store: "OpenStore", declared: DerivedScalar, of: Mapping[frozenset[str], list[Predicate]]
) -> UnitSelection:
    """The units that predicates on layers and axes leave."""
    axes, shape = axis_columns(declared), store.unit_shape(declared)
    columns = int(np.prod(shape))
    layers = np.array(store.layers_of(declared), np.int64)
    layers = layers[_holds(of.get(frozenset({"layer"}), []), {"layer": layers})]
    chosen = [np.arange(size) for size in shape]
    for name, axis in axes.items():
        chosen[axis] = chosen[axis][_holds(of.get(frozenset({name}), []), {name: chosen[axis]})]
    units = None
    if any(len(kept) < size for kept, size in zip(chosen, shape, strict=True)):
        units = np.ravel_multi_index(np.ix_(*chosen), shape).reshape(-1)
    mixed = [
        predicate for names, predicates in of.items() if len(names) > 1 for predicate in predicates
    ]
    numbers = tuple(layers.tolist())
    if not mixed:
        return UnitSelection(numbers, columns, units)
    every = np.arange(columns) if units is None else units
    places = np.unravel_index(every, shape)
    named = {name: places[axis] for name, axis in axes.items()}
    by_layer = {
        layer: every[_holds(mixed, named | {"layer": np.full(len(every), layer)})]
        for layer in numbers
    }
    return UnitSelection(numbers, columns, units, by_layer)


def _choose_rows(
    store: "OpenStore",
    of: Mapping[frozenset[str], list[Predicate]],
    special: bool | None,
    later: list[Predicate],
) -> RowSelection | None:
    """The rows that predicates leave; None for none. What is left to do goes to ``later``."""
    kinds = np.array([False, True])
    allowed = _holds(of.get(frozenset({"special"}), []), {"special": kinds})
    if special is not None:
        allowed &= kinds == special
    if not allowed.any():
        return None
    rows = None
    tokens = of.get(frozenset({"token"}), [])
    if tokens:
        rows = _rows_between(store, *_ends(tokens, "token"))
        if rows is None:
            later += tokens
        else:
            rows = rows[_holds(tokens, {"token": rows})]
    attended = of.get(frozenset({ATTENDED}), [])
    if attended:
        later += attended
        attending = _attending(store, attended)
        if attending is not None:
            rows = attending if rows is None else np.intersect1d(rows, attending)
    if not allowed[0]:
        rows = _special_rows(store, rows)
    return RowSelection(store.reader, rows, bool(allowed[1]))


def _ends(predicates: Sequence[Predicate], column: str) -> tuple[float, float]:
    """Ends, both included, that hold every whole number that passes."""
    interval, _ = interval_of(And(tuple(predicates)), column)
    low = -np.inf if interval is None or interval.low is None else interval.low
    high = np.inf if interval is None or interval.high is None else interval.high
    return low, high


def _rows_between(store: "OpenStore", low: float, high: float) -> npt.NDArray[np.int64] | None:
    """Committed rows between two ends, both included; None where they are too many."""
    reader = store.reader
    parts, count = [np.empty(0, np.int64)], 0
    for segment in reader.segments:
        first = segment * reader.segment_rows
        start = max(first, low)
        stop = min(first + reader.commits["base"][segment].rows - 1, high)
        if start <= stop:
            count += int(stop) - int(start) + 1
            if count > _MOST_ROWS:
                return None
            parts.append(np.arange(int(start), int(stop) + 1))
    return np.concatenate(parts)


def _special_rows(store: "OpenStore", rows: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
    """The special ones of some rows, or of all."""
    allowed = RowSelection(store.reader, rows, True)
    found = [np.empty(0, np.int64)]
    for segment in allowed.segments(store.reader.segments):
        length = store.reader.commits["base"][segment].rows
        mask = allowed.within(segment, length) & allowed.special_rows(segment)[:length]
        found.append(segment * store.reader.segment_rows + np.flatnonzero(mask))
    return np.concatenate(found)


def _attending(store: "OpenStore", predicates: Sequence[Predicate]) -> npt.NDArray[np.int64] | None:
    """Rows of the sequences in which some attended token lies; None where those are many."""
    low, high = _ends(predicates, ATTENDED)
    if not high - low < _MOST_ATTENDED:
        return None
    attended = _rows_between(store, low, high)
    assert attended is not None, "fewer than may be named"
    attended = attended[_holds(predicates, {ATTENDED: attended})]
    found = [np.empty(0, np.int64)]
    for number in np.unique(store.row_map.of_tokens(attended).sequence).tolist():
        place = store.row_map.sequence(number)
        found.append(place.first_token + np.arange(place.length))
    return np.sort(np.concatenate(found))


def _holds(
    predicates: Sequence[Predicate], columns: Mapping[str, npt.NDArray[np.generic]]
) -> npt.NDArray[np.bool_]:
    """Where all of some predicates are true."""
    every = np.ones(len(next(iter(columns.values()))), bool)
    return reduce(np.logical_and, (one.holds(columns) for one in predicates), every)
