"""Arguments of the calls as paths and queries of requests."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np

from actstore.query.derived import DerivedScalar
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = [
    "API",
    "COMPARISON",
    "CONTEXTS",
    "EXPLANATION",
    "INTERVAL",
    "RANKING",
    "STATISTICS",
    "THRESHOLD",
    "Numbers",
    "ScalarName",
    "plain_values",
    "query_pairs",
    "real_numbers",
    "require_options",
    "resource_path",
    "scalar_name",
    "unit_pairs",
    "whole_index",
    "whole_numbers",
    "window_sizes",
]

API = "/api/v1"
Numbers = int | Iterable[int] | None
ScalarName = str | DerivedScalar

_PLURALS = {
    "layers": "layer",
    "neurons": "neuron",
    "heads": "head",
    "latents": "latent",
    "channels": "channel",
    "attended": "attended",
    "tokens": "token",
    "sequences": "sequence",
}
"""Arguments of the calls -> repeated keys of a query."""

RANKING = frozenset(
    {
        "k",
        "layers",
        "neurons",
        "heads",
        "latents",
        "channels",
        "attended",
        "tokens",
        "where",
        "units",
        "per",
        "distinct",
        "largest",
        "by",
        "normalise",
        "combine",
        "special",
        "pass_type",
        "max_cells",
    }
)
COMPARISON = RANKING - {"per", "normalise", "combine"}
EXPLANATION = RANKING - {"max_cells"}
INTERVAL = frozenset({"above", "below", "at_least", "at_most"})
THRESHOLD = INTERVAL | (RANKING - {"k", "per", "distinct", "largest", "by", "normalise", "combine"})
STATISTICS = frozenset(
    {"layers", "neurons", "heads", "latents", "channels", "units", "pass_type", "quantiles"}
)
CONTEXTS = frozenset({"k", "kind", "distinct", "window", "where", "special", "pass_type", "seed"})


def resource_path(resource: str, name: Any) -> str:
    """The path of what a name names, whatever the name holds.

    Raises:
        InvalidInput: it is no name.
    """
    if not isinstance(name, str) or not name or name in (".", ".."):
        raise _invalid(f"The name is {name!r}; give that of a scalar or a location.")
    return f"{API}/{resource}/{quote(name, safe='')}"


def scalar_name(name: ScalarName) -> str:
    """What the server knows a scalar by; a declaration made here it does not know."""
    return name.name if isinstance(name, DerivedScalar) else name


def query_pairs(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Arguments as the keys and values of a query; None is left out."""
    query: list[tuple[str, str]] = []
    for name, value in options.items():
        if value is None:
            continue
        if name in _PLURALS:
            query += [(_PLURALS[name], str(number)) for number in whole_numbers(value, name)]
        elif name == "units" and not isinstance(value, str):
            query.append((name, unit_pairs(value)))
        elif isinstance(value, bool | np.bool_):
            query.append((name, "true" if value else "false"))
        elif isinstance(value, str | int | np.integer):
            query.append((name, str(value)))
        else:
            raise _invalid(f"{name} is {value!r}; give text, a whole number, or True or False.")
    return query


def whole_numbers(values: Any, name: str) -> list[int]:
    """One number or several as a list.

    Raises:
        InvalidInput: they are none: a query without them would mean all.
    """
    given = [values] if isinstance(values, int | np.integer) else values
    try:
        numbers = [operator.index(number) for number in given]
    except TypeError:
        raise _invalid(f"{name} is {values!r}; give whole numbers.") from None
    if not numbers:
        raise _invalid(f"{name} is empty; leave it out for all, or name some.")
    return numbers


def real_numbers(values: Any, name: str) -> list[str]:
    """One number or several, exactly as they are.

    Raises:
        InvalidInput: they are none.
    """
    given = values if isinstance(values, Iterable) else [values]
    numbers = []
    for value in given:
        is_number = isinstance(value, int | float | np.floating | np.integer)
        if not is_number or isinstance(value, bool):
            raise _invalid(f"{name} is {value!r}; give numbers.")
        numbers.append(repr(float(value)))
    if not numbers:
        raise _invalid(f"{name} is empty; leave it out for the usual ones, or name some.")
    return numbers


def whole_index(value: Any) -> int:
    """The number of a layer or a unit.

    Raises:
        InvalidInput: it is no whole number.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidInput(
            f"{value!r} is no unit or layer; give a whole number.", kind=ErrorKind.UNKNOWN_UNIT
        ) from None


def unit_pairs(units: Any) -> str:
    """Pairs of layer and unit as ``3:712,4:1``.

    Raises:
        InvalidInput: they are no pairs.
    """
    given = units if isinstance(units, Iterable) else ()
    pairs = [whole_numbers(pair, "units") for pair in given]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InvalidInput(
            f"units is {units!r}; give (layer, unit) pairs or a predicate.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    return ",".join(f"{layer}:{unit}" for layer, unit in pairs)


def window_sizes(window: Any) -> tuple[int, int]:
    """Tokens before and after.

    Raises:
        InvalidInput: they are not two whole numbers from 0.
    """
    sizes = whole_numbers(window, "window")
    if len(sizes) != 2 or min(sizes) < 0:
        raise _invalid(f"window is {window!r}; give (tokens before, tokens after).")
    return sizes[0], sizes[1]


def plain_values(parameters: Any) -> Any:
    """Parameters with numpy's numbers as Python's own."""
    if isinstance(parameters, dict):
        return {str(name): plain_values(value) for name, value in parameters.items()}
    if isinstance(parameters, list | tuple | np.ndarray):
        return [plain_values(value) for value in parameters]
    return parameters.item() if isinstance(parameters, np.generic) else parameters


def require_options(call: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
    """Check the names of a call's options, as Python does.

    Raises:
        TypeError: the call has no such option.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
