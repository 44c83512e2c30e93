"""A small store behind the service, for the tests of its resources and of its access."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from store_builder import build_store

from actstore.query.service.app import create_app
from actstore.query.service.settings import ServerSettings
from actstore.query.session import Store

__all__ = ["LENGTHS", "NEURONS", "VALUES", "client_of", "make_store"]

LENGTHS = (120, 90, 60, 120, 120, 90)
NEURONS = 6


def _values() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    tokens = sum(LENGTHS)
    acts = rng.normal(size=(2, tokens, NEURONS)).astype(np.float32)
    acts[0, 7, 0], acts[0, 8, 0], acts[0, 9, 0] = np.nan, np.inf, -np.inf
    return {
        "mlp_post_act": acts,
        "resid_post_mlp": rng.normal(size=(2, tokens, 8)).astype(np.float32),
    }


VALUES = _values()


def make_store(path: Path, **options: Any) -> Path:
    """Two layers of six neurons over six documents; a NaN and both infinities among them."""
    given: dict[str, Any] = {
        "dtype": "float32",
        "columns": [{"label": label} for label in "ababab"],
        **options,
    }
    return build_store(path, VALUES, LENGTHS, **given)


@contextmanager
def client_of(
    path: Path, settings: ServerSettings | None = None, *, prompt: Any = None, **options: Any
) -> Iterator[TestClient]:
    """A client of an app over the store, without a socket."""
    given = {"base_url": "http://127.0.0.1", "raise_server_exceptions": False, **options}
    with (
        Store(path) as store,
        TestClient(create_app(store, settings, prompt=prompt, pages=False), **given) as client,
    ):
        yield client
