"""The table of neurons, and the page of one."""

from typing import Annotated, Literal

from fastapi import Query, Request
from fastapi.responses import Response

from actstore.query.service.pages.rendering import Crumb, open_store, render, worker
from actstore.query.service.pages.routing import new_router
from actstore.query.views.derived_values import derived_at_examples
from actstore.query.views.neuron_card import (
    ACTIVATION,
    EXAMPLE_KINDS,
    NeuronCard,
    similar_entries,
)
from actstore.query.views.neuron_table import SORTS, Alive, NeuronQuery, NeuronTable
from actstore.store.vocabulary import Dimension

__all__ = ["router"]

router = new_router()

Kind = Literal["top", "bottom", "random", "quantile"]


@router.get("/neurons")
def neurons(
    request: Request,
    layer: Annotated[str, Query(pattern=r"^\d{0,6}$")] = "",
    sort: str = "max",
    descending: bool = True,
    alive: Alive = "any",
    promotes: str = "",
    where: str = "",
    page: int = 1,
    size: int = 50,
) -> Response:
    """The table of neurons."""
    query = NeuronQuery(
        layer=int(layer) if layer else None,
        sort=sort,
        descending=descending,
        alive=alive,
        promotes=promotes,
        where=where,
        page=page,
        size=size,
    )
    view = NeuronTable.of(open_store(request), query, worker(request))
    crumbs = (Crumb("Neurons"),)
    return render(request, "neurons.html", crumbs=crumbs, view=view, sorts=SORTS)


@router.get("/neurons/{layer}/{neuron}")
def neuron(
    request: Request,
    layer: int,
    neuron: int,
    examples: Kind = "top",
    k: Annotated[int, Query(ge=1, le=100)] = 12,
    whole: bool = False,
    lines: bool = False,
    seed: int = 0,
) -> Response:
    """The page of one neuron."""
    view = NeuronCard.of(
        open_store(request), layer, neuron, kind=examples, k=k, whole=whole, seed=seed
    )
    return render(
        request,
        "neuron.html",
        crumbs=_crumbs(layer, neuron),
        view=view,
        kinds=EXAMPLE_KINDS,
        options={"examples": examples, "k": k, "whole": whole, "lines": lines, "seed": seed},
    )


@router.get("/neurons/{layer}/{neuron}/similar")
def similar(request: Request, layer: int, neuron: int) -> Response:
    """The neurons that write in the same direction."""
    found = similar_entries(open_store(request), layer, neuron)
    crumbs = (*_crumbs(layer, neuron, linked=True), Crumb("Similar neurons"))
    return render(request, "similar.html", crumbs=crumbs, found=found)


@router.get("/neurons/{layer}/{neuron}/derived")
def derived(request: Request, layer: int, neuron: int) -> Response:
    """The neuron's derived scalars where it is strongest."""
    found = derived_at_examples(open_store(request), ACTIVATION, Dimension.NEURON, layer, neuron)
    crumbs = (*_crumbs(layer, neuron, linked=True), Crumb("Derived scalars"))
    return render(request, "derived.html", crumbs=crumbs, found=found)


def _crumbs(layer: int, neuron: int, *, linked: bool = False) -> tuple[Crumb, ...]:
    return (
        Crumb("Neurons", "/neurons"),
        Crumb(f"Layer {layer}", f"/neurons?layer={layer}"),
        Crumb(f"Neuron {neuron}", f"/neurons/{layer}/{neuron}" if linked else None),
    )
