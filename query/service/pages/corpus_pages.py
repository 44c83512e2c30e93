"""Pages about sequences, and about the scalars that they can be coloured by."""

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response

from actstore.query.service.pages.rendering import Crumb, open_store, render
from actstore.query.service.pages.routing import new_router
from actstore.query.views.scalar_list import ScalarList
from actstore.query.views.sequence_grid import GRID_ROWS, SequenceView
from actstore.query.views.sequence_list import SequenceList

__all__ = ["router"]

router = new_router()

Number = Annotated[str, Query(pattern=r"^\d{0,9}$")]


@router.get("/sequences")
def sequences(request: Request, page: Annotated[int, Query(ge=1)] = 1, find: str = "") -> Response:
    """The sequences, with how they begin."""
    view = SequenceList.of(open_store(request), page=page, find=find)
    return render(request, "sequences.html", crumbs=(Crumb("Sequences"),), view=view)


@router.get("/sequences/{sequence}")
def sequence(
    request: Request,
    sequence: int,
    scalar: str = "",
    layer: Number = "",
    unit: Number = "",
    start: Annotated[int, Query(ge=0)] = 0,
    lines: bool = True,
) -> Response:
    """One sequence as tokens by layers."""
    view = SequenceView.of(
        open_store(request),
        sequence,
        scalar=scalar or None,
        layer=int(layer) if layer else None,
        unit=int(unit) if unit else None,
        start=start,
    )
    return render(
        request,
        "sequence.html",
        crumbs=(Crumb("Sequences", "/sequences"), Crumb(f"Sequence {sequence}")),
        view=view,
        size=GRID_ROWS,
        options={
            "scalar": view.scalar,
            "layer": layer,
            "unit": unit,
            "start": start,
            "lines": str(lines).lower(),
        },
        lines=lines,
    )


@router.get("/scalars")
def scalars(request: Request) -> Response:
    """The derived scalars, and which of them this store can give."""
    view = ScalarList.of(open_store(request))
    return render(request, "scalars.html", crumbs=(Crumb("Scalars"),), view=view)
