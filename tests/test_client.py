"""A served store gives what the open one gives, to the last bit, and its errors."""

import pickle
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from store_builder import build_store

from actstore.query.client import RemoteStore, ServerRefusal, ServerUnreachable, connect
from actstore.query.client.decoding import joined
from actstore.query.service.server import BackgroundServer, background
from actstore.query.service.settings import ServerSettings
from actstore.query.service.sql_worker import SqlLimits
from actstore.query.session import Store
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, StoreDamaged, Unavailable
from actstore.store.histograms import Histogram

if TYPE_CHECKING:
    from actstore.query.derived import DerivedScalar

LENGTHS = [60, 37, 5, 100, 90, 100]
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    total = sum(LENGTHS)
    neurons = rng.normal(size=(3, total, 6))
    neurons[1, 40, 2] = np.nan
    neurons[2, 41, 3] = np.inf
    neurons[0, 42, :] = -0.0
    return build_store(
        tmp_path_factory.mktemp("client") / "store",
        {
            "resid_post_embedding": rng.normal(size=(total, 8)),
            "resid_post_mlp": rng.normal(size=(3, total, 8)),
            "mlp_post_act": neurons,
            "mlp_post_act/backward": rng.normal(size=(3, total, 6)),
            "attn_value": rng.normal(size=(3, total, 2, 4)),
        },
        LENGTHS,
        dtype={
            "resid_post_embedding": "float32",
            "resid_post_mlp": "float16",
            "mlp_post_act": "float16",
            "mlp_post_act/backward": "float32",
            "attn_value": "float16",
        },
        special_token_ids=[7],
        shuffle=5,
        columns=[{"label": f"doc {n}", "even": n % 2 == 0} for n in range(len(LENGTHS))],
    )


@pytest.fixture(scope="module")
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[BackgroundServer]:
    settings = ServerSettings(sql=SqlLimits(seconds=3.0, rows=500, default_rows=50))
    with background(store, settings) as running:
        yield running


@pytest.fixture(scope="module")
def remote(server: BackgroundServer) -> Iterator[RemoteStore]:
    with connect(server.url) as connected:
        yield connected


def assert_same(found: LabelledTensor, expected: LabelledTensor) -> None:
    assert found.name == expected.name
    assert found.dims == expected.dims
    assert found.layers == expected.layers
    assert found.source == expected.source
    assert found.values.dtype == expected.values.dtype
    assert found.shape == expected.shape
    # By their bits, so that NaN and signed zeros count.
    assert found.numpy().tobytes() == np.ascontiguousarray(expected.numpy()).tobytes()
    assert set(found.coordinates) == set(expected.coordinates)
    for name, places in expected.coordinates.items():
        assert found.coordinates[name].dtype == places.dtype
        assert np.array_equal(found.coordinates[name], places)


def test_info(remote: RemoteStore, store: Store) -> None:
    expected = {**store.info().to_json(), "path": remote.url}
    assert remote.info().to_json() == expected
    assert type(remote.info()) is type(store.info())
    assert (remote.model_name, remote.n_tokens, remote.n_layers) == ("tiny", sum(LENGTHS), 3)
    assert remote.url in repr(remote)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp_post_act", {}),
        ("mlp_post_act", {"k": 500}),
        ("mlp_post_act", {"layers": 1}),
        ("mlp_post_act", {"layers": [0, 2], "neurons": (3, 1)}),
        ("mlp_post_act", {"layers": np.array([2]), "neurons": np.int64(4)}),
        ("mlp_post_act", {"largest": False}),
        ("mlp_post_act", {"by": "magnitude", "k": 7}),
        ("mlp_post_act", {"special": True, "k": 300}),
        ("mlp_post_act", {"where": "label = 'doc 3' AND position > 5"}),
        ("mlp_post_act", {"units": "neuron % 2 = 0"}),
        ("mlp_post_act", {"units": [(0, 1), (2, 5)]}),
        ("mlp_post_act", {"per": "layer", "k": 3}),
        ("mlp_post_act", {"per": "neuron", "k": 2}),
        ("mlp_post_act", {"distinct": "sequence", "k": 4}),
        ("mlp_post_act", {"distinct": "document", "k": 4}),
        ("mlp_post_act", {"pass_type": "backward"}),
        ("mlp_write_norm", {"k": 9, "max_cells": 10_000_000}),
        ("mlp_post", {"layers": 1}),
        ("mlp_post_act", {"tokens": [200, 3, 41], "k": 9}),
        ("mlp_post_act", {"tokens": [200, 3], "per": "token", "k": 2}),
        ("mlp_post_act", {"normalise": "max", "k": 6}),
        ("mlp_post_act", {"normalise": "std", "by": "magnitude", "layers": 0}),
        ("mlp_post_act", {"units": [(0, 1), (2, 5)], "combine": "mean", "k": 6}),
        ("mlp_post_act", {"layers": 0, "combine": "max", "normalise": "std"}),
        ("resid_post_embedding", {"channels": 3}),
        ("attn_value", {"heads": [1], "channels": [0, 2]}),
        ("resid_post_mlp_norm", {}),
    ],
)
def test_topk(remote: RemoteStore, store: Store, name: str, options: dict[str, Any]) -> None:
    expected = store.topk(name, **options)
    found = remote.topk(name, **options)
    assert type(found) is type(expected)
    assert found.certificate == expected.certificate
    assert found.table.schema.equals(expected.table.schema)
    assert str(found.rows()) == str(expected.rows())
    assert found.column("text") == expected.column("text")
    assert pickle.loads(pickle.dumps(found)).rows() == found.rows()


@pytest.mark.parametrize(
    ("name", "unit", "options"),
    [
        ("mlp_post_act", (1, 3), {}),
        ("mlp_post_act", (1, 2), {"k": 400, "distinct": None, "window": (3, 2)}),
        ("mlp_post_act", (2, 3), {"kind": "bottom", "window": (0, 0)}),
        ("mlp_post_act", (0, 0), {"kind": "random", "seed": 11, "k": 4}),
        ("mlp_post_act", np.array([0, 5]), {"kind": "quantile", "k": 5}),
        ("mlp_post_act", (0, 5), {"where": "even", "special": True, "distinct": "document"}),
        ("mlp_post_act", (0, 5), {"pass_type": "backward"}),
        ("attn_value", (1, 1, 2), {"k": 3}),
        ("mlp_write_norm", (2, 0), {"k": 3}),
    ],
)
def test_examples(
    remote: RemoteStore, store: Store, name: str, unit: Any, options: dict[str, Any]
) -> None:
    expected = store.examples(name, tuple(int(number) for number in unit), **options)
    found = remote.examples(name, unit, **options)
    assert type(found) is type(expected)
    # As text, since NaN differs from itself.
    assert str(found) == str(expected)


@pytest.mark.parametrize(
    ("location", "options"),
    [
        ("mlp_post_act", {}),
        ("mlp_post_act", {"sequences": [3, 0, 3]}),
        ("mlp_post_act", {"sequences": 2, "layers": [2, 0]}),
        ("mlp_post_act", {"tokens": [200, 3, 3, 41]}),
        ("mlp_post_act", {"tokens": np.arange(5), "layers": 1}),
        ("mlp_post_act", {"dtype": "float64", "tokens": [40, 41, 42]}),
        ("mlp_post_act", {"dtype": "float16", "tokens": [40, 41, 42]}),
        ("mlp_post_act", {"pass_type": "backward", "sequences": [1]}),
        ("resid_post_embedding", {"sequences": [0]}),
        ("attn_value", {"sequences": [1, 2], "layers": [1]}),
        ("attn_qk_probs", {"sequences": [0, 2], "layers": [1]}),
        ("blocks.2.hook_resid_post", {"sequences": [0]}),
    ],
)
def test_raw(remote: RemoteStore, store: Store, location: str, options: dict[str, Any]) -> None:
    assert_same(remote.raw(location, **options), store.raw(location, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp_write_norm", {}),
        ("mlp_write_norm", {"sequences": [3, 1], "layers": [1, 0]}),
        ("mlp_write_norm", {"tokens": [200, 3], "dtype": "float64"}),
        ("mlp_act_times_grad", {"sequences": [0]}),
        ("resid_post_mlp_norm", {"sequences": [0, 4]}),
        ("resid_post_embedding_norm", {"sequences": [0]}),
        ("unflattened_attn_write_norm", {"sequences": [0, 2], "layers": [1]}),
        ("flattened_attn_post_softmax", {"sequences": [2], "layers": [0]}),
        ("always_one", {"sequences": [2]}),
    ],
)
def test_derive(remote: RemoteStore, store: Store, name: str, options: dict[str, Any]) -> None:
    assert_same(remote.derive(name, **options), store.derive(name, **options))


def test_derive_several(remote: RemoteStore, store: Store) -> None:
    names: list[str | DerivedScalar] = [
        "mlp_write_norm",
        "resid_post_embedding_norm",
        store.scalar("resid_post_mlp_norm"),
    ]
    expected = store.derive(names, sequences=[1, 2], layers=[2])
    found = remote.derive(names, sequences=[1, 2], layers=[2])
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_same(found[name], tensor)


def test_rows_of_several_requests(
    remote: RemoteStore, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.query.client.remote_store._ROWS_OF_A_REQUEST", 2)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("mlp_post_act", {"tokens": [9, 8, 300, 2, 5]}),
        ("resid_post_embedding", {"sequences": [5, 1, 0]}),
        ("attn_qk_probs", {"sequences": [2, 0, 5], "layers": [1, 2]}),
    ]
    for name, options in asked:
        assert_same(remote.raw(name, **options), store.raw(name, **options))
    expected = store.derive("flattened_attn_post_softmax", sequences=[2, 1, 0], layers=[0])
    found = remote.derive("flattened_attn_post_softmax", sequences=[2, 1, 0], layers=[0])
    assert_same(found, expected)
    assert joined([expected]) is expected


def test_sql(remote: RemoteStore, store: Store) -> None:
    for query, parameters in (
        ("SELECT * FROM tokens ORDER BY token LIMIT 40", None),
        ("SELECT 'NaN'::FLOAT AS a, '-inf'::DOUBLE AS b, NULL AS c, [1, NULL] AS d", None),
        ("SELECT label, $low::INT AS low FROM documents ORDER BY label", {"low": 3}),
        ("SELECT count(*) AS n FROM tokens WHERE position < ?", [5]),
        ("SELECT ? AS a, ? AS b", [np.float64(0.5), None]),
        ("SELECT unnest(?::INT[]) AS n", [np.arange(4)]),
        ("DESCRIBE neurons", None),
    ):
        given = [one.tolist() if isinstance(one, np.ndarray) else one for one in parameters or []]
        plain = parameters if parameters is None or isinstance(parameters, dict) else given
        expected = store.sql(query, plain).to_arrow_table()
        found = remote.sql(query, parameters)
        assert str(found.rows()) == str(expected.to_pylist())
        assert found.to_arrow().schema.equals(expected.schema)
        assert found.to_arrow_table() is found.table
        assert not found.truncated
        assert str(found.fetchall()) == str(store.sql(query, plain).fetchall())
    assert list(remote.sql("SELECT 1 AS a").df()["a"]) == [1]
    assert remote.sql("SELECT 1 AS a").pl()["a"].to_list() == [1]


def test_sql_that_is_cut_off_says_so(remote: RemoteStore) -> None:
    with pytest.warns(UserWarning, match="50"):
        found = remote.sql("SELECT * FROM range(100)")
    assert found.truncated
    assert len(found) == 50
    assert "there are more" in repr(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(remote.sql("SELECT * FROM range(100)", max_rows=60)) == 60
        assert len(remote.sql("SELECT * FROM range(100)", max_rows=100)) == 100


def test_tables(remote: RemoteStore, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.query.client.remote_store._PAGE_ROWS", 7)
    neurons = store.sql("SELECT * FROM neurons WHERE layer = 1 ORDER BY max DESC, neuron")
    ranked = remote.neurons(1, sort="-max", dead=False)
    assert ranked.column("neuron").to_pylist() == [
        row[1] for row in neurons.fetchall() if row[12] is False
    ]
    every = store.sql("SELECT * FROM neurons ORDER BY layer, neuron").to_arrow_table()
    found = remote.neurons()
    assert str(found.to_pylist()) == str(every.to_pylist())
    assert found.schema.equals(every.schema)
    assert remote.neurons(limit=10).num_rows == 10
    by_hand = dict(
        zip(
            neurons.columns,
            store.sql("SELECT * FROM neurons WHERE layer = 1 AND neuron = 3").fetchall()[0],
            strict=True,
        )
    )
    assert remote.neuron(1, 3).row == by_hand


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp_post_act", {}),
        ("mlp_post_act", {"layers": [1], "neurons": [2, 3], "pass_type": "backward"}),
        ("mlp_post_act", {"units": [(2, 3), (1, 2)], "quantiles": [0.5, 0.999]}),
        ("mlp_post_act", {"units": "neuron % 2 = 0", "quantiles": [0.07]}),
        ("mlp_write_norm", {"layers": 0}),
        ("attn_value", {"heads": 1, "channels": [0, 2]}),
    ],
)
def test_statistics(
    remote: RemoteStore, kept: tuple[RemoteStore, Store], store: Store, name: str, options: Any
) -> None:
    for there, here in ((remote, store), kept):
        if here is not store and (name != "mlp_post_act" or "pass_type" in options):
            continue
        expected = here.statistics(name, **options)
        found = there.statistics(name, **options)
        assert type(found) is type(expected)
        assert (found.scalar, found.source) == (expected.scalar, expected.source)
        assert found.quantiles == expected.quantiles
        assert found.to_arrow().schema.equals(expected.to_arrow().schema)
        assert str(found.rows()) == str(expected.rows())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RemoteStore, Store]]:
    """A store with histograms, of which a server gives four rows at a time."""
    rng = np.random.default_rng(8)
    folder = tmp_path_factory.mktemp("kept") / "store"
    build_store(folder, {"mlp_post_act": rng.normal(size=(3, 90, 6))}, [40, 50])
    with Store(folder) as writable:
        writable.index("mlp_post_act", parts=["histogram"])
    with (
        Store(folder) as opened,
        background(opened, ServerSettings(max_rows=4)) as server,
        connect(server.url) as connected,
    ):
        assert opened.statistics("mlp_post_act").quantiles
        yield connected, opened


@pytest.mark.parametrize(
    ("name", "unit", "options"),
    [
        ("mlp_post_act", (1, 2), {}),
        ("mlp_post_act", (2, 3), {}),
        ("mlp_post_act", (0, 5), {"pass_type": "backward"}),
        ("mlp_write_norm", np.array([2, 0]), {}),
        ("attn_value", (1, 1, 2), {}),
    ],
)
def test_histogram(
    remote: RemoteStore, store: Store, name: str, unit: Any, options: dict[str, Any]
) -> None:
    found = remote.histogram(name, unit, **options)
    assert_same_histogram(found, store.histogram(name, tuple(map(int, unit)), **options))


def assert_same_histogram(found: Histogram | None, expected: Histogram | None) -> None:
    assert found is not None
    assert expected is not None
    assert np.array_equal(found.counts, expected.counts)
    assert (found.nan, found.minimum, found.maximum) == (
        expected.nan,
        expected.minimum,
        expected.maximum,
    )
    assert found.to_json() == expected.to_json()


def test_a_histogram_of_nothing(tmp_path: Path) -> None:
    values = np.full((1, 9, 2), np.nan)
    path = build_store(tmp_path / "s", {"mlp_post_act": values}, [9])
    with Store(path) as store, background(store) as server, connect(server.url) as remote:
        found = remote.histogram("mlp_post_act", (0, 1))
        assert (found.total, found.nan) == (0, store.histogram("mlp_post_act", (0, 1)).nan)
        assert np.isnan([found.minimum, found.maximum]).all()


@pytest.mark.parametrize("place", [(1, 3), (2, 3), (1, 2), (0, 0)])
def test_neuron(
    remote: RemoteStore, kept: tuple[RemoteStore, Store], store: Store, place: tuple[int, int]
) -> None:
    for there, here in ((remote, store), kept):
        expected, found = here.neuron(*place), there.neuron(*place)
        for member in fields(expected):
            if member.name != "_store":
                assert getattr(found, member.name) == getattr(expected, member.name)
        assert (found.firing_rate, found.dead) == (expected.firing_rate, expected.dead)
        assert repr(found).endswith(repr(expected).removeprefix("<Neuron"))
        assert_same_histogram(found.histogram, expected.histogram)
        assert found.similar == expected.similar
        assert found.similar_in_layer == expected.similar_in_layer
    assert str(found.examples(k=3)) == str(expected.examples(k=3))
    assert str(remote.neuron(*place).top) == str(store.neuron(*place).top)
    assert str(remote.neuron(*place).to_json()) == str(store.neuron(*place).to_json())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp_post_act", {"above": 2.5}),
        ("mlp_post_act", {"at_least": np.float32(1.1), "below": 1.3, "layers": [1]}),
        ("mlp_post_act", {"at_most": -2, "units": [(0, 1), (2, 5)], "special": True}),
        ("mlp_post_act", {"above": -1e-3, "below": 1e-3, "where": "position > 5"}),
        ("mlp_post_act", {"above": 10, "below": 11}),
        ("mlp_post_act", {"below": -2, "pass_type": "backward", "tokens": range(200)}),
        ("mlp_write_norm", {"above": 3, "neurons": 2, "max_cells": 10**6}),
        ("attn_value", {"above": 2, "heads": 1}),
    ],
)
def test_filter_and_count(
    remote: RemoteStore, store: Store, name: str, options: dict[str, Any]
) -> None:
    expected, found = store.filter(name, **options), remote.filter(name, **options)
    assert type(found) is type(expected)
    assert found.certificate == expected.certificate
    assert found.table.schema.equals(expected.table.schema)
    assert str(found.rows()) == str(expected.rows())
    numbers, counted = store.count(name, **options), remote.count(name, **options)
    assert type(counted) is type(numbers)
    assert counted.certificate == numbers.certificate
    assert counted.total == numbers.total == len(found)
    assert counted.to_arrow().equals(numbers.to_arrow())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 3, "distinct": "sequence", "layers": [1]},
        {"k": 4, "by": "magnitude", "where": "even"},
    ],
)
def test_compare(remote: RemoteStore, store: Store, options: dict[str, Any]) -> None:
    names: list[str | DerivedScalar] = ["mlp_post_act", store.scalar("mlp_write_norm")]
    expected, found = store.compare(names, **options), remote.compare(names, **options)
    assert type(found) is type(expected)
    assert found.certificates == expected.certificates
    assert found.to_arrow().schema.equals(expected.to_arrow().schema)
    assert str(found.rows()) == str(expected.rows())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp_post_act", {}),
        ("mlp_post_act", {"per": "layer", "k": 3, "normalise": "std"}),
        ("mlp_write_norm", {"units": [(0, 1), (0, 2)], "combine": "sum"}),
        ("resid_post_mlp_norm", {"tokens": [3, 4]}),
    ],
)
def test_explain(remote: RemoteStore, store: Store, name: str, options: dict[str, Any]) -> None:
    assert remote.explain(name, **options) == store.explain(name, **options)


ERRORS = [
    (lambda s: s.topk("nonsense"), InvalidInput, ErrorKind.UNKNOWN_SCALAR),
    (lambda s: s.topk("mlp_post_act", k=0), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.topk("mlp_post_act", layers=9), InvalidInput, ErrorKind.UNKNOWN_LAYER),
    (lambda s: s.topk("mlp_post_act", neurons=[6]), InvalidInput, ErrorKind.UNKNOWN_UNIT),
    (lambda s: s.topk("mlp_post_act", heads=[0]), InvalidInput, None),
    (lambda s: s.topk("mlp_post_act", where="nonsense = 3"), InvalidInput, ErrorKind.INVALID_SQL),
    (lambda s: s.topk("mlp_post_act", where="1) OR (1"), InvalidInput, ErrorKind.INVALID_SQL),
    (lambda s: s.topk("mlp_post_act", units="nonsense"), InvalidInput, ErrorKind.INVALID_SQL),
    (lambda s: s.topk("mlp_post_act", per="token"), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.topk("mlp_post_act", by="x"), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.topk("mlp_post_act", distinct="x"), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.topk("mlp_pre_linear"), ActstoreError, None),
    (lambda s: s.topk("resid_post_mlp_norm", max_cells=1), InvalidInput, None),
    (lambda s: s.examples("mlp_post_act", (0, 6)), InvalidInput, ErrorKind.UNKNOWN_UNIT),
    (lambda s: s.examples("mlp_post_act", (7, 0)), InvalidInput, ErrorKind.UNKNOWN_LAYER),
    (
        lambda s: s.examples("mlp_post_act", (0, 1), kind="x"),
        InvalidInput,
        ErrorKind.INVALID_ARGUMENT,
    ),
    (
        lambda s: s.examples("mlp_post_act", (0, 1), window=(1,)),
        InvalidInput,
        ErrorKind.INVALID_ARGUMENT,
    ),
    (lambda s: s.filter("mlp_post_act"), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.filter("mlp_post_act", above="x"), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.filter("mlp_post_act", above=0, limit=3), InvalidInput, ErrorKind.TOO_LARGE),
    (lambda s: s.count("mlp_post_act", above=float("nan")), InvalidInput, None),
    (lambda s: s.compare(["mlp_post_act"]), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.compare(["mlp_post_act", "attn_value"]), InvalidInput, None),
    (lambda s: s.explain("nonsense"), InvalidInput, ErrorKind.UNKNOWN_SCALAR),
    (lambda s: s.neuron(0, 6), InvalidInput, ErrorKind.UNKNOWN_UNIT),
    (lambda s: s.histogram("mlp_post_act", (0, 6)), InvalidInput, ErrorKind.UNKNOWN_UNIT),
    (lambda s: s.histogram("mlp_post_act", (0,)), InvalidInput, ErrorKind.UNKNOWN_UNIT),
    (lambda s: s.statistics("nonsense"), InvalidInput, ErrorKind.UNKNOWN_SCALAR),
    (lambda s: s.statistics("mlp_post_act", layers=9), InvalidInput, ErrorKind.UNKNOWN_LAYER),
    (lambda s: s.statistics("resid_post_mlp_norm"), Unavailable, ErrorKind.NOT_STORED),
    (lambda s: s.raw("nonsense"), InvalidInput, ErrorKind.UNKNOWN_LOCATION),
    (lambda s: s.raw("mlp_post_act", sequences=[99]), InvalidInput, ErrorKind.UNKNOWN_ROW),
    (lambda s: s.raw("mlp_post_act", tokens=[10**6]), InvalidInput, ErrorKind.UNKNOWN_ROW),
    (
        lambda s: s.raw("mlp_post_act", tokens=[0], sequences=[0]),
        InvalidInput,
        ErrorKind.INVALID_ARGUMENT,
    ),
    (lambda s: s.raw("mlp_post_act", tokens=["x"]), InvalidInput, ErrorKind.INVALID_ARGUMENT),
    (lambda s: s.raw("mlp_pre_linear"), ActstoreError, None),
    (lambda s: s.derive("nonsense"), InvalidInput, ErrorKind.UNKNOWN_SCALAR),
    (
        lambda s: s.derive("mlp_post_act", dtype="int8", tokens=[0]),
        InvalidInput,
        ErrorKind.INVALID_ARGUMENT,
    ),
    (lambda s: s.sql("SELECT nonsense"), InvalidInput, ErrorKind.INVALID_SQL),
    (lambda s: s.sql("DROP TABLE tokens"), InvalidInput, ErrorKind.INVALID_SQL),
    (lambda s: s.sql("SELECT 1; SELECT 2"), InvalidInput, ErrorKind.INVALID_SQL),
]


@pytest.mark.parametrize(("call", "kind_of_error", "kind"), ERRORS)
def test_errors_are_those_of_the_open_store(
    remote: RemoteStore,
    store: Store,
    call: Any,
    kind_of_error: type[ActstoreError],
    kind: ErrorKind | None,
) -> None:
    with pytest.raises(kind_of_error) as here:
        call(store)
    with pytest.raises(kind_of_error) as there:
        call(remote)
    assert there.value.kind is here.value.kind
    # The kind of a location that the model lacks leaves open which of two errors it is.
    if there.value.kind is not ErrorKind.UNKNOWN_LOCATION:
        assert type(there.value) is type(here.value)
    assert kind is None or there.value.kind is kind
    assert str(store.path) not in str(there.value)


def test_errors_that_only_a_server_has(remote: RemoteStore) -> None:
    with pytest.raises(InvalidInput) as caught:
        remote.sql("SELECT max(md5(range::VARCHAR)) FROM range(10000000000)")
    assert caught.value.kind is ErrorKind.SQL_TIMEOUT
    with pytest.raises(InvalidInput) as caught:
        remote.sql("SELECT repeat('a', 10000000) FROM range(40)", max_rows=100)
    assert caught.value.kind is ErrorKind.SQL_TOO_LARGE
    with pytest.raises(InvalidInput) as caught:
        remote.sql("SELECT 1", max_rows=10**6)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(InvalidInput) as caught:
        remote.topk("mlp_post_act", k=10**6)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    with pytest.raises(InvalidInput) as caught:
        remote.neuron(0, 99)
    assert caught.value.kind is ErrorKind.UNKNOWN_UNIT


def test_what_a_query_cannot_say_is_refused_here(remote: RemoteStore) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        remote.topk("mlp_post_act", nonsense=1)
    with pytest.raises(TypeError, match="per"):
        remote.compare(["mlp_post_act", "mlp_write_norm"], per="layer")
    with pytest.raises(TypeError, match="k"):
        remote.filter("mlp_post_act", above=1, k=3)
    with pytest.raises(TypeError, match="where"):
        remote.statistics("mlp_post_act", where="even")
    with pytest.raises(TypeError, match="layers"):
        remote.examples("mlp_post_act", (0, 1), layers=[1])
    for call in (
        lambda: remote.topk("mlp_post_act", layers=[]),
        lambda: remote.topk("mlp_post_act", where=3.5),
        lambda: remote.topk(""),
        lambda: remote.topk(".."),
        lambda: remote.topk("mlp_post_act", units=[(1, 2, 3)]),
        lambda: remote.topk("mlp_post_act", units=3),
        lambda: remote.statistics("mlp_post_act", quantiles=[]),
        lambda: remote.statistics("mlp_post_act", quantiles=["0.5"]),
        lambda: remote.neuron("x", 0),  # type: ignore[arg-type]
        lambda: remote.sql("SELECT ?", [float("nan")]),
    ):
        with pytest.raises(InvalidInput):
            call()
    # A name is one part of a path, whatever it holds.
    with pytest.raises(ActstoreError):
        remote.topk("../store")


def test_a_store_without_commits(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", {"mlp_post_act": np.zeros((1, 9, 2))}, [9], commit=[])
    with Store(path) as store, background(store) as server, connect(server.url) as remote:
        assert remote.n_tokens == 0
        with pytest.raises(Unavailable) as caught:
            remote.topk("mlp_post_act")
        assert caught.value.kind is ErrorKind.NOTHING_COMMITTED


def test_damage_is_an_error(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(1, 600, 4))
    path = build_store(tmp_path / "s", {"mlp_post_act": values}, [100] * 6)
    shard = min((path / "arrays/mlp_post_act/forward").glob("c.0.*"))
    with Store(path) as store, background(store) as server, connect(server.url) as remote:
        data = bytearray(shard.read_bytes())
        data[100:3000] = bytes(2900)
        shard.write_bytes(data)
        with pytest.raises(StoreDamaged) as caught:
            remote.raw("mlp_post_act")
        assert caught.value.kind is ErrorKind.CHECKSUM_MISMATCH
        assert "mlp_post_act" in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_token(store: Store) -> None:
    with background(store, ServerSettings(token=TOKEN)) as server:
        with connect(server.url, TOKEN) as remote:
            assert remote.topk("mlp_post_act", k=1).rows() == store.topk("mlp_post_act", k=1).rows()
        for wrong in (None, TOKEN[:-1]):
            with pytest.raises(ServerRefusal) as caught:
                connect(server.url, wrong)
            assert (caught.value.problem, caught.value.status) == ("unauthorized", 401)
            assert TOKEN not in str(caught.value)
            again = pickle.loads(pickle.dumps(caught.value))
            assert (again.problem, again.status, str(again)) == (
                "unauthorized",
                401,
                str(caught.value),
            )


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("ftp://127.0.0.1", {}),
        ("127.0.0.1:80", {}),
        ("http://", {}),
        ("http://user:word@127.0.0.1", {}),
        ("http://127.0.0.1:99999", {}),
        ("http://127.0.0.1?a=b", {}),
        ("http://127.0.0.1", {"token": "a\nb"}),
        ("http://127.0.0.1", {"token": ""}),
        ("http://127.0.0.1", {"timeout": 0}),
    ],
)
def test_addresses_that_cannot_be(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        connect(url, **options)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerUnreachable, match="actstore serve"):
            connect(address)
        taken.listen()
        with pytest.raises(ServerUnreachable, match="no answer within"):
            connect(address, timeout=0.2)


class _Other(BaseHTTPRequestHandler):
    """A server of something else."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        page = b"<h1>hello</h1>"
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_another_kind_of_server() -> None:
    with HTTPServer(("127.0.0.1", 0), _Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            for path in ("", "/missing"):
                with pytest.raises(ServerUnreachable, match="no server of a store"):
                    connect(f"http://127.0.0.1:{other.server_port}{path}")
        finally:
            other.shutdown()
            thread.join()


def test_the_same_question_is_not_sent_again(
    server: BackgroundServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(server.url) as remote:
        first = remote.topk("mlp_post_act", k=200)
        received: list[tuple[int, int]] = []
        ask = remote._transport._exchange

        def counted(*arguments: Any) -> Any:
            status, fields, content = ask(*arguments)
            received.append((status, len(content)))
            return status, fields, content

        monkeypatch.setattr(remote._transport, "_exchange", counted)
        assert str(remote.topk("mlp_post_act", k=200).rows()) == str(first.rows())
        assert received == [(304, 0)]
        remote.topk("mlp_post_act", k=199)
        assert received[1][0] == 200
    with connect(server.url, cache_bytes=0) as remote:
        remote.topk("mlp_post_act", k=3)
        assert not remote._transport._kept


def test_kept_answers_are_bounded(server: BackgroundServer) -> None:
    with connect(server.url, cache_bytes=20_000) as remote:
        for k in range(1, 40):
            remote.topk("mlp_post_act", k=k)
            kept = sum(len(reply.body) for reply in remote._transport._kept.values())
            assert kept == remote._transport._kept_bytes <= 20_000
        assert len(remote._transport._kept) > 1


def test_threads_and_restarts(store: Store) -> None:
    expected = store.topk("mlp_post_act", k=5).rows()
    with background(store) as server:
        remote = connect(server.url, cache_bytes=0)
        failures: list[Exception] = []

        def ask() -> None:
            try:
                for _ in range(10):
                    assert remote.topk("mlp_post_act", k=5).rows() == expected
            except (ActstoreError, AssertionError) as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        port = int(server.url.rpartition(":")[2])
    with pytest.raises(ServerUnreachable):
        remote.info()
    with background(store, ServerSettings(port=port)):
        # The kept connections are of the server that was.
        assert remote.topk("mlp_post_act", k=5).rows() == expected
    remote.close()


def test_joined_fills_attended_axes(store: Store) -> None:
    long = store.raw("attn_qk_probs", sequences=[0], layers=[1])
    short = store.raw("attn_qk_probs", sequences=[2], layers=[1])
    found = joined([long, short])
    expected = store.raw("attn_qk_probs", sequences=[0, 2], layers=[1])
    assert torch.equal(found.values.isnan(), expected.values.isnan())
    assert torch.equal(found.values.nan_to_num(), expected.values.nan_to_num())
