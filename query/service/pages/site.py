"""All pages, and the files that they need."""

import re
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from actstore.query.service.pages import (
    corpus_pages,
    head_pages,
    latent_pages,
    neuron_pages,
    statement_pages,
    store_pages,
)
from actstore.query.service.pages.rendering import ASSETS, assets, open_store
from actstore.query.service.pages.routing import new_router
from actstore.query.service.problems import HttpKind, ServiceError
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["router"]

router = new_router()
for _pages in (
    store_pages,
    neuron_pages,
    head_pages,
    latent_pages,
    corpus_pages,
    statement_pages,
):
    router.include_router(_pages.router)

_YEAR = 365 * 24 * 3600

_PLACES = (
    (re.compile(r"(?:h(?:ead)?) ?(\d+)[ :.,/]+(\d+)"), "/heads/{}/{}"),
    (re.compile(r"(?:f|latent) ?(\d+)[ :.,/]+(\d+)"), "/latents/{set}/{}/{}"),
    (re.compile(r"(?:s|sequence|#) ?(\d+)"), "/sequences/{}"),
    (re.compile(r"(?:n(?:euron)?|l)? ?(\d+)[ :.,/n]+(\d+)"), "/neurons/{}/{}"),
)


_files = APIRouter(include_in_schema=False)
"""Apart from pages: they follow from no store."""


@_files.get("/assets/{name}")
def asset(name: str) -> Response:
    """One of the files that pages need."""
    if name not in ASSETS:
        raise ServiceError(HttpKind.NOT_FOUND, "There is no such file.")
    # Their addresses carry a digest of what is in them.
    lasting = {"Cache-Control": f"public, max-age={_YEAR}, immutable"}
    return Response(assets()[name], 200, lasting, ASSETS[name])


@router.get("/jump")
def jump(request: Request, to: str = "") -> Response:
    """To the unit that somebody typed: ``3:17`` a neuron, ``h2:1`` a head, ``s5`` a sequence."""
    wanted = to.strip().lower()
    base = str(request.scope.get("root_path", "")).rstrip("/")
    for pattern, place in _PLACES:
        found = pattern.fullmatch(wanted)
        if found:
            numbers = (int(digits) for digits in found.groups())
            first = quote(next(iter(open_store(request).kept_latents.sets), "none"), safe="")
            return RedirectResponse(base + place.format(*numbers, set=first), 303)
    raise InvalidInput(
        f"{to!r} names no place. Write 3:17 for layer 3, neuron 17; h2:1 for a head; f3:5 for a "
        "latent; s5 for a sequence.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )


router.include_router(_files)
