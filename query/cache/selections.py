"""Slices of the batch and position axes, as whole numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["Picks", "pick"]


@dataclass(frozen=True, eq=False)
class Picks:
    """Places along one axis.

    Attributes:
        indices: int64 ``(place,)``, from 0.
        drops_axis: whether the one place stands without its axis.
    """

    indices: npt.NDArray[np.int64]
    drops_axis: bool = False


def pick(given: Any, length: int, axis: str) -> Picks:
    """The places that a slice means.

    Args:
        given: a whole number, which drops the axis; a :class:`slice`; a tuple of its
            arguments, so that ``(2,)`` is ``:2``; a list or one-dimensional array of whole
            numbers; None for all.
        length: of the axis.
        axis: its name, for messages.

    Raises:
        InvalidInput: something else, or a place outside the axis.

    >>> pick((1, 6, 2), 10, "position").indices.tolist()
    [1, 3, 5]
    """
    if given is None:
        return Picks(np.arange(length))
    if isinstance(given, tuple):
        given = _slice(given, axis)
    if isinstance(given, slice):
        try:
            return Picks(np.arange(length)[given])
        except (TypeError, ValueError):
            raise _invalid(f"The slice {given!r} of the {axis} axis cannot be used.") from None
    try:
        places = np.asarray(given)
    except (TypeError, ValueError):
        places = np.empty(0, object)
    if places.size == 0 and isinstance(given, list | np.ndarray):
        places = places.astype(np.int64)
    if places.ndim > 1 or places.dtype.kind not in "iu":
        raise _invalid(
            f"The slice of the {axis} axis is {given!r}; give a whole number, a slice, a tuple of "
            "its arguments, or a list of whole numbers."
        )
    places = places.astype(np.int64)
    outside = (places < -length) | (places >= length)
    if outside.any():
        place = int(places[outside].flat[0]) if places.ndim else int(places)
        raise _invalid(f"There is no {axis} {place}; there are {length} of them.")
    places = np.where(places < 0, places + length, places)
    return Picks(places.reshape(-1), drops_axis=places.ndim == 0)


def _slice(given: tuple[Any, ...], axis: str) -> slice:
    whole = all(one is None or isinstance(one, int | np.integer) for one in given)
    if not 1 <= len(given) <= 3 or not whole:
        raise _invalid(
            f"The slice of the {axis} axis is {given!r}; a tuple holds one to three arguments "
            "of slice()."
        )
    return slice(*given)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
