"""What there is: the index of resources, the store, its locations, the scalars."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import Response

from actstore.query.derived import SCALARS
from actstore.query.derived.pages import family_of, is_rankable
from actstore.query.derived.registry import requires_gradient
from actstore.query.service.models import ApiIndex, LocationsModel, ScalarsModel, StoreModel
from actstore.query.service.resources import Asked, new_router, resource

__all__ = ["router"]

router = new_router("what there is")

_RESOURCES = {
    "store": "/api/v1/store",
    "locations": "/api/v1/locations",
    "scalars": "/api/v1/scalars",
    "values": "/api/v1/scalars/{name}",
    "raw": "/api/v1/raw/{location}",
    "topk": "/api/v1/topk/{name}",
    "explain": "/api/v1/explain/{name}",
    "compare": "/api/v1/compare",
    "filter": "/api/v1/filter/{name}",
    "count": "/api/v1/count/{name}",
    "examples": "/api/v1/examples/{name}",
    "neurons": "/api/v1/neurons",
    "heads": "/api/v1/heads",
    "latents": "/api/v1/latents",
    "statistics": "/api/v1/statistics",
    "statistics_of": "/api/v1/statistics/{name}",
    "histogram": "/api/v1/histogram/{name}",
    "documents": "/api/v1/documents",
    "sequences": "/api/v1/sequences",
    "sql": "/api/v1/sql",
    "schema": "/openapi.json",
    "docs": "/api/docs",
}


@resource(router, "", ApiIndex)
def index(ask: Asked) -> Response:
    """Where everything is."""
    found = dict(_RESOURCES)
    if ask.request.app.state.prompt is not None:
        found["prompt"] = "/api/v1/prompt"
    return ask.object({"version": version("actstore"), "resources": found})


@resource(router, "/store", StoreModel)
def store(ask: Asked) -> Response:
    """What the store holds, and what it does not hold yet."""
    opened = ask.store
    found: dict[str, Any] = opened.info().to_json()
    del found["path"]
    manifest = opened.reader.manifest
    found["state"] = ask.opening.tag
    found["format"] = _FORMAT
    found["dimensions"] = dict(manifest.model["dimensions"])
    found["tokenizer"] = dict(manifest.tokenizer)
    found["prompts"] = ask.request.app.state.prompt is not None
    return ask.object(found)


_FORMAT = 1
"""The format of stores that this version reads."""


@resource(router, "/locations", LocationsModel)
def locations(ask: Asked) -> Response:
    """Every location of the forward pass, and every stored gradient: where it comes from."""
    return ask.object({"locations": [asdict(entry) for entry in ask.store.locations.values()]})


@resource(router, "/scalars", ScalarsModel)
def scalars(ask: Asked) -> Response:
    """The derived scalars, from the one registry that everything else reads too."""
    rows = [
        {
            "name": declared.name,
            "family": family_of(declared),
            "axes": [
                *(["layer"] if declared.has_layers else []),
                "pair" if declared.is_flattened else "token",
                *map(str, declared.axes),
            ],
            "node": declared.node_type.value,
            "dependence": type(declared.dependence).__name__.lower(),
            "definition": declared.definition,
            "meaning": declared.meaning,
            "needs_gradient": requires_gradient(declared),
            "rankable": is_rankable(declared),
            "backward": declared.gradient is not None,
            "own": declared.origin is not None,
        }
        for declared in SCALARS.values()
    ]
    return ask.object({"scalars": rows})
