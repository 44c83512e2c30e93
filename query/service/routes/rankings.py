"""Rankings: exact top-k, and contexts of one unit."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import pyarrow as pa
from fastapi import Depends, Query, Response

from actstore.query.examples import Examples
from actstore.query.service.models import (
    ComparisonModel,
    ExamplesModel,
    ExplanationModel,
    TopKModel,
)
from actstore.query.service.negotiation import TABLE, Format
from actstore.query.service.resources import Ask, Asked, new_router, resource
from actstore.query.service.routes.choices import AskedChoice, AskedRanking, K
from actstore.query.service.routes.parameters import (
    Distinct,
    NamePath,
    PassName,
    Special,
    WhereTokens,
    unit_numbers,
)

__all__ = ["AskedContexts", "Contexts", "router"]

router = new_router("rankings")

_WINDOW = 1000

MaxCells = Annotated[int | None, Query(ge=1, description="refuse to look at more values than this")]


def _max_cells(ask: Ask, asked: int | None) -> int:
    return min(asked or ask.settings.max_cells, ask.settings.max_cells)


@resource(router, "/topk/{name}", TopKModel, offers=TABLE)
def topk(ask: Asked, name: NamePath, choice: AskedRanking, max_cells: MaxCells = None) -> Response:
    """Rank every value of a scalar over layers, tokens and units; exact, ties included."""
    choice.require_few(ask, name)
    found = ask.store.topk(name, max_cells=_max_cells(ask, max_cells), **choice.options())
    return ask.table(found.table, {"certificate": found.certificate.to_json()})


@resource(router, "/explain/{name}", ExplanationModel)
def explain(ask: Asked, name: NamePath, choice: AskedRanking) -> Response:
    """How a ranking would be answered, and what it would read."""
    choice.require_few(ask, name)
    return ask.object(ask.store.explain(name, **choice.options()).to_json())


@resource(router, "/compare", ComparisonModel, offers=TABLE)
def compare(
    ask: Asked,
    name: Annotated[list[str], Query(min_length=2, max_length=8, description="scalars")],
    choice: AskedRanking,
    max_cells: MaxCells = None,
) -> Response:
    """The best places of several scalars, with the values of all of them there."""
    ask.limit(choice.k, "k")
    options = choice.options()
    found = ask.store.compare(name, max_cells=_max_cells(ask, max_cells), **options)
    beside = {"certificates": {key: one.to_json() for key, one in found.certificates.items()}}
    return ask.table(found.to_arrow(), beside)


@dataclass(frozen=True)
class Interval:
    """Ends of an interval of values; one at least is given."""

    above: Annotated[float | None, Query(description="values strictly above")] = None
    below: Annotated[float | None, Query(description="values strictly below")] = None
    at_least: Annotated[float | None, Query(description="values of at least this")] = None
    at_most: Annotated[float | None, Query(description="values of at most this")] = None


AskedInterval = Annotated[Interval, Depends()]


@resource(router, "/filter/{name}", TopKModel, offers=TABLE)
def filter_values(
    ask: Asked,
    name: NamePath,
    interval: AskedInterval,
    choice: AskedChoice,
    limit: Annotated[
        int | None,
        Query(ge=1, description="refuse an answer of more values; the server's most by default"),
    ] = None,
    max_cells: MaxCells = None,
) -> Response:
    """Every value in an interval, with its place; refused if there are more than `limit`."""
    found = ask.store.filter(
        name,
        limit=ask.settings.max_rows if limit is None else ask.limit(limit),
        max_cells=_max_cells(ask, max_cells),
        **asdict(interval),
        **choice.options(),
    )
    return ask.table(found.to_arrow(), {"certificate": found.certificate.to_json()})


@resource(router, "/count/{name}", TopKModel, offers=TABLE)
def count_values(
    ask: Asked,
    name: NamePath,
    interval: AskedInterval,
    choice: AskedChoice,
    max_cells: MaxCells = None,
) -> Response:
    """How many values of each unit lie in an interval; units without any are left out."""
    found = ask.store.count(
        name, max_cells=_max_cells(ask, max_cells), **asdict(interval), **choice.options()
    )
    return ask.table(found.to_arrow(), {"certificate": found.certificate.to_json()})


@dataclass(frozen=True)
class Contexts:
    """The options of examples, as query keys."""

    k: K = 20
    kind: Annotated[
        Literal["top", "bottom", "random", "quantile"], Query(description="which rows")
    ] = "top"
    distinct: Distinct = "sequence"
    before: Annotated[int, Query(ge=0, le=_WINDOW, description="tokens shown before")] = 20
    after: Annotated[int, Query(ge=0, le=_WINDOW, description="tokens shown after")] = 10
    where: WhereTokens = None
    special: Special = False
    pass_type: PassName = "forward"
    seed: Annotated[int, Query(ge=0, le=2**53, description="of kind=random")] = 0

    def response(self, ask: Ask, scalar: str, unit: tuple[int, ...]) -> Response:
        """The examples of a unit, in the form that is asked for."""
        ask.limit(self.k, "k")
        found = ask.store.examples(
            scalar,
            unit,
            k=self.k,
            kind=self.kind,
            distinct=None if self.distinct == "none" else self.distinct,
            window=(self.before, self.after),
            where=self.where,
            special=self.special,
            pass_type=self.pass_type,
            seed=self.seed,
        )
        return _examples_response(ask, found)


AskedContexts = Annotated[Contexts, Depends()]


@resource(router, "/examples/{name}", ExamplesModel, offers=TABLE)
def examples(
    ask: Asked,
    name: NamePath,
    unit: Annotated[str, Query(max_length=60, description="layer:unit, or layer:head:channel")],
    contexts: AskedContexts,
) -> Response:
    """Contexts of one unit: where it is strongest, weakest, anywhere, or in between."""
    return contexts.response(ask, name, unit_numbers(unit))


_EXAMPLE_SCHEMA = pa.schema(
    [
        ("token", pa.int64()),
        ("sequence", pa.int64()),
        ("position", pa.int32()),
        ("value", pa.float32()),
        ("quantile", pa.float64()),
        ("focus", pa.int32()),
        ("first_token", pa.int64()),
        ("texts", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
    ]
)


def _examples_response(ask: Ask, found: Examples) -> Response:
    """Examples in the form that is asked for."""
    rows: list[dict[str, Any]] = [
        {**row.to_json(), "first_token": row.first_token} for row in found
    ]
    beside = {
        "unit": list(found.unit),
        "kind": found.kind,
        "certificate": found.certificate.to_json(),
    }
    if ask.form is Format.JSON:
        return ask.object({**beside, "rows": rows})
    return ask.table(pa.Table.from_pylist(rows, _EXAMPLE_SCHEMA), beside)
