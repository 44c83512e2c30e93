"""The service as an ASGI app over one open store."""

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from actstore.query.service.access import HostGuard, Sessions, SiteGuard, TokenGuard
from actstore.query.service.envelope import Envelope
from actstore.query.service.lanes import Lanes
from actstore.query.service.limits import BodyLimit, RateLimit
from actstore.query.service.problems import install_handlers
from actstore.query.service.prompting import Turns
from actstore.query.service.routes import (
    corpus,
    holdings,
    prompts,
    rankings,
    schema,
    spreads,
    statements,
    units,
    values,
)
from actstore.query.service.routes.login import login_router
from actstore.query.service.settings import ServerSettings
from actstore.query.service.state import StoreHolder

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["API_PREFIX", "create_app"]

API_PREFIX = "/api/v1"

_PAGES = "actstore.query.service.pages"
_RELOAD_SECONDS = 2.0
_EXPOSED = ["ETag", "Link", "Retry-After", "Server-Timing", "Actstore-Truncated"]


def create_app(
    store: "Store",
    settings: ServerSettings | None = None,
    *,
    prompt: Callable[[str], Any] | None = None,
    pages: bool = True,
) -> FastAPI:
    """An app that answers from a store.

    The app reads the store at ``app.state.store`` and ends its own worker when it shuts down;
    the store that is given stays the caller's to close.

    Args:
        store: the open store.
        settings: who may ask, and how much.
        prompt: runs a text through the model, as :class:`actstore.Prompt` does; None for a
            server that only reads.
        pages: show pages for people beside the API.
    """
    settings = settings or ServerSettings()
    app = FastAPI(
        title="actstore",
        version=version("actstore"),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    holder = StoreHolder(app, store, settings)
    app.state.holder = holder
    app.state.settings = settings
    app.state.prompt = prompt
    app.state.prompt_turns = Turns()
    install_handlers(app)
    routers = [holdings, values, rankings, spreads, units, corpus, statements]
    if prompt is not None:
        routers.append(prompts)
    for module in routers:
        app.include_router(module.router, prefix=API_PREFIX)
    app.include_router(schema.router)
    if pages and importlib.util.find_spec(_PAGES) is not None:
        router = getattr(import_module(_PAGES), "router", None)
        if isinstance(router, APIRouter):
            app.include_router(router)
    _add_layers(app, holder, settings)
    schema.install_schema(app, version("actstore"))
    return app


def _add_layers(app: FastAPI, holder: StoreHolder, settings: ServerSettings) -> None:
    """The layers about the routes, the outermost first."""
    layers = [
        Middleware(Envelope, holder=holder, framers=settings.framers),
        Middleware(HostGuard, names=settings.host_names()),
    ]
    if settings.rate is not None:
        layers.append(Middleware(RateLimit, per_minute=settings.rate))
    if settings.cors_origins:
        # Outside the token: a browser asks for leave without it.
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "If-None-Match"],
                expose_headers=_EXPOSED,
            )
        )
    layers.append(Middleware(SiteGuard, origins=settings.cors_origins))
    if settings.token is not None:
        sessions = Sessions()
        guard = TokenGuard(app, settings.token, sessions)
        layers.append(Middleware(TokenGuard, token=settings.token, sessions=sessions))
        app.include_router(login_router(guard, sessions))
    layers.append(
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    )
    layers.append(Middleware(Lanes, threads=settings.threads))
    app.user_middleware.extend(layers)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: ServerSettings = app.state.settings
    holder: StoreHolder = app.state.holder
    anyio.to_thread.current_default_thread_limiter().total_tokens = settings.threads
    watch = asyncio.create_task(_watch(holder)) if settings.reload else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        await anyio.to_thread.run_sync(holder.close)


async def _watch(holder: StoreHolder) -> None:
    """Open the store again whenever it has grown."""
    while True:
        await asyncio.sleep(_RELOAD_SECONDS)
        await anyio.to_thread.run_sync(holder.renew)
