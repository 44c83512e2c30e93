"""The calls of an open store, answered by a server.

Values come as Arrow, so NaN and infinities are exact. What the server has sent is kept and
asked for by its entity tag: the same question again costs no transfer, and what has changed
is sent anew.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, overload

import pyarrow as pa

from actstore.query.client.decoding import (
    cells_of,
    comparison_of,
    counts_of,
    examples_of,
    histogram_of,
    info_of,
    joined,
    read_table,
    tensor_of,
    topk_of,
)
from actstore.query.client.remote_neuron import RemoteNeuron
from actstore.query.client.remote_rows import RemoteRows
from actstore.query.client.requests import (
    API,
    COMPARISON,
    CONTEXTS,
    EXPLANATION,
    INTERVAL,
    RANKING,
    STATISTICS,
    THRESHOLD,
    Numbers,
    ScalarName,
    plain_values,
    query_pairs,
    real_numbers,
    require_options,
    resource_path,
    scalar_name,
    whole_index,
    whole_numbers,
    window_sizes,
)
from actstore.query.client.transport import ARROW, JSON, Transport
from actstore.query.comparison import Comparison
from actstore.query.derived import DerivedScalar
from actstore.query.examples import Examples
from actstore.query.explanation import Explanation
from actstore.query.inventory import StoreInfo
from actstore.query.results import Cells, TopK
from actstore.query.statistics import Statistics
from actstore.query.tensors import LabelledTensor, LabelledTensors
from actstore.query.thresholds import Counts
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.histograms import Histogram

__all__ = ["RemoteStore", "connect"]

_CACHE_BYTES = 64 * 2**20
_PAGE_ROWS = 1000
_ROWS_OF_A_REQUEST = 1000
"""Rows that one address names; more are asked for in several requests."""


def connect(
    url: str,
    token: str | None = None,
    *,
    timeout: float = 60.0,
    cache_bytes: int = _CACHE_BYTES,
) -> "RemoteStore":
    """A store that `actstore serve` serves.

    Args:
        url: the address that it prints.
        token: what it asks for, if it asks.
        timeout: seconds to wait for a connection, and for each part of an answer.
        cache_bytes: answers kept here; 0 for none.

    Raises:
        InvalidInput: the address or the token cannot be one.
        ServerUnreachable: no server of a store answers there.
        ServerRefusal: it refuses the token.
    """
    store = RemoteStore(Transport(url, token, timeout, cache_bytes))
    try:
        store.info()
    except BaseException:
        store.close()
        raise
    return store


class RemoteStore:
    """A served store; made by :func:`connect`.

    Its calls take the arguments of :class:`actstore.Store`, give results of the same types and
    raise errors of the same kinds. It may be used by several threads.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RemoteStore {self.url}>"

    # What it holds

    def info(self) -> StoreInfo:
        """What the store holds now; its path is the server's address."""
        return info_of(self._object("/store"), self.url)

    @property
    def model_name(self) -> str:
        """The model's name as given at ingest."""
        return self.info().model

    @property
    def n_tokens(self) -> int:
        """Committed token rows."""
        return self.info().tokens

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.info().layers

    # Rankings

    def topk(self, name: ScalarName, **options: Any) -> TopK:
        """The k best values of a derived scalar, exactly.

        Args:
            name: a derived scalar that the server knows, or a location.
            options: those of :func:`actstore.query.topk.topk`.

        Raises:
            TypeError: an option that there is not.
            InvalidInput: as the open store does, or more rows than the server gives.
            Unavailable: the store cannot derive the scalar.
        """
        require_options("topk", options, RANKING)
        reply = self._transport.get(
            resource_path("topk", scalar_name(name)), _ranking(options), ARROW
        )
        return topk_of(reply.body)

    def explain(self, name: ScalarName, **options: Any) -> Explanation:
        """How :meth:`topk` would answer; see :func:`actstore.query.explanation.explain`."""
        require_options("explain", options, EXPLANATION)
        reply = self._transport.get(
            resource_path("explain", scalar_name(name)), _ranking(options), JSON
        )
        return Explanation(**json.loads(reply.body))

    def compare(self, names: Sequence[ScalarName], **options: Any) -> Comparison:
        """Several scalars side by side; see :func:`actstore.query.comparison.compare`."""
        require_options("compare", options, COMPARISON)
        given = [names] if isinstance(names, str | DerivedScalar) else names
        named = [("name", scalar_name(name)) for name in given]
        reply = self._transport.get(f"{API}/compare", [*named, *_ranking(options)], ARROW)
        return comparison_of(reply.body)

    def filter(self, name: ScalarName, **options: Any) -> Cells:
        """All values in an interval; see :func:`actstore.query.thresholds.filter_cells`.

        ``limit`` is as many as the server gives, by default.
        """
        require_options("filter", options, THRESHOLD | {"limit"})
        path = resource_path("filter", scalar_name(name))
        return cells_of(self._transport.get(path, _interval(options), ARROW).body)

    def count(self, name: ScalarName, **options: Any) -> Counts:
        """How many values lie in an interval; see :func:`actstore.query.thresholds.count`."""
        require_options("count", options, THRESHOLD)
        path = resource_path("count", scalar_name(name))
        return counts_of(self._transport.get(path, _interval(options), ARROW).body)

    def examples(self, name: ScalarName, unit: Sequence[int], **options: Any) -> Examples:
        """Contexts of one unit.

        Args:
            name: a derived scalar that the server knows, or a location.
            unit: (layer, neuron), (layer, head, channel) …
            options: those of :func:`actstore.query.examples.examples`.

        Raises:
            TypeError: an option that there is not.
            InvalidInput: as the open store does.
            Unavailable: the store cannot derive the scalar.
        """
        require_options("examples", options, CONTEXTS)
        given = dict(options)
        before, after = window_sizes(given.pop("window", (20, 10)))
        distinct = given.pop("distinct", "sequence") or "none"
        numbers = ":".join(map(str, whole_numbers(unit, "unit")))
        query = query_pairs(
            {**given, "unit": numbers, "before": before, "after": after, "distinct": distinct}
        )
        reply = self._transport.get(resource_path("examples", scalar_name(name)), query, ARROW)
        return examples_of(reply.body)

    # Values

    def raw(
        self,
        location: str,
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        pass_type: str = "forward",
        dtype: str = "float32",
    ) -> LabelledTensor:
        """A location's values; see :meth:`actstore.Store.raw`."""
        return self._values(
            resource_path("raw", location),
            sequences,
            tokens,
            layers,
            pass_type=pass_type,
            dtype=dtype,
        )

    @overload
    def derive(
        self,
        names: ScalarName,
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
        pass_type: str = "forward",
    ) -> LabelledTensor: ...

    @overload
    def derive(
        self,
        names: list[ScalarName] | list[str] | tuple[ScalarName, ...],
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
        pass_type: str = "forward",
    ) -> LabelledTensors: ...

    def derive(
        self,
        names: ScalarName | list[ScalarName] | list[str] | tuple[ScalarName, ...],
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
        pass_type: str = "forward",
    ) -> LabelledTensor | LabelledTensors:
        """Derived scalars of whole sequences or of rows; see :meth:`actstore.Store.derive`."""
        if isinstance(names, str | DerivedScalar):
            return self._values(
                resource_path("scalars", scalar_name(names)),
                sequences,
                tokens,
                layers,
                pass_type=pass_type,
                dtype=dtype,
            )
        found = {}
        for name in names:
            # As the open store does: a scalar outside the blocks takes no layers.
            outside = not self._has_layers(scalar_name(name))
            tensor = self.derive(
                name,
                sequences=sequences,
                tokens=tokens,
                layers=None if outside else layers,
                dtype=dtype,
                pass_type=pass_type,
            )
            found[tensor.name] = tensor
        return LabelledTensors(found)

    def _has_layers(self, name: str) -> bool:
        for entry in self._object("/scalars")["scalars"]:
            if entry["name"] == name:
                return "layer" in entry["axes"]
        return True

    def _values(
        self, path: str, sequences: Numbers, tokens: Numbers, layers: Numbers, **plain: str
    ) -> LabelledTensor:
        if sequences is not None and tokens is not None:
            raise InvalidInput(
                "Both sequences and tokens are given; give one of them.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        common = query_pairs({"layers": layers, **plain})
        key = "sequence" if sequences is not None else "token"
        rows = sequences if sequences is not None else tokens
        if rows is None:
            return tensor_of(self._transport.get(path, common, ARROW).body)
        numbers = whole_numbers(rows, f"{key}s")
        parts = [
            tensor_of(
                self._transport.get(
                    path,
                    [*common, *((key, str(n)) for n in numbers[at : at + _ROWS_OF_A_REQUEST])],
                    ARROW,
                ).body
            )
            for at in range(0, len(numbers), _ROWS_OF_A_REQUEST)
        ]
        return joined(parts)

    # Tables

    def sql(
        self,
        query: str,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        max_rows: int | None = None,
    ) -> RemoteRows:
        """The rows of one query, run on the server under its limits.

        Args:
            query: one SELECT, EXPLAIN, DESCRIBE, SUMMARIZE or SHOW TABLES.
            parameters: values of ``?`` (a list) or ``$name`` (a mapping).
            max_rows: rows wanted; the server's own number by default, with a warning where
                the query has more.

        Raises:
            InvalidInput: the query is not valid (``invalid_sql``), takes too long
                (``sql_timeout``) or needs too much (``sql_too_large``).
            ServerRefusal: too many queries wait (``busy``).
        """
        given = dict(parameters) if isinstance(parameters, Mapping) else parameters
        body = {"q": query, "parameters": given if given is None else plain_values(given)}
        if max_rows is not None:
            body["max_rows"] = max_rows
        table, beside = read_table(self._transport.post(f"{API}/sql", body, ARROW).body)
        truncated = bool(beside["truncated"])
        if truncated and max_rows is None:
            warnings.warn(
                f"The query has more rows than the {table.num_rows:,} that the server gives "
                "unasked; say max_rows.",
                stacklevel=2,
            )
        return RemoteRows(table, truncated=truncated, seconds=float(beside["seconds"]))

    # Units

    def neuron(self, layer: int, neuron: int) -> RemoteNeuron:
        """What the weights and the corpus say of a neuron; see :mod:`actstore.query.neuron`.

        Raises:
            InvalidInput: there is no such neuron.
        """
        found = self._object(f"/neurons/{whole_index(layer)}/{whole_index(neuron)}")
        return RemoteNeuron.of(self, found)

    def histogram(
        self, name: ScalarName, unit: Sequence[int], *, pass_type: str = "forward"
    ) -> Histogram:
        """One unit's values by size: as the store keeps it, else counted now.

        Args:
            name: a derived scalar that the server knows, or a location.
            unit: (layer, neuron), (layer, head, channel) …
            pass_type: ``backward`` for the gradient of the store's objective.

        Raises:
            InvalidInput: an unknown scalar or unit.
            Unavailable: the store cannot derive the scalar.
        """
        numbers = ":".join(map(str, whole_numbers(unit, "unit")))
        query = query_pairs({"unit": numbers, "pass_type": pass_type})
        path = resource_path("histogram", scalar_name(name))
        return histogram_of(self._transport.get(path, query, ARROW).body)

    def statistics(self, name: ScalarName, **options: Any) -> Statistics:
        """Counts, moments, extremes and quantiles; see :mod:`actstore.query.statistics`.

        Args:
            name: a derived scalar that the server knows, or a location.
            options: those of :func:`actstore.query.statistics.statistics`.

        Raises:
            TypeError: an option that there is not.
            InvalidInput: as the open store does.
            Unavailable: the store has no statistics of the scalar.
        """
        require_options("statistics", options, STATISTICS)
        given = dict(options)
        shares = given.pop("quantiles", None)
        query = query_pairs(given)
        if shares is not None:
            query += [("quantile", one) for one in real_numbers(shares, "quantiles")]
        path = resource_path("statistics", scalar_name(name))
        parts: list[pa.Table] = []
        while True:
            seen = sum(part.num_rows for part in parts)
            reply = self._transport.get(path, [*query, ("offset", str(seen))], ARROW)
            table, beside = read_table(reply.body)
            parts.append(table)
            if not table.num_rows or seen + table.num_rows >= beside["total"]:
                break
        return Statistics(
            pa.concat_tables(parts),
            beside["scalar"],
            beside["source"],
            tuple(beside["quantiles"]),
        )

    def neurons(
        self,
        layers: Numbers = None,
        *,
        dead: bool | None = None,
        where: str | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> pa.Table:
        """The table of neurons.

        Args:
            layers: all by default.
            dead: only dead ones, or only those that are not.
            where: SQL predicate over its columns.
            sort: columns, separated by commas; ``-`` before one for descending.
            limit: rows wanted; all by default.
        """
        query = query_pairs({"layers": layers, "dead": dead, "where": where, "sort": sort})
        return self._pages("/neurons", query, limit)

    def _pages(self, path: str, query: list[tuple[str, str]], limit: int | None) -> pa.Table:
        """Every page of a table, or as many as have the rows wanted."""
        pages: list[pa.Table] = []
        cursor: str | None = None
        while True:
            left = None if limit is None else limit - sum(page.num_rows for page in pages)
            rows = _PAGE_ROWS if left is None else min(left, _PAGE_ROWS)
            following = [] if cursor is None else [("cursor", cursor)]
            asked = [*query, ("limit", str(rows)), *following]
            page, beside = read_table(self._transport.get(f"{API}{path}", asked, ARROW).body)
            pages.append(page)
            cursor = beside["next"]
            if cursor is None or (left is not None and page.num_rows >= left):
                return pa.concat_tables(pages)

    def _object(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._transport.get(f"{API}{path}", [], JSON).body)
        return found


def _ranking(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return query_pairs({**options, "distinct": options.get("distinct") or "none"})


def _interval(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    ends = [
        (name, number)
        for name, value in options.items()
        if name in INTERVAL and value is not None
        for number in real_numbers(value, name)
    ]
    plain = {name: value for name, value in options.items() if name not in INTERVAL}
    return [*query_pairs(plain), *ends]
