"""Indices into derived scalars, and what layers of a source are taken.

Nodes and activations are pointed at by the classes of :mod:`actstore.store.nodes`; here
is their counterpart for derived scalars, and the way between them. Formulas and names:
derived_scalars.md (c.4) and (d).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

from actstore.query.derived.declaration import DerivedScalar
from actstore.query.derived.registry import scalar
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import NODE_LOCATIONS, Index, NodeIndex, index_axes
from actstore.store.vocabulary import Dimension, PassType

__all__ = [
    "DUMMY",
    "ConstantLayerIndexer",
    "DerivedScalarIndex",
    "IdentityLayerIndexer",
    "LayerIndexer",
    "NoLayersLayerIndexer",
    "OffsetLayerIndexer",
    "SourceLayer",
    "scalar_axes",
]


# Indices


def scalar_axes(declared: DerivedScalar) -> tuple[Dimension, ...]:
    """Axes of an index into a derived scalar, the token first.

    Of a flattened scalar the first index counts pairs, not tokens.

    >>> [str(axis) for axis in scalar_axes(scalar("mlp_write"))]
    ['token', 'neuron', 'channel']
    """
    return (Dimension.TOKEN, *declared.axes)


@dataclass(frozen=True)
class DerivedScalarIndex:
    """Values of one derived scalar.

    Attributes:
        dst: the scalar's name; a TransformerLens name of a location becomes ours.
        tensor_indices: their place in the order of :func:`scalar_axes`; None for a whole
            axis, as are axes left out.
        layer_index: the layer, None outside the blocks.
        pass_type: the value itself or its gradient.

    Raises:
        InvalidInput: no such scalar, or indices that do not fit it.
    """

    dst: str
    tensor_indices: tuple[Index, ...]
    layer_index: int | None
    pass_type: PassType = PassType.FORWARD

    def __post_init__(self) -> None:
        declared = scalar(self.dst)
        object.__setattr__(self, "dst", declared.name)
        object.__setattr__(self, "tensor_indices", tuple(self.tensor_indices))
        for index in (*self.tensor_indices, self.layer_index):
            if index is not None and (type(index) is not int or index < 0):
                raise _invalid(
                    f"{self.dst} has the index {index!r}; count from 0, and use None for all."
                )
        axes = scalar_axes(declared)
        if len(self.tensor_indices) > len(axes):
            raise _invalid(
                f"{self.dst} has the axes {', '.join(axes)}, and {self.tensor_indices} has "
                f"{len(self.tensor_indices)} indices. Give at most {len(axes)}."
            )

    @property
    def tensor_index_by_dim(self) -> dict[Dimension, Index]:
        """Axis -> place, None for a whole axis."""
        axes = scalar_axes(scalar(self.dst))
        padded = (*self.tensor_indices, *[None] * (len(axes) - len(self.tensor_indices)))
        return dict(zip(axes, padded, strict=True))

    def with_updates(self, **changes: Any) -> Self:
        """The same index but for these members."""
        return replace(self, **changes)

    @classmethod
    def from_node_index(cls, node: NodeIndex, dst: str) -> Self:
        """The values of a scalar at a node.

        Axes that the node has and the scalar has not must be left open; axes that only the
        scalar has stay whole. A head at (token, attended, head) is found in a flattened
        scalar too.

        Raises:
            InvalidInput: the scalar is of other nodes, or the node names a place on an axis
                that the scalar does not have.
        """
        declared = scalar(dst)
        if declared.node_type is not node.node_type:
            raise _invalid(
                f"{declared.name} has values of {declared.node_type} nodes, not of "
                f"{node.node_type}. Name a scalar of those."
            )
        axes = _node_axes(declared)
        if len(node.tensor_indices) > len(axes):
            raise _invalid(f"{node.tensor_indices} are too many indices for {', '.join(axes)}.")
        places = dict(zip(axes, node.tensor_indices, strict=False))
        own = _unflattened_axes(declared)
        _refuse_lost(places, own, declared.name)
        indices = [places.get(axis) for axis in own]
        if declared.is_flattened:
            indices = [_pair(indices[0], indices[1]), *indices[2:]]
        return cls(declared.name, tuple(indices), node.layer_index, node.pass_type)

    def to_node_index(self) -> NodeIndex:
        """The node whose value this is.

        Raises:
            InvalidInput: a place on an axis that such nodes do not have.
        """
        declared = scalar(self.dst)
        indices = list(self.tensor_index_by_dim.values())
        if declared.is_flattened:
            indices = [*_token_and_attended(indices[0]), *indices[1:]]
        places = dict(zip(_unflattened_axes(declared), indices, strict=True))
        axes = _node_axes(declared)
        _refuse_lost(places, axes, f"A {declared.node_type} node")
        kept = tuple(places.get(axis) for axis in axes)
        return NodeIndex(declared.node_type, kept, self.layer_index, self.pass_type)


def _unflattened_axes(declared: DerivedScalar) -> tuple[Dimension, ...]:
    if declared.is_flattened:
        return (Dimension.TOKEN, Dimension.ATTENDED, *declared.axes)
    return scalar_axes(declared)


def _node_axes(declared: DerivedScalar) -> tuple[Dimension, ...]:
    location = NODE_LOCATIONS.get(declared.node_type)
    return _unflattened_axes(declared) if location is None else index_axes(location)


def _refuse_lost(places: Mapping[Dimension, Index], axes: Sequence[Dimension], having: str) -> None:
    lost = {axis: index for axis, index in places.items() if axis not in axes}
    for axis, index in lost.items():
        if index is not None:
            raise _invalid(
                f"{axis} is {index}, and {having} has no such axis but {', '.join(axes)}. "
                "Leave it None."
            )


def _pair(token: Index, attended: Index) -> Index:
    """Row of a pair in the lower triangle, row by row."""
    if token is None and attended is None:
        return None
    if token is None or attended is None or attended > token:
        raise _invalid(
            f"token {token} and attended {attended} are no row of a flattened scalar; name both, "
            "the attended one not after the token, or neither."
        )
    return token * (token + 1) // 2 + attended


def _token_and_attended(pair: Index) -> tuple[Index, Index]:
    if pair is None:
        return None, None
    token = (math.isqrt(8 * pair + 1) - 1) // 2
    return token, pair - token * (token + 1) // 2


# Layers of a source

DUMMY: Final = "Dummy"
"""Instead of a source layer: there is none, and a 0-d zero stands for it."""

SourceLayer = int | None | Literal["Dummy"]


class LayerIndexer(ABC):
    """Which layer of a source goes to which layer of what is made from it."""

    @abstractmethod
    def source_layers(self, wanted: Sequence[int | None]) -> list[SourceLayer]:
        """The source's layer for every wanted one."""


@dataclass(frozen=True)
class IdentityLayerIndexer(LayerIndexer):
    """The same layer.

    >>> IdentityLayerIndexer().source_layers([0, 2])
    [0, 2]
    """

    def source_layers(self, wanted: Sequence[int | None]) -> list[SourceLayer]:
        """The wanted layers."""
        return list(wanted)


@dataclass(frozen=True)
class OffsetLayerIndexer(LayerIndexer):
    """A layer before or after; none where that is not among the wanted ones.

    >>> OffsetLayerIndexer(-1).source_layers([0, 1, 2])
    ['Dummy', 0, 1]
    """

    offset: int

    def source_layers(self, wanted: Sequence[int | None]) -> list[SourceLayer]:
        """The wanted layers plus the offset.

        Raises:
            InvalidInput: a value outside the blocks is wanted.
        """
        known = set(wanted)
        found: list[SourceLayer] = []
        for layer in wanted:
            if layer is None:
                raise _invalid("A value outside the blocks has no layer before or after it.")
            found.append(layer + self.offset if layer + self.offset in known else DUMMY)
        return found


@dataclass(frozen=True)
class ConstantLayerIndexer(LayerIndexer):
    """One layer for all.

    >>> ConstantLayerIndexer(2).source_layers([0, 1])
    [2, 2]
    """

    layer: int

    def source_layers(self, wanted: Sequence[int | None]) -> list[SourceLayer]:
        """The one layer, as often as wanted."""
        return [self.layer] * len(wanted)


@dataclass(frozen=True)
class NoLayersLayerIndexer(LayerIndexer):
    """The one value outside the blocks for all.

    >>> NoLayersLayerIndexer().source_layers([0, 1])
    [None, None]
    """

    def source_layers(self, wanted: Sequence[int | None]) -> list[SourceLayer]:
        """None, as often as wanted."""
        return [None] * len(wanted)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
