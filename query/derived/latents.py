"""Scalars of autoencoder latents and errors.

Three kinds of each family: ``mlp_…`` and ``attention_…`` speak of the autoencoders at the MLP
and at attention's output, the plain names of the one autoencoder where there is one kind.
*Online* values were recorded in a pass with the autoencoder spliced in; the others are
recomputed from what the autoencoder reads. ``w[n]`` is what latent ``n`` writes: its
decoder row, through the MLP's output weights where it decodes neurons; biases are no
latent's.

Gradients of a latent are those of ``sum_t latent[t, n]``, so that a row is its own
token's: ``1[latent > 0] encoder[n]`` for a ReLU autoencoder.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actstore.query.derived.attention import flattened, pair_projection, token_projection
from actstore.query.derived.config import DstConfig
from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    Frame,
    General,
    Identity,
    LatentWrites,
    LayerRule,
    Source,
)
from actstore.query.derived.nodes import (
    MLP_ERROR,
    act_times_grad,
    latent_node,
    projection,
    times_norm,
    write,
    write_norm,
)
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.store.model.autoencoders import Autoencoder

__all__ = ["SCALARS"]

_L = ActivationLocationType
_D = Dimension
_ATTENTION = NodeType.ATTENTION_AUTOENCODER_LATENT
_OUTPUT = (WeightLocationType.ATTN_TO_RESIDUAL,)

_KINDS = (
    (NodeType.AUTOENCODER_LATENT, "", _L.MLP_POST_ACT),
    (NodeType.MLP_AUTOENCODER_LATENT, "mlp_", _L.MLP_POST_ACT),
    (_ATTENTION, "attention_", _L.RESID_DELTA_ATTN),
)

_RECORDED = {
    _L.ONLINE_AUTOENCODER_LATENT: "latent[t, n]",
    _L.ONLINE_MLP_AUTOENCODER_LATENT: "latent[t, n]",
    _L.ONLINE_ATTENTION_AUTOENCODER_LATENT: "latent[t, n]",
    _L.ONLINE_MLP_AUTOENCODER_ERROR: "error[t, f] = a[t, f] - decode(latent[t])[f]",
    _L.ONLINE_RESIDUAL_MLP_AUTOENCODER_ERROR: (
        "error[t, d] = resid_delta_mlp[t, d] - decode(latent[t])[d]"
    ),
    _L.ONLINE_RESIDUAL_ATTENTION_AUTOENCODER_ERROR: (
        "error[t, d] = resid_delta_attn[t, d] - decode(latent[t])[d]"
    ),
}


# Latents, offline and online


def _encode(node_type: NodeType) -> DerivedScalar:
    _, prefix, usual = next(row for row in _KINDS if row[0] is node_type)

    def encode(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
        assert frame.layer is not None
        return frame.autoencoder(node_type, frame.layer).encode(sources[0])

    def reads(config: DstConfig) -> tuple[Source, ...]:
        return (Source(config.family(node_type).location),)

    return DerivedScalar(
        name=f"{prefix}autoencoder_latent",
        meaning="latents of the autoencoder, recomputed from what it reads",
        definition=(
            "activation(x[t] . enc[n] + latent_bias[n]), x what the autoencoder reads, as it "
            "scales it"
        ),
        axes=(_D.LATENT,),
        node_type=node_type,
        has_layers=True,
        sources=(Source(usual),),
        dependence=General(),
        formula=encode,
        latents=node_type,
        choose_sources=reads,
    )


def _offline_write_norm(node_type: NodeType, prefix: str) -> DerivedScalar:
    return DerivedScalar(
        name=f"{prefix}autoencoder_write_norm",
        meaning="latent, recomputed, times the L2 norm of its write vector",
        definition="latent[t, n] * |w[n]|",
        axes=(_D.LATENT,),
        node_type=node_type,
        has_layers=True,
        sources=(Source(f"{prefix}autoencoder_latent"),),
        dependence=General(),
        weights=(LatentWrites(node_type),),
        formula=times_norm,
        row_wise=True,
        latents=node_type,
    )


def _recorded(location: ActivationLocationType, latents: NodeType) -> DerivedScalar:
    return DerivedScalar(
        name=location.label,
        meaning=location.meaning,
        definition=_RECORDED[location],
        axes=location.axes,
        node_type=location.node_type,
        has_layers=True,
        sources=(Source(location),),
        dependence=Identity(),
        latents=latents,
    )


def _family(node_type: NodeType, prefix: str) -> tuple[DerivedScalar, ...]:
    node = latent_node(node_type)
    return (
        _encode(node_type),
        _offline_write_norm(node_type, prefix),
        _recorded(node.activation, node_type),
        write(node),
        write_norm(node),
        act_times_grad(node),
        projection(
            node, Direction.FINAL_RESIDUAL_GRAD, f"{node.prefix}_write_to_final_residual_grad"
        ),
        projection(
            node,
            Direction.FINAL_ACTIVATION_RESIDUAL_GRAD,
            f"{node.prefix}_write_to_final_activation_residual_grad",
        ),
    )


_ERRORS = (
    _recorded(_L.ONLINE_MLP_AUTOENCODER_ERROR, NodeType.MLP_AUTOENCODER_LATENT),
    _recorded(_L.ONLINE_RESIDUAL_MLP_AUTOENCODER_ERROR, NodeType.MLP_AUTOENCODER_LATENT),
    _recorded(_L.ONLINE_RESIDUAL_ATTENTION_AUTOENCODER_ERROR, _ATTENTION),
    act_times_grad(MLP_ERROR),
    write_norm(MLP_ERROR),
    projection(
        MLP_ERROR, Direction.FINAL_RESIDUAL_GRAD, f"{MLP_ERROR.prefix}_write_to_final_residual_grad"
    ),
)


# The gradient of one latent, and what heads write to it


def _latent_gradient(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
    import torch

    autoencoder, latent = _asked(frame)
    read = sources[0].detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(autoencoder.encode(read)[:, latent].sum(), read)
    return gradient


def _asked(frame: Frame) -> tuple["Autoencoder", int]:
    node = frame.config.traced(frame.name).node_index
    if not node.node_type.is_autoencoder_latent or node.layer_index is None:
        raise _unfit(frame.name, f"trace_config names a {node.node_type} node; name a latent")
    latent = node.tensor_indices[-1]
    autoencoder = frame.autoencoder(node.node_type, node.layer_index)
    if latent is None or latent >= autoencoder.n_latents:
        raise _unfit(
            frame.name, f"the latent is {latent}; there are {autoencoder.n_latents} of them"
        )
    return autoencoder, latent


def _reads(*allowed: ActivationLocationType) -> Callable[[DstConfig], tuple[Source, ...]]:
    def choose(config: DstConfig) -> tuple[Source, ...]:
        name = "the gradient of a latent"
        location = config.family(config.traced(name).node_index.node_type).location
        if location not in allowed:
            known = " or ".join(str(one) for one in allowed)
            raise _unfit(name, f"the autoencoder reads {location}; this scalar is of {known}")
        return (Source(location),)

    return choose


def _gradient_scalar(name: str, *reads: ActivationLocationType) -> DerivedScalar:
    neurons = reads == (_L.MLP_POST_ACT,)
    return DerivedScalar(
        name=name,
        meaning=(
            f"gradient of one latent with respect to what it reads ({' or '.join(map(str, reads))})"
        ),
        definition=(
            f"d latent[t, n] / d x[t, {'f' if neurons else 'd'}], for one n; with ReLU "
            f"1[latent[t, n] > 0] * enc[n, {'f' if neurons else 'd'}]"
        ),
        axes=(_D.NEURON if neurons else _D.CHANNEL,),
        node_type=NodeType.MLP_NEURON if neurons else NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(Source(reads[0]),),
        dependence=General(),
        formula=_latent_gradient,
        about="trace_config",
        only_node_layer=True,
        latents=NodeType.AUTOENCODER_LATENT,
        choose_sources=_reads(*reads),
    )


def _sum_heads(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return sources[0].sum(-1, keepdim=True)


def _active_encoder(frame: Frame, latents: "Tensor") -> "tuple[Tensor, Tensor]":
    """Encoder columns ``(channel, latent)`` and which latents are active ``(token, latent)``."""
    assert frame.layer is not None
    autoencoder = frame.autoencoder(_ATTENTION, frame.layer)
    if not autoencoder.has_linear_encoder_and_relu:
        raise _unfit(
            frame.name, "it is defined for a linear encoder with ReLU, and this one has another"
        )
    return autoencoder.latents_encoder_rows.T, (latents > 0).to(latents.dtype)


def _pairs_to_latents(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
    import torch

    written, latents = sources
    encoder, active = _active_encoder(frame, latents)
    first, second = torch.tril_indices(*written.shape[:2])
    return (written[first, second] @ encoder) * active[first]


def _tokens_to_latents(
    sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", frame: Frame
) -> "Tensor":
    import torch

    weighted, latents = sources
    encoder, active = _active_encoder(frame, latents)
    written = torch.einsum("qhc,hcd->qhd", weighted, weights[0])
    return (written @ encoder) * active[:, None, :]


_WRT_RESIDUAL = _gradient_scalar(
    "autoencoder_latent_grad_wrt_residual_input", _L.RESID_DELTA_ATTN, _L.RESID_DELTA_MLP
)
_GRADIENT = Source(_WRT_RESIDUAL.name, layer=LayerRule.NODE)
_WRITE_TO_LATENT = DerivedScalar(
    name="attn_write_to_latent",
    meaning="the head's write at a pair of tokens, projected on the gradient of one latent",
    definition=(
        "p[q, k, h] * sum_c,d V[k, h, c] * W_O[h, c, d] * d latent[q, n] / d x[q, d], for one n"
    ),
    axes=(_D.ATTENDED, _D.HEAD),
    node_type=NodeType.ATTENTION_HEAD,
    has_layers=True,
    sources=(Source(_L.ATTN_QK_PROBS), Source(_L.ATTN_VALUE), _GRADIENT),
    dependence=General(),
    weights=_OUTPUT,
    formula=pair_projection,
    about="trace_config",
    only_node_layer=True,
    latents=_ATTENTION,
)
_SUMMED_OVER_HEADS = DerivedScalar(
    name="attn_write_to_latent_summed_over_heads",
    meaning="what all heads write at a pair of tokens, projected on the gradient of one latent",
    definition="sum_h attn_write_to_latent[q, k, h]",
    axes=(_D.ATTENDED, _D.SINGLETON),
    node_type=NodeType.LAYER,
    has_layers=True,
    sources=(Source(_WRITE_TO_LATENT.name),),
    dependence=General(),
    formula=_sum_heads,
    about="trace_config",
    only_node_layer=True,
    latents=_ATTENTION,
)

_GRADIENTS = (
    _WRT_RESIDUAL,
    _gradient_scalar("autoencoder_latent_grad_wrt_mlp_post_act_input", _L.MLP_POST_ACT),
    _WRITE_TO_LATENT,
    _SUMMED_OVER_HEADS,
    flattened("flattened_attn_write_to_latent_summed_over_heads", _SUMMED_OVER_HEADS),
    DerivedScalar(
        name="attn_write_to_latent_per_sequence_token",
        meaning="the head's write at a token, projected on the gradient of one latent",
        definition="sum_c,d z[t, h, c] * W_O[h, c, d] * d latent[t, n] / d x[t, d], for one n",
        axes=(_D.HEAD,),
        node_type=NodeType.ATTENTION_HEAD,
        has_layers=True,
        sources=(Source(_L.ATTN_WEIGHTED_SUM_OF_VALUES), _GRADIENT),
        dependence=General(),
        weights=_OUTPUT,
        formula=token_projection,
        about="trace_config",
        only_node_layer=True,
        latents=_ATTENTION,
    ),
    DerivedScalar(
        name="flattened_attn_write_to_latent_summed_over_heads_batched",
        meaning=(
            "what all heads write at a pair of tokens, projected on the encoder of every latent "
            "that is active at the token; pairs with attended tokens up to it, row by row"
        ),
        definition=(
            "1[latent[q, n] > 0] * sum_d attn_write_sum_heads[q, k, d] * enc[n, d], for "
            "k = 0 … q, for q = 0 … T - 1"
        ),
        axes=(_D.LATENT,),
        node_type=_ATTENTION,
        has_layers=True,
        sources=(Source("attn_write_sum_heads"), Source("attention_autoencoder_latent")),
        dependence=General(),
        formula=_pairs_to_latents,
        is_flattened=True,
        latents=_ATTENTION,
    ),
    DerivedScalar(
        name="attn_write_to_latent_per_sequence_token_batched",
        meaning="the head's write at a token, projected on the encoder of every active latent",
        definition="1[latent[t, n] > 0] * sum_c,d z[t, h, c] * W_O[h, c, d] * enc[n, d]",
        axes=(_D.HEAD, _D.LATENT),
        node_type=_ATTENTION,
        has_layers=True,
        sources=(
            Source(_L.ATTN_WEIGHTED_SUM_OF_VALUES),
            Source("attention_autoencoder_latent"),
        ),
        dependence=General(),
        weights=_OUTPUT,
        formula=_tokens_to_latents,
        latents=_ATTENTION,
    ),
)


def _unfit(name: str, reason: str) -> InvalidInput:
    return InvalidInput(f"{name} cannot be derived: {reason}.", kind=ErrorKind.INVALID_ARGUMENT)


SCALARS = (
    *(entry for kind, prefix, _ in _KINDS for entry in _family(kind, prefix)),
    *_ERRORS,
    *_GRADIENTS,
)
