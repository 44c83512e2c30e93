"""Recipes: how a location's values follow from other locations and the weights.

One table per architecture, one row per recipe. Values are computed in float64 for one
whole sequence at a time, so a value never depends on what else was asked for. The
forward recipes repeat the model's own computation; the subtractions stand at the end
and cost more, since they lose the digits that the two residuals share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from actstore.query.derived.declaration import LayerRule, Source
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RECIPES", "Recipe", "Setting", "WeightName"]

WeightName = WeightLocationType | ActivationLocationType
"""A weight; a location stands for the bias that queries, keys or values contain."""


@dataclass(frozen=True)
class Setting:
    """What a recipe may know besides its inputs.

    Attributes:
        dimensions: the model's sizes and constants.
        layer: the target's layer, None for a target outside the blocks.
        token_ids: the sequence's tokens, int64 ``(token,)``.
    """

    dimensions: ModelDimensions
    layer: int | None
    token_ids: "Tensor"


@dataclass(frozen=True)
class Recipe:
    """One way to a location's values.

    Attributes:
        target: the location.
        inputs: locations it is made from; none means the token ids.
        weights: weights of the target's own layer.
        function: ``(inputs, weights, setting) -> value``, float64, the token axis first.
        cost: steps that this recipe counts for when several lead to the target.
    """

    target: ActivationLocationType
    inputs: tuple[Source, ...]
    weights: tuple[WeightName, ...]
    function: Callable[[Sequence["Tensor"], Sequence["Tensor"], Setting], "Tensor"]
    cost: int = 1


_L = ActivationLocationType
_W = WeightLocationType
_LAST_RESORT = 1000

_BEFORE = Source(_L.RESID_POST_MLP, layer=LayerRule.PREVIOUS)
_LAST = Source(_L.RESID_POST_MLP, layer=-1)
_ATTN_NORM = (_W.LAYER_NORM_GAIN_PRE_ATTN, _W.LAYER_NORM_BIAS_PRE_ATTN)
_MLP_NORM = (_W.LAYER_NORM_GAIN_PRE_MLP, _W.LAYER_NORM_BIAS_PRE_MLP)
_FINAL_NORM = (_W.LAYER_NORM_GAIN_FINAL, _W.LAYER_NORM_BIAS_FINAL)


def _embed(_: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting) -> "Tensor":
    tokens, positions = weights
    return tokens[setting.token_ids] + positions[: len(setting.token_ids)]


def _centre(residual: "Tensor", setting: Setting) -> tuple["Tensor", "Tensor"]:
    """The residual less its mean over channels, and sqrt(variance + eps)."""
    centred = residual - residual.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred, (variance + setting.dimensions.layer_norm_epsilon).sqrt()


def _norm_scale(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    return _centre(inputs[0], setting)[1]


def _normalise(residual: "Tensor", gain: "Tensor", bias: "Tensor", setting: Setting) -> "Tensor":
    centred, scale = _centre(residual, setting)
    return centred / scale * gain + bias


def _into_heads(
    inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting
) -> "Tensor":
    gain, norm_bias, matrix, bias = weights
    # (token, channel) @ (head, channel, head_channel), then the token axis first.
    heads = _normalise(inputs[0], gain, norm_bias, setting) @ matrix
    return heads.transpose(0, 1) + bias


def _scores(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    import torch

    query, key = (tensor.transpose(0, 1) for tensor in inputs)
    assert setting.layer is not None
    scores = query @ key.transpose(1, 2) * setting.dimensions.attention_scaling(setting.layer)
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).transpose(0, 1)


def _softmax(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    return inputs[0].softmax(-1)


def _weighted_sum(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    pattern, value = (tensor.transpose(0, 1) for tensor in inputs)
    return (pattern @ value).transpose(0, 1)


def _from_heads(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], _: Setting) -> "Tensor":
    matrix, bias = weights
    return inputs[0].flatten(1) @ matrix.flatten(0, 1) + bias


def _add(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    return inputs[0] + inputs[1]


def _subtract(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    return inputs[0] - inputs[1]


def _into_mlp(
    inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting
) -> "Tensor":
    gain, norm_bias, matrix, bias = weights
    return _normalise(inputs[0], gain, norm_bias, setting) @ matrix + bias


def _activate(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    from torch.nn import functional

    values = inputs[0]
    name = setting.dimensions.activation_function
    if name == "relu":
        return values.relu()
    if name == "silu":
        return values.sigmoid() * values
    approximate = "none" if name == "gelu" else "tanh"
    return functional.gelu(values, approximate=approximate)


def _affine(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], _: Setting) -> "Tensor":
    matrix, bias = weights
    return inputs[0] @ matrix + bias


def _unembed(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting) -> "Tensor":
    gain, norm_bias, matrix = weights
    return _normalise(inputs[0], gain, norm_bias, setting) @ matrix


def _projection(target: ActivationLocationType, matrix: WeightLocationType) -> Recipe:
    return Recipe(target, (_BEFORE,), (*_ATTN_NORM, matrix, target), _into_heads)


def _same(*locations: ActivationLocationType) -> tuple[Source, ...]:
    return tuple(Source(location) for location in locations)


_GPT2 = (
    Recipe(_L.RESID_POST_EMBEDDING, (), (_W.EMBEDDING, _W.POSITION_EMBEDDING), _embed),
    Recipe(_L.ATTN_INPUT_LAYER_NORM_SCALE, (_BEFORE,), (), _norm_scale),
    _projection(_L.ATTN_QUERY, _W.ATTN_TO_QUERY),
    _projection(_L.ATTN_KEY, _W.ATTN_TO_KEY),
    _projection(_L.ATTN_VALUE, _W.ATTN_TO_VALUE),
    Recipe(_L.ATTN_QK_LOGITS, _same(_L.ATTN_QUERY, _L.ATTN_KEY), (), _scores),
    Recipe(_L.ATTN_QK_PROBS, _same(_L.ATTN_QK_LOGITS), (), _softmax),
    Recipe(
        _L.ATTN_WEIGHTED_SUM_OF_VALUES,
        _same(_L.ATTN_QK_PROBS, _L.ATTN_VALUE),
        (),
        _weighted_sum,
    ),
    Recipe(
        _L.RESID_DELTA_ATTN,
        _same(_L.ATTN_WEIGHTED_SUM_OF_VALUES),
        (_W.ATTN_TO_RESIDUAL, _W.ATTN_OUTPUT_BIAS),
        _from_heads,
    ),
    Recipe(_L.RESID_POST_ATTN, (_BEFORE, *_same(_L.RESID_DELTA_ATTN)), (), _add),
    Recipe(_L.MLP_INPUT_LAYER_NORM_SCALE, _same(_L.RESID_POST_ATTN), (), _norm_scale),
    Recipe(
        _L.MLP_PRE_ACT,
        _same(_L.RESID_POST_ATTN),
        (*_MLP_NORM, _W.MLP_TO_HIDDEN, _W.MLP_HIDDEN_BIAS),
        _into_mlp,
    ),
    Recipe(_L.MLP_POST_ACT, _same(_L.MLP_PRE_ACT), (), _activate),
    Recipe(
        _L.RESID_DELTA_MLP,
        _same(_L.MLP_POST_ACT),
        (_W.MLP_TO_RESIDUAL, _W.MLP_OUTPUT_BIAS),
        _affine,
    ),
    Recipe(_L.RESID_POST_MLP, _same(_L.RESID_POST_ATTN, _L.RESID_DELTA_MLP), (), _add),
    Recipe(_L.RESID_FINAL_LAYER_NORM_SCALE, (_LAST,), (), _norm_scale),
    Recipe(_L.LOGITS, (_LAST,), (*_FINAL_NORM, _W.UNEMBEDDING), _unembed),
    Recipe(
        _L.RESID_DELTA_ATTN,
        (*_same(_L.RESID_POST_ATTN), _BEFORE),
        (),
        _subtract,
        _LAST_RESORT,
    ),
    Recipe(
        _L.RESID_DELTA_MLP,
        _same(_L.RESID_POST_MLP, _L.RESID_POST_ATTN),
        (),
        _subtract,
        _LAST_RESORT,
    ),
    Recipe(
        _L.RESID_POST_ATTN,
        _same(_L.RESID_POST_MLP, _L.RESID_DELTA_MLP),
        (),
        _subtract,
        _LAST_RESORT,
    ),
)

RECIPES: Mapping[str, tuple[Recipe, ...]] = MappingProxyType({"gpt2": _GPT2})
"""Architecture -> its recipes."""
