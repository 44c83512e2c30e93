"""What nodes write to the residual stream, and where an attention latent's value comes from.

With ``a`` a neuron's or latent's activation, ``p`` the attention probabilities, ``V`` the
values with their bias: rows of the output weights ``W_out``, ``W_O`` and of decoders, scaled
by what was active. Biases belong to no node.
"""

from typing import TYPE_CHECKING

from actstore.query.derived.post_norms import post_norm
from actstore.query.postprocess_nodes import NodeGroup, NodeRule, Prepared
from actstore.store.errors import ErrorKind, Unavailable
from actstore.store.model.autoencoder_functions import Normalisation
from actstore.store.model.computations import per_query_head
from actstore.store.nodes import NODE_LOCATIONS
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from actstore.store.model.autoencoders import Autoencoder

__all__ = ["PAIR_ATTRIBUTIONS", "WRITES"]

_L = ActivationLocationType
_N = NodeType
_W = WeightLocationType

_INTO_RESIDUAL = {
    _L.MLP_POST_ACT: _W.MLP_TO_RESIDUAL,
    _L.ATTN_WEIGHTED_SUM_OF_VALUES: _W.ATTN_TO_RESIDUAL,
}


def _normed(
    group: NodeGroup, weight: WeightLocationType, layer: int | None
) -> "Callable[[Tensor, Tensor], Tensor]":
    """(writes, tokens) -> the writes through the norm that they pass, if there is one."""
    norm = post_norm(group.values, weight, layer)
    if norm is None:
        return lambda writes, _: writes
    return lambda writes, token: writes * norm.gain / norm.scale[token]


def _neuron_write(group: NodeGroup) -> Prepared:
    acts = group.raw(_L.MLP_POST_ACT, group.layer)
    writers = group.weight(_W.MLP_TO_RESIDUAL, group.layer)
    normed = _normed(group, _W.MLP_TO_RESIDUAL, group.layer)

    def rows(at: "Tensor") -> "Tensor":
        token, neuron = at.T
        return normed(acts[token, neuron, None] * writers[neuron], token)

    return Prepared(len(acts), writers.shape[1], rows)


def _head_write(group: NodeGroup) -> Prepared:
    pattern = group.raw(_L.ATTN_QK_PROBS, group.layer)
    value = per_query_head(group.raw(_L.ATTN_VALUE, group.layer), group.values.dimensions)
    output = group.weight(_W.ATTN_TO_RESIDUAL, group.layer)
    normed = _normed(group, _W.ATTN_TO_RESIDUAL, group.layer)

    def rows(at: "Tensor") -> "Tensor":
        token, attended, head = at.T
        scaled = pattern[token, head, attended, None] * value[attended, head]
        result = scaled.new_empty(len(at), output.shape[-1])
        for one in head.unique():
            of_head = head == one
            result[of_head] = scaled[of_head] @ output[one]
        return normed(result, token)

    return Prepared(len(pattern), output.shape[1] + output.shape[2], rows)


def _embedding_write(group: NodeGroup) -> Prepared:
    embedded = group.raw(_L.RESID_POST_EMBEDDING, None)
    return Prepared(len(embedded), embedded.shape[1], lambda at: embedded[at[:, 0]])


def _latent_write(group: NodeGroup) -> Prepared:
    autoencoder = group.autoencoder
    writers = _latent_writers(group, autoencoder)
    recorded = _recorded_latents(group, autoencoder)
    scaled = autoencoder.normalisation is not Normalisation.NONE
    read = None
    if recorded is None or scaled:
        read = group.raw(autoencoder.location, autoencoder.layer)

    def rows(at: "Tensor") -> "Tensor":
        token, latent = at.T
        if recorded is not None:
            acts = recorded[token, latent, None]
        else:
            assert read is not None
            acts = autoencoder.encode(read[token]).gather(1, latent[:, None])
        if scaled:
            assert read is not None
            acts = acts * autoencoder.output_scale(read[token])
        return acts * writers(latent, token)

    held = recorded if recorded is not None else read
    assert held is not None
    wide = autoencoder.channel_in + autoencoder.channel_out
    return Prepared(len(held), wide + 2 * autoencoder.n_latents, rows)


def _recorded_latents(group: NodeGroup, autoencoder: "Autoencoder") -> "Tensor | None":
    """Latents of the pass itself, which may have been ablated; None if none were recorded."""
    location = NODE_LOCATIONS[group.node_type]
    if group.layer is None:
        return None
    try:
        recorded = group.raw(location, group.layer)
    except Unavailable:
        return None
    if recorded.shape[1] != autoencoder.n_latents:
        raise group.unfit(
            f"the pass recorded {recorded.shape[1]} latents at layer {group.layer}, and the "
            f"autoencoder given has {autoencoder.n_latents}. Give the one that was spliced in"
        )
    return recorded


def _latent_writers(
    group: NodeGroup, autoencoder: "Autoencoder"
) -> "Callable[[Tensor, Tensor], Tensor]":
    """What latents of 1 write, ``(node, channel)``, by latent and token."""
    location, layer = autoencoder.output_location, autoencoder.output_layer
    decoder = autoencoder.latents_decoder_rows
    if location in _INTO_RESIDUAL:
        output = group.weight(_INTO_RESIDUAL[location], layer)
        into_residual = output.reshape(-1, output.shape[-1])
        normed = _normed(group, _INTO_RESIDUAL[location], layer)
        return lambda latent, token: normed(decoder[latent] @ into_residual, token)
    if location.axes != (Dimension.CHANNEL,):
        raise group.unfit(
            f"{autoencoder.name!r} decodes {location}, which is not written to the residual "
            "stream. Use one of mlp_post_act, attn_weighted_sum_of_values or a location of "
            "residual stream channels"
        )
    return lambda latent, _: decoder[latent]


def _pair_attribution(group: NodeGroup) -> Prepared:
    import torch

    autoencoder = group.autoencoder
    assert autoencoder.location is _L.RESID_DELTA_ATTN, "such latents read attention's output"
    if not autoencoder.has_linear_encoder_and_relu:
        raise group.unfit(
            f"{autoencoder.name!r} has the activation {autoencoder.activation.kind} and the "
            f"normalisation {autoencoder.normalisation}; attributions to attended tokens add up "
            "for a linear encoder with ReLU only. Use such an autoencoder",
            ErrorKind.UNSUPPORTED_AUTOENCODER,
        )
    read = group.raw(_L.RESID_DELTA_ATTN, group.layer)
    pattern = group.raw(_L.ATTN_QK_PROBS, group.layer)
    value = per_query_head(group.raw(_L.ATTN_VALUE, group.layer), group.values.dimensions)
    output = group.weight(_W.ATTN_TO_RESIDUAL, group.layer)
    encoder = autoencoder.latents_encoder_rows
    norm = post_norm(group.values, _W.ATTN_TO_RESIDUAL, group.layer)
    if norm is not None:
        output = output * norm.gain

    def rows(at: "Tensor") -> "Tensor":
        token, latent = at.T
        active = autoencoder.encode(read[token]).gather(1, latent[:, None])[:, 0] > 0
        if not bool(active.all()):
            raise group.unfit(
                f"the latent at {tuple(at[~active][0].tolist())} of layer {group.layer} is "
                "inactive, so nothing contributed to it. Name active latents"
            )
        along = torch.einsum("hcd,nd->nhc", output, encoder[latent])
        projected = torch.einsum("khc,nhc->nhk", value, along)
        if norm is not None:
            projected = projected / norm.divisor(3, token)
        return (pattern[token] * projected).sum(1)

    n_tokens, n_heads, _ = value.shape
    wide = 2 * n_heads * n_tokens + output[..., 0].numel() + 2 * autoencoder.n_latents
    return Prepared(n_tokens, wide + autoencoder.channel_in, rows)


_LATENT_WRITE = (
    "latent[t, n] decoder[n], through W_out where the autoencoder decodes neurons; the latent "
    "of the pass where it was spliced in, else recomputed"
)

WRITES = (
    NodeRule(_N.MLP_NEURON, "a[t, f] W_out[f]", _neuron_write),
    NodeRule(_N.ATTENTION_HEAD, "p[q, k, h] V[k, h] W_O[h]", _head_write),
    NodeRule(_N.LAYER, "resid_post_embedding[t]", _embedding_write),
    *(
        NodeRule(kind, _LATENT_WRITE, _latent_write)
        for kind in NodeType
        if kind.is_autoencoder_latent
    ),
)
"""The vector that a node adds to the residual stream at its token."""

PAIR_ATTRIBUTIONS = (
    NodeRule(
        _N.ATTENTION_AUTOENCODER_LATENT,
        "sum_h p[q, k, h] V[k, h] W_O[h] · encoder[n], of an active latent",
        _pair_attribution,
    ),
)
"""What each attended token contributes to an active latent of attention's output."""
