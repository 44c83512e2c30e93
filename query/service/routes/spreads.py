"""How values are spread: statistics of units, and the histogram of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from fastapi import Depends, Query, Response

from actstore.query.service.models import HistogramModel, StatisticsModel, TableModel
from actstore.query.service.negotiation import TABLE, Format
from actstore.query.service.paging import Cursor, Limit, Sort, TableQuery, Where, page_response
from actstore.query.service.resources import Ask, Asked, columns_of, new_router, resource
from actstore.query.service.routes.choices import Units, chosen_units
from actstore.query.service.routes.parameters import (
    Indices,
    Layers,
    NamePath,
    PassName,
    unit_numbers,
)
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.histograms import QUANTILES

if TYPE_CHECKING:
    from actstore.query.statistics import Statistics

__all__ = ["AskedSpread", "Spread", "router", "unit_statistics"]

router = new_router("statistics")

_BARS = 48

Shares = Annotated[
    list[float] | None,
    Query(alias="quantile", max_length=100, description="share, such as 0.99; repeatable"),
]


@resource(router, "/statistics", TableModel, offers=TABLE)
def summaries(
    ask: Asked,
    location: Annotated[str | None, Query(max_length=200)] = None,
    pass_type: Annotated[str | None, Query(max_length=20)] = None,
    layer: Layers = None,
    unit: Indices = None,
    where: Where = None,
    sort: Sort = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """Counts, moments and extremes of every unit of every location that has a summary."""
    filters = {"location": location, "pass": pass_type, "layer": layer, "unit": unit}
    keys = ("location", "pass", "layer", "unit")
    return page_response(ask, TableQuery("statistics", keys, filters, where, sort), limit, cursor)


@resource(router, "/statistics/{name}", StatisticsModel, offers=TABLE)
def statistics(
    ask: Asked,
    name: NamePath,
    layer: Layers = None,
    neuron: Indices = None,
    head: Indices = None,
    latent: Indices = None,
    channel: Indices = None,
    units: Units = None,
    pass_type: PassName = "forward",
    quantile: Shares = None,
    offset: Annotated[int, Query(ge=0, le=2**53, description="units left out before")] = 0,
    limit: Annotated[
        int | None, Query(ge=1, description="rows wanted; the server's most by default")
    ] = None,
) -> Response:
    """Statistics of a scalar's units, with quantiles where its histograms are stored."""
    found = ask.store.statistics(
        name,
        layers=layer,
        neurons=neuron,
        heads=head,
        latents=latent,
        channels=channel,
        units=chosen_units(units),
        pass_type=pass_type,
        quantiles=QUANTILES if quantile is None else quantile,
    )
    most = ask.settings.max_rows if limit is None else ask.limit(limit)
    beside = {
        "scalar": found.scalar,
        "source": found.source,
        "quantiles": list(found.quantiles),
        "total": len(found),
    }
    return ask.table(found.to_arrow().slice(offset, most), beside)


def unit_statistics(ask: Ask, name: str, layer: int, unit: int) -> Response:
    """One unit's statistics, a row for each pass that has some.

    Raises:
        InvalidInput: an unknown scalar.
        Unavailable: the store has no statistics of it.
    """
    found: dict[str, Statistics] = {}
    reason: Unavailable | None = None
    for pass_type in ("forward", "backward"):
        try:
            found[pass_type] = ask.store.statistics(
                name, units=[(layer, unit)], pass_type=pass_type
            )
        except Unavailable as error:
            reason = reason or error
        except InvalidInput as error:
            # A scalar without a backward pass.
            if pass_type == "forward" or error.kind is ErrorKind.UNKNOWN_SCALAR:
                raise
    if not found:
        assert reason is not None
        raise reason
    tables = [
        one.to_arrow()
        .add_column(0, "pass", pa.array([pass_type] * len(one), pa.string()))
        .add_column(0, "scalar", pa.array([one.scalar] * len(one), pa.string()))
        for pass_type, one in found.items()
    ]
    # Either pass alone may have quantiles.
    table = pa.concat_tables(tables, promote_options="default")
    return ask.table(table, {"columns": columns_of(table), "next": None})


@dataclass(frozen=True)
class Spread:
    """The options of a histogram, as query keys."""

    pass_type: PassName = "forward"
    bins: Annotated[
        int, Query(ge=1, le=1000, description="bins of equal width, for people to look at")
    ] = _BARS

    def response(self, ask: Ask, scalar: str, unit: Sequence[int]) -> Response:
        """The histogram of a unit, in the form that is asked for: a table has a row per bin."""
        found = ask.store.histogram(scalar, tuple(unit), pass_type=self.pass_type)
        named = {"scalar": ask.store.scalar(scalar, self.pass_type).name, "unit": list(unit)}
        if ask.form is Format.JSON:
            shown = found.rebinned(self.bins)
            rebinned = [
                {"low": low, "high": high, "count": count}
                for (low, high), count in zip(
                    pairwise(shown.edges.tolist()), shown.counts.tolist(), strict=True
                )
            ]
            beside: dict[str, Any] = {"rebinned": rebinned, "estimated": shown.is_estimated}
            return ask.object({**named, **found.to_json(), **beside})
        places = np.flatnonzero(found.counts)
        columns = {
            "low": found.bin_low[places],
            "high": found.bin_high[places],
            "count": found.counts[places],
        }
        return ask.table(pa.table(columns), {**named, "nan": found.nan})


AskedSpread = Annotated[Spread, Depends()]


@resource(router, "/histogram/{name}", HistogramModel, offers=TABLE)
def histogram(
    ask: Asked,
    name: NamePath,
    unit: Annotated[str, Query(max_length=60, description="layer:unit, or layer:head:channel")],
    spread: AskedSpread,
) -> Response:
    """How the values of one unit are spread: as it is stored, else counted now."""
    return spread.response(ask, name, unit_numbers(unit))
