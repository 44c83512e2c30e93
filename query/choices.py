"""What a query may answer with: rows and units, as people name them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar
from actstore.query.selection import UnitSelection
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["Indices", "allowed_rows", "choose_units", "require_rankable"]

_UNIT_TABLES: dict[tuple[Dimension, ...], str] = {
    (Dimension.NEURON,): "neurons",
    (Dimension.HEAD,): "heads",
    (Dimension.LATENT,): "latents",
}

Indices = int | Iterable[int] | None


def require_rankable(declared: DerivedScalar) -> None:
    """Refuse a scalar that is about one node of one sequence: a corpus has no such node.

    Raises:
        InvalidInput: it is such a scalar.
    """
    if declared.about is not None:
        raise _invalid(
            f"{declared.name} is about one node of one sequence, so it has no ranking over a "
            f"corpus. Derive it with `derive(…, config=DstConfig({declared.about}=…))`, from a "
            "store or from a `Prompt`."
        )


def allowed_rows(
    store: "OpenStore", where: str | None, tokens: Indices = None
) -> npt.NDArray[np.int64] | None:
    """Ascending global rows that may answer; None where nothing restricts them.

    Args:
        store: the open store.
        where: SQL predicate over the columns of tokens, sequences and documents.
        tokens: global rows, in any order; of both, rows that are among both.

    Raises:
        InvalidInput: a predicate or a row that is none.
        Unavailable: a row is not committed.
    """
    named = None
    if tokens is not None:
        named = np.unique(store.row_map.of_tokens(tokens).token)
    if where is None:
        return named
    try:
        allowed = store.rows_where(where.strip())
    except AttributeError:
        raise _invalid(f"where is {where!r}; give a SQL predicate as a string.") from None
    return allowed if named is None else np.intersect1d(allowed, named)


def choose_units(
    store: "OpenStore",
    declared: DerivedScalar,
    layers: Indices,
    arguments: dict[str, Indices],
    units: "str | Sequence[tuple[int, int]] | None",
) -> UnitSelection:
    """The layers and units that may answer.

    Args:
        store: the open store.
        declared: the scalar.
        layers: layers; all by default.
        arguments: ``neurons``, ``heads`` … -> indices along that axis; None for all.
        units: SQL predicate over the table of such units, or (layer, unit) pairs.

    Raises:
        InvalidInput: a layer or unit that the scalar does not have, or a bad predicate.
    """
    count = store.layer_count(declared)
    numbers = _layers(store, declared, layers)
    axes, sizes = declared.ranked_axes, store.unit_shape(declared)
    names = [UNIT_ARGUMENTS.get(axis) for axis in axes]
    for name, value in arguments.items():
        if value is not None and name not in names:
            usable = ", ".join(n for n in names if n) or "none"
            raise _invalid(f"{declared.name} has no {name}; its units are chosen by: {usable}.")
    grid = np.arange(int(np.prod(sizes))).reshape(sizes)
    restricted = False
    for axis, (argument, size) in enumerate(zip(names, sizes, strict=True)):
        if argument is not None and arguments[argument] is not None:
            restricted = True
            wanted = _indices(arguments[argument], size, argument, ErrorKind.UNKNOWN_UNIT)
            grid = np.take(grid, np.array(wanted, np.int64), axis)
    chosen = np.sort(grid.reshape(-1)) if restricted else None
    by_layer = None
    if units is not None:
        pairs = _unit_pairs(store, declared, units)
        grouped: dict[int, list[int]] = {}
        for layer, unit in pairs:
            _indices(layer, count, "units", ErrorKind.UNKNOWN_LAYER)
            _indices(unit, sizes[0], "units", ErrorKind.UNKNOWN_UNIT)
            grouped.setdefault(int(layer), []).append(int(unit))
        by_layer = {layer: np.unique(members) for layer, members in grouped.items()}
    return UnitSelection(tuple(numbers), int(np.prod(sizes)), chosen, by_layer)


def _layers(store: "OpenStore", declared: DerivedScalar, layers: Indices) -> Sequence[int]:
    known = store.layers_of(declared)
    if layers is None:
        return known
    wanted = _indices(layers, store.layer_count(declared), "layers", ErrorKind.UNKNOWN_LAYER)
    outside = [layer for layer in wanted if layer not in known]
    if outside:
        raise InvalidInput(
            f"layers names {outside}; {declared.name} exists at {list(known)} alone.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    return wanted


def _unit_pairs(
    store: "OpenStore", declared: DerivedScalar, units: "str | Sequence[tuple[int, int]]"
) -> list[tuple[int, int]]:
    """(layer, unit) pairs, as given or as SQL over the table of such units finds them."""
    if declared.ranked_axes not in _UNIT_TABLES:
        raise _invalid(
            f"`units` chooses neurons, heads or latents; {declared.name} is over "
            f"{', '.join(declared.ranked_axes)}. Use its own arguments."
        )
    if isinstance(units, str):
        sets = store.latent_set_names(declared)
        return store.units_where(units, _UNIT_TABLES[declared.ranked_axes], sets)
    pairs = []
    for pair in units:
        try:
            layer, unit = pair
        except (TypeError, ValueError):
            raise _invalid(
                f"units holds {pair!r}; give (layer, unit) pairs or a SQL predicate."
            ) from None
        pairs.append((layer, unit))
    return pairs


def _indices(values: Any, size: int, name: str, kind: ErrorKind) -> list[int]:
    if values is None:
        return list(range(size))
    wanted = list(values) if isinstance(values, Iterable) else [values]
    for value in wanted:
        if not isinstance(value, int | np.integer) or not 0 <= value < size:
            raise InvalidInput(
                f"{name} names {value!r}; this store has 0 to {size - 1}.", kind=kind
            )
    return sorted({int(value) for value in wanted})


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
