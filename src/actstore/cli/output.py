"""Where answers and errors go: tables and JSON to stdout, everything else to stderr."""

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ParamSpec
from uuid import UUID

import typer
from rich.console import Console
from rich.text import Text

from actstore.cli.display import visible
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput

__all__ = [
    "cannot_write",
    "console",
    "error_console",
    "json_text",
    "json_value",
    "print_json",
    "reports_errors",
]

_P = ParamSpec("_P")

_PLAIN_WIDTH = 120
"""Columns of a table that no terminal limits."""


def console() -> Console:
    """The console of answers; a pipe gets plain text of a fixed width."""
    return _console(stderr=False)


def error_console() -> Console:
    """The console of progress, notes and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and not os.environ.get("COLUMNS"):
        made.width = _PLAIN_WIDTH
    return made


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json_text(value))


def json_text(value: Any) -> str:
    r"""Strict JSON on one line, in ASCII, so that no control character gets through.

    >>> print(json_text({"value": float("nan"), "text": "\x1b[1m\x7f"}))
    {"value": null, "text": "\u001b[1m\u007f"}
    """
    return json.dumps(json_value(value), allow_nan=False).replace("\x7f", "\\u007f")


def json_value(value: Any) -> Any:
    """The nearest JSON value: NaN and infinities become null, dates and the like text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {str(key): json_value(member) for key, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(member) for member in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def reports_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn an error of actstore into one line on stderr and its exit code.

    With ``--json`` (the parameter ``as_json``) the line is
    ``{"error": {"kind": ..., "message": ...}}``. Other exceptions are bugs and keep their
    traceback.
    """

    @functools.wraps(command)
    def reporting(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ActstoreError as error:
            report_error(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(error.exit_code) from None

    return reporting


def report_error(error: ActstoreError, *, as_json: bool) -> None:
    """Print an error on stderr."""
    if as_json:
        fields = {"kind": error.kind.value, "message": str(error)}
        print(json_text({"error": fields}), file=sys.stderr)
        return
    message = "\n".join(visible(line) for line in str(error).splitlines())
    error_console().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def cannot_write(out: Path, error: OSError) -> InvalidInput:
    """The error for a file that `--out` names and that cannot be written."""
    return InvalidInput(
        f"Cannot write {out}: {error.strerror or error}. Choose another --out.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
