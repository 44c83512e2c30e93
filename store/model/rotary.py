"""Rotary positions: which channels of queries and keys turn, and by how much.

The angles are computed as transformers does, in float32 whatever dtype the model runs in:
at position 8,000 a float32 angle is off by 5e-4, so exact ones would not be the model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ROTARY_KINDS", "Rotary", "rotated"]

ROTARY_KINDS = ("default", "linear", "llama3")
"""``rope_type`` values whose frequencies do not depend on the sequence."""


@dataclass(frozen=True)
class Rotary:
    """The rotation of one layer's queries and keys.

    Attributes:
        theta: base of the frequencies.
        channels: how many of a head's channels turn: the first ones, halves paired.
        kind: ``default``, ``linear`` (all frequencies divided by ``factor``) or ``llama3``
            (the slow ones divided by ``factor``, with a smooth passage).
        factor: see ``kind``.
        low_frequency_factor, high_frequency_factor, original_positions: where the passage
            of ``llama3`` lies.

    Raises:
        InvalidInput: another kind, or an odd number of channels.
    """

    theta: float
    channels: int
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROTARY_KINDS:
            raise _unsupported(
                f"its rotary positions are of type {self.kind!r}, and "
                f"{', '.join(ROTARY_KINDS)} can be recomputed"
            )
        if self.channels < 2 or self.channels % 2:
            raise _unsupported(f"{self.channels} channels of each head turn, no even number")

    @classmethod
    def of(cls, parameters: Mapping[str, Any], d_head: int, positions: int) -> "Rotary":
        """Read the ``rope_parameters`` of a config, once its defaults are filled in.

        Args:
            parameters: ``rope_theta``, and what belongs to ``rope_type``.
            d_head: channels of a head.
            positions: the model's context limit.
        """
        return cls(
            theta=float(parameters["rope_theta"]),
            channels=int(d_head * (parameters.get("partial_rotary_factor") or 1.0)),
            kind=str(parameters.get("rope_type", parameters.get("type", "default"))),
            factor=float(parameters.get("factor") or 1.0),
            low_frequency_factor=float(parameters.get("low_freq_factor") or 1.0),
            high_frequency_factor=float(parameters.get("high_freq_factor") or 4.0),
            original_positions=int(parameters.get("original_max_position_embeddings") or positions),
        )

    def frequencies(self) -> "Tensor":
        """Radians per position of each pair of channels, float32 ``(pair,)``."""
        import torch

        exponents = torch.arange(0, self.channels, 2, dtype=torch.float) / self.channels
        frequencies = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "default":
            return frequencies
        low, high = self.low_frequency_factor, self.high_frequency_factor
        wavelength = 2 * math.pi / frequencies
        is_slow = wavelength > self.original_positions / low
        is_fast = wavelength < self.original_positions / high
        slowed = torch.where(is_slow, frequencies / self.factor, frequencies)
        share = (self.original_positions / wavelength - low) / (high - low)
        between = (1 - share) * slowed / self.factor + share * slowed
        return torch.where(~is_fast & ~is_slow, between, slowed)

    def turns(self, positions: "Tensor", run_dtype: str) -> "tuple[Tensor, Tensor]":
        """Cosine and sine of every position's angles.

        Args:
            positions: int64 ``(token,)``.
            run_dtype: what the model ran in; both are rounded to it.

        Returns:
            Two float64 ``(token, channels)``.
        """
        import torch

        angles = positions.cpu()[:, None].float() * self.frequencies()
        angles = torch.cat((angles, angles), dim=-1)
        rounded = getattr(torch, run_dtype)
        return angles.cos().to(rounded).double(), angles.sin().to(rounded).double()


def rotated(heads: "Tensor", turns: "tuple[Tensor, Tensor]") -> "Tensor":
    """Queries or keys with their first channels turned by their positions.

    Args:
        heads: ``(token, head, head_channel)``.
        turns: cosine and sine, ``(token, channels)``.
    """
    import torch

    cosine, sine = (one[:, None, :].to(heads) for one in turns)
    channels = cosine.shape[-1]
    turning, still = heads[..., :channels], heads[..., channels:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, still), dim=-1)


def _unsupported(reason: str) -> InvalidInput:
    return InvalidInput(
        f"This model is not supported: {reason}. Choose another model.",
        kind=ErrorKind.UNSUPPORTED_MODEL,
    )
