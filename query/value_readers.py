"""Canonical float32 values of a derived scalar, read where a search wants to look.

Three readers cover every scalar: *stored* values times a coefficient per unit, the *product* of
two of those, and anything else *derived* sequence by sequence. They give the same bits as
``derive`` does, so it does not matter which of them a search used.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from actstore.store.reader import StoredArray
from actstore.store.unit_grid import PAGE_ROWS

if TYPE_CHECKING:
    from actstore.query.derived import DerivedScalar
    from actstore.query.opening import OpenStore

__all__ = ["DerivedValues", "ProductValues", "StoredValues", "ValueReader", "derived_value"]

_KEPT_BYTES = 64 * 2**20
_DERIVED_WIDTH = 32


def derived_value(
    raw: npt.NDArray[np.float32], coefficient: npt.NDArray[np.float64] | np.float64
) -> npt.NDArray[np.float32]:
    """The canonical value of a rescaled one: the float64 product rounded once to float32.

    Both roundings are monotone, so the image of a raw maximum (minimum for negative
    coefficients) bounds the images of all values below it.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product: npt.NDArray[np.float32] = (raw.astype(np.float64) * coefficient).astype(np.float32)
    return product


class ValueReader(Protocol):
    """Reads the values of one scalar."""

    @property
    def chunk_width(self) -> int:
        """Columns that one read brings together."""
        ...

    @property
    def cells_per_row(self) -> int:
        """Values that are looked at to get one scattered row of a layer."""
        ...

    @property
    def source(self) -> str:
        """Where values come from, for people."""
        ...

    def block(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Rows ``start:stop`` of a segment, float32 ``(row, column)``.

        Args:
            segment: the segment.
            layer: the layer, 0 for a scalar outside the blocks.
            start: first row within the segment.
            stop: row after the last, at most the filled rows.
            chunks: chunks of ``chunk_width`` columns, side by side; all columns by default.
        """
        ...

    def column(
        self, segment: int, layer: int, start: int, stop: int, unit: int
    ) -> npt.NDArray[np.float32]:
        """One unit's rows ``start:stop`` of a segment, float32 ``(row,)``."""
        ...

    def extents(self, segment: int, length: int, cells: int) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of a segment's rows that are best read one after another.

        Args:
            segment: the segment.
            length: its filled rows.
            cells: values of a layer that a range should hold, about.
        """
        ...

    def rows(self, layer: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Ascending global rows, float32 ``(row, unit)``."""
        ...

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], unit: int
    ) -> npt.NDArray[np.float32]:
        """One unit at ascending rows of a segment, float32 ``(row,)``."""
        ...

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """Announce a :meth:`block` that will be read soon."""
        ...


class StoredValues:
    """A stored array times a coefficient per unit.

    Args:
        array: the array.
        coefficients: layer -> float64 ``(unit,)``.
        copy: the same values by column, for reads of a few units.
    """

    source = "stored"

    def __init__(
        self,
        array: StoredArray,
        coefficients: Callable[[int], npt.NDArray[np.float64]],
        copy: StoredArray | None = None,
    ) -> None:
        self._array = array
        self._spec = array.spec
        self._coefficients = coefficients
        self._columns = array if copy is None else copy

    @property
    def chunk_width(self) -> int:
        """Columns that one read brings together."""
        return self._columns.spec.chunk_width

    @property
    def cells_per_row(self) -> int:
        """A scattered row brings the checksum blocks around it."""
        return self._spec.checksum_rows * self._spec.columns

    def block(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.block`."""
        c = self._coefficients(layer)
        if chunks is None:
            raw = self._array.reader.window(segment, layer, start, stop)
            return derived_value(self._spec.dtype.to_float32(raw), c)
        width, columns = self.chunk_width, self._spec.columns
        raw = self._columns.reader.window(segment, layer, start, stop, chunks)
        wanted = (np.array(chunks)[:, None] * width + np.arange(width)).reshape(-1)
        inside = wanted < columns
        return derived_value(self._spec.dtype.to_float32(raw[:, inside]), c[wanted[inside]])

    def column(
        self, segment: int, layer: int, start: int, stop: int, unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.column`."""
        chunk, inside = divmod(unit, self.chunk_width)
        raw = self._columns.reader.window(segment, layer, start, stop, [chunk])[:, inside]
        return derived_value(self._spec.dtype.to_float32(raw), self._coefficients(layer)[unit])

    def extents(self, segment: int, length: int, cells: int) -> Iterator[tuple[int, int]]:
        """See :meth:`ValueReader.extents`."""
        step = max(1, cells // self._spec.columns // PAGE_ROWS) * PAGE_ROWS
        for start in range(0, length, step):
            yield start, min(start + step, length)

    def rows(self, layer: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.rows`."""
        raw = self._array.reader.rows(layer, tokens)
        return derived_value(self._spec.dtype.to_float32(raw), self._coefficients(layer))

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.cells`."""
        raw = self._columns.reader.cells(segment, layer, offsets, unit)
        return derived_value(self._spec.dtype.to_float32(raw), self._coefficients(layer)[unit])

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """See :meth:`ValueReader.prefetch`."""
        self._columns.reader.prefetch(segment, layer, start, stop, chunks)


class ProductValues:
    """The product of the values of two readers, in float64, rounded once."""

    source = "stored"

    def __init__(self, left: ValueReader, right: ValueReader) -> None:
        assert left.chunk_width == right.chunk_width, "chosen by the caller"
        self._left, self._right = left, right

    @property
    def chunk_width(self) -> int:
        """Columns that one read brings together."""
        return self._left.chunk_width

    @property
    def cells_per_row(self) -> int:
        """Both factors are looked at."""
        return self._left.cells_per_row + self._right.cells_per_row

    def block(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.block`."""
        return _product(
            self._left.block(segment, layer, start, stop, chunks),
            self._right.block(segment, layer, start, stop, chunks),
        )

    def column(
        self, segment: int, layer: int, start: int, stop: int, unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.column`."""
        return _product(
            self._left.column(segment, layer, start, stop, unit),
            self._right.column(segment, layer, start, stop, unit),
        )

    def extents(self, segment: int, length: int, cells: int) -> Iterator[tuple[int, int]]:
        """See :meth:`ValueReader.extents`."""
        return self._left.extents(segment, length, cells)

    def rows(self, layer: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.rows`."""
        return _product(self._left.rows(layer, tokens), self._right.rows(layer, tokens))

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.cells`."""
        return _product(
            self._left.cells(segment, layer, offsets, unit),
            self._right.cells(segment, layer, offsets, unit),
        )

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """See :meth:`ValueReader.prefetch`."""
        self._left.prefetch(segment, layer, start, stop, chunks)
        self._right.prefetch(segment, layer, start, stop, chunks)


class DerivedValues:
    """Any scalar: whole sequences are derived, and the last ones kept.

    Args:
        store: the open store.
        declared: the scalar.
    """

    def __init__(self, store: "OpenStore", declared: "DerivedScalar") -> None:
        self._store = store
        self._declared = declared
        self._units = int(np.prod(store.unit_shape(declared)))
        self._kept: OrderedDict[tuple[int, int], npt.NDArray[np.float32]] = OrderedDict()
        self._bytes = 0

    @property
    def source(self) -> str:
        """Where values come from, for people."""
        return self._store.source_of(self._declared)

    @property
    def chunk_width(self) -> int:
        """Columns whose pages are looked at together: deriving gives all of them anyway."""
        return _DERIVED_WIDTH

    @property
    def cells_per_row(self) -> int:
        """A scattered row costs its sequence."""
        rows = self._store.row_map
        mean = -(-sum(plan.counts.tokens for plan in self._store.reader.plans) // rows.n_sequences)
        return max(1, mean) * self._units

    def block(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.block`."""
        plan = self._store.reader.segment(segment)
        first = plan.first_token - plan.first_row
        begin = max(int(np.searchsorted(first, start, side="right")) - 1, 0)
        end = int(np.searchsorted(first, stop, side="left"))
        wanted: Any = slice(None) if chunks is None else self._columns(chunks)
        parts = [np.empty((0, self._units), np.float32)[:, wanted]]
        for index in range(begin, end):
            low, length = int(first[index]), int(plan.length[index])
            values = self._sequence(plan.first_sequence + index, layer)
            # What is wanted of a sequence goes on, not all of its units.
            parts.append(values[max(start - low, 0) : min(stop - low, length), wanted])
        return np.concatenate(parts)

    def _columns(self, chunks: Sequence[int]) -> npt.NDArray[np.int64]:
        width = self.chunk_width
        columns = (np.array(chunks)[:, None] * width + np.arange(width)).reshape(-1)
        return columns[columns < self._units]

    def column(
        self, segment: int, layer: int, start: int, stop: int, unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.column`."""
        chunk, inside = divmod(unit, self.chunk_width)
        return self.block(segment, layer, start, stop, [chunk])[:, inside]

    def extents(self, segment: int, length: int, cells: int) -> Iterator[tuple[int, int]]:
        """See :meth:`ValueReader.extents`: a sequence each, for what its layers share."""
        plan = self._store.reader.segment(segment)
        for first, count in zip(plan.first_token.tolist(), plan.length.tolist(), strict=True):
            yield first - plan.first_row, first - plan.first_row + count

    def rows(self, layer: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.rows`."""
        found = np.empty((len(tokens), self._units), np.float32)
        segments = tokens // self._store.reader.segment_rows
        for segment in np.unique(segments).tolist():
            plan = self._store.reader.segment(segment)
            inside = np.flatnonzero(segments == segment)
            index = np.searchsorted(plan.first_token, tokens[inside], side="right") - 1
            for number in np.unique(index).tolist():
                places = inside[index == number]
                values = self._sequence(plan.first_sequence + number, layer)
                found[places] = values[tokens[places] - int(plan.first_token[number])]
        return found

    def cells(
        self, segment: int, layer: int, offsets: npt.NDArray[np.int64], unit: int
    ) -> npt.NDArray[np.float32]:
        """See :meth:`ValueReader.cells`."""
        first = segment * self._store.reader.segment_rows
        return self.rows(layer, first + offsets)[:, unit]

    def prefetch(
        self, segment: int, layer: int, start: int, stop: int, chunks: Sequence[int]
    ) -> None:
        """What will be read is not known before it is derived."""

    def _sequence(self, sequence: int, layer: int) -> npt.NDArray[np.float32]:
        key = (sequence, layer)
        if key not in self._kept:
            values = self._store.derive_window(self._declared, sequence, layer)
            self._kept[key] = values
            self._bytes += values.nbytes
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(key)
        return self._kept[key]


def _product(
    left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore", over="ignore"):
        product: npt.NDArray[np.float32] = (
            left.astype(np.float64) * right.astype(np.float64)
        ).astype(np.float32)
    return product
