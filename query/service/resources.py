"""What every resource of the API does alike: keys, the store's identity, forms, tags.

A handler takes an :class:`Ask` and returns one of its answers. Before it runs, unknown query
keys are refused, the store's identity is checked, the form is chosen and a client that has the
answer is told so; after it the identity is checked again, so that no number comes from a
store that was replaced meanwhile.
"""

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pyarrow import Table
from pydantic import BaseModel

from actstore.query.service.encoding import encode_json, encode_table, encode_tensor
from actstore.query.service.etags import CACHE_CONTROL, entity_tag, is_known
from actstore.query.service.negotiation import MEDIA_TYPES, OBJECT, Format, choose_format
from actstore.query.service.problems import MEDIA_TYPE as PROBLEM_TYPE
from actstore.query.service.settings import ServerSettings
from actstore.query.service.state import Opening, ServedStore
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = [
    "PROBLEMS",
    "Ask",
    "Asked",
    "StoreRoute",
    "columns_of",
    "new_router",
    "problem_docs",
    "resource",
]

_Handler = Callable[..., Any]
_H = TypeVar("_H", bound=_Handler)

_VARY = "Accept, Authorization, Cookie"
_OPTIONS = "__actstore_resource__"


@dataclass(frozen=True)
class _Options:
    """How a handler's resource behaves."""

    offers: tuple[Format, ...]
    tagged: bool
    key_prefix: str | None


@dataclass(frozen=True)
class Ask:
    """One request as a handler sees it.

    Attributes:
        request: the request itself.
        opening: the opening of the store that answers it.
        form: how the answer is written.
        settings: the server's.
    """

    request: Request
    opening: Opening
    form: Format
    settings: ServerSettings

    @property
    def store(self) -> ServedStore:
        """The open store."""
        return self.opening.store

    def object(self, value: Mapping[str, Any]) -> Response:
        """A JSON object."""
        return Response(encode_json(value), media_type=MEDIA_TYPES[Format.JSON])

    def table(
        self,
        table: Table,
        beside: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        rows: str = "objects",
    ) -> Response:
        """A table, with what stands beside its rows."""
        content = encode_table(table, self.form, beside, rows=rows)
        return self._response(content, headers)

    def tensor(self, found: LabelledTensor) -> Response:
        """A labelled tensor."""
        content = encode_tensor(found, self.form, self.settings.max_json_values)
        return self._response(content, None)

    def _response(self, content: bytes, headers: Mapping[str, str] | None) -> Response:
        media = MEDIA_TYPES[self.form]
        if self.form is Format.CSV:
            media += "; charset=utf-8; header=present"
        return Response(content, headers=dict(headers or {}), media_type=media)

    def limit(self, asked: int, name: str = "limit") -> int:
        """A number of rows that is within the server's limit.

        Raises:
            InvalidInput: it is not.
        """
        if asked > self.settings.max_rows:
            raise InvalidInput(
                f"{name} is {asked}; this server gives {self.settings.max_rows:,} rows at most.",
                kind=ErrorKind.TOO_LARGE,
            )
        return asked


def _asked(request: Request) -> Ask:
    ask: Ask = request.state.ask
    return ask


Asked = Annotated[Ask, Depends(_asked)]
"""A handler's parameter: the request with its store."""


class StoreRoute(APIRoute):
    """A route of the API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler with all that resources do alike about it."""
        handle = super().get_route_handler()
        options: _Options = getattr(self.endpoint, _OPTIONS)
        keys = dict(_query_keys(self.dependant))

        async def answer(request: Request) -> Response:
            opening: Opening = request.app.state.holder.current
            await _require_same(opening)
            query = request.query_params.multi_items()
            _check_keys(query, keys, options.key_prefix)
            form = choose_format(
                request.query_params.getlist("format"), _accept(request), options.offers
            )
            request.state.ask = Ask(request, opening, form, request.app.state.settings)
            is_tagged = options.tagged and request.method == "GET"
            tag = entity_tag(opening.tag, request.url.path, query, form) if is_tagged else ""
            headers = {"Cache-Control": CACHE_CONTROL if is_tagged else "no-store", "Vary": _VARY}
            if is_tagged:
                headers["ETag"] = tag
                if is_known(tag, request.headers.get("if-none-match")):
                    return Response(status_code=304, headers=headers)
            response = await handle(request)
            await _require_same(opening)
            response.headers.update(headers)
            return response

        return answer


async def _require_same(opening: Opening) -> None:
    """Refuse to answer from a store that was replaced."""
    if opening.identity.is_due:
        # It may read thousands of files' dates, on a disk that may be far away.
        await run_in_threadpool(opening.identity.check)


def _accept(request: Request) -> str | None:
    given = request.headers.getlist("accept")
    return ", ".join(given) if given else None


def _query_keys(dependant: Any) -> Iterator[tuple[str, bool]]:
    """Names of a handler's query parameters, and whether each may repeat."""
    for field in dependant.query_params:
        yield field.alias, _is_list(field.field_info.annotation)
    for inner in dependant.dependencies:
        yield from _query_keys(inner)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(_is_list(one) for one in get_args(annotation))


def _check_keys(
    query: Sequence[tuple[str, str]], keys: Mapping[str, bool], prefix: str | None
) -> None:
    seen: set[str] = set()
    for name, _ in query:
        is_free = prefix is not None and name.startswith(prefix)
        if name not in keys and name != "format" and not is_free:
            known = ", ".join([*keys, "format"])
            raise InvalidInput(
                f"There is no query key {name[:100]!r} here; there are {known}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if name in seen and not keys.get(name, False):
            raise InvalidInput(
                f"The query key {name!r} is given twice; give it once.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        seen.add(name)


def new_router(tag: str) -> APIRouter:
    """A router of resources, under one heading of the docs."""
    return APIRouter(tags=[tag], route_class=StoreRoute)


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_OTHER_FORMS: Mapping[Format, Any] = {
    Format.ARROW: _BINARY,
    Format.NPY: _BINARY,
    Format.CSV: {"schema": {"type": "string"}},
}
_PROBLEM = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: Mapping[int, str] = {
    401: "The token is missing or wrong.",
    403: "A page of another origin asked.",
    404: "The store has no such thing; `kind` says what.",
    406: "None of the forms is acceptable.",
    413: "The request's body, or what is asked for, is too large.",
    421: "The Host header is none of the server's names.",
    422: "A parameter is wrong or unknown, or SQL cannot be answered.",
    429: "Too many requests of one client.",
    503: "The store is damaged or was replaced; `detail` names the file.",
}
"""Statuses of problems that any resource may answer with, and what they mean."""


def problem_docs() -> dict[int | str, dict[str, Any]]:
    """Every problem as the schema documents it."""
    return {status: {"description": text, "content": _PROBLEM} for status, text in PROBLEMS.items()}


def resource(
    router: APIRouter,
    path: str,
    model: type[BaseModel],
    *,
    offers: tuple[Format, ...] = OBJECT,
    tagged: bool = True,
    method: str = "GET",
    key_prefix: str | None = None,
) -> Callable[[_H], _H]:
    """Make a handler a resource of the API.

    Args:
        router: where to.
        path: under the router's prefix.
        model: of the JSON answer.
        offers: the forms it can take, the preferred one first.
        tagged: whether the answer follows from the request and the store alone.
        method: GET, or POST for what does not fit an address.
        key_prefix: further query keys are allowed that begin so.
    """
    contents = {MEDIA_TYPES[form]: _OTHER_FORMS[form] for form in offers if form is not Format.JSON}
    responses = problem_docs()
    responses[200] = {"description": "The answer.", "content": contents}
    if tagged:
        responses[304] = {"description": "The client has the answer already (If-None-Match)."}
    parameters = [
        {
            "name": "format",
            "in": "query",
            "required": False,
            "description": "The form of the answer, instead of the Accept header.",
            "schema": {"type": "string", "enum": [form.value for form in offers]},
        }
    ]

    def declare(handler: _H) -> _H:
        setattr(handler, _OPTIONS, _Options(offers, tagged, key_prefix))
        router.add_api_route(
            path,
            handler,
            methods=[method],
            response_model=model,
            response_model_exclude_none=False,
            responses=responses,
            openapi_extra={"parameters": parameters},
        )
        return handler

    return declare


def columns_of(table: Table) -> list[dict[str, str]]:
    """The names and types of a table's columns."""
    return [{"name": field.name, "type": str(field.type)} for field in table.schema]
