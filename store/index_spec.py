"""The index of a derived scalar: what is kept of values that are not kept themselves."""

import math
from dataclasses import dataclass
from typing import Any

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.layout import StoredDtype
from actstore.store.unit_grid import PAGE_ROWS, UnitGrid
from actstore.store.vocabulary import PassType

__all__ = ["HISTOGRAM", "INDEX_PARTS", "ZONES", "IndexSpec"]

ZONES = "zones"
"""Zone maps, lists, moments and counts."""

HISTOGRAM = "histogram"
"""Counts of values by size."""

INDEX_PARTS = (ZONES, HISTOGRAM)
"""What an index may hold."""

_CHUNK_ROWS = 4096
_CHUNK_WIDTH = 32


@dataclass(frozen=True)
class IndexSpec(UnitGrid):
    """The index of one derived scalar over a store's rows.

    It describes the scalar's canonical values, float32, as the zone files of an array describe
    stored ones; the values are derived again when they are looked at.

    Attributes:
        scalar: its name.
        pass_type: ``backward`` for the gradient of the objective with respect to it.
        layers: number of layers, or None for a scalar outside the blocks.
        unit_shape: sizes of its axes after the token axis.
        segment_rows: S of the store.
        set_name: the set that it is.
        parts: ``zones``, ``histogram`` or both.
        fingerprint: digest of its definition and of ``made_from``.
        made_from: keys of the stored arrays that its values were derived from.
        objective: whose gradients those are, if any are gradients.
    """

    scalar: str
    pass_type: PassType
    layers: int | None
    unit_shape: tuple[int, ...]
    segment_rows: int
    set_name: str
    parts: tuple[str, ...]
    fingerprint: str
    made_from: tuple[str, ...]
    objective: str | None = None
    dtype: StoredDtype = StoredDtype.FLOAT32

    def __post_init__(self) -> None:
        if not self.scalar.isidentifier() or not self.set_name or not self.unit_shape:
            raise _invalid(
                f"An index has a scalar, a set and units; this one has {self.scalar!r}, "
                f"{self.set_name!r} and {self.unit_shape}."
            )
        if not self.parts or set(self.parts) - set(INDEX_PARTS):
            raise _invalid(f"An index holds {' or '.join(INDEX_PARTS)}, not {self.parts}.")
        if self.segment_rows <= 0 or self.segment_rows % PAGE_ROWS:
            raise _invalid(
                f"segment_rows is {self.segment_rows}; it must be a multiple of {PAGE_ROWS}."
            )

    @property
    def label(self) -> str:
        """The scalar's name."""
        return self.scalar

    @property
    def key(self) -> str:
        """``<scalar>/<pass>@<set>``: the path below ``zones/``."""
        return f"{self.scalar}/{self.pass_type}@{self.set_name}"

    @property
    def has_zones(self) -> bool:
        """Whether it holds more than histograms."""
        return ZONES in self.parts

    @property
    def has_histogram(self) -> bool:
        """Whether it holds histograms."""
        return HISTOGRAM in self.parts

    @property
    def chunk_rows(self) -> int:
        """Token rows that are derived and described together."""
        return math.gcd(self.segment_rows, _CHUNK_ROWS)

    @property
    def chunk_width(self) -> int:
        """Columns whose pages a search looks at together."""
        return _CHUNK_WIDTH

    def to_json(self) -> dict[str, Any]:
        """The members of a set record that describe this index."""
        return {
            "scalar": self.scalar,
            "pass": self.pass_type.value,
            "layers": self.layers,
            "unit_shape": list(self.unit_shape),
            "set": self.set_name,
            "parts": list(self.parts),
            "fingerprint": self.fingerprint,
            "made_from": list(self.made_from),
            "objective": self.objective,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], segment_rows: int) -> "IndexSpec":
        """The spec that :meth:`to_json` described."""
        return cls(
            scalar=fields["scalar"],
            pass_type=PassType(fields["pass"]),
            layers=fields["layers"],
            unit_shape=tuple(fields["unit_shape"]),
            # A set's record is checked without the store's manifest too.
            segment_rows=segment_rows or PAGE_ROWS,
            set_name=fields["set"],
            parts=tuple(fields["parts"]),
            fingerprint=fields["fingerprint"],
            made_from=tuple(fields["made_from"]),
            objective=fields["objective"],
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
