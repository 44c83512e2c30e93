"""Scalars of attention heads.

With ``p[q, k, h]`` the probabilities, ``V[k, h, c]`` the values (bias included), ``z`` the
weighted sum of values and ``W_O[h, c, d]`` the output weights: a head writes
``p[q, k, h] V[k, h] W_O[h]`` at ``q`` from ``k``, and ``z[q, h] W_O[h]`` in all. The output
bias belongs to no head.

A flattened scalar holds the pairs (query token, attended token up to it) row by row.
"""

from typing import TYPE_CHECKING

from actstore.query.derived import raw
from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    Frame,
    General,
    Gradient,
    Source,
)
from actstore.query.derived.nodes import (
    ABOUT_OF,
    DIRECTION_SYMBOLS,
    DIRECTIONS,
    direction_source,
    masked,
)
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

__all__ = [
    "SCALARS",
    "flattened",
    "head_projection",
    "lower_triangle",
    "pair_projection",
    "token_projection",
]

_L = ActivationLocationType
_D = Dimension
_PATTERN = Source(_L.ATTN_QK_PROBS)
_PATTERN_GRAD = Source(_L.ATTN_QK_PROBS, PassType.BACKWARD)
_VALUE = Source(_L.ATTN_VALUE)
_WEIGHTED_SUM = Source(_L.ATTN_WEIGHTED_SUM_OF_VALUES)
_OUTPUT = (WeightLocationType.ATTN_TO_RESIDUAL,)
_PAIRS = (_D.ATTENDED, _D.HEAD)

# Raw pair-shaped sources are (token, head, attended): q h k.


def _weighted_value(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    pattern, value = sources
    return pattern.transpose(1, 2).unsqueeze(-1) * value


def _write(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    import torch

    pattern, value = sources
    written = torch.einsum("khc,hcd->khd", value, weights[0])
    return pattern.transpose(1, 2).unsqueeze(-1) * written


def _write_sum_heads(
    sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame
) -> "Tensor":
    import torch

    pattern, value = sources
    return torch.einsum("qhk,khd->qkd", pattern, torch.einsum("khc,hcd->khd", value, weights[0]))


def _value_norms(value: "Tensor", output: "Tensor") -> "Tensor":
    """Norm of what a head writes per unit of probability, ``(attended, head)``."""
    import torch

    return torch.einsum("khc,hcd->khd", value, output).square().sum(-1).sqrt()


def _write_norm(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    pattern, value = sources
    return pattern.transpose(1, 2) * _value_norms(value, weights[0])


def _write_norm_gradient(
    sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame
) -> "Tensor":
    gradient, value = sources
    return gradient.transpose(1, 2) / _value_norms(value, weights[0])


def _token_write_norm(
    sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame
) -> "Tensor":
    # (token, head, head_channel) and (head, head_channel, channel), head by head.
    written = sources[0].transpose(0, 1) @ weights[0]
    return written.square().sum(-1).sqrt().transpose(0, 1)


def _pattern_times_grad(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return (sources[0] * sources[1]).transpose(1, 2)


def _sum_attended(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    return sources[0].sum(1)


def pair_projection(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    """Pattern, value and direction to ``(token, attended, head)``."""
    import torch

    pattern, value, direction = sources
    along = torch.einsum("qd,hcd->qhc", direction, weights[0])
    return torch.einsum("qhk,khc,qhc->qkh", pattern, value, along)


def token_projection(
    sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame
) -> "Tensor":
    """Weighted sum of values and direction to ``(token, head)``."""
    import torch

    return torch.einsum("qhc,hcd,qd->qh", sources[0], weights[0], sources[1])


def lower_triangle(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    """``(token, attended, …)`` to ``(pair, …)``: (0, 0), (1, 0), (1, 1), (2, 0) …."""
    import torch

    pairs = torch.tril_indices(*sources[0].shape[:2])
    return sources[0][pairs[0], pairs[1]]


def flattened(name: str, of: DerivedScalar, has_gradient: bool = False) -> DerivedScalar:
    """The pairs of a pair-shaped scalar, row by row."""
    backward = (Source(of.name, PassType.BACKWARD),)
    return DerivedScalar(
        name=name,
        meaning=f"{of.meaning}; pairs with attended tokens up to the token, row by row",
        definition=f"{of.name}[q, k] for k = 0 … q, for q = 0 … T - 1",
        axes=tuple(axis for axis in of.axes if axis is not _D.ATTENDED),
        node_type=of.node_type,
        has_layers=of.has_layers,
        sources=(Source(of.name),),
        dependence=General(),
        formula=lower_triangle,
        is_flattened=True,
        gradient=(
            Gradient(backward, lower_triangle, f"the same pairs of the backward value of {of.name}")
            if has_gradient
            else None
        ),
        about=of.about,
        only_node_layer=of.only_node_layer,
        latents=of.latents,
    )


def head_projection(name: str, direction: Direction) -> DerivedScalar:
    """What a head writes at a token from an attended one, projected on a direction."""
    return DerivedScalar(
        name=name,
        meaning=f"the head's write at a pair of tokens, projected on {DIRECTIONS[direction]}",
        definition=masked(
            f"p[q, k, h] * sum_c,d V[k, h, c] * W_O[h, c, d] * {DIRECTION_SYMBOLS[direction]}[q, d]"
        ),
        axes=_PAIRS,
        node_type=NodeType.ATTENTION_HEAD,
        has_layers=True,
        sources=(_PATTERN, _VALUE, direction_source(direction)),
        dependence=General(),
        weights=_OUTPUT,
        formula=pair_projection,
        about=ABOUT_OF[direction],
    )


_PROBABILITIES = next(entry for entry in raw.SCALARS if entry.name == "attn_qk_probs")
_WRITE_NORM = DerivedScalar(
    name="unflattened_attn_write_norm",
    meaning="L2 norm of what a head writes at a token from an attended one",
    definition="p[q, k, h] * |sum_c V[k, h, c] * W_O[h, c]|",
    axes=_PAIRS,
    node_type=NodeType.ATTENTION_HEAD,
    has_layers=True,
    sources=(_PATTERN, _VALUE),
    dependence=General(),
    weights=_OUTPUT,
    formula=_write_norm,
    row_wise=True,
    whole=(1,),
    gradient=Gradient(
        (_PATTERN_GRAD, _VALUE),
        _write_norm_gradient,
        "grad(p)[q, k, h] / |sum_c V[k, h, c] * W_O[h, c]|",
    ),
)
_ACT_TIMES_GRAD = DerivedScalar(
    name="unflattened_attn_act_times_grad",
    meaning="attention probability times its gradient",
    definition="p[q, k, h] * grad(p)[q, k, h]",
    axes=_PAIRS,
    node_type=NodeType.ATTENTION_HEAD,
    has_layers=True,
    sources=(_PATTERN, _PATTERN_GRAD),
    dependence=General(),
    formula=_pattern_times_grad,
    row_wise=True,
)
_DIRECT_EFFECT = head_projection(
    "unflattened_attn_write_to_final_residual_grad", Direction.FINAL_RESIDUAL_GRAD
)

SCALARS = (
    DerivedScalar(
        name="attn_weighted_value",
        meaning="attention probability times the attended token's value vector",
        definition="p[q, k, h] * V[k, h, c]",
        axes=(_D.ATTENDED, _D.HEAD, _D.HEAD_CHANNEL),
        node_type=NodeType.V_CHANNEL,
        has_layers=True,
        sources=(_PATTERN, _VALUE),
        dependence=General(),
        formula=_weighted_value,
        row_wise=True,
        whole=(1,),
    ),
    DerivedScalar(
        name="attn_write",
        meaning="what a head writes to the residual stream at a token from an attended one",
        definition="p[q, k, h] * sum_c V[k, h, c] * W_O[h, c, d]",
        axes=(_D.ATTENDED, _D.HEAD, _D.CHANNEL),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(_PATTERN, _VALUE),
        dependence=General(),
        weights=_OUTPUT,
        formula=_write,
        row_wise=True,
        whole=(1,),
    ),
    DerivedScalar(
        name="attn_write_sum_heads",
        meaning="what all heads write at a token from an attended one, without the output bias",
        definition="sum_h,c p[q, k, h] * V[k, h, c] * W_O[h, c, d]",
        axes=(_D.ATTENDED, _D.CHANNEL),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(_PATTERN, _VALUE),
        dependence=General(),
        weights=_OUTPUT,
        formula=_write_sum_heads,
    ),
    _WRITE_NORM,
    flattened("attn_write_norm", _WRITE_NORM, has_gradient=True),
    DerivedScalar(
        name="attn_write_norm_per_sequence_token",
        meaning="L2 norm of what a head writes at a token: norm of the sum over attended tokens",
        definition="|sum_c z[t, h, c] * W_O[h, c]|",
        axes=(_D.HEAD,),
        node_type=NodeType.ATTENTION_HEAD,
        has_layers=True,
        sources=(_WEIGHTED_SUM,),
        dependence=General(),
        weights=_OUTPUT,
        formula=_token_write_norm,
    ),
    flattened("flattened_attn_post_softmax", _PROBABILITIES, has_gradient=True),
    _ACT_TIMES_GRAD,
    flattened("attn_act_times_grad", _ACT_TIMES_GRAD),
    DerivedScalar(
        name="attn_act_times_grad_per_sequence_token",
        meaning="attention probability times its gradient, summed over attended tokens",
        definition="sum_k p[t, k, h] * grad(p)[t, k, h]",
        axes=(_D.HEAD,),
        node_type=NodeType.ATTENTION_HEAD,
        has_layers=True,
        sources=(Source("unflattened_attn_act_times_grad"),),
        dependence=General(),
        formula=_sum_attended,
    ),
    _DIRECT_EFFECT,
    flattened("attn_write_to_final_residual_grad", _DIRECT_EFFECT),
    DerivedScalar(
        name="attn_write_to_final_residual_grad_per_sequence_token",
        meaning=(
            "the head's write at a token, projected on the gradient at the final residual stream"
        ),
        definition=masked("sum_c,d z[t, h, c] * W_O[h, c, d] * G[t, d]"),
        axes=(_D.HEAD,),
        node_type=NodeType.ATTENTION_HEAD,
        has_layers=True,
        sources=(_WEIGHTED_SUM, direction_source(Direction.FINAL_RESIDUAL_GRAD)),
        dependence=General(),
        weights=_OUTPUT,
        formula=token_projection,
    ),
    head_projection(
        "unflattened_attn_write_to_final_activation_residual_grad",
        Direction.FINAL_ACTIVATION_RESIDUAL_GRAD,
    ),
)
