"""Neurons, heads and latents: tables of them, and each one with its examples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query, Response

from actstore.query.service.models import ExamplesModel, TableModel, UnitModel
from actstore.query.service.negotiation import TABLE
from actstore.query.service.paging import Cursor, Limit, Sort, TableQuery, Where, page_response
from actstore.query.service.resources import Ask, Asked, new_router, resource
from actstore.query.service.routes.parameters import Indices, LayerPath, Layers, UnitPath
from actstore.query.service.routes.rankings import AskedContexts
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable

__all__ = ["router"]

router = new_router("units")

_MOST_BINS = 500
"""Of one unit's histograms, forward and backward together."""

SetName = Annotated[
    str | None, Query(alias="set", max_length=200, description="the set of latents")
]
ScalarOf = Annotated[str, Query(max_length=200, description="the scalar whose values are shown")]
LocationOf = Annotated[
    str, Query(max_length=200, description="the location whose values are summarised")
]


@dataclass(frozen=True)
class _Kind:
    """A kind of units.

    Attributes:
        table: its table in SQL, and its path.
        column: the unit's number there.
        keys: what tells its rows apart.
    """

    table: str
    column: str
    keys: tuple[str, ...]


_NEURONS = _Kind("neurons", "neuron", ("layer", "neuron"))
_HEADS = _Kind("heads", "head", ("layer", "head"))
_LATENTS = _Kind("latents", "latent", ("set", "layer", "latent"))


def _row(
    ask: Ask, kind: _Kind, layer: int, unit: int, further: Mapping[str, Any]
) -> dict[str, Any]:
    """A unit's row.

    Raises:
        InvalidInput: there is no such unit, or several sets have one.
    """
    ask.store.require_committed()
    wanted = {"layer": layer, kind.column: unit, **further}
    text, values = TableQuery(kind.table, kind.keys, wanted).sql([])
    rows = ask.store.fetch(f"{text} LIMIT 2", values).to_pylist()
    if not rows:
        raise InvalidInput(
            f"There is no {kind.column} {unit} of layer {layer} in this store.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    if len(rows) > 1:
        raise InvalidInput(
            f"Several sets have a {kind.column} {unit} of layer {layer}; name one with `set`.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    row: dict[str, Any] = rows[0]
    return row


def _unit_response(ask: Ask, kind: _Kind, row: dict[str, Any], parts: tuple[str, ...]) -> Response:
    own = f"/api/v1/{kind.table}/{row['layer']}/{row[kind.column]}"
    links = {"self": own, **{part: f"{own}/{part}" for part in parts}}
    return ask.object({"row": row, "links": links})


@resource(router, "/neurons", TableModel, offers=TABLE)
def neurons(
    ask: Asked,
    layer: Layers = None,
    neuron: Indices = None,
    dead: Annotated[bool | None, Query(description="above zero at no ordinary row")] = None,
    where: Where = None,
    sort: Sort = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """The neurons with their norms, statistics and the tokens that they promote."""
    filters = {"layer": layer, "neuron": neuron, "dead": dead}
    query = TableQuery(_NEURONS.table, _NEURONS.keys, filters, where, sort)
    return page_response(ask, query, limit, cursor)


@resource(router, "/neurons/{layer}/{unit}", UnitModel)
def neuron(ask: Asked, layer: LayerPath, unit: UnitPath) -> Response:
    """One neuron's row."""
    row = _row(ask, _NEURONS, layer, unit, {})
    return _unit_response(ask, _NEURONS, row, ("examples", "statistics", "histogram"))


@resource(router, "/neurons/{layer}/{unit}/examples", ExamplesModel, offers=TABLE)
def neuron_examples(
    ask: Asked,
    layer: LayerPath,
    unit: UnitPath,
    contexts: AskedContexts,
    scalar: ScalarOf = "mlp_post_act",
) -> Response:
    """Contexts of one neuron."""
    return contexts.response(ask, scalar, (layer, unit))


@resource(router, "/neurons/{layer}/{unit}/statistics", TableModel, offers=TABLE)
def neuron_statistics(
    ask: Asked, layer: LayerPath, unit: UnitPath, location: LocationOf = "mlp_post_act"
) -> Response:
    """Counts, moments and extremes of one neuron, forward and backward."""
    _row(ask, _NEURONS, layer, unit, {})
    wanted = {"location": location, "layer": layer, "unit": unit}
    query = TableQuery("statistics", ("location", "pass", "layer", "unit"), wanted)
    return page_response(ask, query, min(50, ask.settings.max_rows), None)


@resource(router, "/neurons/{layer}/{unit}/histogram", TableModel, offers=TABLE)
def neuron_histogram(
    ask: Asked, layer: LayerPath, unit: UnitPath, location: LocationOf = "mlp_post_act"
) -> Response:
    """How the values of one neuron are spread over bins."""
    _row(ask, _NEURONS, layer, unit, {})
    tables = ask.store.fetch("SELECT table_name FROM duckdb_tables()").column(0).to_pylist()
    known = "SELECT location FROM histograms WHERE location = ? LIMIT 1"
    if "histograms" not in tables or not ask.store.fetch(known, [location]).num_rows:
        raise Unavailable(
            f"This store keeps no histograms of {location}. Run `actstore index STORE {location} "
            "--part histogram`, then start the server again.",
            kind=ErrorKind.NOT_STORED,
        )
    wanted = {"location": location, "layer": layer, "unit": unit}
    query = TableQuery("histograms", ("location", "pass", "layer", "unit", "bin"), wanted)
    return page_response(ask, query, min(_MOST_BINS, ask.settings.max_rows), None)


@resource(router, "/heads", TableModel, offers=TABLE)
def heads(
    ask: Asked,
    layer: Layers = None,
    head: Indices = None,
    where: Where = None,
    sort: Sort = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """The attention heads with their norms."""
    query = TableQuery(_HEADS.table, _HEADS.keys, {"layer": layer, "head": head}, where, sort)
    return page_response(ask, query, limit, cursor)


@resource(router, "/heads/{layer}/{unit}", UnitModel)
def head(ask: Asked, layer: LayerPath, unit: UnitPath) -> Response:
    """One head's row."""
    return _unit_response(ask, _HEADS, _row(ask, _HEADS, layer, unit, {}), ("examples",))


@resource(router, "/heads/{layer}/{unit}/examples", ExamplesModel, offers=TABLE)
def head_examples(
    ask: Asked,
    layer: LayerPath,
    unit: UnitPath,
    contexts: AskedContexts,
    scalar: ScalarOf = "attn_write_norm",
) -> Response:
    """Contexts of one head, by a scalar with one value per token and head."""
    return contexts.response(ask, scalar, (layer, unit))


@resource(router, "/latents", TableModel, offers=TABLE)
def latents(
    ask: Asked,
    set_name: SetName = None,
    layer: Layers = None,
    latent: Indices = None,
    dead: Annotated[bool | None, Query(description="zero at every ordinary row")] = None,
    where: Where = None,
    sort: Sort = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """The latents of every set, with their statistics."""
    filters = {"set": set_name, "layer": layer, "latent": latent, "dead": dead}
    query = TableQuery(_LATENTS.table, _LATENTS.keys, filters, where, sort)
    return page_response(ask, query, limit, cursor)


@resource(router, "/latents/{layer}/{unit}", UnitModel)
def latent(ask: Asked, layer: LayerPath, unit: UnitPath, set_name: SetName = None) -> Response:
    """One latent's row."""
    row = _row(ask, _LATENTS, layer, unit, {"set": set_name})
    return _unit_response(ask, _LATENTS, row, ("examples",))


@resource(router, "/latents/{layer}/{unit}/examples", ExamplesModel, offers=TABLE)
def latent_examples(
    ask: Asked,
    layer: LayerPath,
    unit: UnitPath,
    contexts: AskedContexts,
    scalar: ScalarOf = "autoencoder_latent",
) -> Response:
    """Contexts of one latent, by a scalar of latents."""
    return contexts.response(ask, scalar, (layer, unit))


@resource(router, "/statistics", TableModel, offers=TABLE)
def statistics(
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
