"""Choosing and running the plan that answers a ranking with the least reading.

In order of preference: *lists*, the units' proven entries; *rows*, the rows themselves
where a predicate leaves few; *bounds*, branch and bound over zone maps; *scan*, every
value, for what has no zone maps or for more groups than searches would be worth. All
keep their answers in :class:`Ranking`, so they agree to the last tie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.latent_search import search_latents
from actstore.query.ranking import Ranking
from actstore.query.search import (
    Effort,
    Window,
    search_bounds,
    search_lists,
    search_windows,
)
from actstore.query.selection import RowSelection, UnitSelection
from actstore.query.value_readers import DerivedValues, ValueReader
from actstore.query.zoned import ZonedValues
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.unit_grid import PAGE_ROWS

if TYPE_CHECKING:
    from actstore.query.scored import Scored
    from actstore.store.latent_reader import LatentArray
    from actstore.store.reader import StoreReader

__all__ = [
    "SCAN_CELLS",
    "Group",
    "Outcome",
    "choose_plan",
    "count_cells",
    "few_rows",
    "rank",
    "row_windows",
    "windows",
]

SCAN_CELLS = 4_000_000_000
"""Values that a query may look at without an index: about a minute of one core."""

_WINDOW_CELLS = 4_000_000
_ROWS_CELLS = 100_000_000
_SEARCHES = 32
"""Groups that are searched one by one before one scan for all of them is cheaper."""

_LOOSE_SHARE = 0.3
"""Share of the pages after which a scan takes over where bounds are not attained."""

_LEAST_PAGES = 128
"""Pages below which nobody waits for either."""

_PLANS = ("scan", "bounds", "lists+bounds", "rows", "column", "lists")

Group = tuple[UnitSelection, Ranking]
"""Units that may answer, and the ranking that they fill."""


@dataclass
class Outcome:
    """How rankings were filled.

    Attributes:
        plans: every plan that was used.
        source: where the values came from.
        effort: pages read and ruled out.
        cells: values looked at by row reads and scans.
    """

    plans: set[str] = field(default_factory=set)
    source: str = "stored"
    effort: Effort = field(default_factory=Effort)
    cells: int = 0

    @property
    def plan(self) -> str:
        """The most laborious plan that was needed."""
        return next((plan for plan in _PLANS if plan in self.plans), "lists")


def rank(
    scored: "Scored",
    rows: RowSelection,
    groups: Sequence[Group],
    max_cells: int,
    outcome: Outcome,
) -> None:
    """Fill the ranking of every group of units, exactly.

    Raises:
        InvalidInput: only a scan can answer, and it would look at more than ``max_cells``.
        Unavailable: the store cannot derive the scalar.
    """
    reader = scored.store.reader
    kept = _kept_latents(scored, [units for units, _ in groups])
    if kept:
        search_latents(kept, groups, rows, reader.segments, outcome)
        return
    outcome.source = scored.source
    zoned = scored.zoned
    if zoned is None:
        _scan(scored, rows, groups, max_cells, outcome)
        return
    still_open: list[tuple[UnitSelection, Ranking, bool]] = []
    for units, ranking in groups:
        rest = search_lists(zoned, units, rows, ranking)
        if rest:
            open_units = UnitSelection(tuple(rest), units.columns, None, rest)
            still_open.append((open_units, ranking, ranking.is_full))
        else:
            outcome.plans.add("lists")
    pending = [(units, ranking) for units, ranking, _ in still_open]
    if not pending:
        return
    if rows.rows is not None and few_rows(scored.values, rows, [units for units, _ in pending]):
        outcome.plans.add("rows")
        found = row_windows(scored.values, reader, rows, union(pending))
        outcome.cells += search_windows(found, pending)
    elif (
        len(pending) > _SEARCHES
        and count_cells(scored, rows, [units for units, _ in pending]) <= max_cells
    ):
        _scan(scored, rows, pending, max_cells, outcome)
    else:
        for units, ranking, seeded in still_open:
            cells = count_cells(scored, rows, [units])
            if needs_most_pages(scored, rows, units, ranking.k) and cells <= max_cells:
                _scan(scored, rows, [(units, ranking)], max_cells, outcome)
                continue
            _search(scored, zoned, rows, (units, ranking), seeded, max_cells, outcome)


def needs_most_pages(scored: "Scored", rows: RowSelection, units: UnitSelection, k: int) -> bool:
    """Whether a search would read so many of some units' pages that a scan of them is cheaper.

    About a page is read for every answer, and the least page of a scan costs as much.
    """
    records = scored.store.reader.commits["base"]
    segments = rows.segments(scored.store.reader.segments)
    pages = units.total * sum(-(-records[segment].rows // PAGE_ROWS) for segment in segments)
    return k >= pages >= _LEAST_PAGES


def choose_plan(
    scored: "Scored",
    rows: RowSelection,
    groups: Sequence[UnitSelection],
    k: int,
    *,
    by_token: bool = False,
) -> tuple[str, str | None]:
    """The plan that :func:`rank` would begin with, and what follows if that is not enough.

    Args:
        scored: what is ranked.
        rows: rows that may answer.
        groups: the units of each ranking.
        k: answers wanted of each.
        by_token: whether every token has answers of its own.
    """
    if by_token:
        return "rows", None
    if _kept_latents(scored, groups):
        return "column", None
    zoned = scored.zoned
    if zoned is None:
        return "scan", None
    rest: tuple[str, str | None] = ("bounds", None if zoned.is_tight else "scan")
    if rows.rows is not None and few_rows(scored.values, rows, groups):
        rest = ("rows", None)
    elif len(groups) > _SEARCHES or (
        groups and all(needs_most_pages(scored, rows, units, k) for units in groups)
    ):
        rest = ("scan", None)
    layer = groups[0].layers[0] if groups and groups[0].layers else None
    if layer is None or not zoned.has_lists:
        return rest
    return "lists", rest[0]


def _search(
    scored: "Scored",
    zoned: ZonedValues,
    rows: RowSelection,
    group: Group,
    seeded: bool,
    max_cells: int,
    outcome: Outcome,
) -> None:
    """Branch and bound; where bounds turn out too loose, a scan takes over."""
    units, ranking = group
    may_scan = not zoned.is_tight and count_cells(scored, rows, [units]) <= max_cells
    share = _LOOSE_SHARE if may_scan else None
    if search_bounds(zoned, units, rows, ranking, outcome.effort, share):
        outcome.plans.add("lists+bounds" if seeded else "bounds")
    else:
        # What was found stays: it can only spare the scan some sorting.
        _scan(scored, rows, [group], max_cells, outcome)


def _kept_latents(scored: "Scored", groups: Sequence[UnitSelection]) -> "dict[int, LatentArray]":
    """The kept latents by layer, if they are all of the values; else nothing."""
    kept = scored.latents
    committed = scored.store.reader.segments
    whole = all(
        layer in kept and kept[layer].segments == committed
        for units in groups
        for layer in units.layers
    )
    return kept if whole else {}


def union(groups: Sequence[Group]) -> UnitSelection:
    """All units of the layers that groups speak of."""
    layers = sorted({layer for units, _ in groups for layer in units.layers})
    return UnitSelection(tuple(layers), groups[0][0].columns)


def few_rows(values: ValueReader, rows: RowSelection, groups: Sequence[UnitSelection]) -> bool:
    """Whether reading the allowed rows costs less than searching pages might.

    A row brings what stands around it; a page is 512 rows of a chunk of units.
    """
    assert rows.rows is not None
    layers = {layer for units in groups for layer in units.layers}
    by_rows = len(rows.rows) * values.cells_per_row * len(layers)
    pages = len(np.unique(rows.rows // PAGE_ROWS))
    by_pages = sum(units.total for units in groups) * pages * PAGE_ROWS
    return by_rows <= min(_ROWS_CELLS, by_pages)


def row_windows(
    values: ValueReader, reader: "StoreReader", rows: RowSelection, units: UnitSelection
) -> Iterator[Window]:
    """The allowed rows themselves, in windows."""
    tokens = np.concatenate([np.empty(0, np.int64), *rows.tokens(reader.segments)])
    step = max(1, _WINDOW_CELLS // units.columns)
    for layer in units.layers:
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            yield Window(layer, part, values.rows(layer, part))


def _scan(
    scored: "Scored",
    rows: RowSelection,
    groups: Sequence[Group],
    max_cells: int,
    outcome: Outcome,
) -> None:
    """Offer every value of the groups' units.

    Raises:
        InvalidInput: more than ``max_cells`` would be looked at.
    """
    units = [one for one, _ in groups]
    cells = count_cells(scored, rows, units)
    if cells > max_cells:
        raise InvalidInput(
            f"Ranking {scored.declared.name} has no index and would look at {cells:,} values, more "
            f"than max_cells={max_cells:,}. Restrict layers or `where`, raise max_cells, or build "
            f"one with `actstore index STORE {scored.declared.name}`.",
            kind=ErrorKind.TOO_LARGE,
        )
    outcome.plans.add("scan")
    outcome.cells += search_windows(windows(scored, rows, units), groups)


def count_cells(scored: "Scored", rows: RowSelection, groups: Sequence[UnitSelection]) -> int:
    """Values that a scan of some units looks at: whole chunks, or all units if they are derived."""
    reader, values = scored.store.reader, scored.values
    records = reader.commits["base"]
    total = sum(records[segment].rows for segment in rows.segments(reader.segments))
    columns = groups[0].columns if groups else 0
    if isinstance(values, DerivedValues):
        layers = {layer for units in groups for layer in units.layers}
        return total * columns * len(layers) * scored.members
    width = values.chunk_width
    chunks = sum(len(np.unique(units // width)) for units in _members(groups).values())
    return total * min(chunks * width, columns * max(1, len(_members(groups)))) * scored.members


def _members(groups: Sequence[UnitSelection]) -> dict[int, npt.NDArray[np.int64]]:
    """Layer -> the units that any group speaks of, ascending."""
    found: dict[int, npt.NDArray[np.int64]] = {}
    for units in groups:
        for layer in units.layers:
            chosen = units.of(layer)
            found[layer] = np.union1d(found[layer], chosen) if layer in found else chosen
    return {layer: units for layer, units in sorted(found.items()) if len(units)}


def windows(
    scored: "Scored", rows: RowSelection, groups: Sequence[UnitSelection]
) -> Iterator[Window]:
    """Every value of some units at the allowed rows, in windows within segments."""
    reader, values = scored.store.reader, scored.values
    members = _members(groups)
    for segment in rows.segments(reader.segments):
        length = reader.commits["base"][segment].rows
        allowed = rows.allowed(segment, length)
        for start, stop in values.extents(segment, length, _WINDOW_CELLS):
            inside = np.flatnonzero(allowed[start:stop])
            if not len(inside):
                continue
            tokens = segment * reader.segment_rows + start + inside
            for layer, units in members.items():
                found, read = _block(values, segment, layer, start, stop, units, groups[0].columns)
                yield Window(layer, tokens, found[inside], read)


def _block(
    values: ValueReader,
    segment: int,
    layer: int,
    start: int,
    stop: int,
    units: npt.NDArray[np.int64],
    columns: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]:
    """What brings some units' values along with the least others, and which units those are."""
    if len(units) == 1:
        return values.column(segment, layer, start, stop, int(units[0]))[:, None], units
    width = values.chunk_width
    chunks = np.unique(units // width)
    if len(chunks) * width >= columns:
        return values.block(segment, layer, start, stop), None
    read = (chunks[:, None] * width + np.arange(width)).reshape(-1)
    found = values.block(segment, layer, start, stop, chunks.tolist())
    return found, read[read < columns]
