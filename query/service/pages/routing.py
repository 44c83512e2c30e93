"""What all pages do alike: the store is still the one that was opened, errors are pages too."""

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from actstore.query.service.etags import CACHE_CONTROL, entity_tag, is_known
from actstore.query.service.pages.rendering import error_page, revision
from actstore.query.service.problems import ServiceError, error_of
from actstore.store.errors import ActstoreError

if TYPE_CHECKING:
    from actstore.query.service.state import Opening

__all__ = ["PageRoute", "new_router"]


class PageRoute(APIRoute):
    """A page's route."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with what surrounds every page."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await _tagged(request, handle)
            except (ActstoreError, ServiceError, RequestValidationError) as error:
                problem = error_of(error, getattr(request.app.state, "roots", ()))
                return error_page(request, json.loads(bytes(problem.body)), problem.headers)

        return answer


async def _tagged(
    request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]]
) -> Response:
    opening: Opening = request.app.state.holder.current
    opening.identity.check()
    if request.method != "GET":
        response = await handle(request)
        opening.identity.check()
        return response
    has_model = request.app.state.prompt is not None
    state = f"{opening.tag}-{revision()}-{has_model}-{request.scope.get('root_path', '')}"
    query = request.query_params.multi_items()
    tag = entity_tag(state, request.url.path, query, "page")
    headers = {"Cache-Control": CACHE_CONTROL, "ETag": tag}
    if is_known(tag, request.headers.get("if-none-match")):
        return Response(status_code=304, headers=headers)
    response = await handle(request)
    opening.identity.check()
    if response.status_code == 200:
        response.headers.update(headers)
    return response


def new_router() -> APIRouter:
    """A router of pages, which the API's schema does not list."""
    return APIRouter(route_class=PageRoute, include_in_schema=False)
