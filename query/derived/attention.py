"""Scalars of attention heads that need no gradient and no pair axis."""

from typing import TYPE_CHECKING

from actstore.query.derived.declaration import DerivedScalar, General, Source
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["SCALARS"]


def _write_norm(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]") -> "Tensor":
    # (token, head, head_channel) and (head, head_channel, channel), head by head.
    written = sources[0].transpose(0, 1) @ weights[0]
    return written.square().sum(-1).sqrt().transpose(0, 1)


SCALARS = (
    DerivedScalar(
        name="attn_write_norm_per_sequence_token",
        meaning="L2 norm of what a head writes at a token: norm of the sum over attended tokens",
        axes=(Dimension.HEAD,),
        node_type=NodeType.ATTENTION_HEAD,
        has_layers=True,
        sources=(Source(ActivationLocationType.ATTN_WEIGHTED_SUM_OF_VALUES),),
        dependence=General(),
        weights=(WeightLocationType.ATTN_TO_RESIDUAL,),
        formula=_write_norm,
    ),
)
