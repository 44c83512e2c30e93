"""Every derived scalar by name: the package's own, and those that a user declared."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from actstore.query.derived import attention, edges, latents, mlp, raw, residual
from actstore.query.derived.declaration import DerivedScalar, Direction, Source
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.location_names import parse_location
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = [
    "FAMILIES",
    "SCALARS",
    "inputs_of",
    "is_built_in",
    "parse_scalar",
    "register_scalar",
    "require_free_name",
    "requires_gradient",
    "rollback",
    "scalar",
    "temporary_scalars",
    "unregister_scalar",
]

_known: dict[str, DerivedScalar] = {}

SCALARS: Mapping[str, DerivedScalar] = MappingProxyType(_known)
"""Name -> declaration, family by family, then those that were registered; read-only."""

FAMILIES: Mapping[str, tuple[DerivedScalar, ...]] = MappingProxyType(
    {
        "raw": raw.SCALARS,
        "mlp": mlp.SCALARS,
        "attention": attention.SCALARS,
        "residual": residual.SCALARS,
        "latents": latents.SCALARS,
        "edges": edges.SCALARS,
    }
)
"""The package's own scalars by family."""


def register_scalar(declared: DerivedScalar, *, replace: bool = False) -> DerivedScalar:
    """Make a scalar known by its name, in this process.

    Args:
        declared: what to register; its sources are locations, or known already.
        replace: take the place of a scalar that was registered before.

    Returns:
        The scalar.

    Raises:
        InvalidInput: the name is taken, a source is unknown, or the scalar would be made
            from itself.
    """
    name = declared.name
    require_free_name(name, replace=replace)
    for source in _all_sources(declared):
        _check_source(declared, source)
    _known[name] = declared
    return declared


def unregister_scalar(scalar: str | DerivedScalar) -> None:
    """Forget a scalar that was registered.

    Raises:
        InvalidInput: it is not registered, is one of the package's own, or another scalar is
            made from it.
    """
    name = scalar if isinstance(scalar, str) else scalar.name
    if name not in _known or _is_reserved(name):
        raise InvalidInput(
            f"{name!r} is not a scalar that was registered; {_own_names()}.",
            kind=ErrorKind.UNKNOWN_SCALAR,
        )
    users = [other.name for other in _known.values() if name in _names_of_sources(other)]
    if users:
        raise _invalid(f"{', '.join(users)} is made from {name!r}. Unregister that first.")
    del _known[name]


def require_free_name(name: str, *, replace: bool = False) -> None:
    """Check that a name can be given to a scalar.

    Args:
        name: the name.
        replace: allow that of a scalar that was registered.

    Raises:
        InvalidInput: it is taken, or has a meaning to the package itself.
    """
    taken = _known.get(name)
    if _is_reserved(name):
        raise _invalid(f"{name!r} is a name of the package's own. Choose another name.")
    if taken is not None and not replace:
        raise _invalid(
            f"{name!r} is taken: it is declared in {taken.origin or 'this process'} too. Choose "
            "another name, or pass replace=True."
        )


@contextmanager
def rollback(*, always: bool = True) -> Iterator[None]:
    """Put the registered scalars back as they were, after all or where something is raised.

    Args:
        always: also where nothing is raised.
    """
    before = dict(_known)
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            _known.clear()
            _known.update(before)


@contextmanager
def temporary_scalars(*declared: DerivedScalar) -> Iterator[None]:
    """Register scalars for the length of a ``with`` block; others made inside go with them.

    Raises:
        InvalidInput: as :func:`register_scalar`.
    """
    with rollback():
        for one in declared:
            register_scalar(one)
        yield


def is_built_in(declared: DerivedScalar) -> bool:
    """Whether a scalar is one of the package's own."""
    return _BUILT_IN.get(declared.name) is declared


def _is_reserved(name: str) -> bool:
    """Whether the package itself gives a name a meaning."""
    if name in _BUILT_IN or name in set(Direction):
        return True
    try:
        parse_location(name)
    except InvalidInput:
        return False
    return True


def _all_sources(declared: DerivedScalar) -> tuple[Source, ...]:
    backward = () if declared.gradient is None else declared.gradient.sources
    return (*declared.sources, *backward)


def _names_of_sources(declared: DerivedScalar) -> set[str]:
    return {source.of for source in _all_sources(declared) if isinstance(source.of, str)}


def _check_source(declared: DerivedScalar, source: Source) -> None:
    if isinstance(source.of, ActivationLocationType) or source.of in set(Direction):
        return
    if source.of not in _known:
        close = difflib.get_close_matches(source.of, _known)
        hint = f" Did you mean {' or '.join(close)}?" if close else " Register that first."
        raise InvalidInput(
            f"{declared.name} is made from {source.of!r}, which is no known scalar.{hint}",
            kind=ErrorKind.UNKNOWN_SCALAR,
        )
    waiting, seen = [source.of], set[str]()
    while waiting:
        name = waiting.pop()
        if name == declared.name:
            raise _invalid(
                f"{declared.name} would be made from itself, by way of {source.of}. Make it "
                "from other sources."
            )
        if name not in seen and name in _known:
            seen.add(name)
            waiting += _names_of_sources(_known[name])


def _own_names() -> str:
    own = [name for name in _known if name not in _BUILT_IN]
    return f"registered are {', '.join(own)}" if own else "none is registered"


def _fill() -> Mapping[str, DerivedScalar]:
    for declared in (entry for family in FAMILIES.values() for entry in family):
        assert declared.name not in _known, f"{declared.name} is declared twice"
        unknown = _names_of_sources(declared) - {*_known, *Direction}
        assert not unknown, f"{declared.name} is declared before its sources {unknown}"
        _known[declared.name] = declared
    return MappingProxyType(dict(_known))


_BUILT_IN = _fill()


def inputs_of(declared: DerivedScalar) -> tuple[Source, ...]:
    """The raw locations and directions that a scalar rests on, each once, usual ones first."""
    found: dict[Source, None] = {}
    for source in declared.sources:
        inner = SCALARS.get(source.of) if isinstance(source.of, str) else None
        found.update(dict.fromkeys((source,) if inner is None else inputs_of(inner)))
    return tuple(found)


def requires_gradient(declared: DerivedScalar) -> bool:
    """Whether the forward value needs the gradient of a backward pass that was run.

    A gradient that is recomputed from forward values is none.

    >>> requires_gradient(SCALARS["mlp_act_times_grad"])
    True
    """
    run = (Direction.FINAL_RESIDUAL_GRAD, Direction.SUBNODE_ATTRIBUTION_GRAD)
    return any(
        source.of in run if isinstance(source.of, str) else source.pass_type is PassType.BACKWARD
        for source in inputs_of(declared)
    )


def parse_scalar(
    name: str | DerivedScalar, own: Mapping[str, DerivedScalar] = MappingProxyType({})
) -> tuple[DerivedScalar, int | None]:
    """Resolve a derived scalar by its own name, or a raw one by a TransformerLens name.

    Args:
        name: ``mlp_write_norm``, ``mlp_post``, ``blocks.3.hook_resid_post`` …; a declaration
            is taken as it is, registered or not.
        own: further scalars by name, such as a store's.

    Returns:
        The scalar, and the layer if the name holds one.

    Raises:
        InvalidInput: no such scalar; the message lists the closest and all known ones.

    >>> parse_scalar("blocks.3.mlp.hook_post")
    (DerivedScalar('mlp_post_act', axes=['neuron']), 3)
    """
    if isinstance(name, DerivedScalar):
        return name, None
    text = name.strip().lower()
    if text in own:
        return own[text], None
    if text in SCALARS:
        return SCALARS[text], None
    try:
        location, layer = parse_location(text)
    except InvalidInput:
        names = [*own, *SCALARS]
        close = difflib.get_close_matches(text, names)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise InvalidInput(
            f"Unknown derived scalar {name!r}.{hint} Known ones: {', '.join(names)}; "
            "TransformerLens names of locations (mlp_post, blocks.3.hook_resid_post) are "
            "accepted too.",
            kind=ErrorKind.UNKNOWN_SCALAR,
        ) from None
    return SCALARS[location.label], layer


def scalar(
    name: str | DerivedScalar, own: Mapping[str, DerivedScalar] = MappingProxyType({})
) -> DerivedScalar:
    """The derived scalar ``name``; see :func:`parse_scalar`.

    Raises:
        InvalidInput: no such scalar, or the name holds a layer.

    >>> scalar("mlp_post").name
    'mlp_post_act'
    """
    found, layer = parse_scalar(name, own)
    if layer is not None:
        raise InvalidInput(
            f"{name!r} names layer {layer} too; give {found.name!r} and the layer by itself.",
            kind=ErrorKind.UNKNOWN_SCALAR,
        )
    return found


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
