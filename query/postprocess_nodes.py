"""Nodes that are postprocessed together: one kind, one layer, one side of a head.

A rule turns such a group into rows. It prepares once what all nodes of the group share and
then makes rows for any few of them, so that memory does not grow with the number of nodes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import RawValues
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.recipes import WeightName
from actstore.store.nodes import NODE_LOCATIONS, AttnSubNodeIndex, NodeIndex, index_axes
from actstore.store.vocabulary import ActivationLocationType, Dimension, NodeType, PassType

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.store.model.autoencoders import Autoencoder

__all__ = ["NodeGroup", "NodeRule", "Prepared", "RowsOf", "groups_of", "side_of"]

_L = ActivationLocationType
_D = Dimension

RowsOf = Callable[["Tensor"], "Tensor"]
"""Places ``(node, axis)``, int64, in the order of a node's indices -> float64 ``(node, column)``."""


@dataclass(frozen=True)
class Prepared:
    """What the nodes of a group share, ready to make rows.

    Attributes:
        n_tokens: tokens of the sequence.
        width: the most float64 values per node that the rows need while they are made.
        rows: makes them.
    """

    n_tokens: int
    width: int
    rows: RowsOf


@dataclass(frozen=True)
class NodeRule:
    """How a postprocessor treats nodes of one kind.

    Attributes:
        node_type: the kind.
        formula: one row, for people.
        prepare: the computation.
        side: the side of a head that it is for; None for whole nodes.
    """

    node_type: NodeType
    formula: str
    prepare: Callable[["NodeGroup"], Prepared]
    side: ActivationLocationType | None = None

    @property
    def axes(self) -> tuple[Dimension, ...]:
        """Axes of such a node's indices."""
        return _axes_of(self.node_type)


def _axes_of(node_type: NodeType) -> tuple[Dimension, ...]:
    if node_type is NodeType.LAYER:
        return (_D.TOKEN, _D.SINGLETON)
    return index_axes(NODE_LOCATIONS[node_type])


@dataclass(frozen=True, eq=False)
class NodeGroup:
    """Nodes of one kind and layer, and the sequence that they belong to.

    Attributes:
        asked: the postprocessor's name, for messages.
        node_type: their kind.
        layer: their layer, None outside the blocks.
        nodes: the nodes, each with the row of the answer that is its own.
        values: raw values of the sequence.
        config: the autoencoders, for latents.

    Raises:
        InvalidInput: a node does not name one value of the model's forward pass.
        Unavailable: there is no autoencoder of such latents.
    """

    asked: str
    node_type: NodeType
    layer: int | None
    nodes: tuple[tuple[int, NodeIndex], ...]
    values: RawValues
    config: DstConfig

    def __post_init__(self) -> None:
        self._check_layer()
        sizes = [self._size(axis) for axis in self.axes]
        for _, node in self.nodes:
            self._check_node(node, sizes)

    @property
    def axes(self) -> tuple[Dimension, ...]:
        """Axes of the nodes' indices."""
        return _axes_of(self.node_type)

    def _check_layer(self) -> None:
        if self.node_type is NodeType.LAYER:
            if self.layer is not None:
                raise self.unfit(
                    f"layer_index is {self.layer}; a layer node is the embedding's output, "
                    "outside the blocks. Leave it None",
                    ErrorKind.UNKNOWN_LAYER,
                )
        elif self.node_type.is_autoencoder_latent:
            self.config.family(self.node_type).at_layer(self.layer)
        elif self.layer not in range(self.values.dimensions.n_layers):
            last = self.values.dimensions.n_layers - 1
            raise self.unfit(
                f"layer_index is {self.layer}; the model has layers 0 to {last}",
                ErrorKind.UNKNOWN_LAYER,
            )

    def _size(self, axis: Dimension) -> int | None:
        """How many places an axis has; None where the sequence says so."""
        if axis in (_D.TOKEN, _D.ATTENDED):
            return None
        if axis is _D.LATENT:
            return self.config.family(self.node_type).n_latents(self.layer)
        return self.values.dimensions.size(axis)

    def _check_node(self, node: NodeIndex, sizes: list[int | None]) -> None:
        if node.pass_type is not PassType.FORWARD:
            raise self.unfit(
                f"{node.tensor_indices} is of the {node.pass_type} pass; nodes write and read in "
                f"the forward pass. Pass it with pass_type=FORWARD"
            )
        indices = node.tensor_indices
        if len(indices) != len(sizes) or None in indices:
            raise self.unfit(
                f"the indices are {indices}; a {self.node_type} node is at "
                f"({', '.join(self.axes)}). Name one place on each of these axes"
            )
        for index, size, axis in zip(indices, sizes, self.axes, strict=True):
            assert index is not None
            if size is not None and index >= size:
                raise self.unfit(
                    f"{axis} is {index} in {indices}; there are {size}, counted from 0",
                    ErrorKind.UNKNOWN_UNIT,
                )

    def places(self, n_tokens: int) -> "Tensor":
        """Indices of the nodes, int64 ``(node, axis)``.

        Args:
            n_tokens: tokens of the sequence.

        Raises:
            InvalidInput: a token lies outside the sequence.
        """
        import torch

        places = torch.tensor([node.tensor_indices for _, node in self.nodes], dtype=torch.int64)
        tokens = [at for at, axis in enumerate(self.axes) if axis in (_D.TOKEN, _D.ATTENDED)]
        outside = (places[:, tokens] >= n_tokens).any(1).nonzero()
        if len(outside):
            raise self.unfit(
                f"{tuple(places[outside[0, 0]].tolist())} names a token outside the sequence; it "
                f"has {n_tokens}, counted from 0",
                ErrorKind.UNKNOWN_ROW,
            )
        return places

    # What rules read

    def raw(self, location: ActivationLocationType, layer: int | None) -> "Tensor":
        """Forward values, float64 ``(token, *location.axes)``, without a graph."""
        return self.values.raw(location, PassType.FORWARD, layer).detach()

    def weight(self, name: WeightName, layer: int | None = None) -> "Tensor":
        """A weight in float64."""
        return self.values.weight(name, layer)

    @property
    def block(self) -> int:
        """The layer, of nodes that belong to one."""
        assert self.layer is not None
        return self.layer

    @property
    def autoencoder(self) -> "Autoencoder":
        """The latents' autoencoder in float64."""
        import torch

        return self.config.family(self.node_type).at_layer(self.layer).to(torch.float64)

    def unfit(self, reason: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT) -> InvalidInput:
        """The error for nodes of this group."""
        return InvalidInput(f"{self.asked} of {self.node_type} nodes: {reason}.", kind=kind)


def side_of(node: NodeIndex) -> ActivationLocationType | None:
    """The side of a head that a node is; None for whole nodes."""
    return node.q_k_or_v if isinstance(node, AttnSubNodeIndex) else None


def groups_of(
    asked: str,
    nodes: Iterable[NodeIndex],
    rule_of: Callable[[NodeIndex], NodeRule],
    values: RawValues,
    config: DstConfig,
) -> list[tuple[NodeGroup, NodeRule]]:
    """The nodes by kind, layer and side, and the rule for each group.

    Raises:
        InvalidInput: a node is of a kind without a rule, or does not name one value.
    """
    found: dict[tuple[NodeRule, int | None], list[tuple[int, NodeIndex]]] = {}
    for row, node in enumerate(nodes):
        found.setdefault((rule_of(node), node.layer_index), []).append((row, node))
    return [
        (NodeGroup(asked, rule.node_type, layer, tuple(members), values, config), rule)
        for (rule, layer), members in found.items()
    ]
