"""When a query needs only the best values of a scalar's table, and how many.

DuckDB does not tell a Python source of ORDER BY and LIMIT. They may be taken into account where
two things agree. The query's syntax tree says which column an ORDER BY means: a plan only shows
its name, which an alias may have given to another column. The plan says what lies between the
scan and the LIMIT: no filter, join or aggregate may. Whatever is not recognised gets no hint and
is read in full.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from actstore.query.scalar_tables import Hint

__all__ = ["find_hint"]

Node = Mapping[str, Any]

_MOST_ANSWERS = 2**16
_HARMLESS_FUNCTIONS = frozenset({"context", "generate_series", "range", "unnest"})
_RENAMING = ("replace_list", "columns", "expr", "rename_list")
_SPECIAL_FILTERS = {"(NOT special)": False, "special": True}


@dataclass(frozen=True)
class _Order:
    """What an ORDER BY of a query's part begins with: the value."""

    largest: bool
    more_keys: bool


def find_hint(
    cursor: duckdb.DuckDBPyConnection,
    query: str,
    parameters: Any,
    scalars: Collection[str],
    macros: Mapping[str, bool],
) -> Hint | None:
    """The hint that every scan of a scalar's table in a query may take; None for none.

    Args:
        cursor: a connection that knows the tables.
        query: one SELECT.
        parameters: its parameters.
        scalars: names of the tables.
        macros: table macro that holds one such table, ordered by value alone and limited ->
            whether by the greatest.
    """
    # Fetched to the end: a result that is not holds up its connection.
    rows = cursor.execute("SELECT json_serialize_sql($q::VARCHAR)", {"q": query}).fetchall()
    tree = json.loads(rows[0][0])
    if tree["error"] or len(tree["statements"]) != 1:
        return None
    orders = _orders(tree["statements"][0]["node"], scalars, macros)
    if orders is None or len({order.largest for order in orders}) != 1:
        return None
    plan = cursor.execute(f"EXPLAIN (FORMAT JSON) {query}", parameters).fetchall()
    scans = _scans(json.loads(plan[0][1]))
    if scans is None or len(scans) != len(orders) or len({scan.special for scan in scans}) != 1:
        return None
    k = max(scan.k for scan in scans)
    if not 0 < k <= _MOST_ANSWERS:
        return None
    return Hint(
        k=k,
        largest=orders[0].largest,
        with_ties=any(order.more_keys for order in orders),
        special=scans[0].special,
        offered=frozenset(scan.filters for scan in scans),
    )


# The syntax tree


def _orders(
    node: Node, scalars: Collection[str], macros: Mapping[str, bool]
) -> list[_Order] | None:
    """How each use of a scalar's table is ordered and limited; None unless all of them are."""
    references = 0
    orders: list[_Order] = []
    parts = list(_parts(node))
    known = _ctes(node)
    inner = sum(len((part.get("cte_map") or {}).get("map") or ()) for part in parts)
    if inner != len(known) or any(name in scalars for name in known):
        return None
    if any("special" in name for part in parts for name in _given_names(part)):
        # A plan would show that other column by this name too.
        return None
    resolver = _Resolver(scalars, known)
    for part in parts:
        kind = part.get("type")
        if kind == "BASE_TABLE" and part["table_name"].lower() in scalars:
            references += 1
        elif kind == "TABLE_FUNCTION":
            name = part["function"]["function_name"].lower()
            if name in macros:
                references += 1
                orders.append(_Order(macros[name], more_keys=False))
            elif name not in _HARMLESS_FUNCTIONS:
                return None
        elif kind == "SELECT_NODE":
            order = resolver.order_of(part)
            if order is not None:
                orders.append(order)
    return orders if references and len(orders) == references else None


def _ctes(node: Node) -> dict[str, Node]:
    """The outermost WITH queries by name; one that renames its columns is empty."""
    entries = (node.get("cte_map") or {}).get("map") or ()
    return {
        entry["key"].lower(): {}
        if entry["value"].get("aliases")
        else entry["value"].get("query_node") or {}
        for entry in entries
    }


def _given_names(part: Node) -> Iterator[str]:
    """Names that a query gives to columns and tables."""
    yield str(part.get("alias") or "").lower()
    for key in ("column_name_alias", "aliases"):
        yield from (str(name).lower() for name in part.get(key) or ())
    yield from (str(one).lower() for one in part.get("rename_list") or ())
    yield from (str(one).lower() for one in part.get("replace_list") or ())


def _parts(value: Any) -> Iterator[Node]:
    """Every object of a tree."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


class _Resolver:
    """Follows a column's name through subqueries to a scalar's table."""

    def __init__(self, scalars: Collection[str], ctes: Mapping[str, Node]) -> None:
        self._scalars = scalars
        self._ctes = ctes

    def order_of(self, node: Node) -> _Order | None:
        """The order of a SELECT over one scalar's table that begins with the table's value."""
        modifiers = {modifier["type"]: modifier for modifier in node["modifiers"]}
        wanted = {"ORDER_MODIFIER", "LIMIT_MODIFIER"}
        if set(modifiers) != wanted or len(node["modifiers"]) != len(wanted):
            return None
        if not _is_plain(node) or modifiers["LIMIT_MODIFIER"].get("limit_type") != "ROW_COUNT":
            return None
        orders = modifiers["ORDER_MODIFIER"]["orders"]
        first = orders[0]
        nulls = first["null_order"].replace(" ", "_").upper()
        direction = first["type"]
        if nulls not in ("ORDER_DEFAULT", "NULLS_LAST") or direction not in (
            "ORDER_DEFAULT",
            "ASCENDING",
            "DESCENDING",
        ):
            return None
        if not self._is_value(node, first["expression"]):
            return None
        return _Order(direction == "DESCENDING", len(orders) > 1)

    def _is_value(self, node: Node, key: Node) -> bool:
        """Whether an ORDER BY key of a SELECT is the scalar's value."""
        items = node["select_list"]
        if not all(_names_itself(item) for item in items):
            return False
        if key["type"] == "VALUE_CONSTANT":
            text = str((key.get("literal") or {}).get("text", ""))
            place = int(text) if text.isdecimal() else 0
            before = items[:place]
            if not before or place > len(items) or any(one["type"] == "STAR" for one in before):
                return False
            return self._is_reference(node, before[-1])
        if key["type"] == "COLUMN_REF" and len(key["column_names"]) == 1:
            name = key["column_names"][0].lower()
            named = [one for one in items if (one.get("alias") or "").lower() == name]
            if named:
                # An alias goes before a column of the same name.
                return len(named) == 1 and self._is_reference(node, named[0])
        return self._is_reference(node, key)

    def _is_reference(self, node: Node, expression: Node) -> bool:
        """Whether an expression over the tables of a SELECT is the scalar's value itself."""
        if expression["type"] != "COLUMN_REF":
            return False
        *qualifier, name = [part.lower() for part in expression["column_names"]]
        source = node["from_table"]
        if qualifier:
            own = (source.get("alias") or source.get("table_name") or "").lower()
            if qualifier != [own]:
                return False
        return self._exposes(source, name)

    def _exposes(self, source: Node, name: str) -> bool:
        """Whether a column of a FROM clause is the scalar's value."""
        if source.get("column_name_alias") or source.get("sample"):
            return False
        if source["type"] == "SUBQUERY":
            return self._returns(source["subquery"]["node"], name)
        if source["type"] != "BASE_TABLE":
            return False
        table = source["table_name"].lower()
        if table in self._ctes:
            return self._returns(self._ctes[table], name)
        return table in self._scalars and name == "value"

    def _returns(self, node: Node, name: str) -> bool:
        """Whether a column of a SELECT that changes no rows is the scalar's value."""
        if node.get("type") != "SELECT_NODE" or node["modifiers"] or not _is_plain(node):
            return False
        if not all(_names_itself(item) for item in node["select_list"]):
            return False
        found = []
        for item in node["select_list"]:
            if item["type"] == "STAR":
                if not _is_whole_star(item):
                    return False
                found.append(self._exposes(node["from_table"], name))
            elif item["type"] == "COLUMN_REF":
                own = (item.get("alias") or item["column_names"][-1]).lower()
                if own == name:
                    found.append(self._is_reference(node, item))
            elif not item.get("alias") or item["alias"].lower() == name:
                return False
        return found == [True]


def _is_plain(node: Node) -> bool:
    """Whether a SELECT neither groups nor samples nor filters what it has computed."""
    parts = ("group_expressions", "group_sets", "having", "sample", "qualify")
    return not any(node.get(part) for part in parts)


def _names_itself(item: Node) -> bool:
    """Whether the name of a column of a SELECT is its alias, or else that of the column it is."""
    if item["type"] == "STAR":
        return not any(item.get(part) for part in _RENAMING)
    # Fields of a struct become columns of their own.
    return not any(str(part.get("function_name")).lower() == "unnest" for part in _parts(item))


def _is_whole_star(item: Node) -> bool:
    narrowing = ("relation_name", "exclude_list", "qualified_exclude_list")
    return not any(item.get(part) for part in (*narrowing, *_RENAMING))


# The plan


@dataclass(frozen=True)
class _Scan:
    """A scan with nothing but renaming between it and the LIMIT over it."""

    k: int
    special: bool | None
    filters: frozenset[str]


def _scans(plan: list[Node]) -> list[_Scan] | None:
    """Every scan of a Python source; None unless each stands right under a LIMIT of its own."""
    found: list[_Scan] = []
    waiting: list[tuple[Node, int | None, bool | None]] = [(root, None, None) for root in plan]
    while waiting:
        node, k, special = waiting.pop()
        info = node["extra_info"]
        match node["name"]:
            case "PYTHON_ARROW_SCAN":
                if k is None:
                    return None
                found.append(_Scan(k, special, frozenset(_texts(info.get("Filters", [])))))
            case "TOP_N":
                k, special = _limit(info), None
            case "PROJECTION":
                pass
            case "FILTER" if k is not None and _reads_special(node):
                special = _SPECIAL_FILTERS.get(" AND ".join(_texts(info.get("Expression", []))))
                k = None if special is None else k
            case _:
                k, special = None, None
        waiting += [(child, k, special) for child in node["children"]]
    return found


def _reads_special(node: Node) -> bool:
    """Whether a filter stands right over a scan that brings the column ``special``."""
    child = node["children"][0]
    columns = _texts(child["extra_info"].get("Projections", []))
    return child["name"] == "PYTHON_ARROW_SCAN" and "special" in columns


def _limit(info: Node) -> int | None:
    top, offset = str(info.get("Top", "")), str(info.get("Offset", "0"))
    return int(top) + int(offset) if top.isdecimal() and offset.isdecimal() else None


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
