"""The store as a whole: what it holds, how much of it is there, what its layers look like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from actstore.query.inventory import LatentSetInfo, LocationInfo, StoreInfo
from actstore.query.views.colours import ramp
from actstore.query.views.tables import fetch_rows, literal
from actstore.query.views.text import number, percent
from actstore.store.location_names import parse_location

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["HeatCell", "HeatMap", "Overview", "layer_heat_map"]


@dataclass(frozen=True)
class HeatCell:
    """A number with its step among its column's.

    Attributes:
        value: None where there is none.
        step: 0 to 8; None where there is no value.
        shown: the number for people.
    """

    value: float | None
    step: int | None
    shown: str


@dataclass(frozen=True)
class HeatMap:
    """Numbers by layer and statistic; each column has a ramp of its own.

    Attributes:
        location: the stored location that it is about.
        columns: names of the statistics, with what they mean.
        layers: the rows' layers; None for a location outside the blocks.
        rows: cells by layer.
        sql: the query that it was made from.
    """

    location: str
    columns: tuple[tuple[str, str], ...]
    layers: tuple[int | None, ...]
    rows: tuple[tuple[HeatCell, ...], ...]
    sql: str


@dataclass(frozen=True)
class Overview:
    """A store in one page.

    Attributes:
        info: its counts.
        locations: every location and where its values come from.
        latents: its sets of latents.
        units: how many neurons and heads a layer has.
        heat: layers by statistics of one stored location; None where nothing is indexed.
        heat_locations: the locations that have such statistics.
        covered: share of the planned segments that are committed.
    """

    info: StoreInfo
    locations: tuple[LocationInfo, ...]
    latents: tuple[LatentSetInfo, ...]
    units: tuple[tuple[str, int], ...]
    heat: HeatMap | None
    heat_locations: tuple[str, ...]
    covered: float

    @classmethod
    def of(cls, store: "Store", location: str | None = None) -> Self:
        """The overview of an open store.

        Args:
            store: the store.
            location: whose statistics the heat map shows; the neurons' by default.
        """
        info = store.info()
        dimensions = store.sources.dimensions
        known = _indexed(store) if info.segments_committed else ()
        chosen = location if location in known else _usual(known)
        return cls(
            info=info,
            locations=tuple(store.locations.values()),
            latents=tuple(info.latents.values()),
            units=(
                ("neurons per layer", dimensions.d_mlp),
                ("heads per layer", dimensions.n_heads),
                ("residual channels", dimensions.d_model),
                ("vocabulary", dimensions.vocabulary_size),
            ),
            heat=None if chosen is None else layer_heat_map(store, chosen),
            heat_locations=known,
            covered=info.segments_committed / max(info.segments_planned, 1),
        )


def _usual(known: tuple[str, ...]) -> str | None:
    return "mlp_post_act" if "mlp_post_act" in known else next(iter(known), None)


def _indexed(store: "Store") -> tuple[str, ...]:
    query = "SELECT DISTINCT location FROM statistics WHERE pass = 'forward' ORDER BY location"
    return tuple(str(row["location"]) for row in fetch_rows(store, query))


_STATISTICS = (
    ("mean", "avg(mean)", "mean of the units' means", number),
    ("spread", "avg(sqrt(variance))", "mean of the units' standard deviations", number),
    ("max", "max(max)", "greatest value of any unit", number),
    ("min", "min(min)", "least value of any unit", number),
    ("kurtosis", "median(kurtosis)", "median kurtosis; 3 for a normal distribution", number),
    (
        "positive",
        "sum(positive) / nullif(sum(count), 0)",
        "share of the values above zero",
        percent,
    ),
    (
        "dead",
        "avg((positive = 0)::INTEGER)",
        "share of the units that are above zero nowhere",
        percent,
    ),
    ("NaN", "sum(nan)::DOUBLE", "values that are not a number", number),
)


def layer_heat_map(store: "Store", location: str) -> HeatMap:
    """Layers by statistics of a stored location, over ordinary rows."""
    columns = ",\n    ".join(f'{formula} AS "{name}"' for name, formula, _, _ in _STATISTICS)
    sql = (
        f"SELECT layer,\n    {columns}\nFROM statistics\n"
        f"WHERE location = {literal(location)} AND pass = 'forward'\nGROUP BY layer ORDER BY layer"
    )
    found = fetch_rows(store, sql)
    by_column = [_cells((row[name] for row in found), shown) for name, _, _, shown in _STATISTICS]
    layered = parse_location(location)[0].has_layers
    return HeatMap(
        location=location,
        columns=tuple((name, meaning) for name, _, meaning, _ in _STATISTICS),
        layers=tuple(int(row["layer"]) if layered else None for row in found),
        rows=tuple(zip(*by_column, strict=True)) if found else (),
        sql=sql,
    )


def _cells(
    values: Iterable[float | None], shown: Callable[[float | None], str]
) -> tuple[HeatCell, ...]:
    given = [None if value is None else float(value) for value in values]
    return tuple(
        HeatCell(value, step, shown(value)) for value, step in zip(given, ramp(given), strict=True)
    )
