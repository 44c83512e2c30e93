"""Predicates on the columns of a lazily read table, as SQL means them.

A row passes where a predicate is true; a comparison with NULL is not. NOT is pushed inwards when
a tree is made, so AND and OR of what is true is all there is. NaN stands for NULL in floats, None
in texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.query.cells import ValueInterval

__all__ = ["And", "Comparison", "IsNull", "Membership", "Or", "Predicate", "interval_of", "negated"]

Columns = Mapping[str, npt.NDArray[Any]]

_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "=": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}


@dataclass(frozen=True)
class Comparison:
    """A column compared with a number or truth value: ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``.

    A text is compared by ``=`` and ``!=`` alone.
    """

    column: str
    operator: str
    constant: float | str

    def __post_init__(self) -> None:
        if isinstance(self.constant, str) and self.operator not in ("=", "!="):
            raise ValueError(f"{self.operator} does not compare texts")
        if self.operator not in _COMPARE or self.constant != self.constant:
            raise ValueError(f"{self.operator} {self.constant} compares with nothing")

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it speaks of."""
        return frozenset((self.column,))

    def holds(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Where it is true, as broad as the columns are together."""
        values = columns[self.column]
        with np.errstate(invalid="ignore"):
            true: npt.NDArray[np.bool_] = _COMPARE[self.operator](_wide(values), self.constant)
        return true & _is_known(values)


@dataclass(frozen=True)
class Membership:
    """Whether a column is one of some constants, or none of them."""

    column: str
    constants: tuple[float, ...] | tuple[str, ...]
    is_negated: bool = False

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it speaks of."""
        return frozenset((self.column,))

    def holds(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Where it is true, as broad as the columns are together."""
        values = columns[self.column]
        inside = np.isin(_wide(values), np.array(self.constants, _kind(values)))
        return (~inside if self.is_negated else inside) & _is_known(values)


@dataclass(frozen=True)
class IsNull:
    """Whether a column is NULL, or is not."""

    column: str
    is_negated: bool = False

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it speaks of."""
        return frozenset((self.column,))

    def holds(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Where it is true, as broad as the columns are together."""
        known = _is_known(columns[self.column])
        return known if self.is_negated else ~known


@dataclass(frozen=True)
class And:
    """All of several predicates."""

    parts: "tuple[Predicate, ...]"

    @property
    def columns(self) -> frozenset[str]:
        """The columns that they speak of."""
        return frozenset().union(*(part.columns for part in self.parts))

    def holds(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Where it is true, as broad as the columns are together."""
        return reduce(np.logical_and, (part.holds(columns) for part in self.parts))


@dataclass(frozen=True)
class Or:
    """Any of several predicates."""

    parts: "tuple[Predicate, ...]"

    @property
    def columns(self) -> frozenset[str]:
        """The columns that they speak of."""
        return frozenset().union(*(part.columns for part in self.parts))

    def holds(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Where it is true, as broad as the columns are together."""
        return reduce(np.logical_or, (part.holds(columns) for part in self.parts))


Predicate = Comparison | Membership | IsNull | And | Or


def negated(predicate: Predicate) -> Predicate:
    """What is true where a predicate is false; where that is unknown, neither is."""
    match predicate:
        case Comparison(column, operator, constant):
            return Comparison(column, _OPPOSITE[operator], constant)
        case Membership(column, constants, is_negated):
            return Membership(column, constants, not is_negated)
        case IsNull(column, is_negated):
            return IsNull(column, not is_negated)
        case And(parts):
            return Or(tuple(negated(part) for part in parts))
        case Or(parts):
            return And(tuple(negated(part) for part in parts))


def interval_of(predicate: Predicate, column: str) -> tuple[ValueInterval | None, bool]:
    """The least interval of a column that holds whatever passes.

    Args:
        predicate: the predicate.
        column: the column.

    Returns:
        The interval, None where NULL passes too; and whether every value in it passes.
    """
    match predicate:
        case Comparison(name, operator, constant) if (
            name == column and operator != "!=" and not isinstance(constant, str)
        ):
            low = constant if operator in ("=", ">", ">=") else None
            high = constant if operator in ("=", "<", "<=") else None
            return ValueInterval(low, high, operator == ">", operator == "<"), True
        case Membership(name, constants, False) if name == column:
            numbers = [float(one) for one in constants]
            return ValueInterval(min(numbers), max(numbers)), len(set(numbers)) == 1
        case IsNull(name, True) if name == column:
            return ValueInterval(), True
        case Comparison(name) | Membership(name) if name == column:
            return ValueInterval(), False
        case And(parts):
            return _intersection([interval_of(part, column) for part in parts])
        case Or(parts):
            return _union([interval_of(part, column) for part in parts])
        case _:
            return None, False


def _intersection(
    parts: Sequence[tuple[ValueInterval | None, bool]],
) -> tuple[ValueInterval | None, bool]:
    known = [interval for interval, _ in parts if interval is not None]
    if not known:
        return None, False
    # At one end the open interval is the narrower one.
    lows = [(one.low, one.low_open) for one in known if one.low is not None]
    highs = [(one.high, not one.high_open) for one in known if one.high is not None]
    low, low_open = max(lows, default=(None, False))
    high, high_closed = min(highs, default=(None, True))
    exact = all(is_exact for _, is_exact in parts)
    return ValueInterval(low, high, low_open, not high_closed), exact


def _union(
    parts: Sequence[tuple[ValueInterval | None, bool]],
) -> tuple[ValueInterval | None, bool]:
    known = [interval for interval, _ in parts if interval is not None]
    if len(known) < len(parts):
        return None, False
    lows = [(-np.inf if one.low is None else one.low, one.low_open) for one in known]
    highs = [(np.inf if one.high is None else one.high, not one.high_open) for one in known]
    low, low_open = min(lows)
    high, high_closed = max(highs)
    has_low = all(one.low is not None for one in known)
    has_high = all(one.high is not None for one in known)
    return (
        ValueInterval(
            low if has_low else None,
            high if has_high else None,
            low_open and has_low,
            not high_closed and has_high,
        ),
        False,
    )


def _wide(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Floats as float64, in which DuckDB's constants are; whole numbers as they are."""
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _kind(values: npt.NDArray[Any]) -> type | None:
    return object if values.dtype.kind == "O" else None


def _is_known(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if values.dtype.kind == "f":
        known: npt.NDArray[np.bool_] = ~np.isnan(values)
        return known
    if values.dtype.kind == "O":
        return np.array([value is not None for value in values], bool)
    return np.ones(values.shape, bool)
