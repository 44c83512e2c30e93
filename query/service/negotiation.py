"""Which form an answer takes, by ``?format=`` or the Accept header.

JSON is for people and small programs: NaN and infinities are null there. Arrow IPC and npy
carry the exact values.
"""

from collections.abc import Sequence
from enum import StrEnum
from types import MappingProxyType

from actstore.query.service.problems import HttpKind, ServiceError
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["MEDIA_TYPES", "OBJECT", "TABLE", "TENSOR", "Format", "choose_format"]


class Format(StrEnum):
    """A form of an answer, as ``?format=`` names it."""

    JSON = "json"
    ARROW = "arrow"
    NPY = "npy"
    CSV = "csv"


MEDIA_TYPES = MappingProxyType(
    {
        Format.JSON: "application/json",
        Format.ARROW: "application/vnd.apache.arrow.stream",
        Format.NPY: "application/x-npy",
        Format.CSV: "text/csv",
    }
)
"""Format -> media type."""

OBJECT = (Format.JSON,)
TABLE = (Format.JSON, Format.ARROW, Format.CSV)
TENSOR = (Format.JSON, Format.ARROW, Format.NPY)


def choose_format(asked: Sequence[str], accept: str | None, offers: Sequence[Format]) -> Format:
    """The form of an answer.

    Args:
        asked: the values of ``?format=``; at most one.
        accept: the Accept header; None for any form.
        offers: the forms that there are, the preferred one first.

    Raises:
        InvalidInput: ``?format=`` names none of them.
        ServiceError: the Accept header allows none of them.

    >>> choose_format([], "text/csv;q=0.5, application/vnd.apache.arrow.stream", TABLE).value
    'arrow'
    >>> choose_format([], "text/html, */*;q=0.1", TABLE).value
    'json'
    """
    if asked:
        if len(asked) == 1 and asked[0] in offers:
            return Format(asked[0])
        raise InvalidInput(
            f"format is {', '.join(asked)!r}; use one of {', '.join(offers)}.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    if accept is None or not accept.strip():
        return offers[0]
    ranges = _ranges(accept)
    best = max(offers, key=lambda offer: (_quality(offer, ranges), -offers.index(offer)))
    if _quality(best, ranges) <= 0:
        known = ", ".join(MEDIA_TYPES[offer] for offer in offers)
        raise ServiceError(
            HttpKind.NOT_ACCEPTABLE, f"Accept allows none of the forms of this resource: {known}."
        )
    return best


def _ranges(accept: str) -> dict[str, float]:
    """Media range -> quality."""
    found: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "q":
                try:
                    quality = min(max(float(value), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        if name:
            found[name.lower()] = quality
    return found


def _quality(offer: Format, ranges: dict[str, float]) -> float:
    """How much a form is wanted; the most specific range says it."""
    media = MEDIA_TYPES[offer]
    for name in (media, f"{media.partition('/')[0]}/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
