"""Neurons, heads and latents: tables of them, and each one with its examples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query, Response

from actstore.query.service.models import (
    ExamplesModel,
    HistogramModel,
    NeuronModel,
    TableModel,
    UnitModel,
)
from actstore.query.service.negotiation import TABLE
from actstore.query.service.paging import Cursor, Limit, Sort, TableQuery, Where, page_response
from actstore.query.service.resources import Ask, Asked, new_router, resource
from actstore.query.service.routes.parameters import Indices, LayerPath, Layers, UnitPath
from actstore.query.service.routes.rankings import AskedContexts
from actstore.query.service.routes.spreads import AskedSpread, unit_statistics
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["router"]

router = new_router("units")

SetName = Annotated[
    str | None, Query(alias="set", max_length=200, description="the set of latents")
]
ScalarOf = Annotated[str, Query(max_length=200, description="the scalar whose values are shown")]


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


def _unit_response(
    ask: Ask,
    kind: _Kind,
    row: dict[str, Any],
    parts: tuple[str, ...],
    facts: Mapping[str, Any] | None = None,
) -> Response:
    own = f"/api/v1/{kind.table}/{row['layer']}/{row[kind.column]}"
    links = {"self": own, **{part: f"{own}/{part}" for part in parts}}
    return ask.object({**(facts or {}), "row": row, "links": links})


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


@resource(router, "/neurons/{layer}/{unit}", NeuronModel)
def neuron(ask: Asked, layer: LayerPath, unit: UnitPath) -> Response:
    """One neuron: its weights, tokens, statistics, histogram, contexts and neighbours."""
    row = _row(ask, _NEURONS, layer, unit, {})
    parts = ("examples", "statistics", "histogram")
    return _unit_response(ask, _NEURONS, row, parts, ask.store.neuron(layer, unit).to_json())


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
    ask: Asked, layer: LayerPath, unit: UnitPath, scalar: ScalarOf = "mlp_post_act"
) -> Response:
    """Counts, moments, extremes and quantiles of one neuron, forward and backward."""
    return unit_statistics(ask, scalar, layer, unit)


@resource(router, "/neurons/{layer}/{unit}/histogram", HistogramModel, offers=TABLE)
def neuron_histogram(
    ask: Asked,
    layer: LayerPath,
    unit: UnitPath,
    spread: AskedSpread,
    scalar: ScalarOf = "mlp_post_act",
) -> Response:
    """How the values of one neuron are spread: as it is stored, else counted now."""
    return spread.response(ask, scalar, (layer, unit))


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
