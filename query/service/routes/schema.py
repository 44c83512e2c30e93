"""The API's schema, and a docs page that needs no other server."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from actstore.query.derived import SCALARS
from actstore.query.service.models import Problem, ProblemPart

__all__ = ["install_schema", "router"]

router = APIRouter(include_in_schema=False)

_DESCRIPTION = """\
A read-only view of one activation store: what it holds, derived scalars, exact top-k, SQL.

Every table comes as JSON, Arrow IPC or CSV, every tensor as JSON, Arrow IPC or npy: by the
Accept header or `format=`. In JSON, NaN and infinities are null; Arrow and npy are exact.
Errors are RFC 9457 problems with a stable `kind`. Answers carry strong entity tags.
"""


def install_schema(app: FastAPI, version: str) -> None:
    """Give an app its OpenAPI schema, with the problem that every resource may answer with.

    Args:
        app: the app, whose routes are all included.
        version: of the API.
    """

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title="actstore",
                version=version,
                openapi_version="3.1.0",
                description=_DESCRIPTION,
                routes=app.routes,
            )
            known = made.setdefault("components", {}).setdefault("schemas", {})
            template = "#/components/schemas/{model}"
            for model in (Problem, ProblemPart):
                described = model.model_json_schema(ref_template=template)
                described.pop("$defs", None)
                known[model.__name__] = described
            # FastAPI describes its own body of a 422, which is never sent.
            for name in ("HTTPValidationError", "ValidationError"):
                known.pop(name, None)
            _name_scalars(made)
            if app.state.settings.token is not None:
                made["components"]["securitySchemes"] = {
                    "token": {"type": "http", "scheme": "bearer"}
                }
                made["security"] = [{"token": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _name_scalars(made: dict[str, Any]) -> None:
    """Say which names `{name}` takes: those of the registry."""
    for path, operations in made["paths"].items():
        if "{name}" in path:
            for operation in operations.values():
                for parameter in operation["parameters"]:
                    if (parameter["name"], parameter["in"]) == ("name", "path"):
                        parameter["schema"] = {"type": "string", "enum": list(SCALARS)}


@router.get("/openapi.json")
def openapi(request: Request) -> dict[str, Any]:
    """The schema, OpenAPI 3.1."""
    found: dict[str, Any] = request.app.openapi()
    return found


def _file(name: str, media_type: str) -> Response:
    content = (files("actstore.query.service") / "static" / name).read_bytes()
    return Response(
        content, headers={"Cache-Control": "private, max-age=3600"}, media_type=media_type
    )


@router.get("/api/docs")
def docs() -> Response:
    """The docs page."""
    return _file("docs.html", "text/html")


@router.get("/api/docs/docs.js")
def docs_script() -> Response:
    """Starts the docs page."""
    return _file("docs.js", "text/javascript")


@router.get("/api/docs/swagger-ui-bundle.js")
def swagger_script() -> Response:
    """The vendored swagger-ui."""
    return _file("swagger-ui-bundle.js", "text/javascript")


@router.get("/api/docs/swagger-ui.css")
def swagger_style() -> Response:
    """The vendored swagger-ui's style."""
    return _file("swagger-ui.css", "text/css")
