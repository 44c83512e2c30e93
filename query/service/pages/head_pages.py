"""The table of heads, and the page of one over a sequence."""

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response

from actstore.query.service.pages.rendering import Crumb, open_store, render
from actstore.query.service.pages.routing import new_router
from actstore.query.views.heads import HeadTable, HeadView, attention_pattern, pattern_image

__all__ = ["router"]

router = new_router()

_INK = (0xE0, 0x7A, 0x16)
"""An orange that is seen on white and on black."""

Number = Annotated[str, Query(pattern=r"^\d{0,9}$")]


@router.get("/heads")
def heads(request: Request) -> Response:
    """All heads by layer."""
    view = HeadTable.of(open_store(request))
    return render(request, "heads.html", crumbs=(Crumb("Heads"),), view=view)


@router.get("/heads/{layer}/{head}")
def head(
    request: Request,
    layer: int,
    head: int,
    sequence: Number = "",
    query: Number = "",
    lines: bool = False,
) -> Response:
    """One head over one sequence."""
    view = HeadView.of(
        open_store(request),
        layer,
        head,
        int(sequence) if sequence else None,
        int(query) if query else None,
    )
    crumbs = (Crumb("Heads", "/heads"), Crumb(f"Layer {layer}"), Crumb(f"Head {head}"))
    return render(request, "head.html", crumbs=crumbs, view=view, lines=lines)


@router.get("/heads/{layer}/{head}/pattern.png")
def pattern(request: Request, layer: int, head: int, sequence: int) -> Response:
    """The head's attention over a sequence as a picture."""
    found = attention_pattern(open_store(request), layer, head, sequence)
    return Response(pattern_image(found, _INK), 200, media_type="image/png")
