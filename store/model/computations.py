"""The steps of a forward pass, one function each, as recipes put them together.

Each takes the inputs and weights of one step, and a :class:`Setting`; values are float64,
the token axis first, of one whole sequence. All are differentiable. What a family lacks (a
norm's bias, a window, a cap) its dimensions say, so the families share the functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.rotary import rotated

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Function",
    "Setting",
    "activate",
    "affine",
    "difference",
    "embed",
    "from_heads",
    "hidden_pairs",
    "into_heads",
    "into_mlp",
    "into_turned_heads",
    "norm_scale",
    "per_query_head",
    "probabilities",
    "scores",
    "soft_cap",
    "then_normed",
    "then_scale",
    "total",
    "unembed",
    "weighted_sum",
]


@dataclass(frozen=True)
class Setting:
    """What a recipe may know besides its inputs.

    Attributes:
        dimensions: the model's sizes and constants.
        layer: the target's layer, None for a target outside the blocks.
        token_ids: the sequence's tokens, int64 ``(token,)``; only the embedding asks.
        detach_scale: take the norms' denominators as constants when differentiating. The
            mean that is subtracted and the gain still carry gradient, and so do the norms of
            queries and keys, which belong to attention.
        scale: the norm's denominator ``(token, 1)``, to differentiate with respect to it;
            recomputed when None.
        positions: places of the rows in their sequence, int64 ``(token,)``; from 0 on when
            None. Rotations alone depend on them.
    """

    dimensions: ModelDimensions
    layer: int | None
    token_ids: "Tensor | None" = None
    detach_scale: bool = False
    scale: "Tensor | None" = None
    positions: "Tensor | None" = None


Function = Callable[[Sequence["Tensor"], Sequence["Tensor"], Setting], "Tensor"]
"""``(inputs, weights, setting) -> value``, float64, the token axis first."""


def per_query_head(heads: "Tensor", dimensions: ModelDimensions) -> "Tensor":
    """Keys or values ``(token, kv_head, …)`` as the query heads see them, ``(token, head, …)``.

    Query heads ``g * i`` to ``g * i + g - 1`` share head ``i``, with ``g`` of them per head.
    """
    shared = dimensions.n_heads // dimensions.kv_heads
    return heads if shared == 1 else heads.repeat_interleave(shared, dim=1)


def _layer(setting: Setting) -> int:
    assert setting.layer is not None, "this location belongs to a layer"
    return setting.layer


def embed(_: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """Token embeddings times the model's factor, plus those of positions if it has some."""
    assert setting.token_ids is not None, "the embedding needs tokens"
    embedded = weights[0][setting.token_ids]
    if setting.dimensions.embedding_scale != 1:
        embedded = _as_run(embedded * setting.dimensions.embedding_scale, setting.dimensions)
    return embedded if len(weights) == 1 else embedded + weights[1][: len(setting.token_ids)]


def _as_run(values: "Tensor", dimensions: ModelDimensions) -> "Tensor":
    """Values rounded to the dtype that the model ran in."""
    import torch

    return values.to(getattr(torch, dimensions.run_dtype)).to(values.dtype)


# Norms


def _centre(residual: "Tensor", setting: Setting) -> tuple["Tensor", "Tensor"]:
    """The residual, less its mean over channels where norms centre, and its denominator."""
    if setting.dimensions.norm.centres:
        residual = residual - residual.mean(-1, keepdim=True)
    variance = residual.square().mean(-1, keepdim=True)
    scale = (variance + setting.dimensions.layer_norm_epsilon).sqrt()
    return residual, scale.detach() if setting.detach_scale else scale


def norm_scale(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """A norm's denominator, ``(token, 1)``, for what it reads."""
    return _centre(inputs[0], setting)[1]


def _normalise(residual: "Tensor", norm: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """A norm with its gain, and its bias if it has one."""
    centred, scale = _centre(residual, setting)
    normed = centred / (scale if setting.scale is None else setting.scale) * norm[0]
    return normed if len(norm) == 1 else normed + norm[1]


def _normalise_heads(heads: "Tensor", gain: "Tensor", setting: Setting) -> "Tensor":
    square = heads.square().mean(-1, keepdim=True)
    return heads / (square + setting.dimensions.layer_norm_epsilon).sqrt() * gain


# Attention


def into_heads(
    inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting
) -> "Tensor":
    """A norm, then a projection into heads, ``(token, head, head_channel)``, plus a bias."""
    *norm, matrix, bias = weights
    # (token, channel) @ (head, channel, head_channel), then the token axis first.
    heads = _normalise(inputs[0], norm, setting) @ matrix
    return heads.transpose(0, 1) + bias


def into_turned_heads(
    inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting
) -> "Tensor":
    """Queries or keys: with a norm of their own, if they have one, and turned."""
    import torch

    if setting.dimensions.has_query_key_norms:
        *weights, gain = weights
        heads = _normalise_heads(into_heads(inputs, weights, setting), gain, setting)
    else:
        heads = into_heads(inputs, weights, setting)
    rotary = setting.dimensions.rotary_at(_layer(setting))
    if rotary is None:
        return heads
    positions = torch.arange(len(heads)) if setting.positions is None else setting.positions
    return rotated(heads, rotary.turns(positions, setting.dimensions.run_dtype))


def soft_cap(values: "Tensor", cap: float | None) -> "Tensor":
    """``cap * tanh(x / cap)``, or the values themselves without a cap."""
    return values if cap is None else (values / cap).tanh() * cap


def hidden_pairs(tokens: int, window: int | None) -> "Tensor":
    """Which pairs (token, attended) attention leaves out, bool ``(token, attended)``."""
    import torch

    everything = torch.ones(tokens, tokens, dtype=torch.bool)
    hidden = everything.triu(1)
    return hidden if window is None else hidden | everything.tril(-window)


def scores(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """Scores ``(token, head, attended)``, minus infinity where attention does not look."""
    import torch

    layer, dimensions = _layer(setting), setting.dimensions
    query, key = inputs[0].transpose(0, 1), per_query_head(inputs[1], dimensions).transpose(0, 1)
    scores = query @ key.transpose(1, 2) * dimensions.attention_scaling(layer)
    hidden = hidden_pairs(scores.shape[-1], dimensions.window_at(layer)).to(scores.device)
    scores = soft_cap(scores, dimensions.score_cap).masked_fill(hidden, -torch.inf)
    return scores.transpose(0, 1)


def probabilities(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    """Scores to probabilities over the attended tokens."""
    return inputs[0].softmax(-1)


def weighted_sum(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """Values weighted by the probabilities, ``(token, head, head_channel)``."""
    pattern = inputs[0].transpose(0, 1)
    value = per_query_head(inputs[1], setting.dimensions).transpose(0, 1)
    return (pattern @ value).transpose(0, 1)


# What attention and MLP add


def from_heads(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], _: Setting) -> "Tensor":
    """Weighted values of all heads through the output map, plus a bias."""
    matrix, bias = weights
    return inputs[0].flatten(1) @ matrix.flatten(0, 1) + bias


def affine(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], _: Setting) -> "Tensor":
    """Rows through a matrix, plus a bias."""
    matrix, bias = weights
    return inputs[0] @ matrix + bias


def then_normed(function: Function) -> Function:
    """A step with a norm behind it, whose gain is the last weight."""

    def normed(
        inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting
    ) -> "Tensor":
        *before, gain = weights
        return _normalise(function(inputs, before, setting), [gain], setting)

    return normed


def then_scale(function: Function) -> Function:
    """The denominator of the norm behind a step."""

    def scale(
        inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting
    ) -> "Tensor":
        return _centre(function(inputs, weights, setting), setting)[1]

    return scale


def total(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    """The inputs' sum, from the first to the last."""
    value = inputs[0]
    for addend in inputs[1:]:
        value = value + addend
    return value


def difference(inputs: Sequence["Tensor"], _: Sequence["Tensor"], __: Setting) -> "Tensor":
    """The first input less all others."""
    value = inputs[0]
    for subtrahend in inputs[1:]:
        value = value - subtrahend
    return value


# The MLP, and what follows the last block


def into_mlp(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """A norm, then a projection into neurons, plus a bias."""
    *norm, matrix, bias = weights
    return _normalise(inputs[0], norm, setting) @ matrix + bias


def activate(inputs: Sequence["Tensor"], _: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """Neurons after it; a second input is a gated MLP's linear branch."""
    from torch.nn import functional

    values = inputs[0]
    name = setting.dimensions.activation_function
    if name == "relu":
        activated = values.relu()
    elif name == "silu":
        activated = values.sigmoid() * values
    else:
        approximate = "none" if name == "gelu" else "tanh"
        activated = functional.gelu(values, approximate=approximate)
    return activated if len(inputs) == 1 else activated * inputs[1]


def unembed(inputs: Sequence["Tensor"], weights: Sequence["Tensor"], setting: Setting) -> "Tensor":
    """The final norm and the unembedding, with the model's cap."""
    *norm, matrix = weights
    logits = _normalise(inputs[0], norm, setting) @ matrix
    return soft_cap(logits, setting.dimensions.logit_cap)
