"""The page of the store as a whole, and that of its scalars."""

from fastapi import Request
from fastapi.responses import Response

from actstore.query.service.pages.rendering import open_store, render
from actstore.query.service.pages.routing import new_router
from actstore.query.views.overview import Overview

__all__ = ["router"]

router = new_router()


@router.get("/")
def overview(request: Request, location: str | None = None) -> Response:
    """What the store holds."""
    view = Overview.of(open_store(request), location)
    return render(request, "overview.html", view=view)
