"""The k best values of a derived scalar over layers, tokens and units: exact, always.

The planner prefers what reads least: the units' proven lists, then branch and bound
over zone maps, then a scan under a budget of cells. All three keep their answer in one
:class:`Ranking`, so they agree to the last tie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from actstore.query.bounds import derived_value
from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar, scalar
from actstore.query.ranking import Candidates, Grouping, Ranking
from actstore.query.results import Certificate, TopK
from actstore.query.search import (
    Effort,
    ScaledArray,
    Window,
    search_bounds,
    search_lists,
    search_scan,
)
from actstore.query.selection import RowSelection, UnitSelection
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.layout import PAGE_ROWS
from actstore.store.vocabulary import ActivationLocationType, Dimension

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["SCAN_CELLS", "Query", "scaled_array", "topk"]

SCAN_CELLS = 4_000_000_000
"""Values that a query may look at without an index: about a minute of one core."""

_WINDOW_CELLS = 4_000_000
Indices = int | Sequence[int] | None
By = Literal["value", "magnitude"]


@dataclass(frozen=True)
class Query:
    """A validated top-k question.

    Attributes:
        scalar: what is ranked.
        k: answers wanted (per group with ``per``).
        units: layers and units that may answer.
        rows: rows that may answer.
        distinct: ``sequence`` or ``document`` for at most one answer each.
    """

    store: "Store"
    scalar: DerivedScalar
    k: int
    units: UnitSelection
    rows: RowSelection
    distinct: str | None

    def ranking(self, largest: bool) -> Ranking:
        """An empty ranking for this question."""
        return Ranking(self.k, largest, self._grouping())

    def _grouping(self) -> Grouping | None:
        if self.distinct is None:
            return None
        first, label = self.store.row_groups(self.distinct)
        return Grouping(first, label)


def topk(
    store: "Store",
    name: str,
    *,
    k: int = 20,
    layers: Indices = None,
    neurons: Indices = None,
    heads: Indices = None,
    latents: Indices = None,
    channels: Indices = None,
    attended: Indices = None,
    where: str | None = None,
    units: "str | Sequence[tuple[int, int]] | None" = None,
    per: str | None = None,
    distinct: str | None = None,
    largest: bool = True,
    by: By = "value",
    special: bool = False,
    max_cells: int = SCAN_CELLS,
) -> TopK:
    """Rank every value of a derived scalar and return the k best.

    Args:
        store: the open store.
        name: a derived scalar, such as ``mlp_write_norm``, or a location's name.
        k: number of answers; with ``per``, of each group.
        layers: layers that may answer; all by default.
        neurons: neurons that may answer; all by default.
        heads: heads that may answer, for scalars of heads.
        latents: autoencoder latents that may answer.
        channels: residual or head channels that may answer.
        attended: positions of attended tokens that may answer, for scalars of pairs.
        where: SQL predicate over the columns of tokens, sequences and documents.
        units: SQL predicate over the columns of ``neurons`` (or ``heads``), or
            (layer, unit) pairs.
        per: ``layer``, or the unit's own dimension (``neuron`` …), for k answers of each.
        distinct: ``sequence`` or ``document`` for at most one answer from each.
        largest: greatest values; False for the least.
        by: rank by ``value`` or by ``magnitude`` (absolute value; the value is returned).
        special: let special rows (position 0, special tokens) answer too.
        max_cells: refuse a scan of more values than this.

    Returns:
        The answers by value descending (ascending for the least), then layer, token and
        unit ascending, with the certificate of how they were found.

    Raises:
        InvalidInput: an unknown scalar, layer or unit, a bad predicate, or a scan over budget.
        Unavailable: the store cannot derive the scalar.
    """
    if k < 1:
        raise _invalid(f"k is {k}; it must be at least 1.")
    if by not in ("value", "magnitude"):
        raise _invalid(f"by is {by!r}; use value or magnitude.")
    if distinct not in (None, "sequence", "document"):
        raise _invalid(f"distinct is {distinct!r}; use sequence or document.")
    declared = scalar(name)
    chosen = _select_units(
        store,
        declared,
        layers,
        {
            "neurons": neurons,
            "heads": heads,
            "latents": latents,
            "channels": channels,
            "attended": attended,
        },
        units,
    )
    rows = RowSelection(store.reader, None if where is None else store.rows_where(where), special)
    query = Query(store, declared, k, chosen, rows, distinct)
    groups = _groups(query, per)
    ends = (True, False) if by == "magnitude" else (largest,)
    found: list[Candidates] = []
    plans: list[str] = []
    effort = Effort()
    cells = 0
    sources: set[str] = set()
    for group in groups:
        kept = []
        for end in ends:
            ranking = query.ranking(end)
            plan, source, looked = _search(query, group, ranking, effort, max_cells)
            plans.append(plan)
            sources.add(source)
            cells += looked
            kept.append(ranking.best)
        best = _by_magnitude(query, kept, largest) if by == "magnitude" else kept[0]
        effort.bound = float(best.value[-1]) if len(best) >= k else float("-inf")
        found.append(best)
    answer = Candidates.join(found)
    return TopK(
        _table(store, declared, answer),
        _certificate(query, plans, sources, effort, cells, bounded=len(groups) == 1),
    )


def _search(
    query: Query, units: UnitSelection, ranking: Ranking, effort: Effort, max_cells: int
) -> tuple[str, str, int]:
    """Fill the ranking; returns the plan's name, the values' source and cells scanned."""
    source = scaled_array(query.store, query.scalar)
    if source is None:
        windows, origin = _windows(query, units, max_cells)
        rows = query.store.reader.segment_rows
        return "scan", origin, search_scan(windows, rows, units, query.rows, ranking)
    still_open = search_lists(source, units, query.rows, ranking)
    if not still_open:
        return "lists", "stored", 0
    rest = UnitSelection(tuple(still_open), units.columns, None, still_open)
    seeded = ranking.is_full
    search_bounds(source, rest, query.rows, ranking, effort)
    return "lists+bounds" if seeded else "bounds", "stored", 0


def scaled_array(store: "Store", declared: DerivedScalar) -> ScaledArray | None:
    """The scalar as a zone-mapped array times coefficients, if it is one that is stored."""
    source = declared.raw_source
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


def _windows(query: Query, units: UnitSelection, max_cells: int) -> tuple[Iterator[Window], str]:
    """Values of a scalar that no index covers, in windows within segments."""
    store, declared = query.store, query.scalar
    reader = store.reader
    segments = query.rows.segments(reader.segments)
    total = sum(reader.commits["base"][segment].rows for segment in segments)
    cells = total * units.columns * len(units.layers)
    if cells > max_cells:
        raise InvalidInput(
            f"Ranking {declared.name} has no index and would look at {cells:,} values, more than "
            f"max_cells={max_cells:,}. Restrict layers or `where`, or raise max_cells.",
            kind=ErrorKind.TOO_LARGE,
        )
    source = declared.raw_source
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
                    for start in range(0, array.rows_of(segment), step):
                        raw = array.reader.window(segment, layer, start, start + step)
                        value = derived_value(array.spec.dtype.to_float32(raw), c)
                        yield layer, segment * reader.segment_rows + start, value

        return stored(), "stored"

    def derived() -> Iterator[Window]:
        for segment in segments:
            plan = reader.segment(segment)
            for index in range(plan.n_sequences):
                for layer in units.layers:
                    values = store.derive_window(declared, plan.first_sequence + index, layer)
                    if declared.is_pair_shaped:
                        pairs = values.reshape(len(values), *store.unit_shape(declared))
                        values = pairs.swapaxes(1, 2).reshape(len(values), -1)
                    yield layer, int(plan.first_token[index]), values

    return derived(), store.source_of(declared)


def _ranked_axes(
    store: "Store", declared: DerivedScalar
) -> tuple[tuple[Dimension, ...], tuple[int, ...]]:
    """The unit axes in the order that breaks ties: of a pair, attended token, then head."""
    axes, shape = declared.axes, store.unit_shape(declared)
    return (axes[::-1], shape[::-1]) if declared.is_pair_shaped else (axes, shape)


def _select_units(
    store: "Store",
    declared: DerivedScalar,
    layers: Indices,
    arguments: dict[str, Indices],
    units: "str | Sequence[tuple[int, int]] | None",
) -> UnitSelection:
    count = store.layer_count(declared)
    numbers = _indices(layers, count, "layers", ErrorKind.UNKNOWN_LAYER)
    axes, sizes = _ranked_axes(store, declared)
    names = [UNIT_ARGUMENTS.get(axis) for axis in axes]
    for name, value in arguments.items():
        if value is not None and name not in names:
            usable = ", ".join(n for n in names if n) or "none"
            raise _invalid(f"{declared.name} has no {name}; its units are chosen by: {usable}.")
    grid = np.arange(int(np.prod(sizes))).reshape(sizes)
    restricted = False
    for axis, (argument, size) in enumerate(zip(names, sizes, strict=True)):
        if argument is not None and arguments[argument] is not None:
            restricted = True
            wanted = _indices(arguments[argument], size, argument, ErrorKind.UNKNOWN_UNIT)
            grid = np.take(grid, np.array(wanted, np.int64), axis)
    chosen = np.sort(grid.reshape(-1)) if restricted else None
    by_layer = None
    if units is not None:
        if len(sizes) != 1:
            raise _invalid(f"`units` needs a scalar with one unit axis; {declared.name} has more.")
        table = "heads" if declared.axes == (Dimension.HEAD,) else "neurons"
        pairs = store.units_where(units, table) if isinstance(units, str) else list(units)
        grouped: dict[int, list[int]] = {}
        for layer, unit in pairs:
            _indices(layer, count, "units", ErrorKind.UNKNOWN_LAYER)
            _indices(unit, sizes[0], "units", ErrorKind.UNKNOWN_UNIT)
            grouped.setdefault(int(layer), []).append(int(unit))
        by_layer = {layer: np.unique(members) for layer, members in grouped.items()}
    return UnitSelection(tuple(numbers), int(np.prod(sizes)), chosen, by_layer)


def _indices(values: Any, size: int, name: str, kind: ErrorKind) -> list[int]:
    if values is None:
        return list(range(size))
    wanted = [values] if isinstance(values, int | np.integer) else list(values)
    for value in wanted:
        if not isinstance(value, int | np.integer) or not 0 <= value < size:
            raise InvalidInput(
                f"{name} names {value!r}; this store has 0 to {size - 1}.", kind=kind
            )
    return sorted({int(value) for value in wanted})


def _groups(query: Query, per: str | None) -> list[UnitSelection]:
    units = query.units
    if per is None:
        return [units]
    if per == "layer":
        return [units.only_layer(layer) for layer in units.layers]
    if len(query.scalar.axes) == 1 and per == query.scalar.axes[0].value:
        return [units.only(layer, int(unit)) for layer in units.layers for unit in units.of(layer)]
    axes = [axis.value for axis in query.scalar.axes] if len(query.scalar.axes) == 1 else []
    raise _invalid(f"per is {per!r}; {query.scalar.name} allows: {', '.join(['layer', *axes])}.")


def _by_magnitude(query: Query, ends: list[Candidates], largest: bool) -> Candidates:
    """The best of both ends by absolute value.

    The least magnitudes are not at the ends, so they are not offered.
    """
    if not largest:
        raise _invalid("by='magnitude' ranks the greatest magnitudes; drop largest=False.")
    both = Candidates.join(ends)
    ranking = query.ranking(True)
    ranking.offer(Candidates(np.abs(both.value), both.layer, both.token, both.unit))
    place = {
        (layer, token, unit): value
        for value, layer, token, unit in zip(
            both.value, both.layer.tolist(), both.token.tolist(), both.unit.tolist(), strict=True
        )
    }
    best = ranking.best
    signed = [
        place[key]
        for key in zip(best.layer.tolist(), best.token.tolist(), best.unit.tolist(), strict=True)
    ]
    return Candidates(np.array(signed, np.float32), best.layer, best.token, best.unit)


def _table(store: "Store", declared: DerivedScalar, answer: Candidates) -> pa.Table:
    """The answer's rows with the names of their units and their text."""
    columns: dict[str, Any] = {}
    if declared.has_layers:
        columns["layer"] = pa.array(answer.layer, pa.int32())
    columns["token"] = pa.array(answer.token, pa.int64())
    axes, shape = _ranked_axes(store, declared)
    context = store.row_context(answer.token)
    for axis, values in zip(axes, np.unravel_index(answer.unit, shape), strict=True):
        if axis is Dimension.ATTENDED:
            columns["attended_token"] = pa.array(
                answer.token - context["position"] + values, pa.int64()
            )
        elif axis is not Dimension.SINGLETON:
            columns[axis.value] = pa.array(values, pa.int32())
    columns["value"] = pa.array(answer.value, pa.float32())
    columns["sequence"] = pa.array(context["sequence"], pa.int64())
    columns["position"] = pa.array(context["position"], pa.int32())
    columns["text"] = pa.array(context["text"], pa.string())
    return pa.table(columns)


def _certificate(
    query: Query, plans: list[str], sources: set[str], effort: Effort, cells: int, bounded: bool
) -> Certificate:
    reader = query.store.reader
    lengths = {s: reader.commits["base"][s].rows for s in reader.segments}
    special = sum(int(query.rows.special_rows(s).sum()) for s in lengths)
    counted = query.rows.count(lengths)
    total = sum(lengths.values())
    excluded = {} if query.rows.special else {"special": special}
    if query.rows.rows is not None:
        excluded["where"] = total - counted - excluded.get("special", 0)
        if not query.rows.special:
            # A special row that the predicate drops as well is counted as special.
            excluded["where"] = total - special - counted
    order = ["scan", "bounds", "lists+bounds", "lists"]
    return Certificate(
        scalar=query.scalar.name,
        plan=min(plans, key=order.index) if plans else "lists",
        source=", ".join(sorted(sources)) or "stored",
        pages_read=effort.pages_read,
        pages_pruned=max(effort.pages_total - effort.pages_read, 0),
        cells_scanned=cells,
        bound=effort.bound if bounded and np.isfinite(effort.bound) else None,
        segments=len(lengths),
        segments_planned=reader.planned_segments,
        rows=counted,
        rows_excluded=excluded,
    )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
