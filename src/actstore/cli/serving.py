"""The command `serve`: a store over HTTP, and as pages."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actstore.cli.display import visible
from actstore.cli.options import Device, OfObjective, ScalarFiles, StorePath, load_scalar_files
from actstore.cli.output import error_console, reports_errors
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from actstore.query.service.settings import ServerSettings
    from actstore.query.session import Store

__all__ = ["serve"]

_DEFAULT_OBJECTIVE = "next_token_log_prob"


@reports_errors
def serve(
    store: StorePath,
    port: Annotated[
        int, typer.Option("--port", "-p", metavar="PORT", help="0 for a free one.")
    ] = 0,
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="Where to listen; this machine alone."),
    ] = "127.0.0.1",
    show: Annotated[bool, typer.Option("--open", help="Open the address in the browser.")] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Ask clients for the token in this file; mode 600. Needed to listen elsewhere "
            "than at this machine.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A further name of this server; repeatable."
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors",
            metavar="ORIGIN",
            help="Let pages of this origin read answers, such as http://localhost:8888; repeatable.",
        ),
    ] = None,
    frame: Annotated[
        list[str] | None,
        typer.Option(
            "--frame", metavar="ORIGIN", help="Let pages of this origin show ours; repeatable."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="The store's model: run texts that people type, too."
        ),
    ] = None,
    device: Device = "auto",
    objective: OfObjective = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Show new segments as they are committed.")
    ] = False,
    scalar_files: ScalarFiles = None,
) -> None:
    """Answer over HTTP, and show pages, until Ctrl-C. The store is only read.

    What is committed when the server starts is what it shows; later segments show after a
    restart, or with --reload.
    """
    serve_store, settings_of = _service()
    from actstore.query.session import Store

    settings = settings_of(
        host=host,
        port=port,
        token=_token(token_file),
        allowed_hosts=tuple(allow_host or ()),
        cors_origins=tuple(cors or ()),
        frame_ancestors=tuple(frame or ()),
        reload=reload,
    )
    load_scalar_files(scalar_files)
    with Store(store, objective=_stored_objective(store, objective, model)) as opened:
        prompt = None if model is None else _prompt(opened, model, device, objective)

        def started(url: str) -> None:
            note = f"serving {opened.path}; Ctrl-C stops"
            error_console().print(Text(visible(note), "dim"), soft_wrap=True)
            print(url, flush=True)
            if show:
                import webbrowser

                webbrowser.open(url)

        serve_store(opened, settings, prompt=prompt, started=started)


def _service() -> "tuple[Callable[..., None], type[ServerSettings]]":
    """The server's entry points.

    Raises:
        InvalidInput: what the `server` extra brings is not installed.
    """
    try:
        from actstore.query.service.server import serve as serve_store
        from actstore.query.service.settings import ServerSettings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "actstore":
            raise
        raise InvalidInput(
            f"`actstore serve` needs {error.name}, which is not installed. Run "
            "`pip install 'actstore[server]'`.",
            kind=ErrorKind.INVALID_ARGUMENT,
        ) from error
    return serve_store, ServerSettings


def _token(token_file: Path | None) -> str | None:
    if token_file is None:
        return None
    from actstore.query.service.settings import read_token

    return read_token(token_file)


def _stored_objective(path: Path, objective: str | None, model: str | None) -> str | None:
    """The objective to open the store with: one that it has, or else only of texts."""
    if objective is None or model is None:
        return objective
    from actstore.store.reader import StoreReader

    try:
        StoreReader(path, objective=objective).close()
    except Unavailable:
        return None
    return objective


def _prompt(
    opened: "Store", model: str, device: str, objective: str | None
) -> "Callable[[str], Any]":
    """Runs a text through the store's model.

    Raises:
        InvalidInput: it is not the model that the store is of, or the objective is unknown.
    """
    from actstore.ingest.model import load_model
    from actstore.ingest.objectives import parse_objective
    from actstore.prompt import Prompt

    loaded = load_model(model, device=device)
    expected = opened.reader.manifest.model["fingerprint"]
    if loaded.fingerprint != expected:
        raise InvalidInput(
            f"{model} is not the model of this store: its weights have another fingerprint "
            f"({loaded.fingerprint[:12]} instead of {expected[:12]}). Give --model "
            f"{opened.model_name}.",
            kind=ErrorKind.CONFIG_CONFLICT,
        )
    chosen = objective or _DEFAULT_OBJECTIVE
    parse_objective(chosen)
    return lambda text: Prompt(loaded, text, objective=chosen)
