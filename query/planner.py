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

from actstore.query.bounds import derived_value
from actstore.query.derived import DerivedScalar
from actstore.query.derived.post_norms import rescaled_source
from actstore.query.latent_search import search_latents
from actstore.query.ranking import Ranking
from actstore.query.search import (
    Effort,
    ScaledArray,
    Window,
    search_bounds,
    search_lists,
    search_windows,
)
from actstore.query.selection import RowSelection, UnitSelection
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.latent_reader import LatentArray
from actstore.store.layout import PAGE_ROWS
from actstore.store.vocabulary import ActivationLocationType

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["SCAN_CELLS", "Outcome", "rank", "scaled_array"]

SCAN_CELLS = 4_000_000_000
"""Values that a query may look at without an index: about a minute of one core."""

_WINDOW_CELLS = 4_000_000
_ROWS_CELLS = 100_000_000
_SEARCHES = 32
"""Groups that are searched one by one before one scan for all of them is cheaper."""

_PLANS = ("scan", "bounds", "lists+bounds", "rows", "column", "lists")


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
    store: "Store",
    declared: DerivedScalar,
    rows: RowSelection,
    groups: Sequence[tuple[UnitSelection, Ranking]],
    max_cells: int,
    outcome: Outcome,
) -> None:
    """Fill the ranking of every group of units, exactly.

    Raises:
        InvalidInput: only a scan can answer, and it would look at more than ``max_cells``.
        Unavailable: the store cannot derive the scalar.
    """
    kept = _kept_latents(store, declared, groups)
    if kept:
        search_latents(kept, groups, rows, store.reader.segments, outcome)
        return
    source = scaled_array(store, declared)
    if source is None:
        windows, outcome.source = _windows(store, declared, rows, _union(groups), max_cells)
        outcome.plans.add("scan")
        outcome.cells += search_windows(windows, groups)
        return
    still_open: list[tuple[UnitSelection, Ranking, bool]] = []
    for units, ranking in groups:
        rest = search_lists(source, units, rows, ranking)
        if rest:
            open_units = UnitSelection(tuple(rest), units.columns, None, rest)
            still_open.append((open_units, ranking, ranking.is_full))
        else:
            outcome.plans.add("lists")
    pending = [(units, ranking) for units, ranking, _ in still_open]
    if not pending:
        return
    layers = len(_union(pending).layers)
    columns = source.array.spec.columns
    if rows.rows is not None and _few_rows(source, rows, pending, layers * columns):
        outcome.plans.add("rows")
        windows = _row_windows(store, declared, source, rows, _union(pending))
        outcome.cells += search_windows(windows, pending)
    elif len(pending) > _SEARCHES and layers * columns * store.n_tokens <= max_cells:
        outcome.plans.add("scan")
        windows, _ = _windows(store, declared, rows, _union(pending), max_cells)
        outcome.cells += search_windows(windows, pending)
    else:
        for units, ranking, seeded in still_open:
            outcome.plans.add("lists+bounds" if seeded else "bounds")
            search_bounds(source, units, rows, ranking, outcome.effort)


def _kept_latents(
    store: "Store",
    declared: DerivedScalar,
    groups: Sequence[tuple[UnitSelection, Ranking]],
) -> dict[int, LatentArray]:
    """The kept latents by layer, if they are all of the values; else nothing."""
    kept = store.latent_arrays(declared)
    committed = store.reader.segments
    whole = all(
        layer in kept and kept[layer].segments == committed
        for units, _ in groups
        for layer in units.layers
    )
    return kept if whole else {}


def scaled_array(store: "Store", declared: DerivedScalar) -> ScaledArray | None:
    """The scalar as a zone-mapped array times coefficients, if it is one that is stored.

    Raises:
        Unavailable: the array's set has fewer committed segments than the store.
    """
    source = rescaled_source(declared, store.sources.dimensions)
    if source is None or not isinstance(source.of, ActivationLocationType):
        return None
    if (source.of, source.pass_type) not in store.reader.arrays:
        return None
    array = store.reader.array(source.of, source.pass_type)
    if not array.spec.has_zones:
        return None
    if array.segments != store.reader.segments:
        raise Unavailable(
            f"{array.spec.key} has {len(array.segments)} of {len(store.reader.segments)} committed "
            "segments: a ranking would miss the others. Finish its set with `actstore ingest`.",
            kind=ErrorKind.NOT_STORED,
        )
    return ScaledArray(
        array, store.unit_index(array), lambda layer: store.coefficients(declared, layer)
    )


def _union(groups: Sequence[tuple[UnitSelection, Ranking]]) -> UnitSelection:
    layers = sorted({layer for units, _ in groups for layer in units.layers})
    return UnitSelection(tuple(layers), groups[0][0].columns)


def _few_rows(
    source: ScaledArray,
    rows: RowSelection,
    groups: Sequence[tuple[UnitSelection, Ranking]],
    columns: int,
) -> bool:
    """Whether reading the allowed rows costs less than searching pages might.

    A row brings the checksum block around it; a page is 512 rows of a chunk of units.
    """
    assert rows.rows is not None
    spec = source.array.spec
    by_rows = len(rows.rows) * spec.checksum_rows * columns
    pages = len(np.unique(rows.rows // PAGE_ROWS))
    by_pages = sum(units.total for units, _ in groups) * pages * PAGE_ROWS
    return by_rows <= min(_ROWS_CELLS, by_pages)


def _row_windows(
    store: "Store",
    declared: DerivedScalar,
    source: ScaledArray,
    rows: RowSelection,
    units: UnitSelection,
) -> Iterator[Window]:
    spec = source.array.spec
    tokens = np.concatenate([np.empty(0, np.int64), *rows.tokens(store.reader.segments)])
    step = max(1, _WINDOW_CELLS // spec.columns)
    for layer in units.layers:
        c = store.coefficients(declared, layer)
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            raw = source.array.reader.rows(layer, part)
            yield layer, part, derived_value(spec.dtype.to_float32(raw), c)


def _windows(
    store: "Store",
    declared: DerivedScalar,
    rows: RowSelection,
    units: UnitSelection,
    max_cells: int,
) -> tuple[Iterator[Window], str]:
    """Every value of the allowed rows, in windows within segments, and their source."""
    reader = store.reader
    segments = rows.segments(reader.segments)
    total = sum(reader.commits["base"][segment].rows for segment in segments)
    cells = total * units.columns * len(units.layers)
    if cells > max_cells:
        raise InvalidInput(
            f"Ranking {declared.name} has no index and would look at {cells:,} values, more than "
            f"max_cells={max_cells:,}. Restrict layers or `where`, or raise max_cells.",
            kind=ErrorKind.TOO_LARGE,
        )
    source = rescaled_source(declared, store.sources.dimensions)
    place = source.of if source is not None else None
    if (
        source is not None
        and isinstance(place, ActivationLocationType)
        and (place, source.pass_type) in reader.arrays
        and not place.is_pair_shaped
    ):
        array = reader.array(place, source.pass_type)
        step = max(1, _WINDOW_CELLS // units.columns // PAGE_ROWS) * PAGE_ROWS

        def stored() -> Iterator[Window]:
            for layer in units.layers:
                c = store.coefficients(declared, layer)
                for segment in segments:
                    length = array.rows_of(segment)
                    allowed = rows.allowed(segment, length)
                    for start in range(0, length, step):
                        inside = np.flatnonzero(allowed[start : start + step])
                        if len(inside):
                            raw = array.reader.window(segment, layer, start, start + step)[inside]
                            value = derived_value(array.spec.dtype.to_float32(raw), c)
                            yield layer, segment * reader.segment_rows + start + inside, value

        return stored(), "stored"

    def derived() -> Iterator[Window]:
        for segment in segments:
            plan = reader.segment(segment)
            allowed = rows.allowed(segment, plan.n_rows)
            for index in range(plan.n_sequences):
                start = int(plan.first_token[index]) - plan.first_row
                inside = np.flatnonzero(allowed[start : start + int(plan.length[index])])
                if not len(inside):
                    continue
                for layer in units.layers:
                    sequence = plan.first_sequence + index
                    values = store.derive_window(declared, sequence, layer)
                    yield layer, plan.first_row + start + inside, values[inside]

    return derived(), store.source_of(declared)
