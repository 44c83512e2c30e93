"""The command `demo`: a real store of this machine's own text, and what to ask of it."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.rule import Rule
from rich.text import Text

from actstore.cli.display import byte_text, duration_text, fields_table, print_table, visible
from actstore.cli.ingesting import ARGUMENTS, run_ingest
from actstore.cli.listing import print_info
from actstore.cli.output import console, reports_errors
from actstore.cli.progress import PhaseProgress
from actstore.cli.querying import print_examples, print_topk
from actstore.cli.summaries import print_report
from actstore.cli.words import token_count
from actstore.store.errors import ErrorKind, InvalidInput, NotAStore, StoreConflict

if TYPE_CHECKING:
    from rich.console import Console

    from actstore.query.session import Store

__all__ = ["demo"]

_SELECTIVE = """
SELECT layer, neuron, kurtosis, firing_rate, max, promoted[1:4] AS promotes
FROM neurons WHERE NOT dead ORDER BY kurtosis DESC, layer, neuron LIMIT 8
"""
_SHOWN_NEURONS = 3
_SHOWN_CONTEXTS = 5


@reports_errors
def demo(
    typed: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the store goes.")
    ] = Path("runs/demo"),
    limit_tokens: Annotated[
        str, typer.Option("--limit-tokens", metavar="N", help="Tokens to ingest: 120k.")
    ] = "120k",
) -> None:
    """Ingest Python's standard library through the shipped model, then ask about it."""
    shown = console()
    took: dict[str, float] = {}
    limit = token_count(limit_tokens)
    try:
        finished = _ingest(shown, out, limit, took)
    except KeyboardInterrupt:
        finished = False
    if not finished:
        shown.print("Stopped. What is committed is safe; this goes on where it ended:")
        shown.print(f"  actstore {shlex.join(typed.meta[ARGUMENTS])}", soft_wrap=True)
        return
    with _timed(took, "questions"):
        layer, neuron = _ask(shown, out)
    shown.print(Rule("what took how long", align="left"))
    shown.print(fields_table({phase: duration_text(seconds) for phase, seconds in took.items()}))
    _print_next(shown, out, f"{layer}:{neuron}")


def _ingest(shown: "Console", out: Path, limit: int | None, took: dict[str, float]) -> bool:
    """Make the store, or find that it is there; False if Ctrl-C stopped it."""
    with _timed(took, "loading torch and the model"):
        from actstore.ingest.demo import standard_library_files
        from actstore.ingest.model import load_model
        from actstore.ingest.preparation import Corpus
        from actstore.ingest.settings import IngestSettings

        loaded = load_model("demo", device="cpu")
        try:
            files = standard_library_files()
        except FileNotFoundError as error:
            raise InvalidInput(
                f"There is {error}. Ingest a corpus of your own: actstore ingest demo FILES "
                "--out DIR.",
                kind=ErrorKind.EMPTY_CORPUS,
            ) from error
    if _is_there(out, loaded.fingerprint):
        shown.print(f"{visible(str(out))} is there already; nothing to ingest.")
        return True
    shown.print(
        f"Ingesting {limit:,} tokens of Python's standard library through the shipped model "
        f"into {visible(str(out))}."
    )
    progress = PhaseProgress()
    started = time.monotonic()
    report, _ = run_ingest(
        loaded,
        Corpus(files),
        out,
        IngestSettings(limit_tokens=limit),
        quiet=False,
        progress=progress,
    )
    ended = time.monotonic()
    first = progress.first.get("forward", ended)
    last = progress.last.get("forward", ended)
    took["planning and probing"] = first - started
    took["forward passes and writing"] = last - first
    took["index, catalog, self-check"] = ended - last
    if not report.interrupted:
        print_report(report)
    return not report.interrupted


def _is_there(out: Path, fingerprint: str) -> bool:
    """Whether a finished demo store of this model is there.

    Raises:
        StoreConflict: a store of another model is.
    """
    from actstore.store.reader import StoreReader

    try:
        reader = StoreReader(out)
    except NotAStore:
        return False
    try:
        if reader.manifest.model["fingerprint"] != fingerprint:
            raise StoreConflict(
                f"{out} holds a store of {reader.manifest.model['name']}, made with other weights "
                "than the model shipped here. Remove it, or choose another --out.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )
        return 0 < len(reader.segments) == reader.planned_segments
    finally:
        reader.close()


def _ask(shown: "Console", out: Path) -> tuple[int, int]:
    """The tour: what is there, telling neurons, one ranking, one SQL query.

    Returns:
        Layer and neuron of the first of the telling ones.
    """
    from actstore.query.session import Store

    folder = shlex.quote(str(out))
    with Store(out) as store:
        shown.print(Rule(f"actstore info {folder}", align="left"))
        found = store.info()
        print_info(shown, found)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shown.print(f"{byte_text(size)} on disk")
        neurons = _neurons(store)
        for layer, neuron, title in neurons:
            command = f"actstore examples {folder} mlp_post_act {layer}:{neuron}"
            shown.print(Rule(f"{command} -k {_SHOWN_CONTEXTS}", align="left"))
            with _announced(shown):
                contexts = store.examples("mlp_post_act", (layer, neuron), k=_SHOWN_CONTEXTS)
                print_examples(shown, contexts, title=title)
        shown.print(Rule(f"actstore topk {folder} mlp_write_norm -k 8", align="left"))
        with _announced(shown):
            ranking = store.topk("mlp_write_norm", k=8)
            print_topk(shown, ranking)
        query = " ".join(_SELECTIVE.split())
        shown.print(Rule(f"actstore sql {folder} ...", align="left"))
        shown.print(Text(query, "dim"))
        with _announced(shown):
            answer = store.sql(_SELECTIVE).to_arrow_table()
            rows = [list(row.values()) for row in answer.to_pylist()]
            print_table(shown, answer.column_names, rows)
    return neurons[0][:2]


def _neurons(store: "Store") -> list[tuple[int, int, str]]:
    """Layer, neuron and title of those to show."""
    from actstore.ingest.demo import TELLING_NEURONS

    if TELLING_NEURONS:
        return [(one.layer, one.neuron, one.title) for one in TELLING_NEURONS]
    rows: list[tuple[Any, ...]] = store.sql(_SELECTIVE).fetchall()
    return [(row[0], row[1], f"kurtosis {row[2]:.1f}") for row in rows[:_SHOWN_NEURONS]]


def _print_next(shown: "Console", out: Path, unit: str) -> None:
    folder = shlex.quote(str(out))
    shown.print("next:")
    for line in (
        f"actstore topk {folder} mlp_post_act --layer 3 --distinct sequence --explain",
        f"actstore examples {folder} mlp_post_act {unit} --kind quantile -k 8",
        f"actstore topk {folder} mlp_write_norm --where \"text = ' self'\" -k 10",
        f'actstore sql {folder} "FROM documents LIMIT 5"',
        f"actstore derive {folder} resid_post_mlp --sequence 0 --layer 3",
        f"actstore verify {folder}",
        "actstore ingest gpt2 'your/*.txt' --out runs/gpt2 --limit-tokens 100k",
    ):
        shown.print(f"  {line}", soft_wrap=True)


@contextmanager
def _timed(took: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    took[phase] = time.monotonic() - started


@contextmanager
def _announced(shown: "Console") -> Iterator[None]:
    started = time.monotonic()
    yield
    shown.print(Text(f"in {duration_text(time.monotonic() - started)}", "dim"))
