"""Indices, traces and ablations as JSON objects: the same members, in camelCase."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum, StrEnum
from typing import Any, TypeVar

from actstore.query.indexing import DerivedScalarIndex
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import (
    Ablation,
    ActivationIndex,
    AttentionTraceType,
    AttnSubNodeIndex,
    Index,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import ActivationLocationType, NodeType, PassType

__all__ = ["Pointer", "from_json", "to_json"]

Pointer = DerivedScalarIndex | ActivationIndex | NodeIndex | TraceConfig | Ablation
PointerT = TypeVar("PointerT", bound=Pointer)
EnumT = TypeVar("EnumT", bound=StrEnum)


def to_json(value: Pointer) -> dict[str, Any]:
    """An index, trace or ablation as a JSON object with camelCase members.

    >>> to_json(NodeIndex(NodeType.MLP_NEURON, (4, 3), 0))["tensorIndices"]
    [4, 3]
    """
    return {_camel(field.name): _encode(getattr(value, field.name)) for field in fields(value)}


def from_json(kind: type[PointerT], data: object) -> PointerT:
    """Read what :func:`to_json` wrote.

    Args:
        kind: the class to read. A ``NodeIndex`` with ``qKOrV`` becomes an
            ``AttnSubNodeIndex``.
        data: the JSON object; members with a default may be left out, and "All" stands for
            null in ``tensorIndices``.

    Raises:
        InvalidInput: a member is unknown, missing or of another type, or breaks a rule.

    >>> from_json(NodeIndex, {"nodeType": "mlp_neuron", "tensorIndices": [4], "layerIndex": 0})
    ... # doctest: +ELLIPSIS
    NodeIndex(node_type=<NodeType.MLP_NEURON: 'mlp_neuron'>, tensor_indices=(4,), ...
    """
    if not isinstance(data, Mapping):
        raise _invalid(f"{data!r} is no JSON object; {kind.__name__} is one.")
    chosen: type[Any] = AttnSubNodeIndex if kind is NodeIndex and "qKOrV" in data else kind
    members = {_camel(field.name): field for field in fields(chosen)}
    unknown = [str(key) for key in data if key not in members]
    missing = [key for key, field in members.items() if _is_required(field) and key not in data]
    if unknown or missing:
        raise _invalid(
            f"{chosen.__name__} has no member {unknown} and needs {missing}; its members are "
            f"{', '.join(members)}."
        )
    values = {members[key].name: _decode(members[key].name, value) for key, value in data.items()}
    read: PointerT = chosen(**values)
    return read


def _is_required(field: Field[Any]) -> bool:
    # A query that nobody asked for would be a wrong answer, not a default.
    return field.default is MISSING or field.name == "q_k_or_v"


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _encode(value: Any) -> Any:
    if isinstance(value, Pointer):
        return to_json(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Enum) else value


def _decode(name: str, value: object) -> Any:
    try:
        return _DECODERS[name](value)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise _invalid(f"{_camel(name)} is {value!r}; {error}.") from None


def _one_of(kind: type[EnumT]) -> Callable[[object], EnumT]:
    def decode(value: object) -> EnumT:
        if not isinstance(value, str) or value.lower() not in set(kind):
            raise ValueError(f"use {', '.join(kind)}")
        return kind(value.lower())

    return decode


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("use a name")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("use true or false")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("use a finite number")
    return float(value)


def _place(value: object) -> Index:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError("use whole numbers from 0 on, and null for none or all")
    return value


def _places(value: object) -> tuple[Index, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError("use a list")
    return tuple(None if entry == "All" else _place(entry) for entry in value)


def _location(value: object) -> ActivationLocationType:
    if not isinstance(value, str) or value not in _LOCATIONS:
        raise ValueError(f"use {', '.join(_LOCATIONS)}")
    return _LOCATIONS[value]


def _trace_type(value: object) -> AttentionTraceType | None:
    return None if value is None else _one_of(AttentionTraceType)(value)


def _downstream(value: object) -> TraceConfig | None:
    return None if value is None else from_json(TraceConfig, value)


_LOCATIONS = {location.label: location for location in ActivationLocationType}

_DECODERS: dict[str, Callable[[object], Any]] = {
    "dst": _text,
    "node_type": _one_of(NodeType),
    "activation_location_type": _location,
    "tensor_indices": _places,
    "layer_index": _place,
    "pass_type": _one_of(PassType),
    "q_k_or_v": _location,
    "node_index": lambda value: from_json(NodeIndex, value),
    "pre_or_post_act": _one_of(PreOrPostAct),
    "detach_layer_norm_scale": _flag,
    "attention_trace_type": _trace_type,
    "downstream_trace_config": _downstream,
    "index": lambda value: from_json(ActivationIndex, value),
    "value": _number,
}


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
