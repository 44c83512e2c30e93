"""All values beyond a threshold: their places, or how many there are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.answers import count_rows, place_columns
from actstore.query.cells import CellEffort, ValueInterval, select_cells
from actstore.query.choices import Indices, allowed_rows, choose_units, require_rankable
from actstore.query.columnar import Columnar
from actstore.query.derived import DerivedScalar
from actstore.query.planner import SCAN_CELLS
from actstore.query.ranking import Candidates
from actstore.query.results import Cells, Certificate
from actstore.query.selection import RowSelection, UnitSelection
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["Counts", "ThresholdOptions", "count", "filter_cells"]

_MOST_CELLS = 1_000_000


class ThresholdOptions(TypedDict, total=False):
    """Which values, of which units, at which rows; see :func:`filter_cells`."""

    above: float | None
    below: float | None
    at_least: float | None
    at_most: float | None
    layers: Indices
    neurons: Indices
    heads: Indices
    latents: Indices
    channels: Indices
    attended: Indices
    tokens: Indices
    where: str | None
    units: str | Sequence[tuple[int, int]] | None
    special: bool
    pass_type: str
    max_cells: int


@dataclass(frozen=True)
class _Search:
    """A checked question for the values in an interval."""

    store: "OpenStore"
    declared: DerivedScalar
    units: UnitSelection
    rows: RowSelection
    interval: ValueInterval
    max_cells: int
    effort: CellEffort = field(default_factory=CellEffort)

    def batches(self) -> Any:
        return select_cells(
            self.store,
            self.declared,
            self.units,
            self.rows,
            self.interval,
            max_cells=self.max_cells,
            effort=self.effort,
        )

    def certificate(self) -> Certificate:
        counted, excluded = count_rows(self.store, self.rows)
        reader = self.store.reader
        return Certificate(
            scalar=self.declared.name,
            plan=self.effort.plan,
            source=self.store.source_of(self.declared),
            bounded_by=self.effort.bounded_by,
            pages_read=self.effort.pages_read,
            pages_pruned=self.effort.pages_pruned,
            cells_scanned=self.effort.cells,
            bound=None,
            segments=len(reader.segments),
            segments_planned=reader.planned_segments,
            rows=counted,
            rows_excluded=excluded,
        )


def filter_cells(
    store: "OpenStore",
    name: str | DerivedScalar,
    *,
    limit: int = _MOST_CELLS,
    **options: Unpack[ThresholdOptions],
) -> Cells:
    """Every value in an interval, with its place.

    Args:
        store: the open store.
        name: a derived scalar, a location's name, or a declaration.
        limit: refuse an answer of more values than this.
        options: what is asked:

            * ``above``, ``below``: values strictly beyond; ``at_least``, ``at_most``: or equal.
              At least one of them is given. NaN is never among them.
            * ``layers``, ``neurons`` (``heads``, ``latents``, ``channels``, ``attended``),
              ``units``, ``tokens``, ``where``, ``special``, ``pass_type``: as for ``topk``.
            * ``max_cells``: refuse to look at more values than this.

    Returns:
        The values by layer, token and unit, with the certificate of how they were found.

    Raises:
        InvalidInput: no end is given, an unknown scalar, layer or unit, a bad predicate, or
            more values than ``limit`` or ``max_cells``.
        Unavailable: the store cannot derive the scalar.
    """
    _require_limit(limit)
    search = _search(store, name, **options)
    parts: list[Candidates] = []
    found = 0
    for batch in search.batches():
        found += len(batch.values)
        if found > limit:
            raise InvalidInput(
                f"More than {limit:,} values of {search.declared.name} lie there. Narrow the "
                "interval, restrict layers, units or rows, raise `limit`, or ask for `count`.",
                kind=ErrorKind.TOO_LARGE,
            )
        layer = np.full(len(batch.values), batch.layer, np.int64)
        parts.append(Candidates(batch.values, layer, batch.tokens, batch.units))
    answer = Candidates.join(parts)
    answer = answer.take(np.lexsort((answer.unit, answer.token, answer.layer)))
    places = store.row_map.of_tokens(answer.token)
    columns = place_columns(store, search.declared, answer, places)
    columns["value"] = pa.array(answer.value, pa.float32())
    columns["sequence"] = pa.array(places.sequence, pa.int64())
    columns["position"] = pa.array(places.position, pa.int32())
    return Cells(pa.table(columns), search.certificate(), partial(store.row_texts, places))


class Counts(Columnar):
    """How many values of each unit lie in an interval.

    Attributes:
        certificate: how they were counted.
    """

    def __init__(self, table: pa.Table, certificate: Certificate) -> None:
        self._table = table
        self.certificate = certificate

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        return f"Counts({self.certificate.scalar}, {len(self)} rows, {self.total:,} values)"

    @property
    def total(self) -> int:
        """All of them."""
        return int(np.sum(self._table.column("count").to_numpy()))

    def to_arrow(self) -> pa.Table:
        """Columns ``layer``, the units' axes and ``count``; units without any are left out."""
        return self._table

    def to_json(self) -> dict[str, Any]:
        """``{"rows": [...], "certificate": {...}}``."""
        return {"rows": self.rows(), "certificate": self.certificate.to_json()}


def count(
    store: "OpenStore", name: str | DerivedScalar, **options: Unpack[ThresholdOptions]
) -> Counts:
    """How many values of each unit lie in an interval.

    Args:
        store: the open store.
        name: a derived scalar, a location's name, or a declaration.
        options: as for :func:`filter_cells`.

    Raises:
        InvalidInput: as for :func:`filter_cells`.
        Unavailable: the store cannot derive the scalar.
    """
    search = _search(store, name, **options)
    columns = search.units.columns
    counts: dict[int, npt.NDArray[np.int64]] = {}
    for batch in search.batches():
        of_layer = counts.setdefault(batch.layer, np.zeros(columns, np.int64))
        of_layer += np.bincount(batch.units, minlength=columns)
    layers = sorted(counts)
    pairs = [(np.flatnonzero(counts[layer]), layer) for layer in layers]
    unit = np.concatenate([np.empty(0, np.int64), *(units for units, _ in pairs)])
    layer = np.concatenate(
        [np.empty(0, np.int64), *(np.full(len(units), at) for units, at in pairs)]
    )
    amount = np.concatenate([np.empty(0, np.int64), *(counts[at][units] for units, at in pairs)])
    declared = search.declared
    table: dict[str, Any] = {}
    if declared.has_layers:
        table["layer"] = pa.array(layer, pa.int32())
    places = np.unravel_index(unit, store.unit_shape(declared))
    for axis, values in zip(declared.ranked_axes, places, strict=True):
        if axis is not Dimension.SINGLETON:
            table[axis.value] = pa.array(values, pa.int32())
    table["count"] = pa.array(amount, pa.int64())
    return Counts(pa.table(table), search.certificate())


def _search(
    store: "OpenStore",
    name: str | DerivedScalar,
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    layers: Indices = None,
    neurons: Indices = None,
    heads: Indices = None,
    latents: Indices = None,
    channels: Indices = None,
    attended: Indices = None,
    tokens: Indices = None,
    where: str | None = None,
    units: "str | Sequence[tuple[int, int]] | None" = None,
    special: bool = False,
    pass_type: str = "forward",
    max_cells: int = SCAN_CELLS,
) -> _Search:
    interval = _interval(above, below, at_least, at_most)
    declared = store.scalar(name, pass_type)
    require_rankable(declared)
    store.require_committed()
    arguments = {
        "neurons": neurons,
        "heads": heads,
        "latents": latents,
        "channels": channels,
        "attended": attended,
    }
    chosen = choose_units(store, declared, layers, arguments, units)
    rows = RowSelection(store.reader, allowed_rows(store, where, tokens), special)
    return _Search(store, declared, chosen, rows, interval, max_cells)


def _interval(
    above: float | None, below: float | None, at_least: float | None, at_most: float | None
) -> ValueInterval:
    given = {"above": above, "below": below, "at_least": at_least, "at_most": at_most}
    for name, value in given.items():
        if value is not None and not _is_number(value):
            raise _invalid(f"{name} is {value!r}; give a number.")
    if all(value is None for value in given.values()):
        raise _invalid("No threshold is given; give `above`, `below`, `at_least` or `at_most`.")
    if (above is not None and at_least is not None) or (below is not None and at_most is not None):
        raise _invalid("Two ends on one side: give `above` or `at_least`, `below` or `at_most`.")
    return ValueInterval(
        low=above if at_least is None else at_least,
        high=below if at_most is None else at_most,
        low_open=above is not None,
        high_open=below is not None,
    )


def _require_limit(limit: Any) -> None:
    if isinstance(limit, bool) or not _is_number(limit) or limit < 1 or limit != int(limit):
        raise _invalid(f"limit is {limit!r}; it must be an integer of at least 1.")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        # An integer beyond every float.
        return False


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
