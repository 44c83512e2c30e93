"""Which index of a store speaks of which scalar, as the store would derive it now.

An index holds what was said of values once. It is used only while its fingerprint is that of
the scalar: the same definition, made from the same stored arrays.
"""

import dis
import hashlib
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
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

_PLAIN = (str, bytes, int, float, complex, np.generic)


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
    try:
        own = fingerprint(sources, declared, config)
    except InvalidInput:
        # Nobody can tell whether it is the same, so it is not.
        return None
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
        # With its length: 1 and 12 are not 11 and 2.
        digest.update(len(part).to_bytes(8, "little") + part)
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
        yield from _Formula(declared.name).code(declared.formula)
    for source in declared.sources:
        if source.of in SCALARS:
            yield from _definition(SCALARS[str(source.of)])


def _is_built_in(declared: DerivedScalar) -> bool:
    of = SCALARS.get(declared.name.removesuffix("_gradient"))
    return declared.origin is None and of is not None and is_built_in(of)


class _Formula:
    """What tells a user's function from another: its code, and all that it speaks of."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: set[int] = set()

    def code(self, function: Callable[..., Any]) -> Iterator[bytes]:
        """The code of a function, and what it took along."""
        code = getattr(function, "__code__", None)
        if code is None or getattr(function, "__self__", None) is not None:
            raise _unclear(self._name, function)
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        yield from self._compiled(code)
        for cell in getattr(function, "__closure__", None) or ():
            yield from self._content(cell.cell_contents)
        yield from self._content(getattr(function, "__defaults__", None))
        yield from self._content(getattr(function, "__kwdefaults__", None))
        known = getattr(function, "__globals__", {})
        for word in sorted(_global_names(code)):
            # What is not there is the language's own, and its name is in the code.
            if word in known:
                yield word.encode()
                yield from self._of_module(known[word], known.get("__name__"))

    def _of_module(self, value: Any, module: str | None) -> Iterator[bytes]:
        """What a name of the function's module stands for; what was imported, by its name."""
        home, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(value, ModuleType):
            yield value.__name__.encode()
        elif callable(value) and path is not None and home != module:
            yield f"{home}.{path}".encode()
        else:
            yield from self._content(value)

    def _compiled(self, code: CodeType) -> Iterator[bytes]:
        yield code.co_code
        yield repr(code.co_names).encode()
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from self._compiled(constant)
            else:
                yield from self._content(constant)

    def _content(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise _unclear(self._name, value)
            yield repr((value.dtype, value.shape)).encode() + value.tobytes()
        elif hasattr(value, "detach"):
            yield from self._tensor(value)
        elif isinstance(value, tuple | list):
            yield f"{len(value)} of".encode()
            for one in value:
                yield from self._content(one)
        elif isinstance(value, set | frozenset):
            # The order of a set's members is another one in every process.
            yield from self._content(sorted(map(repr, value)))
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                yield repr(key).encode()
                yield from self._content(value[key])
        elif value is None or value is Ellipsis or isinstance(value, _PLAIN):
            yield repr(value).encode()
        elif callable(value):
            yield from self.code(value)
        else:
            raise _unclear(self._name, value)

    def _tensor(self, value: Any) -> Iterator[bytes]:
        import torch

        yield repr((value.dtype, tuple(value.shape))).encode()
        # As bytes: numpy does not know every dtype that a tensor may have.
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _global_names(code: CodeType) -> set[str]:
    """Names that a function's code, and that of functions inside, looks up in its module."""
    found = {str(one.argval) for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _global_names(constant)
    return found


def _unclear(name: str, value: object) -> InvalidInput:
    return InvalidInput(
        f"{name} cannot be indexed: its formula holds a {type(value).__name__}, and nobody could "
        "tell later whether it is still the same. Use numbers, arrays and plain functions.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
