"""Scalars of the residual stream and of whole layers.

Norms are L2 over the channels. What a layer writes includes its output bias. A projection
is ``sum_c X[t, c] D[t, c]``, with ``D`` the direction, and 0 where the write ``X`` does
not come strictly before the residual stream that ``D`` belongs to.
"""

from typing import TYPE_CHECKING

from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    Frame,
    General,
    Gradient,
    LayerRule,
    Source,
)
from actstore.query.derived.nodes import (
    ABOUT_OF,
    DIRECTION_SYMBOLS,
    DIRECTIONS,
    direction_source,
    masked,
)
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["SCALARS", "layer_projection"]

_L = ActivationLocationType

_STREAMS = (
    ("resid_post_embedding", _L.RESID_POST_EMBEDDING, "the embedding"),
    ("resid_post_attn", _L.RESID_POST_ATTN, "the residual stream after attention"),
    ("resid_post_mlp", _L.RESID_POST_MLP, "the residual stream after the MLP"),
)
_WRITES = (
    ("attn_layer_write", _L.RESID_DELTA_ATTN, "what attention adds, output bias included"),
    ("mlp_layer_write", _L.RESID_DELTA_MLP, "what the MLP adds, output bias included"),
)


def _l2(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return sources[0].square().sum(-1, keepdim=True).sqrt()


def _first(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return sources[0]


def _ones(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return sources[0].new_ones(len(sources[0]), 1)


def _dot(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return (sources[0] * sources[1]).sum(-1, keepdim=True)


def _source(location: ActivationLocationType, pass_type: PassType = PassType.FORWARD) -> Source:
    rule = LayerRule.SAME if location.has_layers else LayerRule.NONE
    return Source(location, pass_type, rule)


def _norm(name: str, location: ActivationLocationType, noun: str) -> DerivedScalar:
    return DerivedScalar(
        name=f"{name}_norm",
        meaning=f"L2 norm of {noun}",
        definition=f"sqrt(sum_d {location}[t, d]^2)",
        axes=(Dimension.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=location.has_layers,
        sources=(_source(location),),
        dependence=General(),
        formula=_l2,
    )


def layer_projection(
    name: str, location: ActivationLocationType, noun: str, direction: Direction
) -> DerivedScalar:
    """A whole residual-stream vector, projected on a direction."""
    return DerivedScalar(
        name=name,
        meaning=f"{noun}, projected on {DIRECTIONS[direction]}",
        definition=masked(f"sum_d {location}[t, d] * {DIRECTION_SYMBOLS[direction]}[t, d]"),
        axes=(Dimension.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=location.has_layers,
        sources=(_source(location), direction_source(direction)),
        dependence=General(),
        formula=_dot,
        about=ABOUT_OF[direction],
    )


def _vocabulary_write(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
    index = frame.config.faked(frame.name)
    layer, unit = index.layer_index, index.tensor_indices[-1]
    location = index.activation_location_type
    assert layer is not None
    if len(index.tensor_indices) != 2 or unit is None:
        raise _unfit(frame, f"its index {index.tensor_indices} does not end with one unit")
    given = {_L.RESID_POST_ATTN: _embeddings(frame)}
    if location is _L.MLP_POST_ACT:
        written = frame.recompute(_L.MLP_PRE_ACT, layer, given)[:, unit]
    elif location in (_L.ONLINE_AUTOENCODER_LATENT, _L.ONLINE_MLP_AUTOENCODER_LATENT):
        autoencoder = frame.autoencoder(location.node_type, layer)
        if frame.config.residual_before(location.node_type) is not _L.RESID_POST_ATTN:
            raise _unfit(frame, f"the autoencoder reads {autoencoder.location}")
        read = frame.recompute(autoencoder.location, layer, given)
        written = autoencoder.encode_pre_act(read)[:, unit]
    else:
        raise _unfit(frame, f"{location} has no input direction after attention")
    return written.expand(len(sources[0]), -1)


def _embeddings(frame: Frame) -> "Tensor":
    embedded = frame.weight(WeightLocationType.EMBEDDING, None)
    return embedded * frame.dimensions.embedding_scale


def _unfit(frame: Frame, reason: str) -> InvalidInput:
    return InvalidInput(
        f"{frame.name} cannot be derived: {reason}. Use a neuron of mlp_post_act, or a latent "
        "of an autoencoder of the MLP.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )


_FINAL = Direction.FINAL_RESIDUAL_GRAD

SCALARS = (
    *(_norm(*row) for row in (*_STREAMS, *_WRITES)),
    *(
        layer_projection(f"{name}_proj_to_final_residual_grad", location, noun, _FINAL)
        for name, location, noun in _STREAMS
    ),
    *(
        layer_projection(f"{name}_to_final_residual_grad", location, noun, _FINAL)
        for name, location, noun in _WRITES
    ),
    layer_projection(
        "resid_post_embedding_proj_to_final_activation_residual_grad",
        _L.RESID_POST_EMBEDDING,
        "the embedding",
        Direction.FINAL_ACTIVATION_RESIDUAL_GRAD,
    ),
    DerivedScalar(
        name="token_attribution",
        meaning="the embedding times its gradient, summed over channels",
        definition="sum_d resid_post_embedding[t, d] * grad(resid_post_embedding)[t, d]",
        axes=(Dimension.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=False,
        sources=(
            _source(_L.RESID_POST_EMBEDDING),
            _source(_L.RESID_POST_EMBEDDING, PassType.BACKWARD),
        ),
        dependence=General(),
        formula=_dot,
    ),
    DerivedScalar(
        name="previous_layer_resid_post_mlp",
        meaning="residual stream that enters a layer: the previous layer's, or the embedding",
        definition="resid_post_mlp[t, d] of layer l - 1; resid_post_embedding[t, d] for layer 0",
        axes=(Dimension.CHANNEL,),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(Source(_L.RESID_POST_MLP, layer=LayerRule.PREVIOUS),),
        dependence=General(),
        formula=_first,
        row_wise=True,
        gradient=Gradient(
            (Source(_L.RESID_POST_MLP, PassType.BACKWARD, LayerRule.PREVIOUS),),
            definition="grad(resid_post_mlp) of layer l - 1; of the embedding for layer 0",
        ),
    ),
    DerivedScalar(
        name="always_one",
        meaning="one for every token",
        definition="1",
        axes=(Dimension.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=False,
        sources=(_source(_L.RESID_POST_EMBEDDING),),
        dependence=General(),
        formula=_ones,
    ),
    DerivedScalar(
        name="vocab_token_write_to_input_direction",
        meaning=(
            "for every vocabulary token, the pre-activation that its embedding alone gives one "
            "neuron or latent, through the norm before the MLP; the same at every token"
        ),
        definition=(
            "LN2(W_E[v]) . W_in[:, f] + b_in[f]; for a latent, its encoder's row and bias on "
            "what the autoencoder then reads"
        ),
        axes=(Dimension.VOCABULARY,),
        node_type=NodeType.VOCAB_TOKEN,
        has_layers=False,
        sources=(_source(_L.RESID_POST_EMBEDDING),),
        dependence=General(),
        formula=_vocabulary_write,
        about="activation_index_for_fake_grad",
    ),
)
