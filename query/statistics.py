"""Statistics and histograms of a scalar's units, over ordinary rows.

They are read where the store has them: in the zone maps of a stored array, of which a value may
be a fixed multiple, or in the scalar's own index. A histogram that is not kept is counted from
the values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.choices import Indices, choose_units, require_rankable
from actstore.query.columnar import Columnar
from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar
from actstore.query.scalar_indexes import find_index
from actstore.query.unit_facts import UnitFacts, find_facts, require_facts
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.histograms import QUANTILES, Bracket, Histogram
from actstore.store.index_spec import HISTOGRAM
from actstore.store.unit_histograms import UnitHistograms
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore
    from actstore.query.session import Store

__all__ = [
    "Statistics",
    "UnitSummary",
    "statistics",
    "stored_histograms",
    "unit_histogram",
    "unit_summary",
]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UnitSummary:
    """What is known of one unit over ordinary rows; None where it is undefined or not known.

    Attributes:
        count, nan, positive_share, mean, variance, skewness, kurtosis, min, max, special_min,
            special_max: see :class:`UnitFacts`.
        std: square root of the variance.
        quantiles: share -> value, where the store has the unit's histogram; else empty.
    """

    count: int
    nan: int
    positive_share: float | None
    mean: float | None
    variance: float | None
    std: float | None
    skewness: float | None
    kurtosis: float | None
    min: float | None
    max: float | None
    special_min: float | None
    special_max: float | None
    quantiles: Mapping[float, Bracket] = field(hash=False)

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values; None for what is not finite."""
        found = {
            one.name: _finite(getattr(self, one.name))
            for one in fields(self)
            if one.name != "quantiles"
        }
        quantiles = {str(share): value.to_json() for share, value in self.quantiles.items()}
        return found | {"quantiles": quantiles}


class Statistics(Columnar):
    """Statistics of units, a row each.

    Args:
        table: the rows.
        scalar: whose units.
        source: what they were read from, for people.
        quantiles: the shares of which the table has columns.

    Attributes:
        scalar, source, quantiles: as given.
    """

    def __init__(
        self, table: pa.Table, scalar: str, source: str, quantiles: tuple[float, ...]
    ) -> None:
        self._table = table
        self.scalar = scalar
        self.source = source
        self.quantiles = quantiles

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows()

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(range(len(self))[index], 1).to_pylist()[0]
        return row

    def __repr__(self) -> str:
        return f"Statistics({self.scalar}, {len(self)} units, from {self.source})"

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        values: list[Any] = self._table.column(name).to_pylist()
        return values

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self._table

    def to_json(self) -> dict[str, Any]:
        """``{"scalar", "source", "rows"}`` as JSON values; None for what is not finite."""
        rows = [{name: _finite(value) for name, value in row.items()} for row in self.rows()]
        return {"scalar": self.scalar, "source": self.source, "rows": rows}


def statistics(
    store: "OpenStore",
    name: str | DerivedScalar,
    *,
    layers: Indices = None,
    units: "str | Sequence[tuple[int, int]] | None" = None,
    pass_type: str = "forward",
    quantiles: Sequence[float] = QUANTILES,
    **indices: Indices,
) -> Statistics:
    """Statistics of units over ordinary rows, as a table.

    Args:
        store: the open store.
        name: a stored location, a scalar that is a fixed multiple of one, or an indexed one.
        layers: all by default.
        units: SQL predicate over ``neurons``, ``heads`` or ``latents``, or (layer, unit) pairs.
        pass_type: ``backward`` for the gradient of the store's objective.
        quantiles: shares; columns of them are there if the store has histograms of the scalar.
        indices: ``neurons``, ``heads``, ``channels`` …: indices along that axis.

    Returns:
        Columns ``layer``, one per unit axis, the members of :class:`UnitFacts`, ``std``, and
        for a share such as 0.99 ``q99``, ``q99_low``, ``q99_high``: an estimate, and what the
        true value is not outside of. NULL where something is undefined or not known.

    Raises:
        InvalidInput: an unknown scalar, layer, unit or share.
        Unavailable: the store has no statistics of the scalar.
        StoreDamaged: a file that they are read from fails its checksum.
    """
    declared = store.scalar(name, pass_type)
    require_rankable(declared)
    store.require_committed()
    unknown = sorted(set(indices) - set(UNIT_ARGUMENTS.values()))
    if unknown:
        raise InvalidInput(
            f"statistics has no argument {unknown[0]!r}; units are chosen by "
            f"{', '.join(dict.fromkeys(UNIT_ARGUMENTS.values()))} or `units`.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    known = dict.fromkeys(UNIT_ARGUMENTS.values()) | indices
    chosen = choose_units(store, declared, layers, known, units)
    facts, source = require_facts(store, declared)
    histograms = stored_histograms(store, declared)
    shares = tuple(quantiles) if histograms is not None else ()
    tables = []
    for layer in chosen.layers:
        wanted = chosen.of(layer)
        columns = _unit_names(store, declared, layer, wanted) | _columns(facts(layer, wanted))
        if histograms is not None and shares:
            found = histograms.layer(layer)
            for share in shares:
                parts = zip(("", "_low", "_high"), found.quantile(share), strict=True)
                for suffix, values in parts:
                    columns[f"{_quantile_name(share)}{suffix}"] = _nullable(values[wanted])
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    return Statistics(table, declared.name, source, shares)


def unit_summary(
    store: "OpenStore", declared: DerivedScalar, layer: int, column: int
) -> UnitSummary | None:
    """What the store has of one unit; None where it has no statistics of the scalar.

    Args:
        store: the open store.
        declared: the scalar.
        layer: the layer, 0 for a scalar outside the blocks.
        column: the unit's place among the layer's.

    Raises:
        StoreDamaged: a file that it is read from fails its checksum.
    """
    found = find_facts(store, declared)
    if found is None:
        return None
    facts = found[0](layer, np.array([column]))
    histograms = stored_histograms(store, declared)
    quantiles: dict[float, Bracket] = {}
    if histograms is not None:
        histogram = histograms.of(layer, column)
        if histogram.total:
            quantiles = {share: histogram.quantile(share) for share in QUANTILES}
    variance = _known(facts.variance)
    return UnitSummary(
        count=int(facts.count[0]),
        nan=int(facts.nan[0]),
        positive_share=_known(facts.positive_share),
        mean=_known(facts.mean),
        variance=variance,
        std=None if variance is None else math.sqrt(variance),
        skewness=_known(facts.skewness),
        kurtosis=_known(facts.kurtosis),
        min=_known(facts.min),
        max=_known(facts.max),
        special_min=_known(facts.special_min),
        special_max=_known(facts.special_max),
        quantiles=quantiles,
    )


def _known(values: Floats) -> float | None:
    value = float(values[0])
    return None if math.isnan(value) else value


def stored_histograms(store: "OpenStore", declared: DerivedScalar) -> UnitHistograms | None:
    """The histograms that the store keeps of a scalar; None where it keeps none.

    Raises:
        StoreDamaged: the compacted file is malformed.
    """
    found = find_index(store.sources, declared, store.config_of(declared), HISTOGRAM)
    return None if found is None else UnitHistograms(store.reader, found)


def unit_histogram(
    store: "Store",
    name: str | DerivedScalar,
    unit: tuple[int, ...],
    *,
    pass_type: str = "forward",
) -> Histogram:
    """The histogram of one unit over ordinary rows.

    Read where the store keeps it, else counted from the unit's values: the same either way.

    Args:
        store: the open store.
        name: a scalar with a value per (layer, token, unit).
        unit: (layer, neuron), (layer, head, channel) …; without layer outside the blocks.
        pass_type: ``backward`` for the gradient of the store's objective.

    Raises:
        InvalidInput: an unknown scalar or unit.
        Unavailable: the store cannot derive the scalar.
        StoreDamaged: a file that it is read from fails its checksum.
    """
    from actstore.query.examples import unit_values

    declared = store.scalar(name, pass_type)
    require_rankable(declared)
    store.require_committed()
    layer, column = _place(store, declared, unit)
    histograms = stored_histograms(store, declared)
    if histograms is not None:
        return histograms.of(layer, column)
    values, _ = unit_values(store, declared, layer, column, None, False)
    rows = sum(record.rows for record in store.reader.commits["base"].values())
    return Histogram.of_values(values, nan=rows - store.special_count - len(values))


def _place(store: "OpenStore", declared: DerivedScalar, unit: tuple[int, ...]) -> tuple[int, int]:
    """Layer and column of a unit."""
    shape = store.unit_shape(declared)
    sizes = (store.layer_count(declared), *shape) if declared.has_layers else shape
    given: Any = unit
    if (
        not isinstance(given, Sequence)
        or len(given) != len(sizes)
        or not all(
            isinstance(index, int | np.integer) and 0 <= index < size
            for index, size in zip(given, sizes, strict=True)
        )
    ):
        names = ["layer"] * declared.has_layers + [str(axis) for axis in declared.ranked_axes]
        known = ", ".join(f"{a} below {n}" for a, n in zip(names, sizes, strict=True))
        raise InvalidInput(
            f"unit is {unit!r}; {declared.name} has units ({known}), counted from 0.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    layer, *indices = unit if declared.has_layers else (0, *unit)
    if layer not in store.layers_of(declared):
        raise InvalidInput(
            f"unit names layer {layer}; {declared.name} exists at "
            f"{list(store.layers_of(declared))} alone.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    return int(layer), int(np.ravel_multi_index(indices, shape))


# Columns


def _unit_names(
    store: "OpenStore", declared: DerivedScalar, layer: int, units: npt.NDArray[np.int64]
) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if declared.has_layers:
        columns["layer"] = pa.array(np.full(len(units), layer), pa.int32())
    places = np.unravel_index(units, store.unit_shape(declared))
    for axis, values in zip(declared.ranked_axes, places, strict=True):
        if axis is not Dimension.SINGLETON:
            columns[axis.value] = pa.array(values, pa.int32())
    return columns


def _columns(facts: UnitFacts) -> dict[str, Any]:
    columns: dict[str, Any] = {"count": facts.count, "nan": facts.nan}
    for name in ("positive_share", "mean", "variance"):
        columns[name] = _nullable(getattr(facts, name))
    columns["std"] = _nullable(np.sqrt(facts.variance))
    for name in ("skewness", "kurtosis", "min", "max", "special_min", "special_max"):
        columns[name] = _nullable(getattr(facts, name))
    return columns


def _quantile_name(share: float) -> str:
    return f"q{100 * share:.10g}".replace(".", "_")


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
