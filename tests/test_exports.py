"""Exports: what is written reads back the same, in the schema that its readers expect."""

import csv
import gzip
import json
import math
import os
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from store_builder import build_store, stored_rows
from typer import Typer
from typer.testing import CliRunner

from actstore.cli.exporting import export
from actstore.query.exports import export_neurons, export_table
from actstore.query.exports.tables import CERTIFICATE
from actstore.query.exports.unit_record import Bars, ExportChoice, Moments
from actstore.query.session import Store
from actstore.store.errors import ErrorKind, InvalidInput, WriteFailed
from actstore.store.histograms import Histogram

LENGTHS = [60, 100, 5, 90, 120, 33]
CHOICE = ExportChoice(top=4, random=3, bottom=2, quantiles=4, window=(5, 3))


@pytest.fixture(scope="module")
def values() -> "np.ndarray[Any, np.dtype[np.float32]]":
    made = np.random.default_rng(3).standard_normal((2, sum(LENGTHS), 6)).astype(np.float16)
    made[0, 7, 2] = np.nan
    made[:, :, 5] = np.maximum(made[:, :, 5], 0)
    return made.astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, values: Any) -> Path:
    return build_store(
        tmp_path_factory.mktemp("exports") / "store",
        {"mlp_post_act": values},
        LENGTHS,
        special_token_ids=[2],
        columns=[{"label": f'a,"{n}"\n' if n else None} for n in range(len(LENGTHS))],
    )


@pytest.fixture(scope="module")
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


def lines(path: Path) -> list[Any]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def test_tables_come_back(store: Store, tmp_path: Path) -> None:
    found = store.topk("mlp_post_act", k=50)
    expected = found.to_arrow()
    for name in ("top.parquet", "top.arrow", "top.csv", "top.jsonl"):
        assert export_table(found, tmp_path / name) == tmp_path / name
    for table in (
        parquet.read_table(tmp_path / "top.parquet"),
        pa.ipc.open_file(tmp_path / "top.arrow").read_all(),
    ):
        assert table.to_pylist() == expected.to_pylist()
        assert table.schema.equals(expected.schema)
        assert json.loads(table.schema.metadata[CERTIFICATE]) == found.certificate.to_json()
    assert lines(tmp_path / "top.jsonl") == expected.to_pylist()
    with (tmp_path / "top.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["value"]) for row in rows] == expected.column("value").to_pylist()
    assert [row["text"] for row in rows] == expected.column("text").to_pylist()
    assert list(rows[0]) == expected.column_names


def test_sql_with_every_kind_of_value(store: Store, tmp_path: Path) -> None:
    relation = store.sql(
        "SELECT 'NaN'::FLOAT AS nan, '-inf'::DOUBLE AS low, NULL::INT AS nothing, [1, NULL] AS l, "
        "{'a': 'x', 'b': 1.5} AS s, DATE '2020-01-02' AS day, 1.10::DECIMAL(4, 2) AS money, "
        "true AS yes, label, 'ü☃' AS text FROM documents ORDER BY document"
    )
    for ending in ("parquet", "arrow", "csv", "jsonl"):
        export_table(relation, tmp_path / f"all.{ending}")
    read = parquet.read_table(tmp_path / "all.parquet")
    assert str(read.to_pylist()) == str(relation.to_arrow_table().to_pylist())
    first = lines(tmp_path / "all.jsonl")[1]
    assert first["nan"] is None
    assert first["low"] is None
    assert first["l"] == [1, None]
    assert first["s"] == {"a": "x", "b": 1.5}
    assert (first["day"], first["money"], first["yes"]) == ("2020-01-02", 1.1, True)
    with (tmp_path / "all.csv").open(newline="", encoding="utf-8") as stream:
        row = list(csv.DictReader(stream))[1]
    assert row["label"] == 'a,"1"\n'
    assert math.isnan(float(row["nan"]))
    assert float(row["low"]) == -math.inf
    assert (row["nothing"], row["text"], row["money"]) == ("", "ü☃", "1.10")
    assert json.loads(row["l"]) == [1, None]


def test_examples_come_back(store: Store, tmp_path: Path) -> None:
    found = store.examples("mlp_post_act", (1, 3), k=5, kind="quantile")
    export_table(found, tmp_path / "found.parquet")
    table = parquet.read_table(tmp_path / "found.parquet")
    assert json.loads(table.schema.metadata[CERTIFICATE]) == found.certificate.to_json()
    assert table.column("unit").to_pylist() == [[1, 3]] * 5
    for row, example in zip(table.to_pylist(), found, strict=True):
        assert {key: row[key] for key in example.to_json()} == example.to_json()
    export_table(found, tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="") as stream:
        first = next(csv.DictReader(stream))
    assert json.loads(first["values"]) == list(found[0].values)
    assert json.loads(first["texts"]) == list(found[0].texts)


def test_format_and_existing_files(store: Store, tmp_path: Path) -> None:
    found = store.topk("mlp_post_act", k=3)
    target = tmp_path / "deep" / "er" / "file.txt"
    with pytest.raises(InvalidInput, match="names no format") as caught:
        export_table(found, target)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(InvalidInput, match="xlsx"):
        export_table(found, target, "xlsx")
    assert not target.parent.exists()
    export_table(found, target, "CSV")
    before = target.read_bytes()
    with pytest.raises(InvalidInput, match="exists already"):
        export_table(store.topk("mlp_post_act", k=1), target, "csv")
    assert target.read_bytes() == before
    export_table(store.topk("mlp_post_act", k=1), target, "csv", force=True)
    assert len(target.read_text().splitlines()) == 2
    assert os.listdir(target.parent) == ["file.txt"]


def test_a_failure_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file.csv"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteFailed, match="No space"):
        export_table(store.topk("mlp_post_act", k=3), target, force=True)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.csv"]
    with pytest.raises(WriteFailed):
        export_table(store.topk("mlp_post_act", k=3), tmp_path / "file.csv" / "below.csv")


def test_what_came_meanwhile_is_not_replaced(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file.csv"
    monkeypatch.setattr(os, "fsync", lambda descriptor: target.write_text("other"))
    with pytest.raises(InvalidInput, match="exists already"):
        export_table(store.topk("mlp_post_act", k=3), target)
    assert target.read_text() == "other"
    assert os.listdir(tmp_path) == ["file.csv"]


RECORD_FIELDS = {
    "dataclass_name": str,
    "neuron_id": dict,
    "random_sample": list,
    "random_sample_by_quantile": type(None),
    "quantile_boundaries": type(None),
    "mean": float,
    "variance": float,
    "skewness": float,
    "kurtosis": float,
    "most_positive_activation_records": list,
}


def test_neuron_viewer_records(store: Store, path: Path, values: Any, tmp_path: Path) -> None:
    units = [(1, 3), (0, 2), (1, 3)]
    done = export_neurons(store, units, tmp_path / "nv", choice=CHOICE)
    assert done.files == ("0/2.json", "1/3.json")
    assert done.units == 2
    record = json.loads((tmp_path / "nv/1/3.json").read_text())
    assert {key: type(value) for key, value in record.items()} == RECORD_FIELDS
    assert record["dataclass_name"] == "NeuronRecord"
    assert record["neuron_id"] == {
        "dataclass_name": "NeuronId",
        "layer_index": 1,
        "neuron_index": 3,
    }
    top = store.examples("mlp_post_act", (1, 3), k=4, window=(5, 3))
    assert record["most_positive_activation_records"] == [
        {
            "dataclass_name": "ActivationRecord",
            "tokens": list(row.texts),
            "activations": list(row.values),
        }
        for row in top
    ]
    random = store.examples("mlp_post_act", (1, 3), k=3, kind="random", window=(5, 3))
    assert [one["activations"] for one in record["random_sample"]] == [
        list(row.values) for row in random
    ]
    ordinary = ordinary_values(store, path, values, 1, 3)
    assert record["mean"] == pytest.approx(ordinary.mean())
    assert record["variance"] == pytest.approx(ordinary.var())
    centred = (ordinary - ordinary.mean()) / ordinary.std()
    assert record["skewness"] == pytest.approx((centred**3).mean(), rel=1e-5)
    assert record["kurtosis"] == pytest.approx((centred**4).mean())
    stored = store.sql("SELECT mean, kurtosis FROM neurons WHERE layer = 1 AND neuron = 3")
    assert stored.fetchall()[0] == pytest.approx((record["mean"], record["kurtosis"]))


def test_nan_is_null(store: Store, path: Path, tmp_path: Path) -> None:
    row = int(stored_rows(path)[7])
    choice = ExportChoice(top=200, random=1, window=(8, 8))
    export_neurons(store, [(0, 2)], tmp_path, choice=choice)
    text = (tmp_path / "0/2.json").read_text()
    assert "NaN" not in text
    found = [
        one["activations"]
        for one in json.loads(text)["most_positive_activation_records"]
        if None in one["activations"]
    ]
    examples = store.examples("mlp_post_act", (0, 2), k=200, window=(8, 8))
    expected = [e for e in examples if any(math.isnan(value) for value in e.values)]
    assert len(found) == len(expected)
    assert all(e.first_token <= row < e.first_token + len(e.values) for e in expected)


FEATURE_FIELDS = {
    "modelId": str,
    "layer": str,
    "index": str,
    "creatorId": str,
    "maxActApprox": float,
    "frac_nonzero": float,
    "vectorLabel": type(None),
    "hookName": type(None),
    "vectorDefaultSteerStrength": type(None),
    "sourceSetName": str,
    "hasVector": bool,
    **dict.fromkeys(
        (
            "freq_hist_data_bar_heights",
            "freq_hist_data_bar_values",
            "logits_hist_data_bar_heights",
            "logits_hist_data_bar_values",
            "neuron_alignment_indices",
            "neuron_alignment_l1",
            "neuron_alignment_values",
            "correlated_neurons_indices",
            "correlated_neurons_l1",
            "correlated_neurons_pearson",
            "decoder_weights_dist",
            "neg_str",
            "neg_values",
            "pos_str",
            "pos_values",
            "topkCosSimIndices",
            "topkCosSimValues",
            "vector",
        ),
        list,
    ),
}
ACTIVATION_FIELDS = {
    "id": (str,),
    "modelId": (str,),
    "layer": (str,),
    "index": (str,),
    "creatorId": (str,),
    "dataSource": (str,),
    "dataIndex": (str,),
    "tokens": (list,),
    "values": (list,),
    "maxValue": (float,),
    "maxValueTokenIndex": (int,),
    "minValue": (float,),
    "dfaValues": (list,),
    "dfaMaxValue": (type(None),),
    "dfaTargetIndex": (type(None),),
    "qualifyingTokenIndex": (int,),
    "binMin": (float, type(None)),
    "binMax": (float, type(None)),
    "binContains": (float, type(None)),
}


def test_neuronpedia_layout(store: Store, path: Path, values: Any, tmp_path: Path) -> None:
    done = export_neurons(
        store,
        "neuron IN (3, 5)",
        tmp_path,
        "neuronpedia",
        choice=CHOICE,
        creator="someone",
        release="mine",
    )
    assert done.units == 4
    assert sorted(done.files) == sorted(
        f"tiny/{layer}-mlp_post_act/{name}"
        for layer in (0, 1)
        for name in (
            "model.jsonl",
            "release.jsonl",
            "sourceset.jsonl",
            "source.jsonl",
            "features/batch-0.jsonl.gz",
            "activations/batch-0.jsonl.gz",
        )
    )
    folder = tmp_path / "tiny/1-mlp_post_act"
    (model,), (release,) = lines(folder / "model.jsonl"), lines(folder / "release.jsonl")
    (source,), (source_set,) = lines(folder / "source.jsonl"), lines(folder / "sourceset.jsonl")
    assert (model["id"], model["layers"], model["neuronsPerLayer"]) == ("tiny", 2, 6)
    assert (source["id"], source["modelId"], source["setName"]) == (
        "1-mlp_post_act",
        "tiny",
        source_set["name"],
    )
    assert source_set["releaseName"] == release["name"] == "mine"
    assert {row["creatorId"] for row in (model, release, source, source_set)} == {"someone"}
    features = lines(folder / "features/batch-0.jsonl.gz")
    assert [row["index"] for row in features] == ["3", "5"]
    for row in features:
        assert {key: type(value) for key, value in row.items()} == FEATURE_FIELDS
        ordinary = ordinary_values(store, path, values, 1, int(row["index"]))
        assert row["maxActApprox"] == ordinary.max()
        assert row["frac_nonzero"] == pytest.approx((ordinary > 0).mean())
        heights = row["freq_hist_data_bar_heights"]
        assert sum(heights) == pytest.approx((ordinary != 0).sum())
        assert heights == list(
            Bars.of(store.histogram("mlp_post_act", (1, int(row["index"])))).heights
        )
        assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])
        promoted = store.sql(
            f"SELECT promoted, suppressed FROM neurons WHERE layer = 1 AND neuron = {row['index']}"
        ).fetchall()
        assert promoted == [(row["pos_str"], row["neg_str"])]
        similar = store.neuron(1, int(row["index"])).similar_in_layer
        assert row["topkCosSimIndices"] == [one.neuron for one in similar]
        assert row["topkCosSimValues"] == [one.cosine for one in similar]
        assert len(similar) == 5
        assert row["pos_values"] == sorted(row["pos_values"], reverse=True)
        assert row["neg_values"] == sorted(row["neg_values"])
    activations = lines(folder / "activations/batch-0.jsonl.gz")
    assert len({row["id"] for row in activations}) == len(activations)
    for row in activations:
        assert set(row) == set(ACTIVATION_FIELDS)
        assert all(isinstance(row[key], kinds) for key, kinds in ACTIVATION_FIELDS.items())
        assert len(row["tokens"]) == len(row["values"])
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert row["minValue"] == min(row["values"])
        assert row["layer"] == "1-mlp_post_act"
    bins = [row for row in activations if row["binContains"] is not None and row["index"] == "3"]
    assert bins
    for row in bins:
        assert row["binMin"] <= row["values"][row["qualifyingTokenIndex"]] <= row["binMax"]
    top = store.examples("mlp_post_act", (1, 3), k=4, window=(5, 3))
    assert [row["values"] for row in activations if row["index"] == "3"][:4] == [
        list(row.values) for row in top
    ]


def test_neuronpedia_is_the_same_again(store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_neurons(store, [(0, 1)], tmp_path / name, "neuronpedia", choice=CHOICE)
    for file in sorted((tmp_path / "a").rglob("*.jsonl*")):
        twin = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == twin.read_bytes()


def test_pages_do_not_replace(store: Store, tmp_path: Path) -> None:
    export_neurons(store, [(0, 1)], tmp_path, choice=CHOICE)
    with pytest.raises(InvalidInput, match="exists already"):
        export_neurons(store, [(0, 0), (0, 1)], tmp_path, choice=CHOICE)
    # Nothing is begun that cannot be finished.
    assert not (tmp_path / "0/0.json").exists()
    seen: list[tuple[int, int]] = []
    export_neurons(
        store,
        [(0, 0), (0, 1)],
        tmp_path,
        choice=CHOICE,
        force=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("units", "options", "kind"),
    [
        ([], {}, ErrorKind.UNKNOWN_UNIT),
        ("neuron < 0", {}, ErrorKind.UNKNOWN_UNIT),
        ("nonsense < 0", {}, ErrorKind.INVALID_SQL),
        ([(0, 6)], {}, ErrorKind.UNKNOWN_UNIT),
        ([(2, 0)], {}, ErrorKind.UNKNOWN_UNIT),
        ([3], {}, ErrorKind.UNKNOWN_UNIT),
        ([(0, "1")], {}, ErrorKind.UNKNOWN_UNIT),
        ([(0, 1)], {"schema": "other"}, ErrorKind.INVALID_ARGUMENT),
        ([(0, 1)], {"scalar": "nonsense"}, ErrorKind.UNKNOWN_SCALAR),
        ([(0, 1)], {"scalar": "attn_weighted_value"}, ErrorKind.INVALID_ARGUMENT),
    ],
)
def test_refused(
    store: Store, tmp_path: Path, units: Any, options: dict[str, Any], kind: ErrorKind
) -> None:
    with pytest.raises(InvalidInput) as caught:
        export_neurons(store, units, tmp_path / "out", **options)
    assert caught.value.kind is kind
    assert not (tmp_path / "out").exists()


def test_moments_of_little() -> None:
    assert Moments.of_values(np.empty(0, np.float32)) == Moments(None, None, None, None)
    assert Moments.of_values(np.ones(3, np.float32)) == Moments(1.0, 0.0, None, None)


def test_moments_of_values_are_those_of_the_store(store: Store, path: Path, values: Any) -> None:
    found = store.neuron(1, 3).statistics
    assert found is not None
    counted = Moments.of_values(ordinary_values(store, path, values, 1, 3))
    assert astuple(counted) == pytest.approx(astuple(Moments.of(found)), rel=1e-5)


def test_bars_hold_what_is_not_zero() -> None:
    given = np.array([0, 0, -0.0, 1, 2, 4, 4, 8, 0.001], np.float32)
    bars = Bars.of(Histogram.of_values(given))
    assert sum(bars.heights) == pytest.approx(6)
    assert len(bars.centres) == len(bars.heights) == 50
    assert bars.heights[-1] == pytest.approx(1)
    assert Bars.of(Histogram.of_values(given[:3])) == Bars()
    assert Bars.of(Histogram.of_values(given[:0])) == Bars()


@pytest.fixture(scope="module")
def command() -> Typer:
    app = Typer()
    app.command()(export)
    return app


def test_command(command: Typer, path: Path, store: Store, tmp_path: Path) -> None:
    runner = CliRunner()

    def run(*arguments: str) -> Any:
        return runner.invoke(command, [str(path), *arguments])

    done = run("--topk", "mlp_post_act", "-k", "5", "--layer", "1", "-o", str(tmp_path / "t.csv"))
    assert done.exit_code == 0, done.output
    assert "5 rows" in done.output
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 6
    again = run("--topk", "mlp_post_act", "-o", str(tmp_path / "t.csv"))
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    for arguments in (
        ["--sql", "SELECT token FROM tokens", "-o", str(tmp_path / "s.jsonl")],
        ["--examples", "mlp_post_act", "--unit", "1:3", "-o", str(tmp_path / "e.parquet")],
        ["--neurons", "neuronpedia", "--units", "neuron = 0", "-k", "3", "-o", str(tmp_path)],
        ["--neurons", "neuron_viewer", "--unit", "0:1", "--unit", "1:1", "-o", str(tmp_path)],
    ):
        done = run(*arguments, "--json")
        assert done.exit_code == 0, done.output
        assert all(Path(row["file"]).exists() for row in json.loads(done.stdout)["rows"])
    assert len(lines(tmp_path / "s.jsonl")) == sum(LENGTHS)
    for arguments in (
        [],
        ["--topk", "mlp_post_act", "--sql", "SELECT 1"],
        ["--examples", "mlp_post_act"],
        ["--neurons", "other", "--unit", "0:1"],
        ["--neurons", "neuronpedia", "--unit", "0:1", "--units", "neuron = 0"],
    ):
        assert run(*arguments, "-o", str(tmp_path / "x.csv")).exit_code == 2
    assert not (tmp_path / "x.csv").exists()


def ordinary_values(store: Store, path: Path, values: Any, layer: int, unit: int) -> Any:
    """A unit's values at the rows that are not special and not NaN, float64."""
    rows = stored_rows(path)
    query = "SELECT token FROM tokens WHERE NOT special"
    ordinary = {token for (token,) in store.sql(query).fetchall()}
    kept = np.array([row in ordinary for row in rows.tolist()])
    found = values[layer, kept, unit].astype(np.float64)
    return found[~np.isnan(found)]
