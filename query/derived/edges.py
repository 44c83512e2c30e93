"""Scalars of edges: effects of one node on another, to first order.

One end is the config's ``node_index_for_attribution``. *Out* edges end there: what every
earlier node writes, projected on the gradient of that node's attribution. *In* edges start
there: along the vector that the node writes, the change of the activation (or of the
attribution) of every later node, to first order; 0 where the write does not
come strictly before what the later node reads.

Activations along an edge take the norm's denominator as a constant; attributions do where
``detach_layer_norm_scale_for_attribution`` says so.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actstore.query.derived.attention import head_projection
from actstore.query.derived.config import DstConfig
from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    Formula,
    Frame,
    General,
    LatentWrites,
    LayerRule,
    Source,
)
from actstore.query.derived.nodes import NEURON, direction_source, latent_node, projection
from actstore.query.derived.precedence import precedes
from actstore.query.derived.reconstitution import (
    activation,
    attribution,
    gradient_at,
    gradient_location,
    pick,
)
from actstore.query.derived.residual import layer_projection
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import (
    NODE_LOCATIONS,
    AttentionTraceType,
    AttnSubNodeIndex,
    NodeIndex,
)
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    LocationWithinLayer,
    NodeType,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.query.derived.post_norms import PostNorm

__all__ = ["SCALARS"]

_L = ActivationLocationType
_D = Dimension
_ABOUT = "node_index_for_attribution"
_BEFORE = Source(_L.RESID_POST_MLP, layer=LayerRule.PREVIOUS)
_AFTER_ATTENTION = Source(_L.RESID_POST_ATTN)
_WRITE = Source("single_node_write", layer=LayerRule.NODE)


# What the node writes


def _write_sources(config: DstConfig) -> tuple[Source, ...]:
    node = config.attributed("single_node_write")
    if node.node_type is NodeType.ATTENTION_HEAD:
        return (Source(_L.ATTN_QK_PROBS), Source(_L.ATTN_VALUE))
    return (Source(_node_location(node)),)


def _node_location(node: NodeIndex) -> ActivationLocationType:
    location = NODE_LOCATIONS.get(node.node_type)
    if location is None or node.node_type is NodeType.RESIDUAL_STREAM_CHANNEL:
        raise _unfit(
            "single_node_write",
            f"a {node.node_type} node writes nothing; use a neuron, head, latent",
        )
    return location


def _single_write(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
    node = frame.config.attributed(frame.name)
    layer = node.layer_index
    if node.node_type is NodeType.ATTENTION_HEAD:
        pattern, value = sources
        probability = pick(pattern.transpose(1, 2), node, frame.name)
        _at, attended, head = node.tensor_indices
        output = frame.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer)
        vector = probability * (value[attended, head] @ output[head])
    else:
        acts = sources[0]
        if node.node_type.is_autoencoder_latent:
            acts = frame.restored(node.node_type, acts)
        vector = pick(acts, node, frame.name) * _writer(frame, node)
    norm = _norm_after(frame, node)
    if norm is not None:
        vector = vector * norm.gain / norm.scale[node.tensor_indices[0]]
    result = vector.new_zeros(len(sources[0]), len(vector))
    result[node.tensor_indices[0]] = vector
    return result


def _norm_after(frame: Frame, node: NodeIndex) -> "PostNorm | None":
    """The norm between what a node writes and the stream; None for none."""
    if node.node_type is NodeType.ATTENTION_HEAD:
        return frame.post_norm(WeightLocationType.ATTN_TO_RESIDUAL)
    if node.node_type.is_autoencoder_latent:
        assert node.layer_index is not None
        read = frame.autoencoder(node.node_type, node.layer_index).location
        if read is not _L.MLP_POST_ACT:
            return None
    return frame.post_norm(WeightLocationType.MLP_TO_RESIDUAL)


def _writer(frame: Frame, node: NodeIndex) -> "Tensor":
    """The row that a neuron or latent writes."""
    name = (
        LatentWrites(node.node_type)
        if node.node_type.is_autoencoder_latent
        else WeightLocationType.MLP_TO_RESIDUAL
    )
    return frame.weight(name, node.layer_index)[node.tensor_indices[-1]]


# The gradient of one node's attribution


def _residual_source(config: DstConfig, node_type: NodeType) -> Source:
    before = config.residual_before(node_type)
    return _AFTER_ATTENTION if before is _L.RESID_POST_ATTN else _BEFORE


def _attribution_sources(config: DstConfig) -> tuple[Source, ...]:
    name = "grad_of_single_subnode_attribution"
    node = config.attributed(name)
    gradient = gradient_location(node, name)
    return (_residual_source(config, node.node_type), Source(gradient, PassType.BACKWARD))


def _attribution_gradient(
    sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame
) -> "Tensor":
    residual, gradient = sources
    node = frame.config.attributed(frame.name)
    detach = frame.config.detach_layer_norm_scale_for_attribution
    assert frame.layer is not None
    function = attribution(frame, node, frame.layer, gradient, detach_scale=detach)
    return gradient_at(function, residual, node, frame.name)


# Changes along the node's write


def _is_reached(frame: Frame, residual: ActivationLocationType) -> bool:
    node = frame.config.attributed(frame.name)
    wrote = frame.config.within_layer(_node_location(node))
    place = (
        LocationWithinLayer.RESID_POST_ATTN
        if residual is _L.RESID_POST_ATTN and not frame.dimensions.is_parallel
        else LocationWithinLayer.END_OF_PREV_LAYER
    )
    return precedes((wrote, node.layer_index), (place, frame.layer))


def _change(
    frame: Frame,
    node_type: NodeType,
    function: "Callable[[Tensor], Tensor]",
    residual: "Tensor",
    write: "Tensor",
) -> "Tensor":
    import torch

    if not _is_reached(frame, frame.config.residual_before(node_type)):
        return torch.zeros_like(function(residual))
    # The derivative along a vector by two reverse passes: what pulls any ``u`` back is linear
    # in ``u``, and its derivative is the push forward. Forward mode warns in torch 2.13.
    leaf = residual.detach().requires_grad_()
    with torch.enable_grad():
        result = function(leaf)
        any_u = torch.zeros_like(result, requires_grad=True)
        (pulled,) = torch.autograd.grad(result, leaf, any_u, create_graph=True)
        (change,) = torch.autograd.grad(pulled, any_u, write)
    return change


def _activation_change(node_type: NodeType, side: AttentionTraceType | None) -> Formula:
    def formula(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
        residual, write = sources
        assert frame.layer is not None
        function = activation(frame, node_type, frame.layer, detach_scale=True, side=side)
        return _change(frame, node_type, function, residual, write)

    return formula


def _attribution_change(node_type: NodeType, side: ActivationLocationType | None) -> Formula:
    def formula(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
        residual, gradient, write = sources
        assert frame.layer is not None
        kind = (
            NodeIndex(node_type, (), frame.layer)
            if side is None
            else AttnSubNodeIndex(node_type, (), frame.layer, q_k_or_v=side)
        )
        detach = frame.config.detach_layer_norm_scale_for_attribution
        function = attribution(frame, kind, frame.layer, gradient, detach_scale=detach)
        return _change(frame, node_type, function, residual, write)

    return formula


_EDGE_TEXTS: dict[ActivationLocationType | NodeType, tuple[str, str]] = {
    _L.ATTN_QUERY: (
        "p(r)[q, k, h] through its query alone",
        "p(r)[q, k, h] * grad(p)[q, k, h] through its query alone",
    ),
    _L.ATTN_KEY: (
        "p(r)[q, k, h] through its key alone",
        "p(r)[q, k, h] * grad(p)[q, k, h] through its key alone",
    ),
    _L.ATTN_VALUE: ("", "sum_c p[q, k, h] * V(r)[k, h, c] * grad(z)[q, h, c]"),
    NodeType.MLP_NEURON: ("a(r)[t, f]", "a(r)[t, f] * grad(a)[t, f]"),
    NodeType.AUTOENCODER_LATENT: (
        "latent(r)[t, n]",
        "latent(r)[t, n] * grad(latent)[t, n]",
    ),
}
"""Activation and attribution of a node as a function of the stream ``r`` before it."""


def _in_edges(
    name: str,
    noun: str,
    node_type: NodeType,
    axes: tuple[Dimension, ...],
    gradient: ActivationLocationType,
    side: ActivationLocationType | None = None,
) -> tuple[DerivedScalar, ...]:
    """Changes of activation and of attribution; through a head's value, of attribution alone."""
    residual = _AFTER_ATTENTION if node_type is NodeType.MLP_NEURON else _BEFORE
    latents = node_type if node_type.is_autoencoder_latent else None

    def sources(*middle: Source) -> Callable[[DstConfig], tuple[Source, ...]]:
        return lambda config: (_residual_source(config, node_type), *middle, _WRITE)

    changed, attributed = _EDGE_TEXTS[side or node_type]

    def declare(
        what: str, noun_of: str, text: str, formula: Formula, *middle: Source
    ) -> DerivedScalar:
        return DerivedScalar(
            name=f"{name}_in_edge_{what}",
            meaning=f"change of {noun_of} {noun}, along what one earlier node writes",
            definition=(
                f"d ({text}) / d e at r + e * single_node_write, e = 0; 0 where that write does "
                "not come before r"
            ),
            axes=axes,
            node_type=node_type,
            has_layers=True,
            sources=(residual, *middle, _WRITE),
            dependence=General(),
            formula=formula,
            about=_ABOUT,
            latents=latents,
            choose_sources=None if latents is None else sources(*middle),
        )

    attributions = declare(
        "attribution",
        "the attribution of",
        attributed,
        _attribution_change(node_type, side),
        Source(gradient, PassType.BACKWARD),
    )
    if side is _L.ATTN_VALUE:
        return (attributions,)
    kind = None if side is None else AttentionTraceType(side.label.removeprefix("attn_")[0])
    return (
        declare("activation", "the activation of", changed, _activation_change(node_type, kind)),
        attributions,
    )


_HEADS = (_D.ATTENDED, _D.HEAD)
_LATENT = NodeType.AUTOENCODER_LATENT


def _unfit(name: str, reason: str) -> InvalidInput:
    return InvalidInput(f"{name} cannot be derived: {reason}.", kind=ErrorKind.INVALID_ARGUMENT)


_TO_NODE = Direction.SUBNODE_ATTRIBUTION_GRAD

SCALARS = (
    DerivedScalar(
        name="single_node_write",
        meaning="the vector that one node writes, at its token; 0 at every other token",
        definition="1[t = t_node] * activation of the node * w_node[d]",
        axes=(_D.CHANNEL,),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(Source(_L.MLP_POST_ACT),),
        dependence=General(),
        formula=_single_write,
        about=_ABOUT,
        only_node_layer=True,
        choose_sources=_write_sources,
    ),
    DerivedScalar(
        name="single_node_write_to_final_residual_grad",
        meaning="what one node writes, projected on the gradient at the final residual stream",
        definition=(
            "sum_d single_node_write[t, d] * G[t, d]; 0 where it does not come before that stream"
        ),
        axes=(_D.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=True,
        sources=(Source("single_node_write"), direction_source(Direction.FINAL_RESIDUAL_GRAD)),
        dependence=General(),
        formula=lambda sources, _, __: (sources[0] * sources[1]).sum(-1, keepdim=True),
        about=_ABOUT,
        only_node_layer=True,
    ),
    DerivedScalar(
        name="grad_of_single_subnode_attribution",
        meaning="gradient of one node's attribution at the residual stream before it",
        definition="G_attr[t, d] = d A(r)[node] / d r[t, d], r the stream before the node",
        axes=(_D.CHANNEL,),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(_AFTER_ATTENTION, Source(_L.MLP_POST_ACT, PassType.BACKWARD)),
        dependence=General(),
        formula=_attribution_gradient,
        about=_ABOUT,
        only_node_layer=True,
        choose_sources=_attribution_sources,
    ),
    head_projection("attn_out_edge_attribution", _TO_NODE),
    projection(NEURON, _TO_NODE, "mlp_out_edge_attribution"),
    projection(latent_node(_LATENT), _TO_NODE, "online_autoencoder_out_edge_attribution"),
    layer_projection(
        "token_out_edge_attribution", _L.RESID_POST_EMBEDDING, "the embedding", _TO_NODE
    ),
    *_in_edges(
        "attn_query",
        "heads, through their queries",
        NodeType.ATTENTION_HEAD,
        _HEADS,
        _L.ATTN_QK_PROBS,
        _L.ATTN_QUERY,
    ),
    *_in_edges(
        "attn_key",
        "heads, through their keys",
        NodeType.ATTENTION_HEAD,
        _HEADS,
        _L.ATTN_QK_PROBS,
        _L.ATTN_KEY,
    ),
    *_in_edges(
        "attn_value",
        "heads, through their values",
        NodeType.ATTENTION_HEAD,
        _HEADS,
        _L.ATTN_WEIGHTED_SUM_OF_VALUES,
        _L.ATTN_VALUE,
    ),
    *_in_edges("mlp", "neurons", NodeType.MLP_NEURON, (_D.NEURON,), _L.MLP_POST_ACT),
    *_in_edges(
        "online_autoencoder", "latents", _LATENT, (_D.LATENT,), _L.ONLINE_AUTOENCODER_LATENT
    ),
)
