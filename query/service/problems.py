"""Errors as RFC 9457 problems: one table from kinds to statuses, and no path of the server.

A problem is ``{"type", "title", "status", "detail", "kind"}``. ``kind`` is what a program
looks at: that of the store's error, or one of :class:`HttpKind` for what HTTP alone knows.
"""

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from actstore.query.service.sql_worker import SqlBusy
from actstore.store.errors import ActstoreError, ErrorKind

__all__ = [
    "MEDIA_TYPE",
    "STATUSES",
    "HttpKind",
    "ServiceError",
    "error_of",
    "install_handlers",
    "problem_response",
    "public_text",
]

MEDIA_TYPE = "application/problem+json"

_LOG = logging.getLogger("actstore.service")


class HttpKind(StrEnum):
    """Kinds of problems that HTTP alone knows; members are added, never renamed."""

    BAD_HOST = "bad_host"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TOO_SLOW = "body_too_slow"
    BUSY = "busy"
    FORBIDDEN = "forbidden"
    INTERNAL = "internal"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTABLE = "not_acceptable"
    NOT_FOUND = "not_found"
    RATE_LIMITED = "rate_limited"
    STORE_CHANGED = "store_changed"
    UNAUTHORIZED = "unauthorized"


_K, _H, _S = ErrorKind, HttpKind, HTTPStatus

STATUSES: Mapping[str, HTTPStatus] = MappingProxyType(
    {
        # The request names something that this store does not have.
        _K.UNKNOWN_LOCATION: _S.NOT_FOUND,
        _K.UNKNOWN_SCALAR: _S.NOT_FOUND,
        _K.UNKNOWN_LAYER: _S.NOT_FOUND,
        _K.UNKNOWN_UNIT: _S.NOT_FOUND,
        _K.UNKNOWN_ROW: _S.NOT_FOUND,
        _K.NOT_STORED: _S.NOT_FOUND,
        _K.NOTHING_COMMITTED: _S.NOT_FOUND,
        # The request can be changed so that it is answered.
        _K.INVALID_ARGUMENT: _S.UNPROCESSABLE_ENTITY,
        _K.INVALID_SQL: _S.UNPROCESSABLE_ENTITY,
        _K.SQL_TIMEOUT: _S.UNPROCESSABLE_ENTITY,
        _K.EMPTY_CORPUS: _S.UNPROCESSABLE_ENTITY,
        _K.INVALID_CORPUS: _S.UNPROCESSABLE_ENTITY,
        _K.TOKEN_OUT_OF_VOCABULARY: _S.UNPROCESSABLE_ENTITY,
        _K.UNSUPPORTED_MODEL: _S.UNPROCESSABLE_ENTITY,
        _K.UNSUPPORTED_AUTOENCODER: _S.UNPROCESSABLE_ENTITY,
        _K.CONFIG_CONFLICT: _S.CONFLICT,
        _K.CORPUS_CONFLICT: _S.CONFLICT,
        _K.TOO_LARGE: _S.REQUEST_ENTITY_TOO_LARGE,
        _K.SQL_TOO_LARGE: _S.REQUEST_ENTITY_TOO_LARGE,
        # The store cannot answer now.
        _K.NOT_A_STORE: _S.SERVICE_UNAVAILABLE,
        _K.NEWER_FORMAT: _S.SERVICE_UNAVAILABLE,
        _K.CHECKSUM_MISMATCH: _S.SERVICE_UNAVAILABLE,
        _K.MISSING_FILE: _S.SERVICE_UNAVAILABLE,
        _K.MALFORMED_FILE: _S.SERVICE_UNAVAILABLE,
        _K.NUMERIC_OVERFLOW: _S.SERVICE_UNAVAILABLE,
        _K.CAPTURE_MISMATCH: _S.SERVICE_UNAVAILABLE,
        _K.DISK_FULL: _S.SERVICE_UNAVAILABLE,
        _K.WRITE_FAILED: _S.SERVICE_UNAVAILABLE,
        _K.READ_ONLY: _S.SERVICE_UNAVAILABLE,
        _H.STORE_CHANGED: _S.SERVICE_UNAVAILABLE,
        # HTTP's own.
        _H.BAD_HOST: _S.MISDIRECTED_REQUEST,
        _H.BODY_TOO_LARGE: _S.REQUEST_ENTITY_TOO_LARGE,
        _H.BODY_TOO_SLOW: _S.REQUEST_TIMEOUT,
        _H.BUSY: _S.TOO_MANY_REQUESTS,
        _H.FORBIDDEN: _S.FORBIDDEN,
        _H.INTERNAL: _S.INTERNAL_SERVER_ERROR,
        _H.METHOD_NOT_ALLOWED: _S.METHOD_NOT_ALLOWED,
        _H.NOT_ACCEPTABLE: _S.NOT_ACCEPTABLE,
        _H.NOT_FOUND: _S.NOT_FOUND,
        _H.RATE_LIMITED: _S.TOO_MANY_REQUESTS,
        _H.UNAUTHORIZED: _S.UNAUTHORIZED,
    }
)
"""Every kind of error -> the status that says it."""

_OF_STATUS = {
    _S.NOT_FOUND: _H.NOT_FOUND,
    _S.METHOD_NOT_ALLOWED: _H.METHOD_NOT_ALLOWED,
    _S.UNAUTHORIZED: _H.UNAUTHORIZED,
    _S.FORBIDDEN: _H.FORBIDDEN,
    _S.NOT_ACCEPTABLE: _H.NOT_ACCEPTABLE,
    _S.REQUEST_ENTITY_TOO_LARGE: _H.BODY_TOO_LARGE,
    _S.TOO_MANY_REQUESTS: _H.RATE_LIMITED,
}

_ABSOLUTE = re.compile(r"(?<![\w.:/<>*)\]])/(?:[\w.@+~=-]+/)+([\w.@+~=-]*)")
"""A path from the root, of two parts at least, with what follows its last stroke."""


class ServiceError(Exception):
    """A problem that the service finds, not the store.

    Args:
        kind: what is wrong.
        detail: value, rule, next step.
        headers: of the response.
    """

    def __init__(
        self, kind: HttpKind, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.headers = dict(headers or {})


def public_text(text: str, roots: Sequence[Path] = ()) -> str:
    """A message without the server's paths.

    Files of the store keep their name inside it; of other files only the name stays.

    Args:
        text: the message.
        roots: directories whose files are named relative to them, such as the store's.

    >>> public_text("/data/runs/gpt2/commits/base is gone; see /etc/actstore/conf.d/x.toml",
    ...             [Path("/data/runs/gpt2")])
    'commits/base is gone; see x.toml'
    """
    for root in sorted({str(root) for root in roots}, key=len, reverse=True):
        if len(root) > 1:
            text = text.replace(f"{root}/", "").replace(root, "the store")
    text = text.replace(f"{tempfile.gettempdir()}/", "")
    return _ABSOLUTE.sub(lambda found: found.group(1) or "a directory", text)


def problem_response(
    kind: str, detail: str, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """A problem as a response.

    Args:
        kind: an :class:`ErrorKind` or a :class:`HttpKind`.
        detail: what is wrong here, without paths.
        headers: further headers.
        members: further members of the problem.
    """
    status = STATUSES[kind]
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": detail,
        "kind": str(kind),
        **members,
    }
    content = json.dumps(body, ensure_ascii=True, allow_nan=False)
    return Response(
        content,
        status.value,
        {"Cache-Control": "no-store", **(headers or {})},
        MEDIA_TYPE,
    )


def error_of(error: Exception, roots: Sequence[Path] = ()) -> Response:
    """The response for an error that a request met."""
    if isinstance(error, ServiceError):
        return problem_response(error.kind, public_text(str(error), roots), error.headers)
    if isinstance(error, SqlBusy):
        return problem_response(_H.BUSY, str(error), {"Retry-After": "1"})
    if isinstance(error, ActstoreError):
        if STATUSES[error.kind] >= _S.INTERNAL_SERVER_ERROR:
            _LOG.warning("%s: %s", error.kind, error)
        return problem_response(error.kind, public_text(str(error), roots))
    if isinstance(error, RequestValidationError):
        return _invalid_request(error)
    if isinstance(error, HTTPException):
        status = HTTPStatus(error.status_code)
        kind: str = _OF_STATUS.get(
            status, _K.INVALID_ARGUMENT if status < _S.INTERNAL_SERVER_ERROR else _H.INTERNAL
        )
        detail = _DETAILS.get(kind) or public_text(str(error.detail), roots)
        return problem_response(kind, detail, error.headers)
    return problem_response(
        _H.INTERNAL, "The server met an error of its own; its log has the traceback."
    )


_DETAILS: dict[str, str] = {
    _H.NOT_FOUND: "There is no such resource; /api/v1 lists them, /api/docs describes them.",
    _H.METHOD_NOT_ALLOWED: "The resource has no such method; `Allow` lists those it has.",
}


def _invalid_request(error: RequestValidationError) -> Response:
    """What is wrong with each parameter, without echoing a body back."""
    errors = [
        {"where": [str(part) for part in found["loc"]], "message": str(found["msg"])}
        for found in error.errors()
    ]
    listed = "; ".join(f"{'.'.join(one['where'])}: {one['message']}" for one in errors[:8])
    return problem_response(_K.INVALID_ARGUMENT, f"{listed}.", errors=errors)


def install_handlers(app: FastAPI) -> None:
    """Answer every error of an app with a problem."""

    async def answer(request: Request, error: Exception) -> Response:
        problem = error_of(error, getattr(request.app.state, "roots", ()))
        is_page = not request.url.path.startswith("/api/")
        if is_page and "text/html" in request.headers.get("accept", ""):
            from actstore.query.service.pages.rendering import error_page

            return error_page(request, json.loads(bytes(problem.body)), problem.headers)
        return problem

    for kind in (ActstoreError, ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
