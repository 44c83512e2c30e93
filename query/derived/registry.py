"""Every derived scalar by name."""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from actstore.query.derived import attention, mlp, raw, residual
from actstore.query.derived.declaration import DerivedScalar
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import parse_location

__all__ = ["SCALARS", "parse_scalar", "scalar"]


def _register(families: Iterable[tuple[DerivedScalar, ...]]) -> Mapping[str, DerivedScalar]:
    known: dict[str, DerivedScalar] = {}
    for declaration in (entry for family in families for entry in family):
        unknown = [
            source.of
            for source in declaration.sources
            if isinstance(source.of, str) and source.of not in known
        ]
        if declaration.name in known or unknown:
            raise InvalidInput(
                f"Derived scalar {declaration.name!r} is declared twice, or before its sources "
                f"{unknown}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        known[declaration.name] = declaration
    return MappingProxyType(known)


SCALARS = _register((raw.SCALARS, mlp.SCALARS, attention.SCALARS, residual.SCALARS))
"""Name -> declaration, family by family."""


def parse_scalar(name: str) -> tuple[DerivedScalar, int | None]:
    """Resolve a derived scalar by its own name, or a raw one by a TransformerLens name.

    Args:
        name: ``mlp_write_norm``, ``mlp_post``, ``blocks.3.hook_resid_post`` …

    Returns:
        The scalar, and the layer if the name holds one.

    Raises:
        InvalidInput: no such scalar; the message lists the closest and all known ones.

    >>> parse_scalar("blocks.3.mlp.hook_post")
    (DerivedScalar('mlp_post_act', axes=['neuron']), 3)
    """
    text = name.strip().lower()
    if text in SCALARS:
        return SCALARS[text], None
    try:
        location, layer = parse_location(text)
    except InvalidInput:
        close = difflib.get_close_matches(text, SCALARS)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise InvalidInput(
            f"Unknown derived scalar {name!r}.{hint} Known ones: {', '.join(SCALARS)}; "
            "TransformerLens names of locations (mlp_post, blocks.3.hook_resid_post) are "
            "accepted too.",
            kind=ErrorKind.UNKNOWN_SCALAR,
        ) from None
    return SCALARS[location.label], layer


def scalar(name: str) -> DerivedScalar:
    """The derived scalar ``name``; see :func:`parse_scalar`.

    Raises:
        InvalidInput: no such scalar, or the name holds a layer.

    >>> scalar("mlp_post").name
    'mlp_post_act'
    """
    found, layer = parse_scalar(name)
    if layer is not None:
        raise InvalidInput(
            f"{name!r} names layer {layer} too; give {found.name!r} and the layer by itself.",
            kind=ErrorKind.UNKNOWN_SCALAR,
        )
    return found
