"""Query parameters that several resources share."""

from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import Field

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = [
    "MAX_INDEX",
    "MAX_ROW",
    "Distinct",
    "Dtype",
    "Indices",
    "LayerPath",
    "Layers",
    "NamePath",
    "PassName",
    "Rows",
    "Special",
    "UnitPath",
    "WhereTokens",
    "unit_numbers",
]

MAX_INDEX = 2**31 - 1
MAX_ROW = 2**53
"""Whole numbers that JSON readers hold exactly."""

_Index = Annotated[int, Field(ge=0, le=MAX_INDEX)]
_Row = Annotated[int, Field(ge=0, le=MAX_ROW)]

NamePath = Annotated[str, Path(max_length=200, description="a scalar or a location")]
LayerPath = Annotated[int, Path(ge=0, le=MAX_INDEX)]
UnitPath = Annotated[int, Path(ge=0, le=MAX_INDEX)]
Layers = Annotated[
    list[_Index] | None, Query(max_length=1024, description="only this layer; repeatable")
]
Indices = Annotated[
    list[_Index] | None, Query(max_length=4096, description="only this one; repeatable")
]
Rows = Annotated[list[_Row] | None, Query(max_length=10_000, description="repeatable")]
Dtype = Annotated[Literal["float64", "float32", "float16"], Query(description="of the values")]
PassName = Annotated[
    Literal["forward", "backward"],
    Query(description="backward: the gradient of the store's objective"),
]
Special = Annotated[bool, Query(description="let position 0 and special tokens answer too")]
Distinct = Annotated[
    Literal["sequence", "document", "none"], Query(description="one answer of each")
]
WhereTokens = Annotated[
    str | None,
    Query(
        max_length=20_000,
        description="SQL predicate over the columns of tokens, sequences and documents",
    ),
]


def unit_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a unit as a query names it: ``3:712``, or ``3:2:17``.

    Raises:
        InvalidInput: it is not numbers with colons between.

    >>> unit_numbers("3:712")
    (3, 712)
    """
    parts = text.split(":")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InvalidInput(
            f"unit is {text[:100]!r}; write layer:unit, such as 3:712, or layer:head:channel.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return tuple(int(part) for part in parts)
