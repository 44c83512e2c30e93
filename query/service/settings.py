"""What a server is started with: where it listens, who may ask, and how much."""

import ipaddress
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.service.sql_limits import SqlLimits

__all__ = ["MIN_TOKEN_LENGTH", "ServerSettings", "is_loopback", "read_token"]

MIN_TOKEN_LENGTH = 16
"""Characters of a token at least: 64 bits, if they are random hexadecimal digits."""

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_EVERYWHERE = ("0.0.0.0", "::", "")
_REMOTE_REQUESTS_PER_MINUTE = 1200
"""A person's pages with their parts, and a script that asks twenty times a second."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers, validated on construction.

    Attributes:
        host: the address to listen at.
        port: the port; 0 for a free one.
        token: what a client has to show; None asks for nothing, on a loopback address only.
        allowed_hosts: names under which the server may be addressed, besides its own.
        cors_origins: origins whose pages may read answers, such as ``http://localhost:8888``.
        frame_ancestors: origins that may show its pages in a frame, besides its own; ``*`` for
            all, which is the default at a loopback address without a token: notebooks.
        max_rows: rows of one page of a table, and answers of one ranking.
        max_result_bytes: of one tensor.
        max_json_values: numbers of one tensor in JSON; more are had as Arrow or npy.
        max_cells: values that one ranking may scan.
        max_body_bytes: of a request's body.
        max_text_characters: of a text to run through the model.
        body_seconds: how long a client may take to send a body.
        requests_per_minute: of one client; None for no limit at a loopback address, and 1200
            at any other.
        threads: requests that are worked on at once; slow kinds have a share of them each.
        sql: limits of SQL; None for the worker's own.
        reload: open the store again when it has grown or was replaced.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    frame_ancestors: tuple[str, ...] = ()
    max_rows: int = 10_000
    max_result_bytes: int = 256 * 2**20
    max_json_values: int = 2**20
    max_cells: int = 500_000_000
    max_body_bytes: int = 2**20
    max_text_characters: int = 20_000
    body_seconds: float = 30.0
    requests_per_minute: int | None = None
    threads: int = 16
    sql: "SqlLimits | None" = None
    reload: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise _invalid(f"port is {self.port}; use 0 to 65535, 0 for a free one.")
        if self.token is not None and len(self.token) < MIN_TOKEN_LENGTH:
            raise _invalid(
                f"The token has {len(self.token)} characters; use {MIN_TOKEN_LENGTH} at least, "
                "such as those of `openssl rand -hex 32`."
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise _invalid("The token holds characters that no header can; use printable ASCII.")
        if self.token is None and not is_loopback(self.host):
            raise _invalid(
                f"{self.host or 'every address'} is reached from other machines, so a token is "
                "needed: give --token-file, or listen at 127.0.0.1."
            )
        positive = (
            "max_rows",
            "max_result_bytes",
            "max_json_values",
            "max_cells",
            "max_body_bytes",
            "max_text_characters",
            "body_seconds",
            "threads",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise _invalid(f"{name} is {getattr(self, name)}; it must be positive.")
        if self.requests_per_minute is not None and self.requests_per_minute < 1:
            raise _invalid(
                f"requests_per_minute is {self.requests_per_minute}; it must be at least 1."
            )
        for origin in (*self.cors_origins, *self.frame_ancestors):
            if origin != "*" and not _is_origin(origin):
                raise _invalid(
                    f"{origin!r} is no origin; write it as http://localhost:8888, or * for all."
                )
        if "*" in self.cors_origins and self.token is None:
            raise _invalid(
                "--cors '*' without a token lets every web page that you visit read the store. "
                "Name the origins, or set a token."
            )

    @property
    def rate(self) -> int | None:
        """Requests per minute of one client; None for any number."""
        if self.requests_per_minute is None and not is_loopback(self.host):
            return _REMOTE_REQUESTS_PER_MINUTE
        return self.requests_per_minute

    @property
    def framers(self) -> tuple[str, ...]:
        """Who may show the pages in a frame, as CSP has it."""
        if self.frame_ancestors:
            return ("'self'", *self.frame_ancestors)
        local = self.token is None
        # A notebook's own port is not known, and a page of another site reads nothing of a frame.
        return ("'self'", "http://localhost:*", "http://127.0.0.1:*") if local else ("'self'",)

    def host_names(self) -> frozenset[str]:
        """Names in a Host header that are this server's, lower case and without port."""
        names = {name.lower().strip("[]") for name in self.allowed_hosts}
        bound = self.host.strip("[]")
        if is_loopback(self.host) or bound in _EVERYWHERE:
            names.update(_LOOPBACK_NAMES)
        if bound in _EVERYWHERE:
            names.update(_own_names())
        else:
            names.add(bound.lower())
        return frozenset(names)


def read_token(path: Path) -> str:
    """The token in a file that nobody else can read.

    Raises:
        InvalidInput: there is no such file, others may read it, or it holds no token.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            content = file.read(4096)
    except OSError as error:
        raise _invalid(
            f"Cannot read the token file {path}: {error.strerror or error}. Make one with "
            f"`(umask 077; openssl rand -hex 32 > {path})`."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise _invalid(f"The token file {path} is no regular file.")
    if found.st_mode & 0o077:
        raise _invalid(
            f"The token file {path} has mode {stat.S_IMODE(found.st_mode):04o}: others can read "
            f"the token. Run `chmod 600 {path}`, and choose a new token if others use this machine."
        )
    if found.st_uid not in (os.geteuid(), 0):
        raise _invalid(f"The token file {path} belongs to another user; use one of your own.")
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise _invalid(f"The token file {path} holds bytes that are no ASCII text.") from None
    if not token:
        raise _invalid(f"The token file {path} is empty.")
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("")
    (True, True, False, False)
    """
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def _own_names() -> set[str]:
    """The machine's names and addresses, as far as it knows them."""
    name = socket.gethostname().lower()
    found = {name}
    # A machine that cannot look its own name up is reached by --allow-host.
    with suppress(OSError):
        found.update(str(entry[4][0]) for entry in socket.getaddrinfo(name, None))
    return found


def _is_origin(origin: str) -> bool:
    scheme, separator, rest = origin.partition("://")
    is_plain = not any(character in rest for character in "/?#;, '\"\r\n\t")
    return scheme in ("http", "https") and bool(separator) and bool(rest) and is_plain


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
