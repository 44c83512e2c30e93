"""SQL over derived scalars against the same SQL over their values in ordinary tables."""

import gc
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_builder import build_store, stored_rows

from actstore.query.derived import SCALARS
from actstore.query.derived.registry import temporary_scalars
from actstore.query.session import Store
from actstore.query.sql import Sql
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.reader import StoreReader

LENGTHS = [60, 100, 5, 90, 110, 33, 100, 77]
TOKENS, NEURONS = sum(LENGTHS), 7
EXAMPLES = int(os.environ.get("ACTSTORE_SQL_EXAMPLES", "3"))
"""Of each shape of query; more with the environment variable."""

TABLES = ("mlp_post_act", "mlp_write_norm")
Answer = list[tuple[Any, ...]]


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def hostile_values() -> Any:
    """Values with ties, both zeros, infinities and NaN."""
    rng = np.random.default_rng(3)
    values = np.round(rng.normal(size=(2, TOKENS, NEURONS)) * 2) / 2
    values[:, :, 4] = rng.normal(size=(2, TOKENS))
    flat = values.reshape(-1)
    for number, value in enumerate((-0.0, np.nan, np.inf, -np.inf)):
        flat[rng.choice(flat.size, 60, replace=False)] = value
        assert number < 4
    values[1, :, 6] = np.nan
    values[1, 5, 6] = 1.5
    return values


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, _without_fsync: None) -> Iterator[Store]:
    path = build_store(
        tmp_path_factory.mktemp("scalars") / "store",
        {"mlp_post_act": hostile_values()},
        LENGTHS,
        special_token_ids=[2],
    )
    with Store(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def sql(store: Store) -> Iterator[Sql]:
    with Sql(store.reader, store) as opened:
        yield opened


@pytest.fixture(scope="module")
def copies(sql: Sql) -> duckdb.DuckDBPyConnection:
    """The same tables in an ordinary database."""
    connection = duckdb.connect(":memory:")
    for name in (*TABLES, "tokens", "neurons"):
        incoming = sql.fetch(f"SELECT * FROM {name}")
        connection.register("incoming", incoming)
        connection.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
        connection.unregister("incoming")
    return connection


def rows_of(table: pa.Table) -> Answer:
    return [
        tuple(0.0 if value == 0 else value for value in row.values()) for row in table.to_pylist()
    ]


# Any predicate and any shape of query

NUMBERS = st.sampled_from(["-0.0", "0", "0.5", "1", "-1.5", "2.25", "-3", "1e9", "0.1"])
WHOLE = st.integers(-1, 9).map(str)
ROWS = st.integers(-5, 1200).map(str)
OPERATORS = st.sampled_from(["=", "<>", "<", "<=", ">", ">="])


def comparison(column: str, constants: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    several = st.lists(constants, min_size=1, max_size=4).map(", ".join)
    return st.one_of(
        st.builds(f"{column} {{}} {{}}".format, OPERATORS, constants),
        st.builds(f"{column} BETWEEN {{}} AND {{}}".format, constants, constants),
        several.map(f"{column} IN ({{}})".format),
        several.map(f"{column} NOT IN ({{}})".format),
    )


ATOMS = st.one_of(
    comparison("layer", WHOLE),
    comparison("neuron", WHOLE),
    comparison("token", ROWS),
    comparison("value", NUMBERS),
    st.sampled_from(
        [
            "special",
            "NOT special",
            "special = false",
            "special IS NOT NULL",
            "value IS NULL",
            "value IS NOT NULL",
            "token % 7 = 3",
            "value * 2 > 1",
            "value > neuron",
            "layer = NULL",
            "neuron IN (1, NULL)",
            "value IS DISTINCT FROM 0.5",
            "value = 'nan'::FLOAT",
            "value < 'inf'::FLOAT",
            "isnan(value)",
            "token IN (SELECT token FROM tokens WHERE position = 3)",
            "(layer, neuron) IN ((0, 1), (1, 4))",
        ]
    ),
)
PREDICATES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({} AND {})".format, inner, inner),
        st.builds("({} AND {})".format, inner, inner),
        st.builds("({} OR {})".format, inner, inner),
        inner.map("(NOT {})".format),
    ),
    max_leaves=5,
)

# The rows themselves, in whatever order.
WHOLE_ANSWERS = (
    "SELECT * FROM {t} WHERE {p}",
    "SELECT value, neuron FROM {t} WHERE {p}",
    "SELECT count(*), count(value), min(value), max(value), sum(token) FROM {t} WHERE {p}",
    "SELECT layer, neuron, count(*), max(value), bool_or(special) FROM {t} WHERE {p} GROUP BY ALL",
    "SELECT text, s.value FROM {t} s JOIN tokens USING (token) WHERE s.value > 1 AND s.token > 50",
    (
        "SELECT n.neuron, count(s.value) FROM neurons n LEFT JOIN (SELECT * FROM {t} WHERE {p}) s"
        " USING (layer, neuron) GROUP BY ALL"
    ),
    (
        "WITH a AS (SELECT * FROM {t} WHERE {p} AND neuron < 3) SELECT count(*) FROM a x JOIN a y"
        " ON x.token = y.token WHERE x.neuron = 0 AND y.neuron > 0"
    ),
    "SELECT * FROM {t} WHERE {p} EXCEPT ALL SELECT * FROM {t} WHERE layer = 1",
)
# The values of the first column, in order: which of several equal rows stands there is open.
BEST_VALUES = (
    "SELECT value, token FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k} OFFSET {o}",
    "SELECT s.value AS v, layer FROM {t} AS s WHERE {p} ORDER BY v {d} LIMIT {k}",
    "SELECT value FROM {t} WHERE {p} AND NOT special ORDER BY 1 {d} LIMIT {k}",
    "SELECT value FROM {t} WHERE {p} AND special ORDER BY 1 {d} LIMIT {k}",
    "SELECT value AS v, value * 2 FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k} OFFSET {o}",
    "SELECT value AS v, -value AS value FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k}",
    (
        "SELECT v FROM (SELECT value AS v, -value AS value FROM {t} WHERE {p}) ORDER BY value {d}"
        " LIMIT {k}"
    ),
    (
        "SELECT value FROM (SELECT token, value AS v, neuron::FLOAT AS value FROM {t} WHERE {p})"
        " ORDER BY value {d} LIMIT {k}"
    ),
    (
        "SELECT v FROM (SELECT value AS v, neuron::BOOL AS special FROM {t} WHERE {p}) WHERE special"
        " ORDER BY v {d} LIMIT {k}"
    ),
    "SELECT layer AS value, value AS v FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k}",
    "WITH a AS (SELECT * FROM {t} WHERE {p}) SELECT value FROM a ORDER BY value {d} LIMIT {k}",
    (
        "WITH a(b, value) AS (SELECT value, neuron FROM {t} WHERE {p}) SELECT value FROM a"
        " ORDER BY value {d} LIMIT {k}"
    ),
    (
        "SELECT value FROM {t} AS s(value, token, neuron, special, last) WHERE neuron > 3"
        " ORDER BY value {d} LIMIT {k}"
    ),
    "SELECT * RENAME (layer AS value, value AS v) FROM {t} ORDER BY value {d} LIMIT {k}",
    (
        "SELECT b.value FROM (SELECT token, value FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k}) b"
        " JOIN tokens USING (token) ORDER BY b.value {d}"
    ),
    (
        "SELECT s.value FROM {t} s JOIN tokens USING (token) WHERE position > 5 AND s.neuron = 1"
        " ORDER BY s.value {d} LIMIT {k}"
    ),
    (
        "(SELECT value FROM {t} WHERE {p} ORDER BY value DESC LIMIT {k}) UNION ALL"
        " (SELECT value FROM {t} WHERE neuron = 2 ORDER BY value DESC LIMIT 3) ORDER BY 1 {d}"
    ),
    (
        "WITH a AS (SELECT * FROM {t} WHERE {p}) SELECT value FROM (SELECT value FROM a ORDER BY value"
        " {d} LIMIT {k}) UNION ALL (SELECT layer FROM a ORDER BY layer {d} LIMIT 4) ORDER BY 1 {d}"
    ),
    "SELECT value AS v, unnest({{'value': layer}}) FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k}",
    (
        "SELECT value FROM (SELECT * REPLACE (-value AS value) FROM {t} WHERE {p} ORDER BY value {d}"
        " LIMIT {k}) ORDER BY value {d}"
    ),
    "SELECT value, * EXCLUDE (value) FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k}",
    "SELECT DISTINCT value FROM {t} WHERE {p} ORDER BY value {d} LIMIT {k}",
    "SELECT max(value) AS v FROM {t} WHERE {p} GROUP BY neuron ORDER BY v {d} LIMIT {k}",
    (
        "SELECT value, row_number() OVER (ORDER BY neuron) FROM {t} WHERE {p} ORDER BY value {d}"
        " LIMIT {k}"
    ),
    (
        "SELECT value FROM {t} WHERE {p} QUALIFY row_number() OVER (ORDER BY token, neuron, layer) > 2"
        " ORDER BY value {d} LIMIT {k}"
    ),
    (
        "SELECT count(*), max(value) FROM (SELECT value FROM {t} WHERE {p} ORDER BY value {d}"
        " LIMIT {k})"
    ),
)
# Every column, in order: nothing is left open.
BEST_ROWS = (
    "SELECT * FROM {t} WHERE {p} ORDER BY value {d}, layer, token, neuron LIMIT {k} OFFSET {o}",
    (
        "SELECT token, neuron, value FROM {t} WHERE {p} ORDER BY value {d}, token DESC, neuron, layer"
        " LIMIT {k}"
    ),
    "SELECT * FROM {t} WHERE {p} ORDER BY token, neuron, layer LIMIT {k} OFFSET {o}",
    "SELECT neuron AS value, value AS v FROM {t} WHERE {p} ORDER BY value {d}, v LIMIT {k}",
)
DIRECTIONS = st.sampled_from(
    ["", "DESC", "ASC", "DESC NULLS FIRST", "ASC NULLS FIRST", "DESC NULLS LAST"]
)
FILLED = {
    "t": st.sampled_from(TABLES),
    "p": PREDICATES,
    "d": DIRECTIONS,
    "k": st.integers(0, 25),
    "o": st.integers(0, 4),
}


def check(sql: Sql, copies: duckdb.DuckDBPyConnection, shape: str, filled: dict[str, Any]) -> None:
    query = shape.format(**filled)
    expected = rows_of(copies.sql(query).to_arrow_table())
    found = rows_of(sql.fetch(query))
    if shape in WHOLE_ANSWERS:
        assert Counter(found) == Counter(expected)
    elif shape in BEST_ROWS:
        assert found == expected
    else:
        assert [row[0] for row in found] == [row[0] for row in expected]


@pytest.mark.parametrize("shape", [*WHOLE_ANSWERS, *BEST_VALUES, *BEST_ROWS])
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(filled=st.fixed_dictionaries(FILLED))
def test_any_query_equals_that_over_ordinary_tables(
    sql: Sql, copies: duckdb.DuckDBPyConnection, shape: str, filled: dict[str, Any]
) -> None:
    check(sql, copies, shape, filled)


@settings(max_examples=5 * EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    filled=st.fixed_dictionaries(FILLED),
    shape=st.sampled_from([*WHOLE_ANSWERS, *BEST_VALUES, *BEST_ROWS]),
)
def test_rows_too_many_to_name_are_left_out_afterwards(
    sql: Sql, copies: duckdb.DuckDBPyConnection, shape: str, filled: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.query.sql_pushdown._MOST_ROWS", 100)
        check(sql, copies, shape, filled)


def test_tables_hold_the_canonical_values(sql: Sql, store: Store) -> None:
    norms = sql.fetch("SELECT write_norm FROM neurons ORDER BY layer, neuron").column(0).to_numpy()
    order = np.argsort(stored_rows(store.path))
    raw = hostile_values().astype(np.float16)[:, order].astype(np.float64)
    special = sql.fetch("SELECT special FROM tokens ORDER BY token").column(0).to_numpy()
    assert special.any()
    for name, factors in (("mlp_post_act", np.ones(2 * NEURONS)), ("mlp_write_norm", norms)):
        whole = (raw * factors.reshape(2, 1, NEURONS)).astype(np.float32).reshape(-1)
        table = sql.fetch(f"SELECT * FROM {name} ORDER BY layer, token, neuron")
        assert table.column_names == ["layer", "token", "neuron", "special", "value"]
        values = table.column("value")
        found = values.to_numpy(zero_copy_only=False)
        assert np.array_equal(np.isnan(whole), values.is_null().to_numpy())
        assert np.array_equal(found[~np.isnan(whole)], whole[~np.isnan(whole)])
        assert np.array_equal(
            table.column("special").to_numpy(), np.tile(np.repeat(special, NEURONS), 2)
        )


def test_the_public_route_is_as_right(
    store: Store, copies: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.query.duckdb_source.has_source_protocol", lambda: False)
    filled = {"t": "mlp_write_norm", "d": "DESC", "k": 7, "o": 2}
    with Sql(store.reader, store) as sql:
        for number, shape in enumerate([*WHOLE_ANSWERS, *BEST_VALUES, *BEST_ROWS]):
            predicate = ("layer = 1 AND NOT special", "value > 0.5 AND token < 900")[number % 2]
            check(sql, copies, shape, filled | {"p": predicate})
        assert sql.last is not None
        assert set(sql.last.plans) == {"scan"}


# Other kinds of scalars: pairs, heads and channels, one value per token, gradients


@pytest.fixture(scope="module")
def every_kind(
    tmp_path_factory: pytest.TempPathFactory, _without_fsync: None
) -> Iterator[tuple[Store, Sql]]:
    import torch
    from tiny_gpt2 import tiny_gpt2

    import actstore

    generator = torch.Generator().manual_seed(11)
    corpus = [torch.randint(1, 53, (n,), generator=generator).tolist() for n in (7, 1, 12, 3, 9)]
    store = actstore.ingest(
        (tiny_gpt2(seed=2), None),
        corpus,
        tmp_path_factory.mktemp("kinds") / "store",
        locations="attention",
        objective="next_token_log_prob",
        segment_rows=512,
    )
    with store, Sql(store.reader, store) as sql:
        yield store, sql


KINDS = {
    "attn_qk_probs": ["layer", "token", "attended_token", "head", "special", "value"],
    "attn_write_norm": ["layer", "token", "attended_token", "head", "special", "value"],
    "attn_query": ["layer", "token", "head", "head_channel", "special", "value"],
    "resid_post_embedding": ["token", "channel", "special", "value"],
    "mlp_layer_write_norm": ["layer", "token", "special", "value"],
    "mlp_act_times_grad": ["layer", "token", "neuron", "special", "value"],
    "mlp_post_act_gradient": ["layer", "token", "neuron", "special", "value"],
}
KIND_QUERIES = (
    "SELECT * FROM {t} WHERE token > 3 AND {layer} < 2",
    "SELECT count(*), min(value) FROM {t} WHERE token IN (4, 9, 21) AND {unit} = {a}",
    "SELECT {unit}, max(value) FROM {t} WHERE {unit} IN ({a}, {b}) AND NOT special GROUP BY ALL",
    "SELECT {unit}, count(*) FROM {t} WHERE {unit} BETWEEN {a} AND {b} GROUP BY ALL",
    "SELECT * FROM {t} WHERE {unit} = {a} OR {layer} = 1",
    "SELECT * FROM {t} WHERE NOT ({unit} = {a} AND {layer} = 1)",
    "SELECT value, {unit} FROM {t} WHERE {unit} >= {a} ORDER BY value DESC, token, ALL LIMIT 9",
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_scalar_is_a_table(every_kind: tuple[Store, Sql], name: str) -> None:
    store, sql = every_kind
    whole = sql.fetch(f"SELECT * FROM {name}")
    assert whole.column_names == KINDS[name]
    copy = duckdb.connect(":memory:")
    copy.register("incoming", whole)
    copy.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
    units = [column for column in whole.column_names if column not in ("layer", "special", "value")]
    forward, _, gradient = name.partition("_gradient")
    del gradient
    options = {"pass_type": "backward"} if forward != name else {}
    best = store.topk(forward, k=11, special=True, **options)
    ordered = sql.fetch(
        f"SELECT * FROM {name} WHERE value IS NOT NULL ORDER BY value DESC LIMIT 11"
    )
    assert ordered.column("value").to_pylist() == best.column("value")
    every = store.topk(forward, k=10**6, special=True, **options)
    assert len(every) == whole.num_rows - whole.column("value").null_count
    for unit in units:
        inside = sorted(set(whole.column(unit).to_pylist()))
        names = {"t": name, "unit": unit, "a": inside[len(inside) // 3], "b": inside[-2:][0]}
        names["layer"] = "layer" if "layer" in whole.column_names else "token"
        for shape in KIND_QUERIES:
            query = shape.replace(", ALL", "").format(**names)
            expected, found = copy.sql(query).to_arrow_table(), sql.fetch(query)
            if "ORDER BY" in query:
                assert found.column("value").to_pylist() == expected.column("value").to_pylist()
            else:
                assert Counter(rows_of(found)) == Counter(rows_of(expected)), query


def test_projections_of_a_store_and_registered_scalars_are_tables(
    every_kind: tuple[Store, Sql],
) -> None:
    store, sql = every_kind
    width = store.sources.dimensions.d_model
    mine = store.project("resid_post_mlp", np.arange(width) - 3.0, name="mine")
    found = sql.fetch("SELECT * FROM Mine WHERE layer = 1 ORDER BY value DESC LIMIT 3")
    assert found.column_names == ["layer", "token", "special", "value"]
    best = store.topk(mine, layers=1, k=3, special=True)
    assert found.column("value").to_pylist() == best.column("value")
    theirs = replace(SCALARS["mlp_write_norm"], name="their_norm")
    with temporary_scalars(theirs):
        query = "SELECT max(value) FROM {} WHERE layer = 0"
        assert sql.fetch(query.format("their_norm")) == sql.fetch(query.format("mlp_write_norm"))
    with pytest.raises(InvalidInput, match="their_norm"):
        sql.fetch("SELECT * FROM their_norm")


def test_who_attends_to_a_token_is_looked_for_in_its_sequence(
    every_kind: tuple[Store, Sql],
) -> None:
    store, sql = every_kind
    query = "SELECT token, head, value FROM attn_qk_probs WHERE layer = 0 AND attended_token = 10"
    found = sql.fetch(query).to_pylist()
    assert {row["token"] for row in found} == set(range(10, 20))
    assert sql.last is not None
    assert sql.last.cells == 12 * np.prod(store.unit_shape(SCALARS["attn_qk_probs"]))


# What was looked at

EASY = "SELECT token, value FROM mlp_write_norm WHERE layer = 1 AND neuron = 4 AND NOT special"


def looked(sql: Sql, query: str, parameters: Any = None) -> tuple[int, list[str]]:
    sql.fetch(query, parameters)
    assert sql.last is not None
    return sql.last.cells, sql.last.plans


@pytest.mark.parametrize(
    "query",
    [
        f"{EASY} ORDER BY value DESC LIMIT 10",
        f"{EASY} ORDER BY value LIMIT 7 OFFSET 3",
        f"SELECT v FROM (SELECT value AS v FROM ({EASY})) ORDER BY v DESC LIMIT 3",
        f"SELECT t.text, b.value FROM ({EASY} ORDER BY 2 DESC LIMIT 5) b JOIN tokens t USING (token)",
        f"WITH a AS ({EASY}) SELECT * FROM a ORDER BY value DESC LIMIT 4",
        f"{EASY} AND value > 0.5 ORDER BY value DESC LIMIT 6",
        "SELECT value FROM mlp_write_norm WHERE neuron IN (4, 5) ORDER BY value DESC LIMIT 9",
        "SELECT * FROM top_tokens(1, 4, 6)",
        "SELECT a.token FROM top_tokens(1, 4, 6) a JOIN top_tokens(0, 4, 6) b USING (token)",
    ],
)
def test_the_best_are_found_by_index(sql: Sql, query: str) -> None:
    cells, plans = looked(sql, query)
    assert cells <= 6 * 512
    assert plans
    assert set(plans) <= {"lists", "lists+bounds"}


def test_ties_beyond_the_last_are_there_for_further_keys(sql: Sql) -> None:
    query = "SELECT token, value FROM mlp_post_act WHERE neuron = 1 ORDER BY value DESC, token DESC"
    cells, plans = looked(sql, f"{query} LIMIT 5")
    assert plans[-1] == "zones"
    assert cells > 0
    assert rows_of(sql.fetch(f"{query} LIMIT 5")) == rows_of(sql.fetch(query))[:5]


@pytest.mark.parametrize(
    "query",
    [
        f"{EASY} AND token % 7 = 3 ORDER BY value DESC LIMIT 3",
        f"SELECT -value AS value FROM ({EASY}) ORDER BY value DESC LIMIT 3",
        f"SELECT token AS value, value AS token FROM ({EASY}) ORDER BY value DESC LIMIT 3",
        "SELECT layer AS value, value AS v FROM mlp_write_norm ORDER BY value DESC LIMIT 3",
        f"SELECT DISTINCT value FROM ({EASY}) ORDER BY value DESC LIMIT 3",
        f"{EASY} ORDER BY value DESC NULLS FIRST LIMIT 3",
        f"{EASY} ORDER BY value + 0 DESC LIMIT 3",
        f"{EASY} AND value < 0.5 ORDER BY value DESC LIMIT 3",
        f"SELECT s.value FROM ({EASY}) s JOIN tokens USING (token) ORDER BY s.value DESC LIMIT 3",
        f"({EASY} ORDER BY value DESC LIMIT 3) UNION ALL ({EASY} ORDER BY value LIMIT 3)",
        (
            "SELECT value FROM (SELECT value, neuron::BOOL AS special FROM mlp_post_act) WHERE special"
            " ORDER BY value DESC LIMIT 3"
        ),
        (
            "WITH mlp_post_act AS (SELECT neuron AS value FROM mlp_post_act) FROM mlp_post_act"
            " ORDER BY value DESC LIMIT 3"
        ),
    ],
)
def test_no_hint_where_it_would_be_unsound(sql: Sql, query: str) -> None:
    _, plans = looked(sql, query)
    assert plans
    assert not {"lists", "lists+bounds", "bounds"} & set(plans)


def test_predicates_restrict_what_is_looked_at(sql: Sql) -> None:
    whole, _ = looked(sql, "SELECT count(*) FROM mlp_write_norm")
    assert whole == 2 * TOKENS * NEURONS
    assert looked(sql, "SELECT count(*) FROM mlp_write_norm WHERE layer = 1")[0] == whole // 2
    few = "SELECT count(*) FROM mlp_write_norm WHERE token BETWEEN 5 AND 9 AND layer = 0"
    assert looked(sql, few) == (5 * NEURONS, ["rows"])
    assert looked(sql, "SELECT count(*) FROM mlp_write_norm WHERE layer = 7") == (0, [])
    assert looked(sql, "SELECT count(*) FROM mlp_write_norm WHERE neuron = $n", {"n": 99})[0] == 0
    parts = "SELECT count(*) FROM mlp_write_norm WHERE (layer = 0 OR neuron = 3) AND token < 8"
    assert looked(sql, parts)[0] == 2 * 8 * NEURONS


def test_a_wide_array_is_read_by_chunks_of_units(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(1, 300, 200))
    path = build_store(tmp_path / "wide", {"mlp_post_act": values}, [100, 100, 100])
    with Store(path) as store, Sql(store.reader, store) as sql:
        query = "SELECT count(*), max(value) FROM mlp_post_act WHERE neuron IN (3, 5)"
        assert looked(sql, query) == (300 * 32, ["scan"])
        high = "SELECT count(*) FROM mlp_post_act WHERE value > 100 AND neuron < 150"
        assert looked(sql, high) == (0, ["zones"])
        expected = values[:, :, [3, 5]].astype(np.float16).max()
        assert sql.fetch(query).to_pylist() == [{"count_star()": 600, 'max("value")': expected}]


# Limits

WHOLE_SCAN = "SELECT avg(value) FROM mlp_write_norm"


def test_too_large_a_query_says_how_to_ask(store: Store) -> None:
    with Sql(store.reader, store) as sql:
        sql.max_cells = 1000
        with pytest.raises(InvalidInput, match="Restrict layer, neuron, token by") as caught:
            sql.fetch(WHOLE_SCAN)
        assert caught.value.kind is ErrorKind.TOO_LARGE
        assert sql.last is not None
        assert sql.last.error is caught.value
        with pytest.raises(duckdb.Error, match="ORDER BY value DESC LIMIT k") as raw:
            sql.relation(WHOLE_SCAN).fetchall()
        assert "Traceback" not in str(raw.value)
        twice = "SELECT count(*) FROM mlp_write_norm WHERE layer = 0 AND token < 100"
        assert sql.fetch(twice).num_rows == 1
        with pytest.raises(InvalidInput, match="1,000"):
            sql.fetch(f"{twice} UNION ALL {twice}")
        assert sql.fetch(f"{EASY} ORDER BY value DESC LIMIT 5").num_rows == 5


def test_a_scan_that_takes_too_long_stops(store: Store) -> None:
    with Sql(store.reader, store) as sql:
        sql.seconds = 0.0
        with pytest.raises(InvalidInput, match="longer than it may") as caught:
            sql.fetch(WHOLE_SCAN)
        assert caught.value.kind is ErrorKind.SQL_TIMEOUT


def test_errors_of_scans_keep_their_kind(sql: Sql) -> None:
    with pytest.raises(InvalidInput, match="autoencoder") as caught:
        sql.fetch("SELECT count(value) FROM autoencoder_latent WHERE token = 3")
    assert caught.value.kind is not ErrorKind.INVALID_SQL
    with pytest.raises(InvalidInput, match="mlp_write_nrm"):
        sql.fetch("SELECT * FROM mlp_write_nrm")


def test_a_relation_is_read_when_it_is_fetched(sql: Sql) -> None:
    relation = sql.relation(f"{EASY} ORDER BY value DESC LIMIT $k", {"k": 9})
    other = sql.relation("SELECT count(*) FROM mlp_post_act WHERE layer = 0 AND neuron = 2")
    gc.collect()
    first = relation.fetchall()
    assert other.fetchall() == [(TOKENS,)]
    assert len(first) == 9
    assert relation.limit(4).fetchall() == first[:4]
    assert relation.aggregate("count(*), min(value)").fetchall() == [(9, first[-1][1])]
    assert relation.filter("token % 2 = 0").fetchall() == [row for row in first if row[0] % 2 == 0]
    assert relation.order("token").fetchall() == sorted(first)
    assert len(relation.union(relation).fetchall()) == 18


def test_threads_may_ask_at_once(sql: Sql) -> None:
    queries = [
        f"SELECT value FROM mlp_post_act WHERE neuron = {n} ORDER BY value DESC LIMIT 5"
        for n in range(NEURONS)
    ]
    expected = [rows_of(sql.fetch(query)) for query in queries]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(pool.map(lambda query: rows_of(sql.fetch(query)), queries))
            assert found == expected


def test_scalars_are_tables_with_a_store_alone(sql: Sql, store: Store) -> None:
    described = sql.fetch("DESCRIBE mlp_post_act").column("column_name").to_pylist()
    assert described == ["layer", "token", "neuron", "special", "value"]
    assert sql.fetch("EXPLAIN SELECT * FROM mlp_post_act ORDER BY value LIMIT 3").num_rows
    assert sql.fetch("SUMMARIZE mlp_post_act").num_rows == 5
    for name, declared in SCALARS.items():
        if declared.about is None:
            columns = sql.fetch(f"DESCRIBE {name}").column("column_name").to_pylist()
            assert columns[-2:] == ["special", "value"]
    with Sql(StoreReader(store.path)) as bare:
        assert bare.fetch("SELECT count(*) FROM neurons").num_rows == 1
        with pytest.raises(InvalidInput, match="mlp_post_act"):
            bare.fetch("SELECT * FROM mlp_post_act")


# What people reach for


def test_top_tokens_are_those_of_topk(sql: Sql, store: Store) -> None:
    for k in (1, 5, 400):
        found = sql.fetch("SELECT token, value, text FROM top_tokens(?, ?, ?)", [0, 4, k])
        expected = store.topk("mlp_post_act", layers=0, neurons=4, k=k)
        assert found.column("value").to_pylist() == expected.column("value")
        assert found.column("text").to_pylist() == expected.column("text")


def test_promotes_agrees_with_what_the_store_kept(sql: Sql) -> None:
    query = """
        SELECT layer, neuron, n.place, n.text, promotes_rank(layer, neuron, n.text) AS rank,
            promotes(layer, neuron, n.text) AS effect
        FROM (SELECT layer, neuron, unnest(promoted) AS text, generate_subscripts(promoted, 1) AS
            place FROM neurons WHERE layer = 1) n ORDER BY layer, neuron, place
    """
    rows = sql.fetch(query).to_pylist()
    assert len(rows) == NEURONS * 10
    assert [row["rank"] for row in rows] == [row["place"] for row in rows]
    for before, after in itertools.pairwise(rows):
        assert before["neuron"] != after["neuron"] or before["effect"] >= after["effect"]


def test_promotes_is_an_effect_less_the_mean(sql: Sql) -> None:
    rows = sql.fetch(
        "SELECT promotes(0, 3, text) AS e FROM (SELECT DISTINCT text FROM vocabulary"
        " WHERE text <> chr(65533))"
    )
    effects = rows.column("e").to_numpy()
    assert len(effects) > 40
    assert effects.min() < 0 < effects.max()
    single = sql.fetch("SELECT promotes(0, 3, ' a') AS e").column("e").to_pylist()
    assert single[0] in effects
    nothing = "SELECT promotes(0, 3, 'no such text'), promotes(0, 7, ' a'), promotes(2, 0, ' a')"
    assert set(sql.fetch(nothing).to_pylist()[0].values()) == {None}


def test_who_promotes_a_token_is_one_scan_of_the_neurons(sql: Sql) -> None:
    query = """
        SELECT layer, neuron, promotes(layer, neuron, ' a') AS effect
        FROM neurons ORDER BY effect DESC LIMIT 4
    """
    found = sql.fetch(query).to_pylist()
    assert sql.last is not None
    assert sql.last.cells == 2 * NEURONS
    single = [
        sql.fetch(f"SELECT promotes({row['layer']}, {row['neuron']}, ' a') AS e").to_pylist()[0]
        for row in found
    ]
    assert [row["effect"] for row in found] == [row["e"] for row in single]
    ranks = sql.fetch(
        "SELECT rank, effect, row_number() OVER (ORDER BY effect DESC, token_id) AS place"
        " FROM neuron_effects WHERE layer = 1 AND neuron = 2"
    )
    assert ranks.num_rows == 48
    assert ranks.column("rank").to_pylist() == ranks.column("place").to_pylist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.query.sql_promotion._MOST_EFFECTS", 100)
        with pytest.raises(InvalidInput, match="more than 100") as caught:
            sql.fetch("SELECT max(effect) FROM neuron_effects")
        assert caught.value.kind is ErrorKind.TOO_LARGE


def test_predicates_of_topk_may_ask_scalars(sql: Sql) -> None:
    where = "token IN (SELECT token FROM mlp_post_act WHERE layer = 0 AND neuron = 4 AND value > 1)"
    expected = sql.fetch(
        "SELECT token FROM mlp_post_act WHERE layer = 0 AND neuron = 4 AND value > 1 ORDER BY token"
    )
    assert sql.rows_where(where).tolist() == expected.column(0).to_pylist()
