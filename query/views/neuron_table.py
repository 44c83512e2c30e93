"""The table of neurons: filtered, sorted, a page at a time."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from actstore.query.views.tables import Fetch, fetch_rows, literal, require_predicate
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["SORTS", "NeuronQuery", "NeuronRow", "NeuronTable"]

SORTS = {
    "neuron": "by layer and number",
    "max": "greatest value at an ordinary row",
    "min": "least value at an ordinary row",
    "mean": "mean over ordinary rows",
    "spread": "standard deviation",
    "firing_rate": "share of ordinary values above zero",
    "kurtosis": "fourth moment; high where a neuron is mostly quiet and rarely loud",
    "write_norm": "length of what the neuron writes per unit of activation",
}
"""What the table can be sorted by -> what it means."""

Alive = Literal["any", "live", "dead"]

_COLUMNS = (
    "layer, neuron, max, min, mean, sqrt(variance) AS spread, firing_rate, kurtosis, write_norm, "
    "dead, promoted"
)
_MAX_SIZE = 500


@dataclass(frozen=True)
class NeuronQuery:
    """Which neurons, in which order.

    Attributes:
        layer: of this layer; None for all.
        sort: one of ``SORTS``.
        descending: the greatest first.
        alive: ``any``, ``live`` or ``dead``.
        promotes: part of a token that it promotes.
        where: SQL predicate over the columns of ``neurons``.
        page: from 1.
        size: rows of a page.
    """

    layer: int | None = None
    sort: str = "max"
    descending: bool = True
    alive: Alive = "any"
    promotes: str = ""
    where: str = ""
    page: int = 1
    size: int = 50

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise _invalid(f"sort is {self.sort!r}; use {', '.join(SORTS)}.")
        if self.alive not in ("any", "live", "dead"):
            raise _invalid(f"alive is {self.alive!r}; use any, live or dead.")
        if self.page < 1 or not 1 <= self.size <= _MAX_SIZE:
            raise _invalid(
                f"page is {self.page} and size {self.size}; pages count from 1 and have at most "
                f"{_MAX_SIZE} rows."
            )

    @property
    def predicate(self) -> str:
        """The filters as one SQL predicate."""
        parts = []
        if self.layer is not None:
            parts.append(f"layer = {self.layer}")
        if self.alive != "any":
            parts.append("dead" if self.alive == "dead" else "NOT dead")
        if self.promotes:
            wanted = literal(self.promotes)
            parts.append(f"len(list_filter(promoted, lambda t: contains(t, {wanted}))) > 0")
        if self.where.strip():
            # A line of its own, so that a comment cannot swallow the bracket.
            parts.append(f"(\n{require_predicate(self.where.strip())}\n)")
        return " AND ".join(parts) or "true"

    @property
    def order(self) -> str:
        """The columns of ORDER BY; ties by layer and number."""
        way = "DESC" if self.descending else "ASC"
        if self.sort == "neuron":
            return f"layer {way}, neuron {way}"
        return f"{self.sort} {way} NULLS LAST, layer, neuron"

    @property
    def sql(self) -> str:
        """The query of this page."""
        return (
            f"SELECT {_COLUMNS}\nFROM neurons\nWHERE {self.predicate}\nORDER BY {self.order}\n"
            f"LIMIT {self.size} OFFSET {(self.page - 1) * self.size}"
        )

    def parameters(self, **changes: Any) -> dict[str, str]:
        """The members that differ from their defaults, as a link has them."""
        other, plain = replace(self, **changes), NeuronQuery()
        return {
            name: str(getattr(other, name)).lower()
            if isinstance(getattr(other, name), bool)
            else str(getattr(other, name))
            for name in self.__dataclass_fields__
            if getattr(other, name) != getattr(plain, name)
        }


@dataclass(frozen=True)
class NeuronRow:
    """A neuron in the table; statistics are None where nothing was indexed."""

    layer: int
    neuron: int
    max: float | None
    min: float | None
    mean: float | None
    spread: float | None
    firing_rate: float | None
    kurtosis: float | None
    write_norm: float | None
    dead: bool | None
    promoted: tuple[str, ...]


@dataclass(frozen=True)
class NeuronTable:
    """A page of the table.

    Attributes:
        query: what was asked.
        rows: the neurons.
        total: neurons that the filters allow.
        layers: the model's layers.
    """

    query: NeuronQuery
    rows: tuple[NeuronRow, ...]
    total: int
    layers: int

    @classmethod
    def of(cls, store: "Store", query: NeuronQuery, fetch: Fetch | None = None) -> Self:
        """A page of an open store's neurons.

        Args:
            store: the store.
            query: which.
            fetch: runs the queries; the store's own SQL by default.

        Raises:
            InvalidInput: an unknown layer, or a predicate that is not valid.
        """
        if query.layer is not None and not 0 <= query.layer < store.n_layers:
            raise InvalidInput(
                f"layer is {query.layer}; this store has 0 to {store.n_layers - 1}.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        counted = f"SELECT count(*) AS n FROM neurons WHERE {query.predicate}"
        total = int(fetch_rows(store, counted, fetch)[0]["n"])
        rows = [
            NeuronRow(**{**row, "promoted": tuple(text or "" for text in row["promoted"] or ())})
            for row in fetch_rows(store, query.sql, fetch)
        ]
        return cls(query, tuple(rows), total, store.n_layers)

    @property
    def pages(self) -> int:
        """How many pages there are, one at least."""
        return max(1, -(-self.total // self.query.size))

    @property
    def first(self) -> int:
        """Number of the first row shown, from 1; 0 where there is none."""
        return (self.query.page - 1) * self.query.size + 1 if self.rows else 0


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
