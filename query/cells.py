"""The values of a scalar that lie in an interval, with their places.

Where the scalar has zone maps, pages and segments whose bounds miss the interval are not read.
Everything is counted before it is looked at, so that a question cannot cost more than it may.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived import DerivedScalar
from actstore.query.planner import few_rows, row_windows
from actstore.query.scored import Scored, score
from actstore.query.selection import RowSelection, UnitSelection
from actstore.query.value_readers import DerivedValues
from actstore.query.zoned import Bounds, ZonedValues
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.unit_grid import PAGE_ROWS

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore
    from actstore.query.search import Window

__all__ = ["CellBatch", "CellEffort", "ValueInterval", "select_cells"]

_FEW_UNITS = 32
_WINDOW_CELLS = 4_000_000


@dataclass(frozen=True)
class ValueInterval:
    """Numbers between two ends; NaN is in none.

    Attributes:
        low: the lower end; None for none.
        high: the upper end; None for none.
        low_open: whether the lower end itself is left out.
        high_open: whether the upper end itself is left out.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def contains(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which values lie inside, compared as float64."""
        wide = values.astype(np.float64)
        inside: npt.NDArray[np.bool_] = ~np.isnan(wide)
        with np.errstate(invalid="ignore"):
            if self.low is not None:
                inside &= wide > self.low if self.low_open else wide >= self.low
            if self.high is not None:
                inside &= wide < self.high if self.high_open else wide <= self.high
        return inside

    def may_meet(self, bounds: Bounds) -> npt.NDArray[np.bool_]:
        """Which zones may hold a value inside, ``(unit, zone)``."""
        reached: npt.NDArray[np.bool_] = bounds.filled.copy()
        if self.low is not None:
            high = bounds.maximum.astype(np.float64)
            reached &= high > self.low if self.low_open else high >= self.low
        if self.high is not None:
            low = bounds.minimum.astype(np.float64)
            reached &= low < self.high if self.high_open else low <= self.high
        return reached


@dataclass(frozen=True)
class CellBatch:
    """Some values of one layer; every array is ``(cell,)``.

    Attributes:
        layer: the layer, 0 outside the blocks.
        tokens: int64 global rows.
        units: int64 columns.
        values: float32 canonical values.
    """

    layer: int
    tokens: npt.NDArray[np.int64]
    units: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


@dataclass
class CellEffort:
    """What selecting cells did.

    Attributes:
        plan: ``zones``, ``rows`` or ``scan``.
        cells: values looked at.
        pages_read: pages of 512 rows x one chunk of units.
        pages_pruned: those that their bounds ruled out.
        bounded_by: what the bounds were of.
    """

    plan: str = "zones"
    cells: int = 0
    pages_read: int = 0
    pages_pruned: int = 0
    bounded_by: str = field(default="nothing")


def select_cells(
    store: "OpenStore",
    declared: DerivedScalar,
    units: UnitSelection,
    rows: RowSelection,
    interval: ValueInterval | None,
    *,
    max_cells: int,
    deadline: float | None = None,
    effort: CellEffort | None = None,
) -> Iterator[CellBatch]:
    """Every value of some units at some rows that lies in an interval, each once, in no order.

    Args:
        store: the open store.
        declared: the scalar.
        units: layers and units.
        rows: rows.
        interval: what values may be; None for all, NaN among them. Pairs and latents that do not
            exist are no values.
        max_cells: most values to look at.
        deadline: of ``time.monotonic()``; nothing more is read after it.
        effort: told what was done.

    Raises:
        InvalidInput: more values would have to be looked at, or the deadline has passed.
        Unavailable: the store cannot derive the scalar.
    """
    few = all(len(units.of(layer)) < _FEW_UNITS for layer in units.layers)
    scored = score(store, declared, few_units=few)
    effort = CellEffort() if effort is None else effort
    effort.bounded_by = scored.bounded_by
    search = _Selection(scored, units, rows, interval, max_cells, deadline, effort)
    return search.batches()


class _Selection:
    def __init__(
        self,
        scored: Scored,
        units: UnitSelection,
        rows: RowSelection,
        interval: ValueInterval | None,
        max_cells: int,
        deadline: float | None,
        effort: CellEffort,
    ) -> None:
        self._scored = scored
        self._store = scored.store
        self._values = scored.values
        self._units = units
        self._rows = rows
        self._interval = interval
        self._max_cells = max_cells
        self._deadline = deadline
        self._effort = effort
        declared = scored.declared
        # Padding of pairs and of narrower layers' latents is NaN and stands for nothing.
        self._is_padded = declared.is_pair_shaped or declared.is_flattened
        self._is_padded |= declared.latents is not None

    def batches(self) -> Iterator[CellBatch]:
        """The cells, by the cheapest plan."""
        zoned = self._scored.zoned
        if self._rows.rows is not None and few_rows(self._values, self._rows, [self._units]):
            self._effort.plan = "rows"
            self._count(len(self._rows.rows) * self._units.columns * len(self._units.layers))
            found = row_windows(self._values, self._store.reader, self._rows, self._units)
            return self._from_windows(found)
        if zoned is None or self._interval is None:
            self._effort.plan = "scan"
            self._count(self._scanned_cells())
            return self._from_scan()
        return self._from_zones(zoned, self._interval)

    def _count(self, cells: int) -> None:
        self._effort.cells += cells
        if self._effort.cells > self._max_cells:
            raise InvalidInput(
                f"{self._scored.declared.name} would have to be looked at in more than "
                f"{self._max_cells:,} places. Restrict layers, units or rows, or ask for a "
                "narrower interval of values.",
                kind=ErrorKind.TOO_LARGE,
            )
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise InvalidInput(
                f"Looking at {self._scored.declared.name} took longer than it may. Restrict "
                "layers, units or rows.",
                kind=ErrorKind.SQL_TIMEOUT,
            )

    def _scanned_cells(self) -> int:
        """Values that a scan looks at: whole chunks of units, or all units where they are derived."""
        reader, rows = self._store.reader, self._rows
        if rows.rows is None:
            records = reader.commits["base"]
            count = sum(records[segment].rows for segment in rows.segments(reader.segments))
        else:
            count = len(rows.rows)
        return count * sum(
            self._read_columns(self._units.of(layer)) for layer in self._units.layers
        )

    def _read_columns(self, units: npt.NDArray[np.int64]) -> int:
        if isinstance(self._values, DerivedValues):
            return self._units.columns if len(units) else 0
        width = self._values.chunk_width
        return min(len(np.unique(units // width)) * width, self._units.columns)

    def _from_scan(self) -> Iterator[CellBatch]:
        """The cells of all allowed rows; counted already."""
        reader, width = self._store.reader, self._values.chunk_width
        members = {layer: self._units.of(layer) for layer in self._units.layers}
        chunks = {layer: np.unique(units // width) for layer, units in members.items()}
        for segment in self._rows.segments(reader.segments):
            length = reader.commits["base"][segment].rows
            allowed = self._rows.allowed(segment, length)
            for start, stop in self._values.extents(segment, length, _WINDOW_CELLS):
                inside = np.flatnonzero(allowed[start:stop])
                if not len(inside):
                    continue
                tokens = segment * reader.segment_rows + start + inside
                for layer, units in members.items():
                    if not len(units):
                        continue
                    self._count(0)
                    of_layer = chunks[layer]
                    block = self._values.block(segment, layer, start, stop, of_layer.tolist())
                    column = np.searchsorted(of_layer, units // width) * width + units % width
                    yield self._batch(layer, tokens, units, block[inside][:, column])

    def _from_windows(self, found: "Iterator[Window]") -> Iterator[CellBatch]:
        """The cells of rows that were read by themselves; counted already."""
        for window in found:
            self._count(0)
            chosen = self._units.of(window.layer)
            yield self._batch(window.layer, window.tokens, chosen, window.of(chosen))

    def _batch(
        self,
        layer: int,
        tokens: npt.NDArray[np.int64],
        units: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
    ) -> CellBatch:
        """The cells of ``values (row, unit)`` that are wanted."""
        if self._interval is not None:
            inside = self._interval.contains(values)
        elif self._is_padded:
            inside = ~np.isnan(values)
        else:
            inside = np.ones(values.shape, bool)
        row, column = np.nonzero(inside)
        return CellBatch(layer, tokens[row], units[column], values[row, column])

    def _from_zones(self, zoned: ZonedValues, interval: ValueInterval) -> Iterator[CellBatch]:
        place = {segment: number for number, segment in enumerate(zoned.segments)}
        segments = [s for s in self._rows.segments(zoned.segments) if s in place]
        for layer in self._units.layers:
            units = self._units.of(layer)
            if not len(units):
                continue
            met = interval.may_meet(zoned.segment_bounds(layer, units, special=False))
            for segment in segments:
                members = units[met[:, place[segment]]]
                yield from self._pages(zoned, interval, layer, segment, units, members)
            if self._rows.special:
                met = interval.may_meet(zoned.segment_bounds(layer, units, special=True))
                for segment in segments:
                    yield from self._special(layer, segment, units[met[:, place[segment]]])

    def _pages(
        self,
        zoned: ZonedValues,
        interval: ValueInterval,
        layer: int,
        segment: int,
        units: npt.NDArray[np.int64],
        members: npt.NDArray[np.int64],
    ) -> Iterator[CellBatch]:
        """The cells of ordinary rows in a segment, of the units whose bounds meet the interval."""
        length = zoned.rows_of(segment)
        total = len(np.unique(units // self._values.chunk_width)) * -(-length // PAGE_ROWS)
        self._effort.pages_pruned += total
        if not len(members):
            return
        met = interval.may_meet(zoned.page_bounds(segment, layer, members))
        allowed = self._rows.within(segment, length) & ~self._rows.special_rows(segment)[:length]
        first, width = segment * zoned.segment_rows, self._values.chunk_width
        for page, end in _runs(met):
            start, stop = page * PAGE_ROWS, min(end * PAGE_ROWS, length)
            inside = np.flatnonzero(allowed[start:stop])
            if not len(inside):
                continue
            wanted = members[met[:, page]]
            chunks = np.unique(wanted // width)
            self._effort.pages_read += len(chunks) * (end - page)
            self._effort.pages_pruned -= len(chunks) * (end - page)
            self._count(len(inside) * min(len(chunks) * width, self._units.columns))
            block = self._values.block(segment, layer, start, stop, chunks.tolist())
            column = np.searchsorted(chunks, wanted // width) * width + wanted % width
            yield self._batch(layer, first + start + inside, wanted, block[inside][:, column])

    def _special(
        self, layer: int, segment: int, members: npt.NDArray[np.int64]
    ) -> Iterator[CellBatch]:
        """The cells of special rows in a segment."""
        if not len(members):
            return
        length = self._store.reader.commits["base"][segment].rows
        within = self._rows.within(segment, length) & self._rows.special_rows(segment)[:length]
        offsets = np.flatnonzero(within)
        if not len(offsets):
            return
        tokens = segment * self._store.reader.segment_rows + offsets
        if len(members) < _FEW_UNITS:
            self._count(len(offsets) * len(members))
            columns = [self._values.cells(segment, layer, offsets, int(one)) for one in members]
            yield self._batch(layer, tokens, members, np.stack(columns, axis=1))
        else:
            self._count(len(offsets) * self._units.columns)
            yield self._batch(layer, tokens, members, self._values.rows(layer, tokens)[:, members])


def _runs(met: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Ranges of pages that the same units have to be read at, from ``(unit, page)``."""
    reached = met.any(axis=0)
    same = np.zeros(met.shape[1], bool)
    same[1:] = (met[:, 1:] == met[:, :-1]).all(axis=0)
    begins = np.flatnonzero(reached & ~same)
    for begin in begins.tolist():
        end = begin + 1
        while end < met.shape[1] and same[end]:
            end += 1
        yield begin, end
