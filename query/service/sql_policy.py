"""Which SQL a stranger may run: one query over the store's own tables, told by its parse tree.

DuckDB's settings already keep a query away from files, extensions and writes. What they
leave open shows the process's own affairs (settings, paths, memory) or runs text as SQL;
the policy closes that. It works from lists of what is allowed, made from the catalog when
the process starts: a function that a later DuckDB adds is refused until it is named here,
unless DuckDB declares that it depends on its arguments alone.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import duckdb

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["SqlPolicy"]

_QUERY_NODES = frozenset(
    {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE", "STATEMENT_NODE"}
)
"""Parts of a query that read; ``INSERT_QUERY_NODE`` and its like write."""

_TABLE_FUNCTIONS = frozenset(
    {
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
)
_INTERNAL_VIEWS = frozenset({"duckdb_columns", "duckdb_tables", "duckdb_types"})
_SCHEMA_VIEWS = frozenset({"columns", "tables"})
"""Views of ``information_schema`` that name the store's tables and nothing else."""

_SHOWN = frozenset({"tables", "__show_tables_expanded"})
"""What ``SHOW TABLES`` and ``SHOW ALL TABLES`` ask for."""

_VOLATILE = frozenset(
    {
        "current_database",
        "current_date",
        "current_localtime",
        "current_localtimestamp",
        "current_schema",
        "error",
        "gen_random_uuid",
        "get_current_time",
        "get_current_timestamp",
        "now",
        "random",
        "today",
        "transaction_timestamp",
        "uuid",
        "uuidv4",
        "uuidv7",
        "version",
    }
)
"""Functions that depend on more than their arguments and show nothing of the process."""

_REFUSED = frozenset(
    {
        # Takes SQL as text, plans it and shows the plan.
        "json_serialize_plan",
        # Reads the raw state of an aggregate, which anybody can make up.
        "combine",
        "combine_aggr",
        "finalize",
        "to_aggregate_state",
        "variant_bytes_to_variant",
    }
)
_REFUSED_PREFIXES = ("__internal", "pg_get_")

_COMMENT = r"(?:\s+|--[^\n]*(?:\n|$)|/\*.*?\*/)"
_EXPLAIN = re.compile(
    rf"{_COMMENT}*explain\b{_COMMENT}*(?P<analyze>analyze\b)?{_COMMENT}*"
    r"(?:\(\s*format\s+(?P<format>text|json)\s*\))?(?P<query>.*)",
    re.IGNORECASE | re.DOTALL,
)


class SqlPolicy:
    """Judges queries by what the catalog of a connection holds.

    Args:
        connection: the one that will run them, or another of the same database, with every
            table, view and macro of the store.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        functions = connection.execute(
            "SELECT lower(function_name), function_type, stability, macro_definition, internal"
            " FROM duckdb_functions()"
        ).fetchall()
        self._known = {name for name, *_ in functions}
        self._functions = {
            name
            for name, kind, stability, definition, internal in functions
            if _is_allowed(name, kind, stability, definition, internal)
        }
        # A name that has a harmless overload and another one is refused.
        self._functions -= {
            name
            for name, kind, stability, definition, internal in functions
            if kind in ("scalar", "aggregate", "window", "macro")
            and not _is_allowed(name, kind, stability, definition, internal)
        }
        self._table_functions = _TABLE_FUNCTIONS | {
            name
            for name, kind, _, _, internal in functions
            if kind == "table_macro" and not internal
        }
        views = connection.execute(
            "SELECT lower(view_name), schema_name FROM duckdb_views() WHERE internal"
        ).fetchall()
        # What stands in information_schema is not found without the schema's name.
        self._views = {name for name, schema in views if schema != "information_schema"}

    def admit(self, query: str) -> str:
        """The statement to run, if it may run.

        Args:
            query: what was asked.

        Returns:
            The query; of EXPLAIN, put together again from its parts that were judged.

        Raises:
            InvalidInput: it is not exactly one query, or reaches for what is not the store's;
                the kind is ``invalid_sql``.
        """
        cursor = self._connection.cursor()
        try:
            statements = cursor.extract_statements(query)
            if len(statements) != 1:
                raise _refused(f"{len(statements)} statements are given; give exactly one.")
            kind = statements[0].type
            if kind is duckdb.StatementType.SELECT:
                self._judge(cursor, query)
                return query
            explained = _EXPLAIN.fullmatch(query)
            if kind is duckdb.StatementType.EXPLAIN and explained is not None:
                inner = explained["query"]
                self._judge(cursor, inner)
                analyze = "ANALYZE " if explained["analyze"] else ""
                form = f"(FORMAT {explained['format']}) " if explained["format"] else ""
                return f"EXPLAIN {analyze}{form}{inner}"
        except duckdb.Error as error:
            raise _refused(f"The query cannot be read. {error}") from error
        finally:
            cursor.close()
        raise _refused(f"A {kind.name} statement is not answered here; use SELECT.")

    def _judge(self, cursor: duckdb.DuckDBPyConnection, query: str) -> None:
        row = cursor.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchone()
        assert row is not None
        try:
            tree = json.loads(row[0])
        except RecursionError:
            raise _refused("The query is nested too deeply; write it with WITH.") from None
        if tree["error"] or len(tree["statements"]) != 1:
            reason = tree.get("error_message", "It is not one SELECT.")
            raise _refused(f"The query cannot be judged. {reason}")
        waiting: list[Any] = [tree["statements"]]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(value)
            elif isinstance(value, dict):
                waiting.extend(self._parts(value))

    def _parts(self, node: Mapping[str, Any]) -> Iterable[Any]:
        """The parts of a node that are to be judged too, once it has been itself."""
        kind = node.get("type")
        if isinstance(kind, str):
            if kind.endswith("_NODE") and kind not in _QUERY_NODES:
                raise _refused("The query writes; a store is only read.")
            if kind == "BASE_TABLE":
                self._require_table(_path(node, "table_name"))
            elif kind == "SHOW_REF":
                self._require_shown(node)
            elif kind == "TABLE_FUNCTION":
                function = node["function"]
                self._require_table_function(function.get("function_name", ""))
                rest = {key: part for key, part in function.items() if key != "function_name"}
                return [rest, *(part for key, part in node.items() if key != "function")]
        name = node.get("function_name")
        if isinstance(name, str):
            self._require_function(name)
        return node.values()

    def _require_table(self, path: list[str]) -> None:
        *schemas, name = path
        if "information_schema" in schemas:
            if name not in _SCHEMA_VIEWS:
                raise _hidden(".".join(path))
        elif name in self._views and name not in _INTERNAL_VIEWS:
            raise _hidden(name)

    def _require_shown(self, node: Mapping[str, Any]) -> None:
        path = _path(node, "table_name")
        if node.get("query") is not None or not path[-1]:
            return
        if node.get("show_type") == "SHOW_SPECIAL":
            if path[-1].strip('"') not in _SHOWN:
                raise _hidden(path[-1].strip('"'))
        else:
            # SHOW says the value of a setting as readily as the columns of a table.
            raise _refused(f"SHOW {path[-1]} is not answered here; use DESCRIBE {path[-1]}.")

    def _require_table_function(self, name: str) -> None:
        lowered = name.lower()
        if lowered in self._known and lowered not in self._table_functions:
            raise _hidden(name)

    def _require_function(self, name: str) -> None:
        lowered = name.lower()
        is_listed = lowered in self._functions or lowered in self._table_functions
        if lowered in self._known and not is_listed:
            raise _hidden(name)


def _is_allowed(
    name: str, kind: str, stability: str | None, definition: str | None, internal: bool
) -> bool:
    if name in _REFUSED or name.startswith(_REFUSED_PREFIXES):
        return False
    if kind == "macro":
        # One with a query of its own may look where the query itself may not.
        return not internal or "(SELECT " not in (definition or "").upper()
    if kind not in ("scalar", "aggregate", "window"):
        return False
    return stability == "CONSISTENT" or name in _VOLATILE


def _path(node: Mapping[str, Any], key: str) -> list[str]:
    """The parts of a name, lower case, from the catalog to the name itself."""
    own = str(node.get(key) or "").lower()
    path = [str(part).lower() for part in (node.get("qualified_name") or {}).get("path") or ()]
    return path if path and path[-1] == own else [*path, own]


def _hidden(name: str) -> InvalidInput:
    return _refused(
        f"{name} is not open to queries here; SHOW TABLES lists what is, and functions of "
        "their arguments alone can be used."
    )


def _refused(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_SQL)
