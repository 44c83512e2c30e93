"""How stores and answers show themselves in a notebook: the pages' own templates.

Each function gives HTML that stands by itself, for a ``_repr_html_``; or None where the
``server`` extra, which brings the templates, is not installed: then the plain repr is shown.
"""

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pyarrow as pa

from actstore.query.views.colours import Scale
from actstore.query.views.strips import TokenStrip, strip_of
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    import altair as alt
    from duckdb import DuckDBPyRelation

    from actstore.query.examples import Examples
    from actstore.query.neuron import Neuron
    from actstore.query.results import TopK
    from actstore.query.service.server import BackgroundServer
    from actstore.query.session import Store
    from actstore.query.views.neuron_card import NeuronCard

__all__ = [
    "View",
    "chart",
    "examples_html",
    "neuron_html",
    "store_html",
    "strips_html",
    "topk_html",
    "view",
]

_SHOWN_ROWS = 50
"""Rows of a ranking that a notebook shows; all of them are in its table."""

_servers: "WeakKeyDictionary[Store, BackgroundServer]" = WeakKeyDictionary()


def store_html(store: "Store") -> str | None:
    """An open store: its counts, its coverage, and where its values come from."""
    return _fragment("store", info=store.info(), locations=tuple(store.locations.values()))


def topk_html(found: "TopK") -> str | None:
    """The first rows of a ranking, with its certificate.

    Raises:
        StoreDamaged: a file that the texts are read from is missing or fails its checksum.
    """
    table = found.to_arrow()
    rows = table.slice(0, _SHOWN_ROWS).to_pylist()
    return _fragment(
        "topk",
        columns=table.column_names,
        rows=rows,
        total=table.num_rows,
        scale=Scale.over(row["value"] for row in rows),
        certificate=found.certificate,
    )


def examples_html(found: "Examples") -> str | None:
    """Examples of a unit as strips on one scale."""
    scale = Scale.over(value for example in found for value in example.values)
    strips = [
        strip_of(
            example.texts,
            example.values,
            scale,
            first_row=example.first_token,
            first_position=example.position - example.focus,
            focus=example.focus,
            sequence=example.sequence,
            quantile=example.quantile,
        )
        for example in found
    ]
    title = f"{found.certificate.scalar} {':'.join(map(str, found.unit))}, {found.kind}"
    return _fragment(
        "strips", title=title, strips=strips, scale=scale, certificate=found.certificate
    )


def strips_html(strips: "list[TokenStrip] | TokenStrip", title: str = "") -> str | None:
    """Token strips on the scale that they were made with.

    Args:
        strips: one or several.
        title: what they are.
    """
    several = [strips] if isinstance(strips, TokenStrip) else list(strips)
    return _fragment("strips", title=title, strips=several, scale=None, certificate=None)


def neuron_html(found: "Neuron | NeuronCard") -> str | None:
    """A neuron: statistics, distribution, what it promotes, and examples."""
    from actstore.query.views.neuron_card import NeuronCard

    if isinstance(found, NeuronCard):
        return _fragment("neuron", view=found)
    return _fragment("neuron", view=NeuronCard.of(found._store, found.layer, found.neuron, k=6))


def chart(answer: "pa.Table | DuckDBPyRelation") -> "alt.Chart":
    """What fits the columns of a table, or of a query's answer, as an Altair chart.

    A label and a number make bars, two numbers points or a line, one number a histogram.

    Args:
        answer: a table, or what ``store.sql`` returns.

    Raises:
        InvalidInput: nothing fits, or the ``viewer`` extra is not installed.
    """
    from actstore.query.views.charts import can_draw, suggest, suggested_chart

    if not can_draw():
        raise InvalidInput(
            "Charts need the extra: pip install 'actstore[viewer]'.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    table = answer if isinstance(answer, pa.Table) else answer.to_arrow_table()
    wanted = suggest(table)
    if wanted is None:
        raise InvalidInput(
            f"No chart fits the columns {', '.join(table.column_names)} of {table.num_rows} rows; "
            "give a label and a number, or numbers, of two rows at least.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return suggested_chart(table, wanted)


def _fragment(kind: str, **context: Any) -> str | None:
    try:
        from actstore.query.service.pages.templating import environment, style_sheet
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("actstore"):
            raise
        return None
    template = environment().get_template("notebook.html")
    return template.render(kind=kind, style=style_sheet(), base="", **context)


@dataclass(frozen=True)
class View:
    """A page of the viewer beside a cell.

    Attributes:
        url: the page's address.
        height: of the frame, in pixels.
        server: what answers; None if somebody else's does.
    """

    url: str
    height: int
    server: "BackgroundServer | None" = None

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.url)}" width="100%" height="{self.height}" '
            'title="actstore viewer" style="border:1px solid #8888"></iframe>'
        )

    def close(self) -> None:
        """Stop answering, for every view of the same store."""
        if self.server is not None:
            self.server.close()
            for store, server in list(_servers.items()):
                if server is self.server:
                    del _servers[store]


def view(store: "Store", path: str = "/", *, height: int = 700) -> View:
    """A page of the viewer in a frame, from a server in this process.

    One server answers for all views of a store, at this machine's loopback address.

    Args:
        store: the open store.
        path: of the page, such as ``/neurons/3/17``.
        height: of the frame, in pixels.

    Raises:
        InvalidInput: the path is not one of this server, or its extra is not installed.
    """
    if not path.startswith("/") or path.startswith("//"):
        raise InvalidInput(
            f"path is {path!r}; give one of the viewer's, such as /neurons/3/17.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    server = _servers.get(store)
    if server is None:
        try:
            from actstore.query.service.server import background
        except ModuleNotFoundError as error:
            raise InvalidInput(
                f"The viewer needs {error.name}; install the extra: pip install "
                "'actstore[server,viewer]'.",
                kind=ErrorKind.INVALID_ARGUMENT,
            ) from error
        server = _servers[store] = background(store)
    return View(server.url + path, height, server)
