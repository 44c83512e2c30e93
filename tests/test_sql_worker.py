"""SQL from strangers: what is refused, what is cut off, and what goes on meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from store_builder import build_store

from actstore.query.service.sql_policy import SqlPolicy
from actstore.query.service.sql_worker import SqlAnswer, SqlBusy, SqlLimits, SqlService
from actstore.query.session import Store
from actstore.query.sql import Sql
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, NotAStore, StoreDamaged
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact

LIMITS = SqlLimits(seconds=0.6, rows=500, default_rows=100, cells=2000, result_bytes=2**20)
REPEAT = "SELECT " + " || ".join(f"md5(repeat('{c}', 200000000))" for c in "abcdefghij" * 2)
"""Seconds inside scalar functions, which DuckDB does not interrupt."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = np.random.default_rng(0).standard_normal((2, 240, 8))
    folder = tmp_path_factory.mktemp("secret-folder")
    built = build_store(
        folder / "store",
        {"mlp_post_act": values},
        lengths=[100, 60, 80],
        columns=[{"label": label} for label in ("poem", "prose", "poem")],
    )
    # With a snapshot on disk, as a served store has it: the database has a path.
    reader = StoreReader(built)
    compact(reader)
    reader.close()
    return built


@pytest.fixture(scope="module")
def service(path: Path) -> Iterator[SqlService]:
    with SqlService(path, LIMITS) as made:
        yield made


def error_of(service: SqlService, query: str, parameters: Any = None) -> ActstoreError:
    with pytest.raises(ActstoreError) as caught:
        service.run(query, parameters)
    return caught.value


def test_answers_are_those_of_the_open_store(service: SqlService, path: Path) -> None:
    queries = [
        "SELECT * FROM tokens ORDER BY token LIMIT 50",
        "SELECT layer, neuron, max, dead FROM neurons ORDER BY ALL",
        "SELECT label, count(*) FROM tokens JOIN documents USING (document) GROUP BY 1 ORDER BY 1",
        "FROM context(5, 2, 2)",
        "DESCRIBE tokens",
        "SHOW TABLES",
        "WITH t AS (SELECT 1 AS a UNION ALL SELECT 2) SELECT a, 'NaN'::DOUBLE, [a], NULL FROM t",
    ]
    with Store(path) as store:
        for query in queries:
            expected = store.sql(query).to_arrow_table()
            found = service.run(query)
            assert str(found.table.to_pylist()) == str(expected.to_pylist())
            assert found.table.schema.equals(expected.schema)
            assert not found.truncated


def test_explain_and_summarize(service: SqlService) -> None:
    assert "token_rows" in str(service.run("EXPLAIN SELECT * FROM tokens").table.to_pylist())
    assert service.run("-- why\nexplain analyze select 1").table.num_rows == 1
    plan = service.run("EXPLAIN (FORMAT json) SELECT 1").table.column("explain_value")[0].as_py()
    assert json.loads(plan)
    assert service.run("SUMMARIZE neurons").table.num_rows > 10


def test_parameters(service: SqlService) -> None:
    named = service.run("SELECT $low + 1 AS a, $name AS b", {"low": 2, "name": "x"}).table
    assert named.to_pylist() == [{"a": 3, "b": "x"}]
    assert service.run("SELECT ? AS a", [None]).table.to_pylist() == [{"a": None}]
    assert error_of(service, "SELECT ? AS a", [b"x"]).kind is ErrorKind.INVALID_SQL
    assert error_of(service, "SELECT ? AS a", ["\ud800"]).kind is ErrorKind.INVALID_SQL
    assert error_of(service, "SELECT ? AS a").kind is ErrorKind.INVALID_SQL
    assert error_of(service, "SELECT $a", {"b": 1}).kind is ErrorKind.INVALID_SQL


def test_rows_and_cells_truncate(service: SqlService) -> None:
    assert service.run("SELECT * FROM range(100)").truncated is False
    cut = service.run("SELECT * FROM range(101)")
    assert (cut.table.num_rows, cut.truncated) == (100, True)
    assert service.run("SELECT * FROM range(1000)", max_rows=7).table.num_rows == 7
    endless = service.run("SELECT range AS a FROM range(10000000000)", max_rows=500)
    assert (endless.table.num_rows, endless.truncated) == (500, True)
    # 2000 cells: 200 rows of ten columns.
    ten = ", ".join(f"range + {n} AS c{n}" for n in range(10))
    wide = service.run(f"SELECT {ten} FROM range(300)", max_rows=300)
    assert (wide.table.num_rows, wide.truncated) == (200, True)
    assert service.run("SELECT range FROM range(9) ORDER BY range DESC", max_rows=2).table.column(
        0
    ).to_pylist() == [8, 7]
    for rows in (0, 501):
        with pytest.raises(InvalidInput) as caught:
            service.run("SELECT 1", max_rows=rows)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


WRITES = [
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE VIEW x AS SELECT 1",
    "CREATE TEMP MACRO f() AS 1",
    "INSERT INTO layers VALUES (9)",
    "WITH x AS (INSERT INTO layers VALUES (9) RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM layers RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE layers SET layer = 1 RETURNING *) SELECT * FROM x",
    "UPDATE layers SET layer = 9",
    "DELETE FROM layers",
    "DROP TABLE layers",
    "ALTER TABLE layers ADD COLUMN x INT",
    "TRUNCATE layers",
    "CHECKPOINT",
    "VACUUM",
    "EXPLAIN ANALYZE INSERT INTO layers VALUES (9)",
    "EXPLAIN ANALYZE CREATE TEMP TABLE x AS SELECT 1",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SET VARIABLE x = 1",
    "CREATE SECRET s (TYPE http)",
]
FILES = [
    "SELECT * FROM read_csv('/etc/hosts')",
    "SELECT * FROM read_text('/etc/hosts')",
    "SELECT * FROM read_blob('/etc/hosts')",
    "SELECT * FROM read_json('/etc/hosts')",
    "SELECT * FROM read_parquet('/etc/hosts')",
    "SELECT * FROM read_duckdb('/etc/hosts')",
    "SELECT * FROM parquet_metadata('/etc/hosts')",
    "SELECT * FROM sniff_csv('/etc/hosts')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT (SELECT max(content) FROM read_text('/etc/hosts'))",
    "SELECT * FROM '/etc/hosts'",
    "FROM '/etc/hosts.csv'",
    "FROM 'file:///etc/hosts.parquet'",
    "FROM 'https://example.org/x.parquet'",
    "COPY layers TO '/tmp/stolen.csv'",
    "COPY (SELECT 1) TO '/tmp/stolen.csv'",
    "COPY layers FROM '/etc/hosts'",
    "ATTACH '/tmp/other.duckdb'",
    "ATTACH ':memory:' AS x",
    "DETACH memory",
    "USE memory",
    "EXPORT DATABASE '/tmp/stolen'",
    "IMPORT DATABASE '/tmp/stolen'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '/tmp/evil.duckdb_extension'",
    "EXPLAIN ANALYZE COPY layers TO '/tmp/stolen.csv'",
]
SETTINGS = [
    "SET memory_limit = '100GB'",
    "SET threads = 64",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET GLOBAL temp_directory = '/tmp'",
    "RESET memory_limit",
    "PRAGMA threads = 64",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '/tmp/stolen'",
    "CALL enable_logging()",
    "FROM enable_profiling()",
    "SELECT setseed(0.5)",
    "SELECT write_log('x')",
]
SEVERAL = ["SELECT 1; SELECT 2", "SELECT 1; DROP TABLE layers", "", "   ", "-- nothing", ";"]
INSIDE = [
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM system.main.duckdb_settings()",
    "FROM duckdb_databases()",
    "FROM duckdb_databases",
    "FROM DUCKDB_DATABASES",
    'FROM "duckdb_databases"',
    "SHOW DATABASES",
    "SHOW temp_directory",
    "SHOW memory_limit",
    "SHOW VARIABLES",
    "SUMMARIZE FROM duckdb_settings()",
    "DESCRIBE FROM duckdb_settings()",
    "FROM (SHOW DATABASES)",
    "EXPLAIN ANALYZE FROM duckdb_settings()",
    "PRAGMA database_list",
    "PRAGMA database_size",
    "CALL pragma_database_size()",
    "FROM pragma_database_size()",
    "FROM pragma_database_list",
    "FROM pragma_storage_info('layers')",
    "SELECT * FROM layers WHERE EXISTS (FROM duckdb_settings())",
    "SELECT (SELECT max(value) FROM duckdb_settings())",
    "WITH x AS (FROM duckdb_settings()) FROM x",
    "SELECT current_setting('temp_directory')",
    "SELECT 'temp_directory'.current_setting()",
    "SELECT list_transform(['temp_directory'], lambda x: current_setting(x))",
    "SELECT layer FROM layers GROUP BY ALL HAVING current_setting('threads') = 1",
    "SELECT count(*) FILTER (current_setting('threads') = 1) FROM layers",
    "SELECT * FROM layers ORDER BY current_setting('threads')",
    "SELECT * FROM query('FROM duckdb_settings()')",
    "FROM query_table('duckdb_databases')",
    "FROM histogram_values(duckdb_databases, path)",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM duckdb_settings()'))",
    "SELECT json_serialize_plan('SELECT current_setting(''temp_directory'')')",
    "FROM duckdb_secrets()",
    "FROM which_secret('a', 'b')",
    "FROM duckdb_extensions()",
    "FROM duckdb_logs",
    "FROM duckdb_temporary_files()",
    "FROM duckdb_external_file_cache()",
    "FROM duckdb_views()",
    "FROM pg_catalog.pg_settings",
    "FROM pg_settings",
    "FROM sqlite_master",
    "FROM information_schema.schemata",
    "FROM information_schema.views",
    "SELECT getenv('HOME')",
    "SELECT getvariable('x')",
    "SELECT pg_get_viewdef(1)",
    "SELECT nextval('x')",
    "FROM seq_scan('layers')",
    "FROM python_arrow_scan(1, 2, 3)",
]


@pytest.mark.parametrize("query", WRITES + FILES + SETTINGS + SEVERAL + INSIDE)
def test_refused(service: SqlService, path: Path, query: str) -> None:
    error = error_of(service, query)
    assert isinstance(error, InvalidInput)
    assert error.kind is ErrorKind.INVALID_SQL
    assert "secret-folder" not in str(error)
    assert not Path("/tmp/stolen.csv").exists()


def test_refusals_change_nothing_and_cost_no_process(service: SqlService) -> None:
    before = service.run("FROM layers").table
    processes = service.process_ids
    for query in WRITES + SETTINGS:
        error_of(service, query)
    assert service.run("FROM layers").table.equals(before)
    assert service.process_ids == processes


OPEN_FUNCTIONS = {
    "duckdb_columns",
    "duckdb_functions",
    "duckdb_keywords",
    "duckdb_tables",
    "duckdb_types",
    "generate_series",
    "json_each",
    "json_tree",
    "range",
    "repeat",
    "repeat_row",
    "unnest",
}
OPEN_VIEWS = {
    "information_schema.columns",
    "information_schema.tables",
    "main.duckdb_columns",
    "main.duckdb_tables",
    "main.duckdb_types",
}


def test_every_function_that_duckdb_has_is_judged(service: SqlService, path: Path) -> None:
    """What is let through is asked for, and shows nothing of the machine."""
    connection = duckdb.connect()
    policy = SqlPolicy(connection)
    functions = connection.execute(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN"
        " ('table', 'table_macro', 'pragma')"
    ).fetchall()
    assert {name for (name,) in functions if _admits(policy, f'FROM "{name}"()')} == OPEN_FUNCTIONS
    views = connection.execute(
        "SELECT schema_name || '.' || view_name FROM duckdb_views() WHERE internal"
    ).fetchall()
    assert {name for (name,) in views if _admits(policy, f"FROM {name}")} == OPEN_VIEWS
    for name in ("duckdb_columns()", "duckdb_functions()", "duckdb_tables()", "duckdb_types()"):
        assert_shows_no_path(service.run(f"FROM {name}", max_rows=50).table, path)
    for name in ("information_schema.tables", "information_schema.columns", "duckdb_tables"):
        assert_shows_no_path(service.run(f"FROM {name}").table, path)
    scalars = connection.execute(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN"
        " ('scalar', 'macro') AND len(parameters) = 0 AND function_name NOT LIKE '\\_\\_%' ESCAPE"
        " '\\' ORDER BY ALL"
    ).fetchall()
    assert ("current_database",) in scalars
    for (name,) in scalars:
        if _admits(policy, f'SELECT "{name}"()'):
            assert_shows_no_path(_shown(service, f'SELECT "{name}"() AS x'), path)


def _shown(service: SqlService, query: str) -> pa.Table:
    """The answer, or the error's text in a table."""
    try:
        return service.run(query).table
    except InvalidInput as error:
        return pa.table({"error": [str(error)]})


def _admits(policy: SqlPolicy, query: str) -> bool:
    try:
        policy.admit(query)
    except InvalidInput:
        return False
    return True


def assert_shows_no_path(table: pa.Table, path: Path) -> None:
    text = str(table.to_pylist())
    for secret in ("secret-folder", str(Path.home()), str(path), sys.prefix):
        assert secret not in text


def test_errors_show_no_path(service: SqlService, path: Path, tmp_path: Path) -> None:
    with SqlService(tmp_path / "no-store", LIMITS) as nothing:
        error = error_of(nothing, "SELECT 1")
        assert isinstance(error, NotAStore)
        assert "no-store" not in str(error)
        assert not nothing.process_ids
    for query in (f"FROM '{path}/store.json'", f"SELECT error('{path}')"):
        # What the query says itself stays: otherwise a guess would be confirmed.
        assert str(path) in str(error_of(service, query))
    other = error_of(service, "SELECT error(?)", ["/nowhere/else"])
    assert "/nowhere/else" in str(other)


@pytest.mark.parametrize(
    "query",
    [
        REPEAT,
        "SELECT count(*) FROM range(100000000) a, range(1000) b WHERE hash(a.range, b.range) > 5",
        "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM t) SELECT count(*) FROM t",
        "SELECT count(*) FROM tokens a, tokens b, tokens c, tokens d WHERE hash(a.token, d) > 5",
        "SELECT max(md5(range::VARCHAR)) FROM range(10000000000)",
        "SELECT sum(len(list_transform(range(9000 + a.range % 7), lambda x: x + 1))) FROM range(1000000) a",
    ],
)
def test_time_runs_out(service: SqlService, query: str) -> None:
    service.run("SELECT 1")
    started = time.monotonic()
    error = error_of(service, query)
    assert error.kind in (ErrorKind.SQL_TIMEOUT, ErrorKind.SQL_TOO_LARGE)
    assert time.monotonic() - started < LIMITS.seconds + 1.5
    assert service.run("SELECT 1 AS a").table.to_pylist() == [{"a": 1}]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT repeat('a', 2000000000)",
        "SELECT length(repeat('a', 1900000000)) + length(repeat('b', 1900000000))",
        "SELECT list(range) FROM range(300000000)",
        "SELECT range(400000000)",
        "SELECT string_agg(repeat('x', 1000), '') FROM range(10000000)",
        "SELECT * FROM range(200000000) ORDER BY hash(range)",
        "SELECT repeat('a', 100000) FROM range(100)",
        "SELECT [repeat('a', 900000), repeat('b', 900000)]",
    ],
)
def test_memory_runs_out(service: SqlService, query: str) -> None:
    error = error_of(service, query)
    assert error.kind in (ErrorKind.SQL_TOO_LARGE, ErrorKind.SQL_TIMEOUT)
    assert service.run("SELECT 1 AS a").table.to_pylist() == [{"a": 1}]


def test_tables_of_derived_scalars(path: Path) -> None:
    limits = SqlLimits(seconds=60.0, scan_cells=1000)
    queries = [
        "SELECT * FROM mlp_post_act WHERE layer = 1 AND neuron = 3 AND token < 50 ORDER BY token",
        "SELECT * FROM mlp_write_norm WHERE token IN (3, 4) ORDER BY layer, neuron, token",
        "FROM top_tokens(0, 2, 5)",
        "EXPLAIN SELECT max(value) FROM mlp_write_norm",
    ]
    with Store(path) as store, SqlService(path, limits) as service:
        sql = Sql(store.reader, store)
        for query in queries:
            expected = sql.relation(query).to_arrow_table()
            assert str(service.run(query).table.to_pylist()) == str(expected.to_pylist())
        sql.close()
        error = error_of(service, "SELECT sum(value) FROM mlp_write_norm")
        assert error.kind is ErrorKind.TOO_LARGE
        assert "ORDER BY value" in str(error)
        assert error_of(service, "SELECT nonsense FROM mlp_write_norm").kind is (
            ErrorKind.INVALID_SQL
        )
        for query in (
            "FROM mlp_write_norm, duckdb_settings()",
            "SELECT current_setting('threads') FROM mlp_write_norm",
            "FROM duckdb_views() WHERE view_name = 'mlp_write_norm'",
        ):
            assert error_of(service, query).kind is ErrorKind.INVALID_SQL


def test_slow_table_is_stopped(path: Path) -> None:
    # Importing torch alone takes longer, and no query can be interrupted meanwhile.
    with SqlService(path, SqlLimits(seconds=0.1)) as service:
        service.run("SELECT 1")
        started = time.monotonic()
        error = error_of(service, "SELECT max(value) FROM resid_post_mlp_norm")
        assert error.kind is ErrorKind.SQL_TIMEOUT
        assert time.monotonic() - started < 1.5
        assert service.run("SELECT 1").table.num_rows == 1


def test_too_long_a_query(service: SqlService) -> None:
    error = error_of(service, "SELECT " + "1 + " * 50_000 + "1")
    assert error.kind is ErrorKind.SQL_TOO_LARGE
    for query in (
        "SELECT " + "(" * 20_000 + "1",
        "SELECT " + "1+" * 30_000 + "1",
        "SELECT " + "[" * 900 + "1" + "]" * 900,
        "FROM (" * 900 + "SELECT 1" + ")" * 900,
    ):
        assert isinstance(error_of(service, query), InvalidInput)
    assert service.run("SELECT 1").table.num_rows == 1


def test_others_are_answered_while_one_runs_away(path: Path) -> None:
    with SqlService(path, SqlLimits(seconds=3.0)) as service:
        runaway = threading.Thread(target=error_of, args=(service, REPEAT))
        runaway.start()
        # The second process starts meanwhile.
        service.run("SELECT 1")
        answered = 0
        while runaway.is_alive() and answered < 20:
            assert service.run("SELECT 1 AS a").table.num_rows == 1
            answered += 1
        assert answered == 20
        service.close()
        runaway.join()


def test_queue_is_bounded(path: Path) -> None:
    limits = SqlLimits(seconds=1.0, processes=1, waiting=1, wait_seconds=0.3)
    with SqlService(path, limits) as service:
        service.run("SELECT 1")
        runaway = threading.Thread(target=error_of, args=(service, REPEAT))
        runaway.start()
        time.sleep(0.1)
        late: list[ActstoreError] = []
        waiting = threading.Thread(target=lambda: late.append(error_of(service, "SELECT 1")))
        waiting.start()
        time.sleep(0.1)
        with pytest.raises(SqlBusy, match="wait already"):
            service.run("SELECT 1")
        waiting.join()
        assert isinstance(late[0], SqlBusy)
        assert late[0].kind is ErrorKind.SQL_TIMEOUT
        runaway.join()
        assert service.run("SELECT 1").table.num_rows == 1


def test_killed_process_is_replaced(path: Path) -> None:
    with SqlService(path, LIMITS) as service:
        service.run("SELECT 1")
        (process,) = service.process_ids
        os.kill(process, signal.SIGKILL)
        wait_until_gone(process)
        assert service.run("SELECT 1 AS a").table.to_pylist() == [{"a": 1}]
        assert process not in service.process_ids


def test_death_during_a_query_is_an_error(path: Path) -> None:
    with SqlService(path, SqlLimits(seconds=20)) as service:
        service.run("SELECT 1")
        (process,) = service.process_ids
        threading.Timer(0.2, os.kill, (process, signal.SIGKILL)).start()
        error = error_of(service, "SELECT count(*) FROM range(1000000000) a, range(1000) b")
        assert error.kind is ErrorKind.SQL_TOO_LARGE
        assert service.run("SELECT 1").table.num_rows == 1


def test_close_leaves_nothing(path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    service = SqlService(path, SqlLimits(seconds=20))
    service.start()
    service.run("SELECT 1")
    found: list[ActstoreError] = []
    runaway = threading.Thread(target=lambda: found.append(error_of(service, REPEAT)))
    runaway.start()
    time.sleep(0.2)
    service.run("SELECT 1")
    processes = service.process_ids
    assert len(processes) == 2
    service.close()
    runaway.join(5)
    assert "closed" in str(found[0])
    for process in processes:
        assert not Path(f"/proc/{process}").exists()
    assert "closed" in str(error_of(service, "SELECT 1"))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    service.close()


def test_processes_end_with_their_parent(path: Path) -> None:
    script = (
        "import sys, threading, time\n"
        "from actstore.query.service.sql_worker import SqlLimits, SqlService\n"
        "service = SqlService(sys.argv[1], SqlLimits(seconds=60))\n"
        "service.run('SELECT 1')\n"
        "threading.Thread(target=service.run, args=(sys.argv[2],), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "service.run('SELECT 1')\n"
        "print(*service.process_ids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(path), REPEAT], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    processes = [int(number) for number in parent.stdout.readline().split()]
    assert len(processes) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for process in processes:
        wait_until_gone(process)


def test_no_growth(path: Path) -> None:
    with SqlService(path, SqlLimits(seconds=0.3)) as service:
        service.run("SELECT 1")

        def ask() -> None:
            for _ in range(25):
                service.run("SELECT * FROM tokens ORDER BY random() LIMIT 50")
                error_of(service, "SELECT nonsense")
            error_of(service, REPEAT)
            service.run("SELECT 1")

        ask()
        before = len(os.listdir("/proc/self/fd")), pa.total_allocated_bytes()
        ask()
        assert len(service.process_ids) <= 2
        # What tests before this one left behind may be collected meanwhile.
        files, allocated = len(os.listdir("/proc/self/fd")), pa.total_allocated_bytes()
        assert (files <= before[0], allocated <= before[1]) == (True, True)


def test_child_that_has_grown_is_replaced(path: Path) -> None:
    rows = 8_000_000
    limits = SqlLimits(
        seconds=60, memory_bytes=2**25, result_bytes=2**28, cells=rows, rows=rows, default_rows=rows
    )
    with SqlService(path, limits) as service:
        service.run("SELECT 1")
        (first,) = service.process_ids
        assert service.run(f"FROM range({rows})").table.num_rows == rows
        service.run("SELECT 1")
        assert service.process_ids != (first,)


def test_another_store_at_the_path_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "store"
    values = np.zeros((1, 20, 4))
    build_store(place, {"mlp_post_act": values}, lengths=[20])
    with SqlService(place, LIMITS) as service:
        assert service.run("SELECT count(*) AS n FROM tokens").table.to_pylist() == [{"n": 20}]
        place.rename(tmp_path / "old")
        build_store(place, {"mlp_post_act": values}, lengths=[10, 10], seed=5)
        (process,) = service.process_ids
        os.kill(process, signal.SIGKILL)
        wait_until_gone(process)
        error = error_of(service, "SELECT 1")
        assert isinstance(error, StoreDamaged)
        assert str(tmp_path) not in str(error)


def test_many_threads_ask_at_once(service: SqlService) -> None:
    found: list[SqlAnswer] = []

    def ask(number: int) -> None:
        for step in range(10):
            answer = service.run("SELECT $n AS n", {"n": number * 100 + step})
            assert answer.table.to_pylist() == [{"n": number * 100 + step}]
            found.append(answer)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert len(service.process_ids) <= LIMITS.processes


def test_limits_are_checked() -> None:
    for name in ("seconds", "rows", "memory_bytes", "processes"):
        with pytest.raises(InvalidInput, match=name):
            SqlLimits(**{name: 0})
    with pytest.raises(InvalidInput, match="default_rows"):
        SqlLimits(rows=5, default_rows=6)


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            # Its threads, and so its pipes, may end a moment later.
            time.sleep(0.05)
            return
        time.sleep(0.01)
    pytest.fail(f"process {process} is still there")
