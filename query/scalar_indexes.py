"""Which index of a store speaks of which scalar, as the store would derive it now.

An index holds what was said of values once. It is used only while its fingerprint is that of
the scalar: the same definition, made from the same stored arrays.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.query.derived.config import DstConfig
from actstore.query.derived.declaration import DerivedScalar, Direction
from actstore.query.derived.registry import SCALARS, is_built_in
from actstore.query.sources import Sources
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.sources import Source
from actstore.store.records import canonical_json
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from actstore.store.index_spec import IndexSpec
    from actstore.store.reader import DescribedUnits

__all__ = ["arrays_of", "find_index", "fingerprint", "has_gradients"]


def find_index(
    sources: Sources, declared: DerivedScalar, config: DstConfig, part: str
) -> "DescribedUnits | None":
    """The index of a scalar that is whole and still speaks of what is stored; None for none.

    Args:
        sources: of the store.
        declared: the scalar.
        config: its autoencoders, if it has some.
        part: what the index must hold.
    """
    reader = sources.reader
    found = [
        one
        for one in reader.indexes.values()
        if isinstance(one.spec, _spec_type())
        and one.spec.scalar == declared.name
        and part in one.spec.parts
        and one.segments == reader.segments
    ]
    if not found:
        return None
    own = fingerprint(sources, declared, config)
    return next((one for one in found if _spec(one).fingerprint == own), None)


def _spec_type() -> "type[IndexSpec]":
    from actstore.store.index_spec import IndexSpec

    return IndexSpec


def _spec(one: "DescribedUnits") -> "IndexSpec":
    spec = one.spec
    assert isinstance(spec, _spec_type()), "all of a reader's indexes are"
    return spec


def fingerprint(sources: Sources, declared: DerivedScalar, config: DstConfig) -> str:
    """Digest of a scalar's definition and of what the store makes it from.

    Raises:
        InvalidInput: a user's formula holds something that cannot be told from another.
    """
    digest = hashlib.sha256()
    for part in _definition(declared):
        digest.update(part)
    autoencoders: list[str] = []
    if declared.latents is not None and config.autoencoders is not None:
        autoencoders = [one.fingerprint for one in config.family(declared.latents)]
    arrays = list(arrays_of(sources, declared))
    objective = sources.reader.objective if has_gradients(declared) else None
    digest.update(canonical_json([arrays, autoencoders, objective]))
    return digest.hexdigest()


def arrays_of(sources: Sources, declared: DerivedScalar) -> tuple[str, ...]:
    """Keys of the stored arrays that a scalar's values come from; ``token_id`` for the tokens.

    Of one with gradients that follow by the chain rule, every array: they pass through most.
    """
    arrays = sources.reader.arrays
    found: set[str] = set()
    for location, pass_type in _places(declared):
        if pass_type is PassType.BACKWARD and (location, pass_type) not in arrays:
            return tuple(sorted(array.spec.key for array in arrays.values()))
        if (location, pass_type) in arrays:
            found.add(arrays[location, pass_type].spec.key)
            continue
        layers = range(sources.n_layers) if location.has_layers else (None,)
        names = {
            name
            for layer in layers
            if (location, layer) in sources.routes
            for name in sources.roots(location, layer)
        }
        keys = {of.label: one.spec.key for (of, kind), one in arrays.items() if kind == "forward"}
        found |= {keys.get(name, name) for name in names}
    return tuple(sorted(found))


def _places(declared: DerivedScalar) -> Iterator[tuple[ActivationLocationType, PassType]]:
    """The locations that a scalar is made from, those of its sources' sources among them."""
    for source in declared.sources:
        yield from _places_of(source)


def _places_of(source: Source) -> Iterator[tuple[ActivationLocationType, PassType]]:
    if isinstance(source.of, ActivationLocationType):
        yield source.of, source.pass_type
    elif source.of in set(Direction):
        yield ActivationLocationType.RESID_POST_MLP, PassType.BACKWARD
    else:
        of = SCALARS[source.of]
        inner = of.sources
        if source.pass_type is PassType.BACKWARD and of.gradient is not None:
            inner = of.gradient.sources
        for one in inner:
            yield from _places_of(one)


def has_gradients(declared: DerivedScalar) -> bool:
    """Whether a scalar is made from gradients, and so belongs to an objective."""
    return any(pass_type is PassType.BACKWARD for _, pass_type in _places(declared))


def _definition(declared: DerivedScalar) -> Iterator[bytes]:
    """What tells a scalar from another of its name."""
    yield canonical_json(
        [
            declared.name,
            declared.definition,
            [str(axis) for axis in declared.axes],
            [[str(one.of), one.pass_type.value, str(one.layer)] for one in declared.sources],
            [str(weight) for weight in declared.weights],
            repr(declared.dependence),
            list(declared.layers or ()),
        ]
    )
    if not _is_built_in(declared) and declared.formula is not None:
        yield from _code(declared.formula, declared.name)
    for source in declared.sources:
        if source.of in SCALARS:
            yield from _definition(SCALARS[str(source.of)])


def _is_built_in(declared: DerivedScalar) -> bool:
    of = SCALARS.get(declared.name.removesuffix("_gradient"))
    return of is not None and is_built_in(of)


def _code(function: Callable[..., Any], name: str) -> Iterator[bytes]:
    """The code of a user's function, and what it took along."""
    code = getattr(function, "__code__", None)
    if code is None:
        raise _unclear(name, function)
    yield from _compiled(code)
    for cell in getattr(function, "__closure__", None) or ():
        yield from _content(cell.cell_contents, name)
    for default in getattr(function, "__defaults__", None) or ():
        yield from _content(default, name)


def _compiled(code: Any) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _compiled(constant)
        else:
            yield repr(constant).encode()


def _content(value: Any, name: str) -> Iterator[bytes]:
    if isinstance(value, np.ndarray):
        yield repr((value.dtype, value.shape)).encode() + value.tobytes()
    elif hasattr(value, "detach"):
        yield from _content(value.detach().numpy(), name)
    elif callable(value):
        yield from _code(value, name)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _content(one, name)
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _content(value[key], name)
    elif value is None or isinstance(value, str | bytes | int | float | complex):
        yield repr(value).encode()
    else:
        raise _unclear(name, value)


def _unclear(name: str, value: object) -> InvalidInput:
    return InvalidInput(
        f"{name} cannot be indexed: its formula holds a {type(value).__name__}, and nobody could "
        "tell later whether it is still the same. Use numbers, arrays and plain functions.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
