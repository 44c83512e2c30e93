"""The command line: `actstore COMMAND`, or `python -m actstore.cli COMMAND`.

Exit codes: 0 done, also an ingest that Ctrl-C stopped; 1 the answer is bad news; 2 wrong
use; 3 the store is damaged, or lacks what the question needs. Commands import what they
need when they run, so that looking at a store does not pay for torch.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from actstore.cli import (
    adding,
    demonstration,
    deriving,
    exporting,
    indexing,
    ingesting,
    listing,
    querying,
    serving,
    statements,
    thresholds,
    upkeep,
)

__all__ = ["app", "main"]


class _Arguments(TyperGroup):
    """Keeps what was typed, so that a stopped ingest can say how to go on."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ingesting.ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="actstore",
    cls=_Arguments,
    help="Keep a model's activations on disk, and ask them anything later.",
    no_args_is_help=True,
    # A bug's traceback is for those who report it: plain, and without the values in it.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"actstore {version('actstore')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and stop."
        ),
    ] = False,
) -> None:
    pass


def _register(command: Callable[..., None], summary: str, *examples: str) -> None:
    name = command.__name__.strip("_").replace("_", "-")
    lines = [f"  actstore {name} {example}".rstrip() for example in examples]
    # Click keeps the lines of a paragraph that begins with a backspace.
    epilog = "\b\n" + "\n".join(["Examples:", *lines])
    app.command(name, short_help=summary, epilog=epilog)(command)


_register(
    demonstration.demo,
    "Ingest this machine's Python library, then ask about it.",
    "",
    "--out /tmp/demo --limit-tokens 200k",
)
_register(
    ingesting.estimate,
    "Say what an ingest would write and take.",
    "gpt2 'corpus/*.txt' --locations neurons",
    "demo data.jsonl --text-column body --limit-tokens 2M --json",
)
_register(ingesting.plan, "Say how a corpus would be cut up.", "gpt2 'corpus/*.txt' --context 512")
_register(
    ingesting.ingest,
    "Run a model over a corpus and keep its activations.",
    "gpt2 'corpus/*.txt' --out runs/gpt2 --limit-tokens 2M --max-bytes 100GB",
    "demo data.parquet --out runs/demo --keep attn_query=raw --columns label,split",
)
_register(listing.info, "Say what a store holds.", "runs/gpt2", "runs/gpt2 --json")
_register(listing.locations, "List what can be kept, or what a store has.", "", "runs/gpt2")
_register(
    listing.scalars,
    "List the derived scalars, or explain one.",
    "",
    "mlp_write_norm",
    "--scalars my_scalar.py --json",
)
_register(
    querying.topk,
    "Rank every value of a scalar, exactly.",
    "runs/gpt2 mlp_write_norm -k 10",
    "runs/gpt2 mlp_post_act --layer 3 --neuron 712 --distinct sequence",
    "runs/gpt2 mlp_post_act --where \"text = ' the'\" --units 'kurtosis > 10' --explain",
)
_register(
    querying.examples,
    "Show contexts of one unit.",
    "runs/gpt2 mlp_post_act 3:712",
    "runs/gpt2 mlp_post_act 3:712 --kind quantile -k 10 --window 10,5",
)
_register(
    thresholds.filter_,
    "List every value beyond a threshold.",
    "runs/gpt2 mlp_post_act --above 6 --layer 3",
    "runs/gpt2 mlp_write_norm --below -2 --neuron 712 --layer 3 --json",
)
_register(
    thresholds.count,
    "Count each unit's values beyond a threshold.",
    "runs/gpt2 mlp_post_act --above 6",
    "runs/gpt2 mlp_post_act --above 0 --layer 3 --where \"text = ' the'\"",
)
_register(
    thresholds.compare,
    "Show several scalars side by side where each is greatest.",
    "runs/gpt2 mlp_post_act mlp_write_norm -k 5",
)
_register(
    deriving.derive,
    "Compute a scalar on whole sequences.",
    "runs/gpt2 mlp_write_norm --sequence 17 --layer 3",
    "runs/gpt2 resid_post_mlp --sequence 0 --sequence 1 --out values.npz",
)
_register(
    statements.sql,
    "Ask the tables of a store.",
    "runs/gpt2 'SELECT layer, neuron, kurtosis FROM neurons ORDER BY 3 DESC LIMIT 10'",
    "runs/gpt2 'FROM tokens' --format parquet --out tokens.parquet",
)
_register(
    adding.add_saes,
    "Keep the latents of autoencoders.",
    "runs/gpt2 saes/layer3 saes/layer4",
    "runs/gpt2 params.npz --location resid_post_mlp --layer 20 --name gemma-16k",
    "runs/gpt2",
)
_register(
    indexing.index,
    "Index scalars, or copy arrays by column.",
    "runs/gpt2 mlp_act_times_grad",
    "runs/gpt2 mlp_post_act --part histogram",
    "runs/gpt2 --columns mlp_post_act",
)
_register(
    exporting.export,
    "Write answers or neuron pages to files.",
    "runs/gpt2 --topk mlp_write_norm -o top.parquet",
    "runs/gpt2 --neurons neuronpedia --units 'layer = 3' -o pages",
)
_register(
    serving.serve,
    "Answer over HTTP, and show pages in a browser.",
    "runs/gpt2 --open",
    "runs/gpt2 --model gpt2 -p 8321",
    "runs/gpt2 --host 0.0.0.0 --token-file token.txt --allow-host lab.example",
)
_register(upkeep.verify, "Read every byte against its checksum.", "runs/gpt2")
_register(upkeep.compact, "Merge what queries need of all segments.", "runs/gpt2")


def main() -> None:
    """Run the command line with the process' arguments."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets another one, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="actstore")
