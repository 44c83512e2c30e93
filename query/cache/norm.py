"""Norms as functions of what they read, and as linear maps once their denominator is known."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Norm"]


@dataclass(frozen=True, eq=False)
class Norm:
    """``y = centre(x) / scale * gain + bias`` over channels, in float64.

    With a ``scale`` and without a ``bias`` it is linear in ``x``, so the parts of a sum may
    be taken one by one.

    Attributes:
        centres: whether the mean over channels is subtracted first.
        epsilon: added to the variance inside the square root.
        scale: denominator ``(position, 1)``; that of each ``x`` itself when None.
        gain: ``(channel,)``; ones when None.
        bias: ``(channel,)``; zeros when None.
    """

    centres: bool
    epsilon: float
    scale: "Tensor | None" = None
    gain: "Tensor | None" = None
    bias: "Tensor | None" = None

    @property
    def is_linear(self) -> bool:
        """Whether the norm of a sum is the sum of the norms."""
        return self.scale is not None and self.bias is None

    def own_scale(self, values: "Tensor") -> "Tensor":
        """The denominator of some values, ``(..., 1)``: sqrt(variance + epsilon)."""
        centred = self._centred(values)
        return (centred.square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def __call__(self, values: "Tensor") -> "Tensor":
        """The norm of ``(..., position, channel)``."""
        centred = self._centred(values)
        result = centred / (self.own_scale(values) if self.scale is None else self.scale)
        if self.gain is not None:
            result = result * self.gain
        return result if self.bias is None else result + self.bias

    def pulled_back(self, directions: "Tensor") -> "Tensor":
        """Directions ``q`` with ``q . x / scale == p . norm(x)``, for a linear norm.

        Args:
            directions: ``p``, ``(..., channel)``.
        """
        found = directions if self.gain is None else directions * self.gain
        # Centring is its own transpose.
        return self._centred(found)

    def _centred(self, values: "Tensor") -> "Tensor":
        return values - values.mean(-1, keepdim=True) if self.centres else values
