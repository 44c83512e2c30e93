"""Resources of the service: answers equal the Python calls, in every form."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel
from served import LENGTHS, NEURONS, VALUES, client_of, make_store

import actstore
from actstore.query.derived import SCALARS
from actstore.query.service import models

API = "/api/v1"
ARROW = "application/vnd.apache.arrow.stream"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("served") / "store")


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    with client_of(path) as found:
        yield found


@pytest.fixture(scope="module")
def store(path: Path) -> Iterator[actstore.Store]:
    with actstore.open(path) as found:
        yield found


def body(client: TestClient, path: str, **query: Any) -> Any:
    answer = client.get(API + path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def arrow(client: TestClient, path: str, **query: Any) -> pa.Table:
    answer = client.get(API + path, params=query, headers={"Accept": ARROW})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == ARROW
    return pa.ipc.open_stream(answer.content).read_all()


EVERY_RESOURCE: list[tuple[str, type[BaseModel]]] = [
    ("", models.ApiIndex),
    ("/store", models.StoreModel),
    ("/locations", models.LocationsModel),
    ("/scalars", models.ScalarsModel),
    ("/scalars/mlp_write_norm?sequence=2", models.TensorModel),
    ("/raw/resid_post_mlp?token=1&token=0", models.TensorModel),
    ("/topk/mlp_post_act", models.TopKModel),
    ("/explain/mlp_post_act", models.ExplanationModel),
    ("/compare?name=mlp_post_act&name=mlp_write_norm", models.ComparisonModel),
    ("/filter/mlp_post_act?above=3", models.TopKModel),
    ("/count/mlp_post_act?above=3", models.TopKModel),
    ("/examples/mlp_post_act?unit=1:3", models.ExamplesModel),
    ("/neurons", models.TableModel),
    ("/neurons/1/3", models.NeuronModel),
    ("/neurons/1/3/examples", models.ExamplesModel),
    ("/neurons/1/3/statistics", models.TableModel),
    ("/neurons/1/3/histogram", models.HistogramModel),
    ("/histogram/mlp_write_norm?unit=1:3&bins=7", models.HistogramModel),
    ("/statistics/mlp_post_act", models.StatisticsModel),
    ("/heads", models.TableModel),
    ("/heads/1/0", models.UnitModel),
    ("/latents", models.TableModel),
    ("/statistics", models.TableModel),
    ("/documents", models.TableModel),
    ("/sequences", models.TableModel),
    ("/sequences/1", models.SequenceModel),
    ("/sql?q=SELECT 1", models.SqlModel),
]


@pytest.mark.parametrize(("resource", "model"), EVERY_RESOURCE)
def test_an_answer_is_what_the_schema_says(
    client: TestClient, resource: str, model: type[BaseModel]
) -> None:
    answer = client.get(API + resource)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    model.model_validate(answer.json())


def test_the_store_is_described_without_its_path(
    client: TestClient, store: actstore.Store, path: Path
) -> None:
    found = body(client, "/store")
    expected = store.info().to_json()
    assert found["tokens"] == sum(LENGTHS)
    assert found["id"] == expected["id"]
    assert found["locations"].keys() == expected["locations"].keys()
    assert found["dimensions"]["n_layers"] == 2
    assert "path" not in found
    assert str(path) not in json.dumps(found)


def test_the_scalars_are_the_registry(client: TestClient) -> None:
    assert [one["name"] for one in body(client, "/scalars")["scalars"]] == list(SCALARS)


def test_a_ranking_is_the_python_calls(client: TestClient, store: actstore.Store) -> None:
    query = {
        "k": 7,
        "layer": [0, 1],
        "neuron": [1, 2, 5],
        "where": "label = 'a' AND position > 3",
        "units": "layer = 1 OR neuron = 2",
        "distinct": "document",
        "largest": "false",
        "special": "true",
    }
    expected = store.topk(
        "mlp_write_norm",
        k=7,
        layers=[0, 1],
        neurons=[1, 2, 5],
        where="label = 'a' AND position > 3",
        units="layer = 1 OR neuron = 2",
        distinct="document",
        largest=False,
        special=True,
    )
    found = body(client, "/topk/mlp_write_norm", **query)
    assert len(expected) > 1
    assert found == expected.to_json()
    table = arrow(client, "/topk/mlp_write_norm", **query)
    assert table.replace_schema_metadata(None).equals(expected.to_arrow())
    beside = json.loads(table.schema.metadata[b"actstore"])
    assert beside["certificate"] == expected.certificate.to_json()


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ({"by": "magnitude"}, {"by": "magnitude"}),
        ({"per": "layer", "k": 2}, {"per": "layer", "k": 2}),
        ({"per": "neuron", "k": 1}, {"per": "neuron", "k": 1}),
        ({"units": "0:3,1:4"}, {"units": [(0, 3), (1, 4)]}),
        ({"k": 3, "max_cells": 10**9}, {"k": 3}),
        ({"k": 2, "per": "token", "token": [5, 3]}, {"k": 2, "per": "token", "tokens": [5, 3]}),
        ({"normalise": "std"}, {"normalise": "std"}),
        ({"combine": "sum", "units": "0:1,1:2"}, {"combine": "sum", "units": [(0, 1), (1, 2)]}),
    ],
)
def test_the_options_of_a_ranking(
    client: TestClient, store: actstore.Store, query: dict[str, Any], options: dict[str, Any]
) -> None:
    found = body(client, "/topk/mlp_post_act", **query)
    rows = store.topk("mlp_post_act", **options).rows()
    assert [row["token"] for row in found["rows"]] == [row["token"] for row in rows]


def test_values_in_an_interval(client: TestClient, store: actstore.Store) -> None:
    options: dict[str, Any] = {"above": 1.5, "at_most": 3.0, "special": True}
    found = body(client, "/filter/mlp_post_act", layer=1, **options)
    assert found == store.filter("mlp_post_act", layers=1, **options).to_json()
    counted = body(client, "/count/mlp_post_act", layer=1, **options)["rows"]
    assert sum(row["count"] for row in counted) == len(found["rows"]) > 5
    few = client.get(f"{API}/filter/mlp_post_act?above=0&limit=3")
    assert (few.status_code, few.json()["kind"]) == (413, "too_large")


def test_a_comparison_and_an_explanation(client: TestClient, store: actstore.Store) -> None:
    names = ["mlp_write_norm", "mlp_post_act"]
    expected = store.compare(names, k=4, layers=1).to_json()
    assert body(client, "/compare", name=names, k=4, layer=1) == expected
    explained = body(client, "/explain/mlp_write_norm", k=3, where="position > 4")
    expected = store.explain("mlp_write_norm", k=3, where="position > 4").to_json()
    assert explained == expected


def test_a_predicate_that_allows_nothing_gives_nothing(client: TestClient) -> None:
    assert body(client, "/topk/mlp_post_act", where="false")["rows"] == []
    assert body(client, "/topk/mlp_post_act", units="false")["rows"] == []


@pytest.mark.parametrize("kind", ["top", "bottom", "random", "quantile"])
def test_examples_are_the_python_calls(
    client: TestClient, store: actstore.Store, kind: Any
) -> None:
    options: dict[str, Any] = {"k": 3, "kind": kind, "distinct": "sequence", "seed": 4}
    expected = store.examples("mlp_post_act", (1, 2), window=(3, 2), **options)
    found = body(client, "/examples/mlp_post_act", unit="1:2", before=3, after=2, **options)
    by_unit = body(client, "/neurons/1/2/examples", before=3, after=2, **options)
    assert found == by_unit
    for row, own in zip(found["rows"], expected, strict=True):
        assert {k: row[k] for k in own.to_json()} == own.to_json()
        assert row["first_token"] == own.first_token
    table = arrow(client, "/examples/mlp_post_act", unit="1:2", before=3, after=2, **options)
    assert table.column("texts").to_pylist() == [list(one.texts) for one in expected]


def test_values_are_exact_in_arrow_and_npy_and_null_in_json(
    client: TestClient, store: actstore.Store
) -> None:
    expected = store.raw("mlp_post_act", tokens=[6, 7, 8, 9], layers=[0, 1]).numpy()
    assert np.isnan(expected).any()
    assert np.isinf(expected).sum() == 2
    query: dict[str, Any] = {"token": [6, 7, 8, 9], "layer": [0, 1]}
    answer = client.get(f"{API}/raw/mlp_post_act", params={**query, "format": "npy"})
    exact = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert exact.tobytes() == expected.tobytes()

    table = arrow(client, "/raw/mlp_post_act", **query)
    flat = table.column("values").combine_chunks().flatten().to_numpy()
    assert flat.tobytes() == expected.tobytes()
    assert table.column("layer").to_pylist() == [0] * 4 + [1] * 4
    assert table.column("token").to_pylist() == [6, 7, 8, 9] * 2
    beside = json.loads(table.schema.metadata[b"actstore"])
    assert beside["dims"] == ["layer", "token", "neuron"]
    assert beside["shape"] == [2, 4, NEURONS]

    plain = np.array(body(client, "/raw/mlp_post_act", **query)["values"], np.float64)
    assert np.isnan(plain).sum() == 3
    finite = np.isfinite(expected)
    assert (plain[finite] == expected[finite]).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_derived_values_in_each_dtype(
    client: TestClient, store: actstore.Store, dtype: str
) -> None:
    expected = store.derive("mlp_write_norm", sequences=[2], layers=[1], dtype=dtype).numpy()
    query: dict[str, Any] = {"sequence": 2, "layer": 1, "dtype": dtype, "format": "npy"}
    answer = client.get(f"{API}/scalars/mlp_write_norm", params=query)
    found = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert found.dtype == np.dtype(dtype)
    assert found.tobytes() == expected.tobytes()


def test_a_table_is_paged_without_loss_or_repeat(client: TestClient) -> None:
    query: dict[str, Any] = {"sort": "-kurtosis", "limit": 5}
    first = client.get(f"{API}/neurons", params=query)
    found = first.json()
    rows = found["rows"]
    following = first.headers["link"].partition(">")[0][1:]
    assert client.get(following).json() == body(client, "/neurons", cursor=found["next"], **query)
    while found["next"] is not None:
        found = body(client, "/neurons", cursor=found["next"], **query)
        rows += found["rows"]
    assert len(rows) == 2 * NEURONS
    assert len({(row["layer"], row["neuron"]) for row in rows}) == 2 * NEURONS
    kurtosis = [row["kurtosis"] for row in rows if row["kurtosis"] is not None]
    assert kurtosis == sorted(kurtosis, reverse=True)


def test_a_table_is_filtered(client: TestClient, store: actstore.Store) -> None:
    query = {"layer": 1, "where": "max > 2.5", "sort": "neuron"}
    found = body(client, "/neurons", **query)["rows"]
    expected = store.sql(
        "SELECT neuron FROM neurons WHERE layer = 1 AND max > 2.5 ORDER BY neuron"
    ).fetchall()
    assert expected
    assert [(row["neuron"],) for row in found] == expected
    assert body(client, "/neurons", dead="true")["rows"] == []


def test_a_table_as_csv(client: TestClient) -> None:
    answer = client.get(f"{API}/documents", headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    lines = answer.text.splitlines()
    assert lines[0].split(",")[0] == "document"
    assert len(lines) == 1 + len(LENGTHS)


def test_a_cursor_of_another_question_is_refused(client: TestClient) -> None:
    cursor = body(client, "/neurons", limit=2)["next"]
    others: list[dict[str, Any]] = [{"limit": 2, "sort": "-max"}, {"layer": 1}]
    for query in others:
        answer = client.get(f"{API}/neurons", params={**query, "cursor": cursor})
        assert answer.status_code == 422
    assert client.get(f"{API}/neurons", params={"cursor": "!!"}).status_code == 422


def test_a_sequence_and_its_tokens(client: TestClient, store: actstore.Store) -> None:
    found = body(client, "/sequences/1")
    assert found["length"] == LENGTHS[1]
    assert [row["position"] for row in found["rows"]] == list(range(LENGTHS[1]))
    assert found["text"] == "".join(row["text"] for row in found["rows"])
    documents = body(client, "/documents", where="label = 'b'")["rows"]
    assert [row["document"] for row in documents] == [1, 3, 5]


def test_statistics_are_of_the_values(client: TestClient, store: actstore.Store) -> None:
    rows = body(client, "/neurons/1/2/statistics")["rows"]
    assert [row["pass"] for row in rows] == ["forward"]
    ordinary = np.delete(VALUES["mlp_post_act"][1, :, 2], np.cumsum((0, *LENGTHS[:-1])))
    assert rows[0]["count"] == len(ordinary)
    assert rows[0]["max"] == float(ordinary.max())
    (own,) = store.statistics("mlp_post_act", units=[(1, 2)])
    assert rows == [{"scalar": "mlp_post_act", "pass": "forward", **own}]
    listed = body(client, "/statistics", location="mlp_post_act", layer=1, unit=2)["rows"]
    assert {name: listed[0][name] for name in ("count", "max", "mean")} == {
        name: own[name] for name in ("count", "max", "mean")
    }
    scaled = body(client, "/neurons/1/2/statistics", scalar="mlp_write_norm")["rows"]
    assert scaled[0]["mean"] == store.statistics("mlp_write_norm", units=[(1, 2)])[0]["mean"]


def test_statistics_of_a_scalar(client: TestClient, store: actstore.Store) -> None:
    expected = store.statistics("mlp_post_act")
    every = body(client, "/statistics/mlp_post_act")
    assert every["rows"] == expected.to_json()["rows"]
    assert (every["source"], every["total"]) == (expected.source, len(expected))
    part = body(client, "/statistics/mlp_post_act", offset=3, limit=2)
    assert part["rows"] == every["rows"][3:5]
    assert body(client, "/statistics/mlp_post_act", units="1:2,0:3")["total"] == 2
    table = arrow(client, "/statistics/mlp_post_act", layer=1, neuron=[0, 4])
    assert table.to_pylist() == store.statistics("mlp_post_act", layers=1, neurons=[0, 4]).rows()
    missing = client.get(f"{API}/statistics/resid_post_mlp_norm")
    assert (missing.status_code, missing.json()["kind"]) == (404, "not_stored")
    unknown = client.get(f"{API}/statistics/nonsense")
    assert (unknown.status_code, unknown.json()["kind"]) == (404, "unknown_scalar")


def test_a_histogram_is_the_stores(client: TestClient, store: actstore.Store) -> None:
    expected = store.histogram("mlp_post_act", (1, 3))
    found = body(client, "/neurons/1/3/histogram", bins=5)
    assert {name: found[name] for name in expected.to_json()} == expected.to_json()
    shown = expected.rebinned(5)
    assert [one["count"] for one in found["rebinned"]] == shown.counts.tolist()
    assert [one["low"] for one in found["rebinned"]] == shown.edges[:-1].tolist()
    assert (found["scalar"], found["unit"], found["estimated"]) == ("mlp_post_act", [1, 3], True)
    assert body(client, "/histogram/mlp_post_act", unit="1:3", bins=5) == found
    table = arrow(client, "/neurons/1/3/histogram")
    assert table.column("count").to_pylist() == [one["count"] for one in found["bins"]]
    for unit in ("1:99", "1"):
        answer = client.get(f"{API}/histogram/mlp_post_act", params={"unit": unit})
        assert (answer.status_code, answer.json()["kind"]) == (404, "unknown_unit")
    assert client.get(f"{API}/neurons/1/3/histogram", params={"bins": 0}).status_code == 422


def test_a_neuron_is_the_stores(client: TestClient, store: actstore.Store) -> None:
    found = body(client, "/neurons/1/3")
    expected = store.neuron(1, 3).to_json()
    assert {name: found[name] for name in expected} == json.loads(json.dumps(expected))
    assert found.keys() - expected.keys() == {"row", "links"}
    assert client.get(f"{API}/neurons/1/3").headers["etag"]


def test_sql_by_address_and_by_body(client: TestClient) -> None:
    query = "SELECT layer, neuron FROM neurons WHERE layer = $layer AND neuron < 2 ORDER BY ALL"
    found = body(client, "/sql", q=query, **{"p.layer": "1"})
    assert found["rows"] == [[1, 0], [1, 1]]
    assert not found["truncated"]
    long = client.post(f"{API}/sql", json={"q": query, "parameters": {"layer": 1}})
    assert long.json()["rows"] == found["rows"]
    few = body(client, "/sql", q="FROM neurons", max_rows=3)
    assert few["truncated"]
    assert len(few["rows"]) == 3
    table = arrow(client, "/sql", q="SELECT 'nan'::FLOAT AS a, 1 AS a")
    assert table.num_columns == 2
    assert np.isnan(table.column(0)[0].as_py())


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "application/json"),
        ("text/csv, application/json;q=0.9", "text/csv; charset=utf-8; header=present"),
        (f"application/json;q=0.1, {ARROW};q=0.5, */*;q=0.01", ARROW),
        ("application/*;q=0.2, text/*;q=0.1, application/json;q=0", ARROW),
        ("TEXT/CSV", "text/csv; charset=utf-8; header=present"),
    ],
)
def test_the_form_follows_from_accept(client: TestClient, accept: str, expected: str) -> None:
    answer = client.get(f"{API}/heads", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == expected


def test_no_form_is_acceptable(client: TestClient) -> None:
    answer = client.get(f"{API}/heads", headers={"Accept": "image/png"})
    assert answer.status_code == 406
    assert client.get(f"{API}/heads?format=npy").status_code == 422
    assert client.get(f"{API}/raw/mlp_post_act?token=1&format=csv").status_code == 422


def test_a_known_answer_is_not_sent_again(client: TestClient) -> None:
    address = f"{API}/topk/mlp_post_act?k=3&layer=1"
    first = client.get(address)
    tag = first.headers["etag"]
    assert tag.startswith('"')
    again = client.get(address, headers={"If-None-Match": f'"x", {tag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    # The order of the keys is nothing; the form and the question are all.
    assert client.get(f"{API}/topk/mlp_post_act?layer=1&k=3").headers["etag"] == tag
    others = [f"{address}&format=csv", f"{API}/topk/mlp_post_act?k=4&layer=1"]
    assert all(client.get(other).headers["etag"] != tag for other in others)
    assert client.get(address, headers={"Accept": ARROW}).headers["etag"] != tag
    assert "etag" not in client.get(f"{API}/sql?q=SELECT 1").headers


def test_tags_follow_the_store(client: TestClient, tmp_path: Path, path: Path) -> None:
    tag = client.get(f"{API}/store").headers["etag"]
    with client_of(path) as again:
        assert again.get(f"{API}/store").headers["etag"] == tag
    with client_of(make_store(tmp_path / "other", seed=3)) as other:
        assert other.get(f"{API}/store").headers["etag"] != tag


def test_head_gives_the_headers_of_get(client: TestClient) -> None:
    answer = client.head(f"{API}/store")
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["etag"] == client.get(f"{API}/store").headers["etag"]


def test_the_docs_page_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/api/docs").text
    assert "http://" not in page
    assert "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "docs.js"):
        assert f"/api/docs/{name}" in page
        assert client.get(f"/api/docs/{name}").status_code == 200
