"""The functions that autoencoders are made of: input normalisations and activations.

An activation is a small immutable object with its parameters. All of them keep the shape,
pass NaN on, and work under reverse and forward differentiation and any leading axes. Their
masks (which latent is let through) are constants of the differentiation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Activation",
    "ActivationKind",
    "Gated",
    "Identity",
    "JumpReLU",
    "Normalisation",
    "ReLU",
    "TopK",
    "activation_from",
    "unsupported_autoencoder",
]


def unsupported_autoencoder(name: str, reason: str, advice: str) -> InvalidInput:
    """The error for an autoencoder that cannot be used, or not as it stands."""
    return InvalidInput(
        f"The autoencoder {name!r} cannot be used: {reason}. {advice}",
        kind=ErrorKind.UNSUPPORTED_AUTOENCODER,
    )


_EPSILON = 1e-5  # added to the standard deviation, not to the variance as a model's norms do


class Normalisation(StrEnum):
    """What is done to each token's input; an autoencoder undoes it on its output."""

    NONE = "none"
    LAYER_NORM = "layer_norm"  # (x - mean) / (std + 1e-5), the std unbiased, no gain
    CONSTANT_NORM_RESCALE = "constant_norm_rescale"  # to the norm sqrt(channels)

    def moments(self, x: "Tensor") -> "tuple[Tensor, Tensor]":
        """What undoing it adds and multiplies by: shift and scale, (..., 1) each.

        Args:
            x: the raw input, (..., channel).
        """
        if self is Normalisation.LAYER_NORM:
            mean = x.mean(dim=-1, keepdim=True)
            return mean, (x - mean).std(dim=-1, keepdim=True)
        ones = x.new_ones(*x.shape[:-1], 1)
        if self is Normalisation.NONE:
            return ones - 1, ones
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return ones - 1, scale.masked_fill(scale == 0, 1)  # a row of zeros stays one

    def normalise(self, x: "Tensor") -> "Tensor":
        """The input that the encoder sees; (..., channel) to (..., channel)."""
        if self is Normalisation.NONE:
            return x
        shift, scale = self.moments(x)
        return (x - shift) / (scale + _EPSILON if self is Normalisation.LAYER_NORM else scale)

    def undo(self, output: "Tensor", x: "Tensor") -> "Tensor":
        """An output in the units of the raw input ``x``; both (..., channel)."""
        shift, scale = self.moments(x)
        return output * scale + shift


class ActivationKind(StrEnum):
    """The activation functions of published autoencoders."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    TOPK = "topk"
    IDENTITY = "identity"
    GATED = "gated"


@dataclass(frozen=True, eq=False)
class Activation(ABC):
    """An activation function of latents; its tensors are one number per latent.

    Attributes:
        kind: which function.
    """

    kind: ClassVar[ActivationKind]

    @abstractmethod
    def __call__(self, pre: "Tensor") -> "Tensor":
        """The latents, (..., latent), of the encoder's values, (..., latent)."""

    @property
    def tensors(self) -> dict[str, "Tensor"]:
        """The parameters that are tensors, each (latent,), by name."""
        return {}

    @property
    def settings(self) -> dict[str, int | bool]:
        """The parameters that are numbers, by name."""
        return {}

    def with_tensors(self, tensors: Mapping[str, "Tensor"]) -> Self:
        """The same function with other tensors under the same names."""
        return type(self)(**self.settings, **tensors)

    def fault(self, n_latents: int) -> str | None:
        """What is wrong with a number among the parameters, or None.

        Args:
            n_latents: latents of the autoencoder.
        """
        return None


@dataclass(frozen=True, eq=False)
class ReLU(Activation):
    """max(pre, 0)."""

    kind = ActivationKind.RELU

    def __call__(self, pre: "Tensor") -> "Tensor":
        """max(pre, 0)."""
        return pre.relu()


@dataclass(frozen=True, eq=False)
class Identity(Activation):
    """The latents are what the encoder gives."""

    kind = ActivationKind.IDENTITY

    def __call__(self, pre: "Tensor") -> "Tensor":
        """The values themselves."""
        return pre


@dataclass(frozen=True, eq=False)
class JumpReLU(Activation):
    """max(pre, 0) where pre is strictly above a threshold, else 0.

    Attributes:
        threshold: (latent,).
    """

    threshold: "Tensor"
    kind = ActivationKind.JUMPRELU

    @property
    def tensors(self) -> dict[str, "Tensor"]:
        """The threshold."""
        return {"threshold": self.threshold}

    def __call__(self, pre: "Tensor") -> "Tensor":
        """max(pre, 0) · [pre > threshold]."""
        return pre.relu() * (pre > self.threshold).to(pre.dtype)


@dataclass(frozen=True, eq=False)
class TopK(Activation):
    """The k greatest of a token's values, the others 0.

    Among equal values at the k-th place those of the lower latents are kept, so the
    result does not depend on the machine.

    Attributes:
        k: how many are kept.
        rectified: whether the kept ones go through a ReLU.
    """

    k: int
    rectified: bool = True
    kind = ActivationKind.TOPK

    @property
    def settings(self) -> dict[str, int | bool]:
        """``k`` and ``rectified``."""
        return {"k": self.k, "rectified": self.rectified}

    def fault(self, n_latents: int) -> str | None:
        """Whether ``k`` is a number of latents that there are."""
        if type(self.k) is not int or not 1 <= self.k <= n_latents:
            return f"k is {self.k!r}, and must be a whole number from 1 to its {n_latents} latents"
        return None

    def __call__(self, pre: "Tensor") -> "Tensor":
        """The k greatest along the last axis, in their places."""
        import torch

        if self.k == pre.shape[-1]:
            return self._rectify(pre)
        fixed = pre.detach()
        greatest = fixed.topk(self.k + 1, dim=-1)
        least, next_one = greatest.values[..., -2:-1], greatest.values[..., -1:]
        if bool((least > next_one).all()):
            places = greatest.indices[..., :-1]
            kept = self._rectify(pre.gather(-1, places))
            return torch.zeros_like(pre).scatter(-1, places, kept)
        # Several times slower, and rare: only here it matters which of the equals are kept.
        above = fixed > least
        tied = ~(above | (fixed < least))
        room = self.k - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
        let_through = above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= room))
        return self._rectify(pre) * let_through.to(pre.dtype)

    def _rectify(self, values: "Tensor") -> "Tensor":
        return values.relu() if self.rectified else values


@dataclass(frozen=True, eq=False)
class Gated(Activation):
    """A gate that opens above 0, and a magnitude of its own scale and bias behind it.

    Both share the encoder's weights, so the encoder gives x·W, without a bias.

    Attributes:
        gate_bias: (latent,).
        log_scale: (latent,), logarithm of the magnitude's scale.
        magnitude_bias: (latent,).
    """

    gate_bias: "Tensor"
    log_scale: "Tensor"
    magnitude_bias: "Tensor"
    kind = ActivationKind.GATED

    @property
    def tensors(self) -> dict[str, "Tensor"]:
        """The three parameters."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, pre: "Tensor") -> "Tensor":
        """[pre + gate_bias > 0] · relu(pre·exp(log_scale) + magnitude_bias)."""
        magnitude = pre * self.log_scale.exp() + self.magnitude_bias
        return magnitude.relu() * (pre + self.gate_bias > 0).to(pre.dtype)


_CLASSES: dict[ActivationKind, type[Activation]] = {
    cls.kind: cls for cls in (ReLU, Identity, JumpReLU, TopK, Gated)
}


def activation_from(
    kind: str, settings: Mapping[str, Any], tensors: Mapping[str, "Tensor"]
) -> Activation:
    """The activation that :attr:`Activation.settings` and ``tensors`` describe.

    Raises:
        ValueError: no such kind.
        TypeError: a parameter is missing or unknown.
    """
    return _CLASSES[ActivationKind(kind)](**settings, **tensors)
