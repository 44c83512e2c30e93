"""Steps of colour for values: one diverging scale for values, one ramp for comparisons.

A step is a small number that a style sheet turns into a colour, so a view knows nothing of
light and dark.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

__all__ = ["STEPS", "Scale", "ramp"]

STEPS = 8
"""Steps on either side of zero: more cannot be told apart behind text."""


@dataclass(frozen=True)
class Scale:
    """A diverging scale around zero.

    Attributes:
        limit: the magnitude of the outermost steps, above zero.
    """

    limit: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"limit is {self.limit}; it must be a positive number.")

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Self:
        """The scale that reaches the greatest finite magnitude; 1 where all are zero."""
        known = [abs(value) for value in values if value is not None and math.isfinite(value)]
        return cls(max(known, default=0.0) or 1.0)

    def step(self, value: float | None) -> int | None:
        """-8 to 8, 0 for values near zero; None for NaN and values that are missing.

        >>> [Scale(2.0).step(value) for value in (2.0, -9.0, 0.1, 0.2, None)]
        [8, -8, 0, 1, None]
        """
        if value is None or math.isnan(value):
            return None
        size = min(STEPS, math.floor(min(abs(value) / self.limit, 1.0) * STEPS + 0.5))
        return -size if value < 0 else size


def ramp(values: Iterable[float | None]) -> tuple[int | None, ...]:
    """Steps 0 to 8 between the least and the greatest of some values; None where there is none.

    >>> ramp([1.0, None, 3.0, 2.0])
    (0, None, 8, 4)
    """
    given = list(values)
    known = [value for value in given if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low
    return tuple(
        None
        if value is None or not math.isfinite(value)
        else round((value - low) / span * STEPS)
        if span > 0
        else 0
        for value in given
    )
