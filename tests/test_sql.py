"""SQL over a store: queries, predicates on rows and units, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from store_builder import build_store, stored_rows

from actstore.query.sql import Sql
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact

LENGTHS = [60, 120, 5, 90, 128, 33, 100, 77]
LABELS = ["poem", "code", "poem", None, "code", "code", "poem", "letter"]
CONTEXT = 128


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    """What is durable is tested elsewhere; waiting for the disk is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = np.random.default_rng(0).normal(size=(2, sum(LENGTHS), 12))
    path = build_store(
        tmp_path_factory.mktemp("sql") / "store",
        {"mlp_post_act": values},
        LENGTHS,
        columns=[{"label": label, "year": 1900 + n} for n, label in enumerate(LABELS)],
        special_token_ids=[2],
    )
    compact(StoreReader(path))
    return path


@pytest.fixture(scope="module")
def sql(root: Path) -> Iterator[Sql]:
    with Sql(StoreReader(root)) as opened:
        yield opened


def test_relation_is_lazy_and_has_all_forms(sql: Sql) -> None:
    relation = sql.relation(
        "SELECT document, year FROM documents WHERE year > ? ORDER BY 1", [1904]
    )
    assert isinstance(relation, duckdb.DuckDBPyRelation)
    assert relation.fetchall() == [(5, 1905), (6, 1906), (7, 1907)]
    named = sql.relation("SELECT count(*) FROM documents WHERE label = $l", {"l": "poem"})
    assert named.to_arrow_table().column(0).to_pylist() == [3]
    assert sql.relation("SELECT label FROM documents").df().shape == (8, 1)
    assert sql.relation("SELECT label FROM documents").pl().height == 8


def test_two_relations_do_not_disturb_each_other(sql: Sql) -> None:
    first = sql.relation("SELECT token FROM tokens ORDER BY token")
    second = sql.relation("SELECT count(*) FROM tokens")
    assert second.fetchall() == [(sum(LENGTHS),)]
    assert len(first.fetchall()) == sum(LENGTHS)


@pytest.mark.parametrize(
    "query", ["DESCRIBE neurons", "SHOW TABLES", "SUMMARIZE documents", "EXPLAIN FROM tokens"]
)
def test_statements_that_only_look(sql: Sql, query: str) -> None:
    assert sql.fetch(query).num_rows


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nosuch FROM neurons", "nosuch"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("", "0 statements"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("INSERT INTO layers VALUES (9)", "INSERT"),
        ("CREATE TEMP TABLE t AS SELECT 1", "CREATE"),
        ("ATTACH '/tmp/other.duckdb'", "ATTACH"),
        ("SET threads = 1", "SET"),
        ("SELECT * FROM read_csv('/etc/hostname')", "Permission"),
        ("SELECT layer FROM neurons WHERE layer = ?", "parameter"),
    ],
)
def test_refused_queries_say_why(sql: Sql, query: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        sql.relation(query).fetchall()
    assert caught.value.kind is ErrorKind.INVALID_SQL


def test_python_variables_are_no_tables(sql: Sql) -> None:
    secret = np.arange(3)
    with pytest.raises(InvalidInput):
        sql.relation("SELECT * FROM secret")
    assert len(secret) == 3


def test_errors_of_values_are_invalid_input(sql: Sql) -> None:
    with pytest.raises(InvalidInput, match="poem"):
        sql.fetch("SELECT CAST(label AS INTEGER) FROM documents")


def test_rows_where_is_ascending_and_right(sql: Sql, root: Path) -> None:
    rows = stored_rows(root)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    expected = [rows[starts[n] + 3] for n, length in enumerate(LENGTHS) if length > 3]
    found = sql.rows_where("position = 3")
    assert found.dtype == np.int64
    assert found.tolist() == sorted(expected)

    poems = [n for n, label in enumerate(LABELS) if label == "poem"]
    expected = [row for n in poems for row in rows[starts[n] : starts[n + 1]]]
    assert sql.rows_where("label = 'poem'").tolist() == sorted(expected)
    assert sql.rows_where("true").tolist() == sorted(rows.tolist())
    assert sql.rows_where("length = 5 AND documents.year = 1902").tolist() == sorted(
        rows[starts[2] : starts[3]].tolist()
    )
    assert sql.rows_where("year > 2000").tolist() == []
    assert sql.rows_where("special -- a comment").tolist() == sorted(
        sql.fetch("SELECT token FROM tokens WHERE special").column(0).to_pylist()
    )


def test_units_where(sql: Sql) -> None:
    neurons = sql.fetch("SELECT layer, neuron, write_norm FROM neurons").to_pylist()
    expected = [(n["layer"], n["neuron"]) for n in neurons if n["write_norm"] > 2.5]
    assert 0 < len(expected) < len(neurons)
    assert sql.units_where("write_norm > 2.5") == sorted(expected)
    assert sql.units_where("layer = 1 AND head = 0", "heads") == [(1, 0)]
    with pytest.raises(InvalidInput, match="neurons, heads"):
        sql.units_where("true", "documents")


@pytest.mark.parametrize(
    "predicate",
    ["", "  ", "position = ", "nosuch = 1", "true) OR (true", "true; SELECT 1", "true ORDER BY 1"],
)
def test_bad_predicates_are_refused(sql: Sql, predicate: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        sql.rows_where(predicate)
    assert caught.value.kind is ErrorKind.INVALID_SQL
    with pytest.raises(InvalidInput):
        sql.units_where(predicate)


def everything(root: Path) -> list[pa.Table]:
    tables = ("documents", "tokens", "neurons", "top_activations", "statistics", "segments")
    with Sql(StoreReader(root)) as opened:
        return [opened.fetch(f"SELECT * FROM {table}") for table in tables]


def test_damage_that_only_duckdb_sees_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).normal(size=(1, sum(LENGTHS), 12))
    root = build_store(tmp_path / "s", {"mlp_post_act": values}, LENGTHS)
    compact(StoreReader(root))
    monkeypatch.setattr("actstore.store.snapshot.CHECKED_BYTES", 0)
    path = next((root / "catalog").glob("*.duckdb"))
    good, truth = path.read_bytes(), everything(root)
    found = 0
    for place in range(9_000, len(good), len(good) // 12):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        try:
            # A block that no table uses is not read.
            assert everything(root) == truth
        except StoreDamaged:
            found += 1
    assert found > 4
