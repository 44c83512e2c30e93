"""A node's activation as a function of the residual stream before it.

With ``r`` the residual stream after attention for what sits in the MLP, and the one that
enters the layer for heads and what reads attention's output, ``activation`` is ``act(r)``,
before or after the node's non-linearity, and ``attribution`` is ``A(r) = act(r) * g`` with
the gradient ``g`` of the pass that was run as a constant (for a head's value side,
``p[q, k, h] * sum_c V(r)[k, h, c] g_z[q, h, c]``). Both can be differentiated backward and
forward, which gives gradients at residual streams and effects along edges.

Through the query of a head its keys and values are constants, through the key its queries
and values; through the value its probabilities.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from actstore.query.derived.declaration import Frame
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.recipes import per_query_head
from actstore.store.nodes import (
    AttentionTraceType,
    AttnSubNodeIndex,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import ActivationLocationType, NodeType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OfResidual",
    "activation",
    "attribution",
    "gradient_at",
    "gradient_location",
    "pick",
    "traced_activation",
]

_L = ActivationLocationType
_POST = PreOrPostAct.POST

OfResidual = Callable[["Tensor"], "Tensor"]
"""Residual stream ``(token, channel)`` -> ``(token, *axes of the node)``."""

_SIDES = {
    _L.ATTN_QUERY: AttentionTraceType.Q,
    _L.ATTN_KEY: AttentionTraceType.K,
    _L.ATTN_VALUE: AttentionTraceType.V,
}


def activation(
    frame: Frame,
    node_type: NodeType,
    layer: int,
    *,
    detach_scale: bool,
    side: AttentionTraceType | None = None,
    pre_or_post: PreOrPostAct = _POST,
) -> OfResidual:
    """``act`` of all nodes of one kind and layer.

    Args:
        frame: the model.
        node_type: neurons, heads or latents.
        layer: their layer.
        detach_scale: take the norm's denominator as a constant.
        side: for heads, the inputs that carry gradient: Q, K or both.
        pre_or_post: before or after the non-linearity.

    Returns:
        A function to ``(token, unit)``, or ``(token, attended, head)`` for heads.
    """
    post = pre_or_post is _POST
    if node_type is NodeType.MLP_NEURON:
        target = _L.MLP_POST_ACT if post else _L.MLP_PRE_ACT
        return lambda r: frame.recompute(
            target, layer, {_L.RESID_POST_ATTN: r}, detach_scale=detach_scale
        )
    if node_type is NodeType.ATTENTION_HEAD:
        target = _L.ATTN_QK_PROBS if post else _L.ATTN_QK_LOGITS
        constant = {
            AttentionTraceType.Q: (_L.ATTN_KEY,),
            AttentionTraceType.K: (_L.ATTN_QUERY,),
            AttentionTraceType.QK: (),
        }[side or AttentionTraceType.QK]

        def pairs(r: "Tensor") -> "Tensor":
            given = {
                location: frame.recompute(location, layer, {}, r).detach() for location in constant
            }
            scores = frame.recompute(target, layer, given, r, detach_scale=detach_scale)
            return scores.transpose(1, 2)

        return pairs
    autoencoder = frame.autoencoder(node_type, layer)
    after_attention = frame.config.residual_before(node_type) is _L.RESID_POST_ATTN

    def latents(r: "Tensor") -> "Tensor":
        given = {_L.RESID_POST_ATTN: r} if after_attention else {}
        before = None if after_attention else r
        read = frame.recompute(
            autoencoder.location, layer, given, before, detach_scale=detach_scale
        )
        before_act = autoencoder.encode_pre_act(read)
        return autoencoder.activate(before_act) if post else before_act

    return latents


def gradient_location(node: NodeIndex, name: str) -> ActivationLocationType:
    """The location whose gradient an attribution of the node multiplies with.

    Raises:
        InvalidInput: a head without a side, or a node that has no attribution.
    """
    if isinstance(node, AttnSubNodeIndex):
        is_value = node.q_k_or_v is _L.ATTN_VALUE
        return _L.ATTN_WEIGHTED_SUM_OF_VALUES if is_value else _L.ATTN_QK_PROBS
    found = _GRADIENT_LOCATIONS.get(node.node_type)
    if found is None:
        side = node.node_type is NodeType.ATTENTION_HEAD
        raise InvalidInput(
            f"{name} cannot be derived for a {node.node_type} node. "
            + (
                "Say which side of the head: AttnSubNodeIndex(…, q_k_or_v=ATTN_QUERY)."
                if side
                else "Use a neuron, a head's query, key or value, or a latent."
            ),
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return found


_GRADIENT_LOCATIONS = {
    NodeType.MLP_NEURON: _L.MLP_POST_ACT,
    NodeType.AUTOENCODER_LATENT: _L.ONLINE_AUTOENCODER_LATENT,
    NodeType.MLP_AUTOENCODER_LATENT: _L.ONLINE_MLP_AUTOENCODER_LATENT,
    NodeType.ATTENTION_AUTOENCODER_LATENT: _L.ONLINE_ATTENTION_AUTOENCODER_LATENT,
}


def attribution(
    frame: Frame, node: NodeIndex, layer: int, gradient: "Tensor", *, detach_scale: bool
) -> OfResidual:
    """``A`` of all nodes of a node's kind.

    Args:
        frame: the model.
        node: a node of that kind; for heads, one of a side.
        layer: the layer.
        gradient: the gradient at :func:`gradient_location`, as its raw location has it.
        detach_scale: take the norm's denominator as a constant.
    """
    side = _SIDES[node.q_k_or_v] if isinstance(node, AttnSubNodeIndex) else None
    if side is AttentionTraceType.V:
        return _through_value(frame, layer, gradient, detach_scale)
    act = activation(frame, node.node_type, layer, detach_scale=detach_scale, side=side)
    if node.node_type is NodeType.ATTENTION_HEAD:
        gradient = gradient.transpose(1, 2)
    return lambda r: act(r) * gradient


def _through_value(frame: Frame, layer: int, gradient: "Tensor", detach_scale: bool) -> OfResidual:
    def of_residual(r: "Tensor") -> "Tensor":
        import torch

        pattern = frame.recompute(_L.ATTN_QK_PROBS, layer, {}, r).detach()
        shared = frame.recompute(_L.ATTN_VALUE, layer, {}, r, detach_scale=detach_scale)
        value = per_query_head(shared, frame.dimensions)
        return torch.einsum("qhk,khc,qhc->qkh", pattern, value, gradient)

    return of_residual


def traced_activation(frame: Frame, trace: TraceConfig, layer: int) -> OfResidual:
    """The activation that a trace is about, for all nodes of its kind and layer.

    Raises:
        InvalidInput: the trace goes through a head's values: its objective is an effect on
            what comes later, and not an activation.
    """
    node = trace.node_index
    if trace.attention_trace_type is AttentionTraceType.V:
        raise InvalidInput(
            f"{frame.name} differentiates an activation, and a trace through V has an effect on "
            "later nodes as its objective. Use the scalars of the final residual gradient.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return activation(
        frame,
        node.node_type,
        layer,
        detach_scale=trace.detach_layer_norm_scale,
        side=trace.attention_trace_type,
        pre_or_post=trace.pre_or_post_act,
    )


def pick(values: "Tensor", node: NodeIndex, name: str) -> "Tensor":
    """The value at a node.

    Raises:
        InvalidInput: the node does not name one value, or none that is there.
    """
    indices = node.tensor_indices
    if len(indices) != values.ndim or None in indices:
        raise InvalidInput(
            f"{name} is of one value, and the node's indices {indices} name "
            f"{len(indices)} of {values.ndim} axes. Name every axis.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    sizes = tuple(values.shape)
    if any(index is not None and index >= size for index, size in zip(indices, sizes, strict=True)):
        raise InvalidInput(
            f"{name} is of the node at {indices}, and its axes are {sizes} long.",
            kind=ErrorKind.UNKNOWN_ROW,
        )
    return values[indices]


def gradient_at(function: OfResidual, residual: "Tensor", node: NodeIndex, name: str) -> "Tensor":
    """Gradient of a function's value at one node with respect to the residual stream."""
    import torch

    leaf = residual.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(pick(function(leaf), node, name), leaf)
    return gradient
