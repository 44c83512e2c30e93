"""Parts of the residual stream, kept as factors until somebody wants their channels.

What heads and neurons write is an outer product: small coefficients per token, and rows of
a weight. Projecting contracts the weight first, so no tensor of tokens x neurons x channels
is made; without a projection it is made block by block, straight into the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from actstore.query.cache.norm import Norm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense", "HeadWrites", "NeuronWrites", "Writes", "put"]

_BLOCK_BYTES = 2**25


class Writes(Protocol):
    """Several parts of the stream at some positions, in float64."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Parts, positions, channels."""
        ...

    def expand(self, block: slice) -> "Tensor":
        """Some of the parts, ``(part, position, channel)``."""
        ...

    def project(self, onto: "Tensor") -> "Tensor":
        """All parts on directions ``(channel, direction)``: ``(part, position, direction)``."""
        ...

    def total(self) -> "Tensor":
        """Their sum, ``(position, channel)``."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """Parts whose channels are known, ``(part, position, channel)``."""

    values: "Tensor"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Parts, positions, channels."""
        parts, positions, channels = self.values.shape
        return parts, positions, channels

    def expand(self, block: slice) -> "Tensor":
        """Some of the parts."""
        return self.values[block]

    def project(self, onto: "Tensor") -> "Tensor":
        """All parts on directions."""
        return self.values @ onto

    def total(self) -> "Tensor":
        """Their sum."""
        return self.values.sum(0)


@dataclass(frozen=True, eq=False)
class HeadWrites:
    """What heads write: ``z`` (position, head, head_channel) times ``weight`` of each head.

    Attributes:
        z: weighted sums of values.
        weight: ``(head, head_channel, channel)``.
    """

    z: "Tensor"
    weight: "Tensor"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Parts, positions, channels."""
        return self.weight.shape[0], self.z.shape[0], self.weight.shape[-1]

    def expand(self, block: slice) -> "Tensor":
        """Some heads' writes."""
        return self.z.transpose(0, 1)[block] @ self.weight[block]

    def project(self, onto: "Tensor") -> "Tensor":
        """All heads on directions."""
        return self.z.transpose(0, 1) @ (self.weight @ onto)

    def total(self) -> "Tensor":
        """Their sum."""
        return self.z.flatten(1) @ self.weight.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class NeuronWrites:
    """What neurons write: ``activations`` (position, neuron) times rows of ``weight``.

    Attributes:
        activations: after the activation function.
        weight: ``(neuron, channel)``.
    """

    activations: "Tensor"
    weight: "Tensor"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Parts, positions, channels."""
        return self.weight.shape[0], self.activations.shape[0], self.weight.shape[-1]

    def expand(self, block: slice) -> "Tensor":
        """Some neurons' writes."""
        return self.activations.T[block, :, None] * self.weight[block, None, :]

    def project(self, onto: "Tensor") -> "Tensor":
        """All neurons on directions."""
        return self.activations.T[:, :, None] * (self.weight @ onto)[:, None, :]

    def total(self) -> "Tensor":
        """Their sum."""
        return self.activations @ self.weight


def put(target: "Tensor", writes: Writes, norms: Sequence[Norm], onto: "Tensor | None") -> None:
    """Write parts, through norms, into a result.

    Args:
        target: ``(part, position, channel)``, or ``(part, position, direction)``.
        writes: the parts.
        norms: what they pass, in order.
        onto: ``(channel, direction)`` in float64; None for the channels themselves.
    """
    if onto is not None and all(norm.is_linear for norm in norms):
        directions = onto
        for norm in reversed(norms):
            directions = norm.pulled_back(directions.T).T
        found = writes.project(directions)
        for norm in norms:
            assert norm.scale is not None, "a linear norm has its denominator"
            found = found / norm.scale
        target.copy_(found)
        return
    parts, positions, channels = writes.shape
    step = max(1, _BLOCK_BYTES // max(1, positions * channels * 8))
    for start in range(0, parts, step):
        block = slice(start, min(start + step, parts))
        found = writes.expand(block)
        for norm in norms:
            found = norm(found)
        target[block].copy_(found if onto is None else found @ onto)
