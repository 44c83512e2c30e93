"""The table of latents, and the page of one."""

from typing import Annotated, Literal

from fastapi import Query, Request
from fastapi.responses import Response

from actstore.query.service.pages.rendering import Crumb, open_store, render, worker
from actstore.query.service.pages.routing import new_router
from actstore.query.views.latents import (
    LATENT_KINDS,
    LATENT_SORTS,
    LatentCard,
    LatentKind,
    LatentQuery,
    LatentTable,
)

__all__ = ["router"]

router = new_router()

Number = Annotated[str, Query(pattern=r"^\d{0,9}$")]


@router.get("/latents")
def latents(
    request: Request,
    of: Annotated[str, Query(alias="set")] = "",
    layer: Number = "",
    sort: str = "max",
    descending: bool = True,
    alive: Literal["any", "live", "dead"] = "any",
    where: str = "",
    page: int = 1,
    size: int = 50,
) -> Response:
    """The table of a set's latents."""
    store = open_store(request)
    crumbs = (Crumb("Latents"),)
    if not store.kept_latents.sets:
        return render(request, "no_latents.html", crumbs=crumbs)
    query = LatentQuery(
        set=of or next(iter(store.kept_latents.sets)),
        layer=int(layer) if layer else None,
        sort=sort,
        descending=descending,
        alive=alive,
        where=where,
        page=page,
        size=size,
    )
    view = LatentTable.of(store, query, worker(request))
    return render(request, "latents.html", crumbs=crumbs, view=view, sorts=LATENT_SORTS)


@router.get("/latents/{of}/{layer}/{latent}")
def latent(
    request: Request,
    of: str,
    layer: int,
    latent: int,
    examples: LatentKind = "top",
    k: Annotated[int, Query(ge=1, le=100)] = 12,
    lines: bool = False,
    seed: int = 0,
) -> Response:
    """The page of one latent."""
    view = LatentCard.of(open_store(request), of, layer, latent, kind=examples, k=k, seed=seed)
    crumbs = (
        Crumb("Latents", "/latents"),
        Crumb(view.set, f"/latents?set={view.set}"),
        Crumb(f"Layer {layer}", f"/latents?set={view.set}&layer={layer}"),
        Crumb(f"Latent {latent}"),
    )
    return render(
        request,
        "latent.html",
        crumbs=crumbs,
        view=view,
        kinds=LATENT_KINDS,
        options={"examples": examples, "k": k, "lines": lines, "seed": seed},
    )
