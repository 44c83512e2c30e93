"""Scalars from a file of the user's own: run it, and know them by name."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from actstore.query.derived.declaration import DerivedScalar
from actstore.query.derived.registry import SCALARS, rollback, unregister_scalar
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["load_scalars"]

_loaded: dict[Path, tuple[str, ...]] = {}
"""File -> the names that it registered, to be given anew when it is loaded again."""


def load_scalars(path: str | Path) -> tuple[DerivedScalar, ...]:
    """Run a user's own file and register the scalars that it declares.

    A file that is loaded again gives its scalars anew. Where anything fails, the registered
    scalars stay as they were.

    Args:
        path: a Python file. It runs with all rights of this process.

    Returns:
        The scalars that the file registered.

    Raises:
        InvalidInput: there is no such file, it raises, or it registers nothing.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise _invalid(f"There is no file {str(path)!r}. Name the Python file of your scalars.")
    with rollback(always=False):
        for known in reversed(_loaded.get(file, ())):
            if known in SCALARS:
                unregister_scalar(known)
        before = set(SCALARS)
        module_name = f"actstore_scalars_{file.stem}"
        spec = spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise _invalid(f"{str(path)!r} is no Python file; its name must end in .py.")
        module = module_from_spec(spec)
        # Dataclasses and pickling look their module up by its name.
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}", kind=error.kind) from error
        except Exception as error:
            raise _invalid(
                f"{path} raised {type(error).__name__}: {error}. Correct it, and try "
                f"`python {path}`."
            ) from error
        found = tuple(one for label, one in SCALARS.items() if label not in before)
        if not found:
            raise _invalid(
                f"{path} registers no scalar. Put `@actstore.derived_scalar(…)` on a function."
            )
    _loaded[file] = tuple(one.name for one in found)
    return found


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
