"""The grid of values that is described unit by unit: an array's, or a derived scalar's.

Everything that summarises units (tiles, zone files, lists, the compacted index) needs to know
how many there are, how rows fall into pages and segments, and how values compare; not where the
values themselves are kept, if they are.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

from actstore.store.vocabulary import PassType

if TYPE_CHECKING:
    from actstore.store.layout import StoredDtype

__all__ = ["PAGE_ROWS", "UnitGrid"]

PAGE_ROWS = 512
"""Token rows under one zone-map entry."""


class UnitGrid(ABC):
    """Values ``(layer, token, *unit_shape)`` in segments, described unit by unit.

    Attributes:
        pass_type: forward or backward.
        layers: number of layers, or None for a place outside the blocks.
        unit_shape: sizes of the axes after the token axis.
        dtype: of the values that are described.
        segment_rows: S, token rows of a segment; a multiple of 512.
    """

    pass_type: PassType
    layers: int | None
    unit_shape: tuple[int, ...]
    dtype: "StoredDtype"
    segment_rows: int

    @property
    @abstractmethod
    def label(self) -> str:
        """The location's or the scalar's name."""

    @property
    @abstractmethod
    def key(self) -> str:
        """The path below ``zones/``."""

    @property
    @abstractmethod
    def has_zones(self) -> bool:
        """Whether units have zone maps, lists and moments."""

    @property
    def has_histogram(self) -> bool:
        """Whether units have histograms."""
        return False

    @property
    @abstractmethod
    def chunk_rows(self) -> int:
        """Token rows that lie together; divides ``segment_rows``."""

    @property
    @abstractmethod
    def chunk_width(self) -> int:
        """Columns that lie together."""

    @cached_property
    def columns(self) -> int:
        """Values per token and layer."""
        return math.prod(self.unit_shape)

    @property
    def layer_count(self) -> int:
        """Number of tensors: 1 for a place outside the blocks."""
        return 1 if self.layers is None else self.layers

    @cached_property
    def row_chunks(self) -> int:
        """Chunks along the tokens of a segment."""
        return self.segment_rows // self.chunk_rows

    @cached_property
    def column_chunks(self) -> int:
        """Chunks along the columns."""
        return -(-self.columns // self.chunk_width)

    @cached_property
    def pages(self) -> int:
        """Pages of a segment."""
        return self.segment_rows // PAGE_ROWS

    def zone_path(self, segment: int) -> str:
        """The checked file that describes a segment's units."""
        return f"zones/{self.key}/{segment:06d}.sections"

    def present_row_chunks(self, rows: int) -> int:
        """Chunks along the tokens that hold a filled row; the others are left out."""
        return -(-rows // self.chunk_rows)
