"""What nodes read from the residual stream: gradients of one value before its non-linearity.

The gradient is taken at the residual stream just before the node, at the node's token, with
the norm's denominator as a constant; the mean that is subtracted and the gain still count.
Neurons and latents are taken on the sequence of that one token alone, so that every
row is its own token's: attention in front of a latent attends to this token with weight 1.
A head's score is read from one of its two tokens; the other side is what it was in the
sequence.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from actstore.query.postprocess_nodes import NodeGroup, NodeRule, Prepared
from actstore.store.model.computations import per_query_head, soft_cap
from actstore.store.model.recipes import Setting, recompute
from actstore.store.model.sources import LayerRule, Source
from actstore.store.vocabulary import ActivationLocationType, Dimension, NodeType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["READS"]

_L = ActivationLocationType
_N = NodeType

_STREAMS = (_L.RESID_POST_EMBEDDING, _L.RESID_POST_ATTN, _L.RESID_POST_MLP)
_BEFORE = Source(_L.RESID_POST_MLP, layer=LayerRule.PREVIOUS)

Scalars = Callable[["Tensor", "Tensor"], "Tensor"]
"""Residual rows ``(node, channel)`` and places ``(node, axis)`` -> one value per row."""


def _recompute(
    group: NodeGroup,
    target: ActivationLocationType,
    given: "Mapping[ActivationLocationType, Tensor]",
    before: "Tensor | None" = None,
    positions: "Tensor | None" = None,
) -> "Tensor":
    setting = Setting(group.values.dimensions, group.layer, detach_scale=True, positions=positions)
    return recompute(group.values.recipes, target, setting, group.weight, given, before)


def _residual_before(group: NodeGroup) -> "Tensor":
    location, layer = _BEFORE.place(group.layer, group.values.dimensions.n_layers)
    assert isinstance(location, ActivationLocationType)
    return group.raw(location, layer)


def _residual_before_mlp(group: NodeGroup) -> "Tensor":
    if group.values.dimensions.is_parallel:
        return _residual_before(group)
    return group.raw(_L.RESID_POST_ATTN, group.layer)


def _gradients(residual: "Tensor", scalars: Scalars, token_axis: int, width: int) -> Prepared:
    """Each value's gradient at the row that it is made from."""
    import torch

    def rows(at: "Tensor") -> "Tensor":
        leaf = residual[at[:, token_axis]].requires_grad_()
        with torch.enable_grad():
            # Values of different rows share nothing, so one sweep gives each its own.
            (gradient,) = torch.autograd.grad(scalars(leaf, at).sum(), leaf)
        return gradient

    # Forward values, their gradients, and what lies between.
    return Prepared(len(residual), 4 * (width + residual.shape[1]), rows)


def _neuron_read(group: NodeGroup) -> Prepared:
    def scalars(rows: "Tensor", at: "Tensor") -> "Tensor":
        pre = _recompute(group, _L.MLP_PRE_ACT, {_L.RESID_POST_ATTN: rows})
        return pre.gather(1, at[:, 1:])

    residual = _residual_before_mlp(group)
    return _gradients(residual, scalars, 0, group.values.dimensions.d_mlp)


def _latent_read(group: NodeGroup) -> Prepared:
    autoencoder = group.autoencoder
    location = autoencoder.location
    after_attention = group.config.residual_before(group.node_type) is _L.RESID_POST_ATTN

    def read(rows: "Tensor") -> "Tensor":
        if location in _STREAMS:
            return rows
        if after_attention:
            return _recompute(group, location, {_L.RESID_POST_ATTN: rows})
        # A token alone attends to itself, so the weighted sum of values is its value.
        value = per_query_head(_recompute(group, _L.ATTN_VALUE, {}, rows), group.values.dimensions)
        return _recompute(group, location, {_L.ATTN_WEIGHTED_SUM_OF_VALUES: value}, rows)

    def scalars(rows: "Tensor", at: "Tensor") -> "Tensor":
        return autoencoder.encode_pre_act(read(rows)).gather(1, at[:, 1:])

    if location in _STREAMS:
        residual = group.raw(location, group.layer)
    elif after_attention:
        residual = _residual_before_mlp(group)
    else:
        residual = _residual_before(group)
    sizes = group.values.dimensions
    width = autoencoder.n_latents + autoencoder.channel_in + sizes.d_mlp + sizes.d_model
    return _gradients(residual, scalars, 0, width)


def _head_read(side: ActivationLocationType) -> Callable[[NodeGroup], Prepared]:
    """The score of a head at a pair of tokens, from the token whose ``side`` it is."""
    from_query = side is _L.ATTN_QUERY
    other = _L.ATTN_KEY if from_query else _L.ATTN_QUERY
    own_axis, other_axis = (0, 1) if from_query else (1, 0)

    def prepare(group: NodeGroup) -> Prepared:
        constant = group.raw(other, group.layer)
        sizes = group.values.dimensions
        factor = sizes.attention_scaling(group.block)

        def scalars(rows: "Tensor", at: "Tensor") -> "Tensor":
            _refuse_unseen(group, at)
            query_head = at[:, 2]
            shared_head = query_head // (sizes.n_heads // sizes.kv_heads)
            own, others = (query_head, shared_head) if from_query else (shared_head, query_head)
            mine = _recompute(group, side, {}, rows, at[:, own_axis])
            # (node, head, channel): of each node its own head.
            chosen = mine.take_along_dim(own[:, None, None], 1)[:, 0]
            score = (chosen * constant[at[:, other_axis], others]).sum(1) * factor
            return soft_cap(score, sizes.score_cap)

        width = sizes.n_heads * sizes.d_head
        return _gradients(_residual_before(group), scalars, own_axis, 2 * width)

    return prepare


def _refuse_unseen(group: NodeGroup, at: "Tensor") -> None:
    window = group.values.dimensions.window_at(group.block)
    distant = at[at[:, 0] - at[:, 1] >= window] if window is not None else at[:0]
    if len(distant):
        raise group.unfit(
            f"{tuple(distant[0].tolist())} attends over {window} tokens or more, which the layer's "
            f"sliding window masks. Name pairs less than {window} apart"
        )
    later = at[at[:, 1] > at[:, 0]]
    if len(later):
        raise group.unfit(
            f"{tuple(later[0].tolist())} attends to a later token, whose score is masked and "
            f"reads nothing. Name pairs with {Dimension.ATTENDED} up to {Dimension.TOKEN}"
        )


READS = (
    NodeRule(_N.MLP_NEURON, "d mlp_pre_act[t, f] / d resid_post_attn[t]", _neuron_read),
    NodeRule(
        _N.ATTENTION_HEAD,
        "d score[q, k, h] / d residual[q] before the layer, the key constant",
        _head_read(_L.ATTN_QUERY),
        side=_L.ATTN_QUERY,
    ),
    NodeRule(
        _N.ATTENTION_HEAD,
        "d score[q, k, h] / d residual[k] before the layer, the query constant",
        _head_read(_L.ATTN_KEY),
        side=_L.ATTN_KEY,
    ),
    *(
        NodeRule(
            kind,
            "d (encoder's value of latent n) / d residual[t] before what the autoencoder reads",
            _latent_read,
        )
        for kind in NodeType
        if kind.is_autoencoder_latent
    ),
)
"""The direction of the residual stream that a node reads at its token."""
