"""Nodes: the things in a model that have an activation and write to the residual stream.

Most derived scalars are a *view* of a node (its activation, its write vector, the norm
of that), so a family is its node passed through the views.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.query.derived.declaration import Coefficient, DerivedScalar, General, ScaledBy, Source
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["NEURON", "Node", "write", "write_norm", "write_sum"]


@dataclass(frozen=True)
class Node:
    """A kind of unit whose activation is a scalar per token.

    Attributes:
        prefix: how the names of its scalars begin.
        noun: what one is called.
        activation: the location of its activations, ``(token, unit)``.
        write_weight: rows it adds to the residual stream, ``(unit, channel)``.
        write_norm: the L2 norms of those rows.
    """

    prefix: str
    noun: str
    activation: ActivationLocationType
    write_weight: WeightLocationType
    write_norm: Coefficient

    @property
    def unit(self) -> Dimension:
        """The axis that counts the units."""
        return self.activation.axes[-1]


NEURON = Node(
    prefix="mlp",
    noun="neuron",
    activation=ActivationLocationType.MLP_POST_ACT,
    write_weight=WeightLocationType.MLP_TO_RESIDUAL,
    write_norm=Coefficient.WRITE_NORM,
)
"""A neuron of an MLP."""


def write_norm(node: Node) -> DerivedScalar:
    """``a[t, u] * norm(W[u])``: the size of what a unit writes, with the activation's sign."""
    return DerivedScalar(
        name=f"{node.prefix}_write_norm",
        meaning=f"activation times the L2 norm of the {node.noun}'s write vector; signed",
        axes=(node.unit,),
        node_type=node.activation.node_type,
        has_layers=node.activation.has_layers,
        sources=(Source(node.activation),),
        dependence=ScaledBy(node.write_norm),
    )


def write(node: Node) -> DerivedScalar:
    """``a[t, u] * W[u, c]``: the vector a unit adds to the residual stream."""
    return DerivedScalar(
        name=f"{node.prefix}_write",
        meaning=f"activation times the {node.noun}'s write vector",
        axes=(node.unit, Dimension.CHANNEL),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=node.activation.has_layers,
        sources=(Source(node.activation),),
        dependence=General(),
        weights=(node.write_weight,),
        formula=_outer,
        row_wise=True,
    )


def write_sum(node: Node, name: str) -> DerivedScalar:
    """``sum_u a[t, u] * W[u, c]``: what all units of a layer add, without a bias."""
    return DerivedScalar(
        name=name,
        meaning=f"sum of the write vectors of a layer's {node.noun}s, without the output bias",
        axes=(Dimension.CHANNEL,),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=node.activation.has_layers,
        sources=(Source(node.activation),),
        dependence=General(),
        weights=(node.write_weight,),
        formula=_project,
    )


def _outer(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]") -> "Tensor":
    return sources[0].unsqueeze(-1) * weights[0]


def _project(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]") -> "Tensor":
    return sources[0] @ weights[0]
