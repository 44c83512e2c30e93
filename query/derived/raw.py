"""The raw scalars: every location of the forward pass, under its own name.

Formulas: the identity, but for two things. Queries and keys carry the factor
d_head^(-1/4), so that their product is the attention score; the store keeps what the
attention function received. Scores and probabilities are ``(token, attended, head)``;
the store keeps the head before the attended token. Backward values follow: the gradient
with respect to a scaled query is the gradient divided by the factor.
"""

import math
from typing import TYPE_CHECKING

from actstore.query.derived.declaration import (
    Coefficient,
    Dependence,
    DerivedScalar,
    Formula,
    Frame,
    General,
    Gradient,
    Identity,
    LayerRule,
    ScaledBy,
    Source,
)
from actstore.store.nodes import index_axes
from actstore.store.vocabulary import FORWARD_LOCATIONS, ActivationLocationType, PassType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["SCALARS"]

_L = ActivationLocationType

_DEFINITIONS = {
    _L.RESID_POST_EMBEDDING: "W_E[token_id[t], d] + W_pos[position[t], d]",
    _L.ATTN_INPUT_LAYER_NORM_SCALE: "sqrt(variance_d(x[t]) + eps), x the stream that enters",
    _L.ATTN_QUERY: "(LN1(x)[t] . W_Q[h, :, c] + b_Q[h, c]) * d_head^(-1/4)",
    _L.ATTN_KEY: "(LN1(x)[t] . W_K[h, :, c] + b_K[h, c]) * d_head^(-1/4)",
    _L.ATTN_VALUE: "LN1(x)[t] . W_V[h, :, c] + b_V[h, c]",
    _L.ATTN_QK_LOGITS: "sum_c query[q, h, c] * key[k, h, c], minus infinity where k > q",
    _L.ATTN_QK_PROBS: "p[q, k, h] = softmax over k of attn_qk_logits[q, k, h]",
    _L.ATTN_WEIGHTED_SUM_OF_VALUES: "z[q, h, c] = sum_k p[q, k, h] * V[k, h, c]",
    _L.ATTN_OUTPUT_LAYER_NORM_SCALE: (
        "sqrt(mean_d(y[t]^2) + eps), y what attention makes before that norm"
    ),
    _L.RESID_DELTA_ATTN: "sum_h,c z[t, h, c] * W_O[h, c, d] + b_O[d]",
    _L.RESID_POST_ATTN: "x[t, d] + resid_delta_attn[t, d], x the stream that enters",
    _L.MLP_INPUT_LAYER_NORM_SCALE: "sqrt(variance_d(resid_post_attn[t]) + eps)",
    _L.MLP_PRE_ACT: "LN2(resid_post_attn)[t] . W_in[:, f] + b_in[f]",
    _L.MLP_PRE_LINEAR: "LN2(resid_post_attn)[t] . W_linear[:, f]",
    _L.MLP_POST_ACT: (
        "a[t, f] = activation_function(mlp_pre_act[t, f]); in a gated MLP * mlp_pre_linear[t, f]"
    ),
    _L.MLP_OUTPUT_LAYER_NORM_SCALE: (
        "sqrt(mean_d(y[t]^2) + eps), y what the MLP makes before that norm"
    ),
    _L.RESID_DELTA_MLP: "sum_f a[t, f] * W_out[f, d] + b_out[d]",
    _L.RESID_POST_MLP: "resid_post_attn[t, d] + resid_delta_mlp[t, d]",
    _L.RESID_FINAL_LAYER_NORM_SCALE: "sqrt(variance_d(resid_post_mlp[t] of the last layer) + eps)",
    _L.LOGITS: "LN_final(resid_post_mlp of the last layer)[t] . W_U[:, v]",
}

_SCALED = (ActivationLocationType.ATTN_QUERY, ActivationLocationType.ATTN_KEY)


def _by_attended(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return sources[0].transpose(1, 2)


def _unscaled(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", frame: Frame) -> "Tensor":
    assert frame.layer is not None
    return sources[0] / math.sqrt(frame.dimensions.attention_scaling(frame.layer))


def _raw(location: ActivationLocationType) -> DerivedScalar:
    scaled, pairs = location in _SCALED, location.is_pair_shaped
    dependence: Dependence = Identity()
    if scaled:
        dependence = ScaledBy(Coefficient.QUERY_KEY_SCALE)
    elif pairs:
        dependence = General()
    rule = LayerRule.SAME if location.has_layers else LayerRule.NONE
    backward: Formula | None = _unscaled if scaled else _by_attended if pairs else None
    return DerivedScalar(
        name=location.label,
        meaning=f"{location.meaning}{', times d_head^(-1/4)' if scaled else ''}",
        definition=_DEFINITIONS[location],
        axes=index_axes(location)[1:],
        node_type=location.node_type,
        has_layers=location.has_layers,
        sources=(Source(location, layer=rule),),
        dependence=dependence,
        formula=_by_attended if pairs else None,
        row_wise=True,
        gradient=Gradient(
            (Source(location, PassType.BACKWARD, rule),),
            backward,
            f"grad({location})" + (" / d_head^(-1/4)" if scaled else ""),
        ),
    )


SCALARS = tuple(_raw(location) for location in FORWARD_LOCATIONS)
