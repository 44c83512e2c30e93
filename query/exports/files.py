"""Files that are there whole or not at all, and replace nothing by accident."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actstore.store.errors import ErrorKind, InvalidInput, WriteFailed

__all__ = ["new_file", "refuse_existing"]


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place once the block is left.

    Args:
        path: where the file goes; its directory is made.
        force: replace a file that is there.

    Raises:
        InvalidInput: something is there, and ``force`` is not given.
        WriteFailed: the disk is full, read-only or failing.
    """
    if not force:
        refuse_existing([path])
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        _place(temporary, path, force=force)
    except OSError as error:
        raise WriteFailed(
            f"Cannot write {path}: {error.strerror or error}. Choose another place, or make room.",
            kind=ErrorKind.WRITE_FAILED,
        ) from error
    finally:
        # Where nothing could be written there is nothing to remove, whatever the reason.
        with suppress(OSError):
            temporary.unlink()


def _place(temporary: Path, path: Path, *, force: bool) -> None:
    if not force:
        try:
            # Unlike a rename, a link never takes the place of what came meanwhile.
            os.link(temporary, path)
        except FileExistsError:
            raise _exists(path) from None
        except OSError:
            # Some file systems have no links.
            refuse_existing([path])
        else:
            return
    temporary.replace(path)


def refuse_existing(paths: list[Path]) -> None:
    """Check that no file of an export is there yet.

    Raises:
        InvalidInput: one is.
    """
    for path in paths:
        if path.exists():
            raise _exists(path)


def _exists(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path} exists already. Choose another name, or say force.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
