"""The command that adds autoencoders' latents to a store: `add-saes`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actstore.cli.display import byte_text, count_text, print_table
from actstore.cli.ingesting import ARGUMENTS
from actstore.cli.options import AsReport, Quiet, StorePath
from actstore.cli.output import console, error_console, print_json, reports_errors
from actstore.cli.progress import PhaseProgress

if TYPE_CHECKING:
    from actstore.query.latent_ingest import AddedLatents

__all__ = ["add_saes"]


@reports_errors
def add_saes(
    ctx: typer.Context,
    store: StorePath,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Autoencoders, one per layer; without one, the store's own are completed.",
        ),
    ] = None,
    location: Annotated[
        str | None,
        typer.Option("--location", metavar="L", help="What they read, if the files do not say."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", metavar="N", help="The layer, if the file does not say."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="SET", help="Name of the set of latents.")
    ] = None,
    as_json: AsReport = False,
    quiet: Quiet = False,
) -> None:
    """Compute autoencoders' latents at every committed token and keep them, as a set.

    Run again, it goes on where it stopped, and completes what was ingested since.
    """
    from actstore.query.latent_ingest import add_autoencoders, complete_latents
    from actstore.store.model.autoencoder_formats import load_autoencoder

    added: list[AddedLatents]
    try:
        with PhaseProgress(quiet=quiet) as progress:
            if paths:
                loaded = [load_autoencoder(path, location=location, layer=layer) for path in paths]
                added = add_autoencoders(store, loaded, name=name, progress=progress)
            else:
                added = complete_latents(store, name=name, progress=progress)
    except KeyboardInterrupt:
        _print_stop(ctx, as_json=as_json)
        return
    if as_json:
        print_json({"rows": [one.to_json() for one in added]})
        return
    rows = [
        [
            one.set,
            one.location,
            " ".join(map(str, one.layers)),
            f"{one.segments} ({one.written} new)",
            count_text(one.entries),
            byte_text(one.bytes),
        ]
        for one in added
    ]
    names = ["latents", "of", "layers", "segments", "non-zero, new", "written"]
    print_table(console(), names, rows)


def _print_stop(ctx: typer.Context, *, as_json: bool) -> None:
    resume = f"actstore {shlex.join(ctx.meta[ARGUMENTS])}"
    if as_json:
        print_json({"interrupted": True, "resume": resume})
        return
    error_console().print("Stopped. What is committed is safe; this goes on where it ended:")
    print(f"  {resume}")
