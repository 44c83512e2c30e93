"""Scalars of the residual stream that need no gradient.

Norms are L2 over the channels. Those of what a layer writes include its output bias.
"""

from typing import TYPE_CHECKING

from actstore.query.derived.declaration import DerivedScalar, General, LayerRule, Source
from actstore.store.vocabulary import ActivationLocationType, Dimension, NodeType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["SCALARS"]

_L = ActivationLocationType

_NORMS = (
    ("resid_post_embedding_norm", _L.RESID_POST_EMBEDDING, "the embedding"),
    ("resid_post_attn_norm", _L.RESID_POST_ATTN, "the residual stream after attention"),
    ("resid_post_mlp_norm", _L.RESID_POST_MLP, "the residual stream after the MLP"),
    ("attn_layer_write_norm", _L.RESID_DELTA_ATTN, "what attention adds, output bias included"),
    ("mlp_layer_write_norm", _L.RESID_DELTA_MLP, "what the MLP adds, output bias included"),
)


def _l2(sources: "Sequence[Tensor]", _: "Sequence[Tensor]") -> "Tensor":
    return sources[0].square().sum(-1, keepdim=True).sqrt()


def _first(sources: "Sequence[Tensor]", _: "Sequence[Tensor]") -> "Tensor":
    return sources[0]


def _ones(sources: "Sequence[Tensor]", _: "Sequence[Tensor]") -> "Tensor":
    return sources[0].new_ones(len(sources[0]), 1)


def _norm(name: str, location: ActivationLocationType, noun: str) -> DerivedScalar:
    return DerivedScalar(
        name=name,
        meaning=f"L2 norm of {noun}",
        axes=(Dimension.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=location.has_layers,
        sources=(
            Source(location, layer=LayerRule.SAME if location.has_layers else LayerRule.NONE),
        ),
        dependence=General(),
        formula=_l2,
    )


SCALARS = (
    *(_norm(*row) for row in _NORMS),
    DerivedScalar(
        name="previous_layer_resid_post_mlp",
        meaning="residual stream that enters a layer: the previous layer's, or the embedding",
        axes=(Dimension.CHANNEL,),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(Source(_L.RESID_POST_MLP, layer=LayerRule.PREVIOUS),),
        dependence=General(),
        formula=_first,
    ),
    DerivedScalar(
        name="always_one",
        meaning="one for every token",
        axes=(Dimension.SINGLETON,),
        node_type=NodeType.LAYER,
        has_layers=False,
        sources=(Source(_L.RESID_POST_EMBEDDING, layer=LayerRule.NONE),),
        dependence=General(),
        formula=_ones,
    ),
)
