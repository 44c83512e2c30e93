"""What DuckDB asks of a Python source and takes from it, on either route."""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from duckdb._sources import nodes

from actstore.query.duckdb_source import (
    Offered,
    has_source_protocol,
    predicate_of,
    register_table,
)
from actstore.query.sql_predicates import And, Comparison, IsNull, Membership, Or, Predicate

ROWS = 60
SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("token", pa.int64()),
        ("special", pa.bool_()),
        ("value", pa.float32()),
    ]
)
VALUES = np.array([np.nan, -0.0, 0.0, 0.1, -1.5, 2.0] * (ROWS // 6), np.float32)
DATA = pa.table(
    {
        "layer": pa.array(np.arange(ROWS) % 3, pa.int32()),
        "token": pa.array(np.arange(ROWS), pa.int64()),
        "special": pa.array(np.arange(ROWS) % 10 == 0),
        "value": pa.array(VALUES, mask=np.isnan(VALUES)),
    },
    schema=SCHEMA,
)


class Told:
    """A table that remembers what it was asked, and applies what it accepts.

    Args:
        refused: columns whose predicates it leaves to DuckDB.
        fail_after: batches after which it raises; None for never.
        seconds: time that each batch takes; it stops after the deadline.
        deadline: of ``time.monotonic()``.
    """

    def __init__(
        self,
        refused: Sequence[str] = (),
        fail_after: int | None = None,
        seconds: float = 0.0,
        deadline: float = math.inf,
    ) -> None:
        self._refused = set(refused)
        self._fail_after = fail_after
        self._seconds = seconds
        self._deadline = deadline
        self.asked: list[tuple[list[str], list[Predicate], Offered | None]] = []

    @property
    def schema(self) -> pa.Schema:
        return SCHEMA

    def count(self) -> int | None:
        return ROWS

    def accepts(self, predicate: Predicate) -> bool:
        return not predicate.columns & self._refused

    def batches(
        self, columns: Sequence[str], predicates: Sequence[Predicate], offered: Offered | None
    ) -> Iterator[pa.RecordBatch]:
        self.asked.append((list(columns), list(predicates), offered))
        arrays: dict[str, Any] = {
            name: DATA.column(name).to_numpy(zero_copy_only=False) for name in SCHEMA.names
        }
        mask = np.ones(ROWS, bool)
        for predicate in predicates:
            mask &= predicate.holds(arrays)
        kept = DATA.filter(pa.array(mask)).select(list(columns))
        for number, batch in enumerate(kept.to_batches(max_chunksize=7)):
            if number == self._fail_after:
                raise ValueError("the reader has met an end")
            time.sleep(self._seconds)
            if time.monotonic() > self._deadline:
                raise TimeoutError("the reader was too slow")
            yield batch


@pytest.fixture(params=[False, True], ids=["protocol", "public"])
def public(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    options = {
        "enable_external_access": False,
        "python_enable_replacements": False,
        "lock_configuration": True,
    }
    with duckdb.connect(":memory:", config=options) as opened:  # type: ignore[arg-type]
        opened.register("incoming", DATA)
        opened.execute("CREATE TABLE copied AS SELECT * FROM incoming")
        yield opened


PREDICATES = [
    "layer = 1",
    "1 < layer",
    "layer <> 1",
    "layer >= 1 AND token < 40",
    "token BETWEEN 5 AND 17",
    "layer IN (0, 2)",
    "layer NOT IN (0, 2)",
    "NOT (layer = 1 AND token > 20)",
    "layer = 0 OR layer = 2",
    "layer = 0 OR value > 1",
    "special",
    "NOT special",
    "special = false AND layer = 1",
    "value > 0.05",
    "value >= 0",
    "value < 0.1",
    "value <= 0.1",
    "value = 0",
    "value = -0.0",
    "value = 0.1",
    "value <> 2",
    "value BETWEEN -0.0 AND 0.1",
    "value IN (0.1, 2)",
    "value NOT IN (0.1, 2)",
    "value IS NULL",
    "value IS NOT NULL",
    "NOT (value > 0)",
    "value IS NULL OR value > 1",
    "value > 1e38",
    "value > 'nan'::FLOAT",
    "value < 'inf'::FLOAT",
    "token % 7 = 3",
    "token IN (SELECT 3 UNION SELECT 5)",
    "layer = NULL",
    "token IN (" + ", ".join(map(str, range(0, 60, 2))) + ")",
    "true",
]


@pytest.mark.parametrize("refused", [(), ("value",), SCHEMA.names], ids=["all", "places", "none"])
def test_whatever_is_taken_is_applied(
    connection: duckdb.DuckDBPyConnection, public: bool, refused: Sequence[str]
) -> None:
    register_table(connection, "lazy", Told(refused), public=public)
    for where in PREDICATES:
        query = f"SELECT value, token FROM {{}} WHERE {where} ORDER BY token"
        expected = connection.sql(query.format("copied")).fetchall()
        assert connection.sql(query.format("lazy")).fetchall() == expected, where
        count = f"SELECT count(*) FROM lazy WHERE {where}"
        assert connection.sql(count).fetchall() == [(len(expected),)], where


def test_the_protocol_is_there() -> None:
    assert has_source_protocol(), "DuckDB has moved it: the public route is slower"


def asked(
    connection: duckdb.DuckDBPyConnection, public: bool, query: str, parameters: Any = None
) -> tuple[list[str], list[Predicate], Offered | None]:
    table = Told()
    register_table(connection, "lazy", table, public=public)
    connection.sql(query, params=parameters).fetchall()
    assert len(table.asked) == 1
    return table.asked[0]


def test_only_wanted_columns_are_asked_for(
    connection: duckdb.DuckDBPyConnection, public: bool
) -> None:
    assert asked(connection, public, "SELECT value FROM lazy")[0] == ["value"]
    assert asked(connection, public, "SELECT value, layer FROM lazy")[0] == ["layer", "value"]
    assert len(asked(connection, public, "SELECT count(*) FROM lazy")[0]) == 1
    assert asked(connection, public, "SELECT * FROM lazy")[0] == SCHEMA.names


@pytest.mark.parametrize(
    ("where", "predicates", "offered"),
    [
        ("layer = 1", [Comparison("layer", "=", 1)], {'("layer" = 1)'}),
        (
            "layer = 1 AND token < 9",
            [Comparison("layer", "=", 1), Comparison("token", "<", 9)],
            {'("layer" = 1)', '("token" < 9)'},
        ),
        ("layer IN (0, 2)", [Membership("layer", (0, 2))], {'("layer" IN (0, 2))'}),
        (
            "layer NOT IN (0, 2)",
            [Membership("layer", (0, 2), is_negated=True)],
            {'(NOT ("layer" IN (0, 2)))'},
        ),
        (
            "value > 2",
            [Comparison("value", ">", 2.0)],
            {'("value" > 2.0::DOUBLE)'},
        ),
        ("value IS NOT NULL", [IsNull("value", is_negated=True)], {'("value" IS NOT NULL)'}),
        (
            "token BETWEEN 3 AND 5",
            [And((Comparison("token", ">=", 3), Comparison("token", "<=", 5)))],
            {'(("token" >= 3) AND ("token" <= 5))'},
        ),
        (
            "layer = 0 OR value > 1",
            [Or((Comparison("layer", "=", 0), Comparison("value", ">", 1.0)))],
            {'(("layer" = 0) OR ("value" > 1.0::DOUBLE))'},
        ),
        ("special = true", [Comparison("special", "=", True)], {'("special" = TRUE)'}),
        ("NOT special", [], set()),
        ("token % 7 = 3", [], set()),
        ("value > 'nan'::FLOAT", [], set()),
    ],
)
def test_what_the_protocol_offers(
    connection: duckdb.DuckDBPyConnection,
    where: str,
    predicates: list[Predicate],
    offered: set[str],
) -> None:
    _, found, written = asked(connection, False, f"SELECT token FROM lazy WHERE {where}")
    assert found == predicates
    assert written == frozenset(offered)


def test_a_float_constant_is_rounded_to_the_column(connection: duckdb.DuckDBPyConnection) -> None:
    _, found, _ = asked(connection, False, "SELECT token FROM lazy WHERE value = 0.1")
    assert found == [Comparison("value", "=", float(np.float32(0.1)))]


@pytest.mark.parametrize(
    ("where", "predicates"),
    [
        (
            "layer = 1 AND token BETWEEN 3 AND 9",
            [
                Comparison("layer", "=", 1),
                Comparison("token", ">=", 3),
                Comparison("token", "<=", 9),
            ],
        ),
        ("special = false AND value < 1", [Comparison("special", "=", False)]),
        ("value < 1 AND value IS NOT NULL", []),
        ("layer = 1 OR token = 3", []),
        ("layer IN (0, 2) AND token = 3", []),
        ("NOT (layer IN (0, 2))", []),
    ],
)
def test_what_the_public_route_understands(
    connection: duckdb.DuckDBPyConnection, where: str, predicates: list[Predicate]
) -> None:
    _, found, written = asked(connection, True, f"SELECT token FROM lazy WHERE {where}")
    assert sorted(map(repr, found)) == sorted(map(repr, predicates))
    assert written is None


def test_parameters_views_ctes_and_macros_pass_predicates_on(
    connection: duckdb.DuckDBPyConnection, public: bool
) -> None:
    expected = [Comparison("layer", "=", 1)]
    plain = "SELECT token FROM lazy WHERE layer = $n"
    assert asked(connection, public, plain, {"n": 1})[1] == expected
    assert asked(connection, public, "WITH a AS (FROM lazy) FROM a WHERE layer = 1")[1] == expected
    connection.execute("CREATE TEMP VIEW seen AS SELECT layer AS l, token FROM lazy")
    assert asked(connection, public, "SELECT token FROM seen WHERE l = 1")[1] == expected
    connection.execute("CREATE TEMP MACRO of(_n) AS TABLE SELECT token FROM lazy WHERE layer = _n")
    assert asked(connection, public, "FROM of(1)")[1] == expected


def test_a_table_is_known_to_its_connection_alone_and_lives_with_it(
    connection: duckdb.DuckDBPyConnection, public: bool
) -> None:
    cursor = connection.cursor()
    register_table(cursor, "lazy", Told(), public=public)
    with pytest.raises(duckdb.CatalogException, match="lazy"):
        connection.sql("SELECT * FROM lazy")
    relation = cursor.sql("SELECT count(*), sum(token) FROM lazy")
    del cursor
    gc.collect()
    for _ in range(2):
        assert relation.fetchall() == [(ROWS, ROWS * (ROWS - 1) // 2)]


def test_a_source_may_be_scanned_twice_at_once(
    connection: duckdb.DuckDBPyConnection, public: bool
) -> None:
    table = Told()
    register_table(connection, "lazy", table, public=public)
    query = "SELECT count(*) FROM lazy a JOIN lazy b USING (token) WHERE a.layer = 1"
    assert connection.sql(query).fetchall() == [(ROWS // 3,)]
    assert len(table.asked) == 2


@pytest.mark.parametrize("after", [0, 3])
def test_errors_of_a_table_are_said(
    connection: duckdb.DuckDBPyConnection, public: bool, after: int
) -> None:
    register_table(connection, "lazy", Told(fail_after=after), public=public)
    with pytest.raises(duckdb.Error, match="the reader has met an end") as caught:
        connection.sql("SELECT sum(token) FROM lazy").fetchall()
    # What is wrong with a question shows at once, and then there is no traceback.
    assert ("Traceback" in str(caught.value)) <= (after > 0)
    register_table(connection, "sound", Told(), public=public)
    assert connection.sql("SELECT count(*) FROM sound").fetchall() == [(ROWS,)]


def test_a_slow_table_keeps_its_own_deadline(
    connection: duckdb.DuckDBPyConnection, public: bool
) -> None:
    started = time.monotonic()
    table = Told(seconds=0.05, deadline=started + 0.12)
    register_table(connection, "lazy", table, public=public)
    with pytest.raises(duckdb.Error, match="too slow"):
        connection.sql("SELECT sum(token) FROM lazy").fetchall()
    assert time.monotonic() - started < 5


def test_nodes_that_are_no_predicates_of_ours() -> None:
    column, one = nodes.Col(("layer",)), nodes.Lit(1, "INTEGER")
    equal = nodes.Binary("=", column, one)
    assert predicate_of(equal) == Comparison("layer", "=", 1)
    odd = [
        nodes.Binary("~", column, one),
        nodes.Binary("=", nodes.Col(("layer", "field")), one),
        nodes.Binary("<", column, nodes.Lit("x", "VARCHAR")),
        nodes.In(column, [nodes.Lit("x", "VARCHAR"), nodes.Lit(None, "VARCHAR")]),
        nodes.Binary("=", column, nodes.Lit(math.nan, "FLOAT")),
        nodes.Binary("=", column, nodes.Lit(None, "INTEGER")),
        nodes.Unary("-", equal),
        nodes.Postfix("IS TRUE", column),
        nodes.In(column, [nodes.Lit(None, "INTEGER")]),
        nodes.In(column, []),
        column,
    ]
    for node in odd:
        assert predicate_of(node) is None
        assert predicate_of(nodes.Binary("AND", equal, node)) is None
        assert predicate_of(nodes.Unary("NOT", node)) is None
