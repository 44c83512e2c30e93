"""Nodes: the things in a model that have an activation and write to the residual stream.

Most derived scalars are a *view* of a node (its activation, its write vector, the norm of
that, its projection on a gradient), so a family is its node passed through the views.
With ``a`` the activations and ``W`` the rows that the units write:

=====================  ================================================================
view                   value
=====================  ================================================================
``write_norm``         ``a[t, u] * |W[u]|``, with the activation's sign
``write``              ``a[t, u] * W[u, c]``
``write_sum``          ``sum_u a[t, u] * W[u, c]``, without a bias
``act_times_grad``     ``a[t, u] * grad(a)[t, u]``
``projection``         ``a[t, u] * sum_c W[u, c] D[t, c]``, ``D`` the direction
=====================  ================================================================
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.query.derived.declaration import (
    Coefficient,
    Dependence,
    DerivedScalar,
    Direction,
    Frame,
    General,
    LatentWrites,
    LayerRule,
    Product,
    ScaledBy,
    Source,
)
from actstore.store.model.recipes import WeightName
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
    "DIRECTIONS",
    "DIRECTION_SYMBOLS",
    "MLP_ERROR",
    "NEURON",
    "Node",
    "act_times_grad",
    "direction_source",
    "latent_node",
    "masked",
    "projection",
    "times_norm",
    "write",
    "write_norm",
    "write_sum",
]

_L = ActivationLocationType


@dataclass(frozen=True)
class Node:
    """A kind of unit whose activation is a scalar per token.

    Attributes:
        prefix: how the names of its scalars begin.
        noun: what one is called.
        activation: the location of its activations, ``(token, unit)``.
        writes: rows it adds to the residual stream, ``(unit, channel)``.
        write_norm: the L2 norms of those rows, where the store keeps them.
        latents: the autoencoders that it belongs to.
        symbols: what its activation, its unit and its rows are called in definitions.
    """

    prefix: str
    noun: str
    activation: ActivationLocationType
    writes: WeightName | LatentWrites
    write_norm: Coefficient | None = None
    latents: NodeType | None = None
    symbols: tuple[str, str, str] = ("a", "f", "W_out")

    @property
    def value(self) -> str:
        """Its activation in plain text."""
        activation, unit, _ = self.symbols
        return f"{activation}[t, {unit}]"

    @property
    def row(self) -> str:
        """The vector that it writes, in plain text."""
        _, unit, rows = self.symbols
        return f"{rows}[{unit}]"

    @property
    def row_channel(self) -> str:
        """A channel of that vector, in plain text."""
        return f"{self.row.removesuffix(']')}, d]"

    @property
    def unit(self) -> Dimension:
        """The axis that counts the units."""
        return self.activation.axes[-1]


NEURON = Node(
    prefix="mlp",
    noun="neuron",
    activation=_L.MLP_POST_ACT,
    writes=WeightLocationType.MLP_TO_RESIDUAL,
    write_norm=Coefficient.WRITE_NORM,
)
"""A neuron of an MLP."""

MLP_ERROR = Node(
    prefix="online_mlp_autoencoder_error",
    noun="neuron",
    activation=_L.ONLINE_MLP_AUTOENCODER_ERROR,
    writes=WeightLocationType.MLP_TO_RESIDUAL,
    write_norm=Coefficient.WRITE_NORM,
    latents=NodeType.MLP_AUTOENCODER_LATENT,
    symbols=("error", "f", "W_out"),
)
"""What an autoencoder of neurons leaves of each neuron's activation."""


def latent_node(node_type: NodeType) -> Node:
    """A latent of the autoencoders of one kind, spliced into the pass."""
    location = _ONLINE[node_type]
    return Node(
        prefix=location.label.removesuffix("_latent"),
        noun="latent",
        activation=location,
        writes=LatentWrites(node_type),
        latents=node_type,
        symbols=("latent", "n", "w"),
    )


_ONLINE = {
    NodeType.AUTOENCODER_LATENT: _L.ONLINE_AUTOENCODER_LATENT,
    NodeType.MLP_AUTOENCODER_LATENT: _L.ONLINE_MLP_AUTOENCODER_LATENT,
    NodeType.ATTENTION_AUTOENCODER_LATENT: _L.ONLINE_ATTENTION_AUTOENCODER_LATENT,
}


def write_norm(node: Node) -> DerivedScalar:
    """``a[t, u] * norm(W[u])``: the size of what a unit writes, with the activation's sign."""
    known = node.write_norm is not None
    dependence: Dependence = General() if node.write_norm is None else ScaledBy(node.write_norm)
    return DerivedScalar(
        name=f"{node.prefix}_write_norm",
        meaning=f"activation times the L2 norm of the {node.noun}'s write vector; signed",
        definition=f"{node.value} * |{node.row}|",
        axes=(node.unit,),
        node_type=node.activation.node_type,
        has_layers=True,
        sources=(Source(node.activation),),
        dependence=dependence,
        weights=() if known else (node.writes,),
        formula=None if known else times_norm,
        row_wise=True,
        latents=node.latents,
    )


def write(node: Node) -> DerivedScalar:
    """``a[t, u] * W[u, c]``: the vector a unit adds to the residual stream."""
    return DerivedScalar(
        name=f"{node.prefix}_write",
        meaning=f"activation times the {node.noun}'s write vector",
        definition=f"{node.value} * {node.row_channel}",
        axes=(node.unit, Dimension.CHANNEL),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(Source(node.activation),),
        dependence=General(),
        weights=(node.writes,),
        formula=_outer,
        row_wise=True,
        latents=node.latents,
    )


def write_sum(node: Node, name: str) -> DerivedScalar:
    """``sum_u a[t, u] * W[u, c]``: what all units of a layer add, without a bias."""
    return DerivedScalar(
        name=name,
        meaning=f"sum of the write vectors of a layer's {node.noun}s, without the output bias",
        definition=f"sum_{node.symbols[1]} {node.value} * {node.row_channel}",
        axes=(Dimension.CHANNEL,),
        node_type=NodeType.RESIDUAL_STREAM_CHANNEL,
        has_layers=True,
        sources=(Source(node.activation),),
        dependence=General(),
        weights=(node.writes,),
        formula=_project,
        latents=node.latents,
    )


def act_times_grad(node: Node) -> DerivedScalar:
    """``a[t, u] * grad(a)[t, u]``: the first-order effect on the objective of ablating it."""
    return DerivedScalar(
        name=f"{node.prefix}_act_times_grad",
        meaning=f"activation of the {node.noun} times its gradient",
        definition=f"{node.value} * grad({node.symbols[0]})[t, {node.symbols[1]}]",
        axes=(node.unit,),
        node_type=node.activation.node_type,
        has_layers=True,
        sources=(Source(node.activation), Source(node.activation, PassType.BACKWARD)),
        dependence=Product(),
        formula=times,
        row_wise=True,
        latents=node.latents,
    )


def projection(node: Node, direction: Direction, name: str) -> DerivedScalar:
    """``a[t, u] * sum_c W[u, c] D[t, c]``: the direct effect of a unit's write."""
    return DerivedScalar(
        name=name,
        meaning=f"the {node.noun}'s write vector, projected on {DIRECTIONS[direction]}",
        definition=masked(
            f"{node.value} * sum_d {node.row_channel} * {DIRECTION_SYMBOLS[direction]}[t, d]"
        ),
        axes=(node.unit,),
        node_type=node.activation.node_type,
        has_layers=True,
        sources=(Source(node.activation), direction_source(direction)),
        dependence=General(),
        weights=(node.writes,),
        formula=_projected,
        about=ABOUT_OF[direction],
        latents=node.latents,
    )


DIRECTIONS = {
    Direction.FINAL_RESIDUAL_GRAD: "the gradient at the final residual stream",
    Direction.FINAL_ACTIVATION_RESIDUAL_GRAD: (
        "the traced activation's gradient at the residual stream before it"
    ),
    Direction.SUBNODE_ATTRIBUTION_GRAD: (
        "the gradient of one node's attribution at the residual stream before it"
    ),
}
"""What people read for a direction."""

DIRECTION_SYMBOLS = {
    Direction.FINAL_RESIDUAL_GRAD: "G",
    Direction.FINAL_ACTIVATION_RESIDUAL_GRAD: "G_node",
    Direction.SUBNODE_ATTRIBUTION_GRAD: "G_attr",
}
"""What definitions call a direction."""


def masked(definition: str) -> str:
    """The definition of a projection on a direction: nothing comes from later writes."""
    return f"{definition}; 0 where the write does not come before that residual stream"


ABOUT_OF = {
    Direction.FINAL_RESIDUAL_GRAD: None,
    Direction.FINAL_ACTIVATION_RESIDUAL_GRAD: "trace_config",
    Direction.SUBNODE_ATTRIBUTION_GRAD: "node_index_for_attribution",
}
"""The member of the config that a direction needs; the first asks the trace if there is one."""


def direction_source(direction: Direction) -> Source:
    """A direction as an input."""
    return Source(direction.value, PassType.BACKWARD, LayerRule.NONE)


def times(sources: "Sequence[Tensor]", _: "Sequence[Tensor]", __: Frame) -> "Tensor":
    """The product of two sources, element by element."""
    return sources[0] * sources[1]


def times_norm(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    """A source times the L2 norms of the rows of a weight."""
    return sources[0] * weights[0].square().sum(-1).sqrt()


def _outer(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    return sources[0].unsqueeze(-1) * weights[0]


def _project(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    return sources[0] @ weights[0]


def _projected(sources: "Sequence[Tensor]", weights: "Sequence[Tensor]", _: Frame) -> "Tensor":
    activation, direction = sources
    return activation * (direction @ weights[0].T)
