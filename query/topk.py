"""The k best values of a derived scalar over layers, tokens and units: exact, always.

The planner prefers what reads least: the units' proven lists, then branch and bound
over zone maps, then a scan under a budget of cells. All three keep their answer in one
:class:`Ranking`, so they agree to the last tie.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar
from actstore.query.planner import SCAN_CELLS, Outcome, rank
from actstore.query.ranking import Candidates, Grouping, Ranking
from actstore.query.results import Certificate, TopK
from actstore.query.rows import Rows
from actstore.query.selection import RowSelection, UnitSelection
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["Query", "allowed_rows", "require_distinct", "topk"]

_UNIT_TABLES: dict[tuple[Dimension, ...], str] = {
    (Dimension.NEURON,): "neurons",
    (Dimension.HEAD,): "heads",
    (Dimension.LATENT,): "latents",
}

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
    name: str | DerivedScalar,
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
    pass_type: str = "forward",
    max_cells: int = SCAN_CELLS,
) -> TopK:
    """Rank every value of a derived scalar and return the k best.

    Args:
        store: the open store.
        name: a derived scalar, such as ``mlp_write_norm``, or a location's name; or a
            declaration, such as a projection's.
        k: number of answers; with ``per``, of each group.
        layers: layers that may answer; all by default.
        neurons: neurons that may answer; all by default.
        heads: heads that may answer, for scalars of heads.
        latents: autoencoder latents that may answer.
        channels: residual or head channels that may answer.
        attended: positions of attended tokens that may answer, for scalars of pairs.
        where: SQL predicate over the columns of tokens, sequences and documents.
        units: SQL predicate over the columns of ``neurons`` (``heads``, ``latents``), or
            (layer, unit) pairs.
        per: ``layer``, or the unit's own dimension (``neuron`` …), for k answers of each.
        distinct: ``sequence`` or ``document`` for at most one answer from each.
        largest: greatest values; False for the least.
        by: rank by ``value`` or by ``magnitude`` (absolute value; the value is returned).
        special: let special rows (position 0, special tokens) answer too.
        pass_type: ``backward`` ranks the gradient of the store's objective with respect to
            the scalar, where it has one.
        max_cells: refuse a scan of more values than this.

    Returns:
        The answers by value descending (ascending for the least), then layer, token and
        unit ascending, with the certificate of how they were found.

    Raises:
        InvalidInput: an unknown scalar, layer or unit, a bad predicate, or a scan over budget.
        Unavailable: the store cannot derive the scalar.
    """
    k = _positive(k)
    if by not in ("value", "magnitude"):
        raise _invalid(f"by is {by!r}; use value or magnitude.")
    if by == "magnitude" and not largest:
        # The least magnitudes are not at the ends of the lists.
        raise _invalid("by='magnitude' ranks the greatest magnitudes; drop largest=False.")
    require_distinct(distinct)
    declared = store.scalar(name, pass_type)
    _require_rankable(declared)
    store.require_committed()
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
    rows = RowSelection(store.reader, allowed_rows(store, where), special)
    query = Query(store, declared, k, chosen, rows, distinct)
    groups = _groups(query, per)
    ends = (True, False) if by == "magnitude" else (largest,)
    outcome = Outcome()
    rankings = [[query.ranking(end) for end in ends] for _ in groups]
    for number in range(len(ends)):
        pairs = [(units, kept[number]) for units, kept in zip(groups, rankings, strict=True)]
        rank(store, declared, rows, pairs, max_cells, outcome)
    found = [
        _by_magnitude(query, [ranking.best for ranking in kept])
        if by == "magnitude"
        else kept[0].best
        for kept in rankings
    ]
    bound = (
        float(np.abs(found[0].value[-1]) if by == "magnitude" else found[0].value[-1])
        if (len(found) == 1 and len(found[0]) >= k)
        else None
    )
    answer = Candidates.join(found)
    places = store.row_map.of_tokens(answer.token)
    table = _table(store, declared, answer, places)
    return TopK(table, _certificate(query, outcome, bound), partial(store.row_texts, places))


def _require_rankable(declared: DerivedScalar) -> None:
    """Refuse a scalar that is about one node of one sequence: a corpus has no such node."""
    if declared.about is not None:
        raise _invalid(
            f"{declared.name} is about one node of one sequence, so it has no ranking over a "
            f"corpus. Derive it with `derive(…, config=DstConfig({declared.about}=…))`, from a "
            "store or from a `Prompt`."
        )


def _select_units(
    store: "Store",
    declared: DerivedScalar,
    layers: Indices,
    arguments: dict[str, Indices],
    units: "str | Sequence[tuple[int, int]] | None",
) -> UnitSelection:
    count = store.layer_count(declared)
    numbers = _layers(store, declared, layers)
    axes, sizes = declared.ranked_axes, store.unit_shape(declared)
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
        pairs = _unit_pairs(store, declared, units)
        grouped: dict[int, list[int]] = {}
        for layer, unit in pairs:
            _indices(layer, count, "units", ErrorKind.UNKNOWN_LAYER)
            _indices(unit, sizes[0], "units", ErrorKind.UNKNOWN_UNIT)
            grouped.setdefault(int(layer), []).append(int(unit))
        by_layer = {layer: np.unique(members) for layer, members in grouped.items()}
    return UnitSelection(tuple(numbers), int(np.prod(sizes)), chosen, by_layer)


def _layers(store: "Store", declared: DerivedScalar, layers: Indices) -> Sequence[int]:
    known = store.layers_of(declared)
    if layers is None:
        return known
    wanted = _indices(layers, store.layer_count(declared), "layers", ErrorKind.UNKNOWN_LAYER)
    outside = [layer for layer in wanted if layer not in known]
    if outside:
        raise InvalidInput(
            f"layers names {outside}; {declared.name} exists at {list(known)} alone.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    return wanted


def _unit_pairs(
    store: "Store", declared: DerivedScalar, units: "str | Sequence[tuple[int, int]]"
) -> list[tuple[int, int]]:
    """(layer, unit) pairs, as given or as SQL over the table of such units finds them."""
    if declared.ranked_axes not in _UNIT_TABLES:
        raise _invalid(
            f"`units` chooses neurons, heads or latents; {declared.name} is over "
            f"{', '.join(declared.ranked_axes)}. Use its own arguments."
        )
    if isinstance(units, str):
        sets = store.latent_set_names(declared)
        return store.units_where(units, _UNIT_TABLES[declared.ranked_axes], sets)
    pairs = []
    for pair in units:
        try:
            layer, unit = pair
        except (TypeError, ValueError):
            raise _invalid(
                f"units holds {pair!r}; give (layer, unit) pairs or a SQL predicate."
            ) from None
        pairs.append((layer, unit))
    return pairs


def _indices(values: Any, size: int, name: str, kind: ErrorKind) -> list[int]:
    if values is None:
        return list(range(size))
    wanted = list(values) if isinstance(values, Iterable) else [values]
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
    if len(query.scalar.ranked_axes) == 1 and per == query.scalar.ranked_axes[0].value:
        return [units.only(layer, int(unit)) for layer in units.layers for unit in units.of(layer)]
    axes = (
        [axis.value for axis in query.scalar.ranked_axes]
        if len(query.scalar.ranked_axes) == 1
        else []
    )
    raise _invalid(f"per is {per!r}; {query.scalar.name} allows: {', '.join(['layer', *axes])}.")


def _by_magnitude(query: Query, ends: list[Candidates]) -> Candidates:
    """The best of both ends by absolute value."""
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


def _table(store: "Store", declared: DerivedScalar, answer: Candidates, rows: Rows) -> pa.Table:
    """The answer's rows with the names of their units and their places."""
    columns: dict[str, Any] = {}
    if declared.has_layers:
        columns["layer"] = pa.array(answer.layer, pa.int32())
    columns["token"] = pa.array(answer.token, pa.int64())
    axes, shape = declared.ranked_axes, store.unit_shape(declared)
    for axis, values in zip(axes, np.unravel_index(answer.unit, shape), strict=True):
        if axis is Dimension.ATTENDED:
            columns["attended_token"] = pa.array(answer.token - rows.position + values, pa.int64())
        elif axis is not Dimension.SINGLETON:
            columns[axis.value] = pa.array(values, pa.int32())
    columns["value"] = pa.array(answer.value, pa.float32())
    columns["sequence"] = pa.array(rows.sequence, pa.int64())
    columns["position"] = pa.array(rows.position, pa.int32())
    return pa.table(columns)


def _certificate(query: Query, outcome: Outcome, bound: float | None) -> Certificate:
    store, rows = query.store, query.rows
    total, special = store.n_tokens, store.special_count
    counted = rows.count(store.reader.segments, total - special)
    excluded = {} if rows.special else {"special": special}
    if rows.rows is not None:
        # A special row that the predicate drops as well is counted as special.
        excluded["where"] = total - counted - sum(excluded.values())
    return Certificate(
        scalar=query.scalar.name,
        plan=outcome.plan,
        source=outcome.source,
        pages_read=outcome.effort.pages_read,
        pages_pruned=max(outcome.effort.pages_total - outcome.effort.pages_read, 0),
        cells_scanned=outcome.cells,
        bound=bound if bound is not None and np.isfinite(bound) else None,
        segments=len(store.reader.segments),
        segments_planned=store.reader.planned_segments,
        rows=counted,
        rows_excluded=excluded,
    )


def allowed_rows(store: "Store", where: str | None) -> npt.NDArray[np.int64] | None:
    """Ascending global rows that a predicate allows; None where there is no predicate."""
    if where is None:
        return None
    try:
        return store.rows_where(where.strip())
    except AttributeError:
        raise _invalid(f"where is {where!r}; give a SQL predicate as a string.") from None


def _positive(k: int) -> int:
    try:
        number = operator.index(k)
    except TypeError:
        number = 0
    if number < 1:
        raise _invalid(f"k is {k!r}; it must be an integer of at least 1.")
    return number


def require_distinct(distinct: str | None) -> None:
    """Check the name of what answers are distinct by.

    Raises:
        InvalidInput: it is neither None, ``sequence`` nor ``document``.
    """
    if distinct not in (None, "sequence", "document"):
        raise _invalid(f"distinct is {distinct!r}; use sequence or document.")


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
