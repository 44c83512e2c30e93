"""Pointing at things: nodes, activations, and what is to be differentiated or ablated.

Indices follow the axes of the derived scalars: ``(token, neuron)``, ``(token, latent)``,
``(token, channel)``, ``(token, attended, head)`` for a head at a pair of tokens, and
``(token, 0)`` for a whole layer. Names and rules are those of the Transformer Debugger.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
)

__all__ = [
    "Ablation",
    "ActivationIndex",
    "AttentionTraceType",
    "AttnSubNodeIndex",
    "NodeIndex",
    "PreOrPostAct",
    "TraceConfig",
    "index_axes",
]

_L = ActivationLocationType
_N = NodeType

NODE_LOCATIONS: dict[NodeType, ActivationLocationType] = {
    _N.ATTENTION_HEAD: _L.ATTN_QK_PROBS,
    _N.MLP_NEURON: _L.MLP_POST_ACT,
    _N.AUTOENCODER_LATENT: _L.ONLINE_AUTOENCODER_LATENT,
    _N.MLP_AUTOENCODER_LATENT: _L.ONLINE_MLP_AUTOENCODER_LATENT,
    _N.ATTENTION_AUTOENCODER_LATENT: _L.ONLINE_ATTENTION_AUTOENCODER_LATENT,
    _N.RESIDUAL_STREAM_CHANNEL: _L.RESID_POST_MLP,
}
"""The location whose values are a node's activations."""

Index = int | None
"""A place along an axis; None for the whole axis."""


def index_axes(location: ActivationLocationType) -> tuple[Dimension, ...]:
    """Axes of an index into a location: pairs are ``(token, attended, head)``.

    Stored arrays keep the head before the attended token.

    >>> [str(axis) for axis in index_axes(ActivationLocationType.ATTN_QK_PROBS)]
    ['token', 'attended', 'head']
    """
    axes = location.axes
    if location.is_pair_shaped:
        axes = (Dimension.ATTENDED, *(axis for axis in axes if axis is not Dimension.ATTENDED))
    return (Dimension.TOKEN, *axes)


def _check_index(name: str, indices: tuple[Index, ...], axes: int | None) -> None:
    for index in indices:
        if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
            raise _invalid(f"{name} has the index {index!r}; use whole numbers, None for all.")
        if index is not None and index < 0:
            raise _invalid(f"{name} has the index {index}; count from 0.")
    if axes is not None and len(indices) > axes:
        raise _invalid(f"{name} has {len(indices)} indices {indices}; it has {axes} axes.")


@dataclass(frozen=True)
class NodeIndex:
    """A node: a neuron, a head at a pair of tokens, a latent, a channel, a layer.

    Attributes:
        node_type: what it is.
        tensor_indices: its place; None for a whole axis.
        layer_index: its layer, None outside the blocks.
        pass_type: whose values are meant.
    """

    node_type: NodeType
    tensor_indices: tuple[Index, ...]
    layer_index: int | None
    pass_type: PassType = PassType.FORWARD

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor_indices", tuple(self.tensor_indices))
        location = NODE_LOCATIONS.get(self.node_type)
        axes = None if location is None else len(index_axes(location))
        _check_index(f"A {self.node_type} node", self.tensor_indices, axes)

    @classmethod
    def from_activation_index(cls, index: "ActivationIndex") -> "NodeIndex":
        """The node whose activation an index points at."""
        return NodeIndex(
            index.activation_location_type.node_type,
            index.tensor_indices,
            index.layer_index,
            index.pass_type,
        )

    @property
    def ndim(self) -> int:
        """Axes that stay when the node's activations are indexed.

        Raises:
            InvalidInput: the node type has no reference location.
        """
        location = NODE_LOCATIONS.get(self.node_type)
        if location is None:
            raise _invalid(f"A {self.node_type} node has no activation of its own to index.")
        fixed = sum(index is not None for index in self.tensor_indices)
        return len(index_axes(location)) - fixed

    def with_updates(self, **changes: Any) -> Self:
        """The same node but for these members."""
        return replace(self, **changes)

    def to_subnode_index(self, q_k_or_v: ActivationLocationType) -> "AttnSubNodeIndex":
        """The head's query, key or value side."""
        return AttnSubNodeIndex(
            self.node_type, self.tensor_indices, self.layer_index, self.pass_type, q_k_or_v
        )


@dataclass(frozen=True)
class AttnSubNodeIndex(NodeIndex):
    """A head at a pair of tokens, reached through its query, key or value.

    Attributes:
        q_k_or_v: ``attn_query``, ``attn_key`` or ``attn_value``.
    """

    q_k_or_v: ActivationLocationType = _L.ATTN_QUERY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.node_type is not _N.ATTENTION_HEAD:
            raise _invalid(f"A {self.node_type} node has no query, key or value; a head has.")
        if self.q_k_or_v not in (_L.ATTN_QUERY, _L.ATTN_KEY, _L.ATTN_VALUE):
            raise _invalid(f"q_k_or_v is {self.q_k_or_v}; use attn_query, attn_key or attn_value.")


@dataclass(frozen=True)
class ActivationIndex:
    """Values of one location.

    Attributes:
        activation_location_type: the location.
        tensor_indices: their place in the order of :func:`index_axes`; None for a whole axis,
            as are axes left out.
        layer_index: the layer, None outside the blocks.
        pass_type: forward values or gradients.
    """

    activation_location_type: ActivationLocationType
    tensor_indices: tuple[Index, ...]
    layer_index: int | None
    pass_type: PassType = PassType.FORWARD

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor_indices", tuple(self.tensor_indices))
        location = self.activation_location_type
        _check_index(str(location), self.tensor_indices, len(index_axes(location)))
        if location.has_layers == (self.layer_index is None):
            raise _invalid(f"{location} with layer_index={self.layer_index} does not fit.")

    @classmethod
    def from_node_index(cls, node: NodeIndex, location: ActivationLocationType) -> Self:
        """A node's values at a location of its node type.

        Raises:
            InvalidInput: the location's nodes are of another type.
        """
        if location.node_type is not node.node_type:
            raise _invalid(f"{location} holds {location.node_type} nodes, not {node.node_type}.")
        return cls(location, node.tensor_indices, node.layer_index, node.pass_type)

    @property
    def tensor_index_by_dim(self) -> dict[Dimension, Index]:
        """Axis -> place, None for a whole axis."""
        axes = index_axes(self.activation_location_type)
        padded = (*self.tensor_indices, *[None] * (len(axes) - len(self.tensor_indices)))
        return dict(zip(axes, padded, strict=True))

    @property
    def ndim(self) -> int:
        """Axes that stay when the values are indexed."""
        return sum(index is None for index in self.tensor_index_by_dim.values())

    def with_updates(self, **changes: Any) -> Self:
        """The same index but for these members."""
        return replace(self, **changes)


class PreOrPostAct(StrEnum):
    """Before or after a node's non-linearity."""

    PRE = "pre"
    POST = "post"


class AttentionTraceType(StrEnum):
    """Through which inputs of a head the gradient flows; the others are constants."""

    Q = "q"
    K = "k"
    QK = "qk"
    V = "v"


@dataclass(frozen=True)
class TraceConfig:
    """One node whose activation is the objective of the backward pass.

    Attributes:
        node_index: the node; every axis is named, but for latents whose token may be None.
        pre_or_post_act: its activation before or after its non-linearity.
        detach_layer_norm_scale: take the norm's denominator as a constant.
        attention_trace_type: for heads, the inputs that carry gradient; ``V`` asks for the
            head's direct effect on the downstream node or, without one, on the loss.
        downstream_trace_config: the downstream node of a trace through ``V``.
    """

    node_index: NodeIndex
    pre_or_post_act: PreOrPostAct = PreOrPostAct.PRE
    detach_layer_norm_scale: bool = True
    attention_trace_type: AttentionTraceType | None = None
    downstream_trace_config: "TraceConfig | None" = None

    def __post_init__(self) -> None:
        node, kind = self.node_index, self.attention_trace_type
        if node.pass_type is not PassType.FORWARD or node.layer_index is None:
            raise _invalid("A trace starts at a node of a layer in the forward pass.")
        if (node.node_type is _N.ATTENTION_HEAD) != (kind is not None):
            raise _invalid(
                f"attention_trace_type is {kind} for a {node.node_type} node; heads need one "
                f"of {', '.join(AttentionTraceType)}, other nodes none."
            )
        if node.node_type not in NODE_LOCATIONS or node.node_type is _N.RESIDUAL_STREAM_CHANNEL:
            raise _invalid(f"A {node.node_type} node cannot be traced; use a neuron, head, latent.")
        downstream = self.downstream_trace_config
        if downstream is not None and (
            kind is not AttentionTraceType.V
            or downstream.attention_trace_type is AttentionTraceType.V
        ):
            raise _invalid(
                "Only a trace through V has a downstream trace, which is not through V itself."
            )

    @classmethod
    def from_activation_index(
        cls, index: ActivationIndex, detach_layer_norm_scale: bool = True
    ) -> Self:
        """The trace of one activation.

        Raises:
            InvalidInput: the location is not an activation before or after a non-linearity.
        """
        try:
            pre_or_post = _TRACED[index.activation_location_type]
        except KeyError:
            known = ", ".join(str(location) for location in _TRACED)
            raise _invalid(
                f"{index.activation_location_type} cannot be traced; use {known}."
            ) from None
        node = NodeIndex.from_activation_index(index)
        is_head = node.node_type is _N.ATTENTION_HEAD
        kind = AttentionTraceType.QK if is_head else None
        return cls(node, pre_or_post, detach_layer_norm_scale, kind)

    def with_updated_index(self, **changes: Any) -> Self:
        """The same trace of a node with these members changed."""
        return replace(self, node_index=self.node_index.with_updates(**changes))


_TRACED = {
    _L.MLP_PRE_ACT: PreOrPostAct.PRE,
    _L.ATTN_QK_LOGITS: PreOrPostAct.PRE,
    _L.MLP_POST_ACT: PreOrPostAct.POST,
    _L.ATTN_QK_PROBS: PreOrPostAct.POST,
    _L.ONLINE_AUTOENCODER_LATENT: PreOrPostAct.POST,
    _L.ONLINE_MLP_AUTOENCODER_LATENT: PreOrPostAct.POST,
    _L.ONLINE_ATTENTION_AUTOENCODER_LATENT: PreOrPostAct.POST,
}


@dataclass(frozen=True)
class Ablation:
    """Values of one pass that are set to a constant.

    A forward ablation happens before the location is recorded. A gradient ablation changes
    everything upstream; what is recorded at the location itself is the gradient before it.

    Attributes:
        index: which values; ``pass_type`` says forward values or gradients.
        value: the constant.
    """

    index: ActivationIndex
    value: float = 0.0

    @classmethod
    def of_node(cls, node: NodeIndex, value: float = 0.0) -> Self:
        """The ablation of a node: of a head, its probabilities for every attended token.

        Raises:
            InvalidInput: the node type has no activation of its own.
        """
        location = NODE_LOCATIONS.get(node.node_type)
        if location is None:
            raise _invalid(f"A {node.node_type} node has no activation of its own to ablate.")
        index = ActivationIndex.from_node_index(node, location)
        if node.node_type is _N.ATTENTION_HEAD:
            token, _, head = index.tensor_index_by_dim.values()
            index = index.with_updates(tensor_indices=(token, None, head))
        return cls(index, value)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
