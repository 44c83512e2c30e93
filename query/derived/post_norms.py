"""Writes of models whose attention and MLP pass a norm before they are added to the stream.

Such a norm is linear once its denominator ``s`` is known: what it makes of a sum is the sum
of what it makes of the parts. So a head or neuron writes ``gain * (a W) / s``, and the parts
add up to what the layer adds. The activation takes ``1 / s`` of its token, and the rows that
are written the gain.
"""

from typing import TYPE_CHECKING, Protocol

from actstore.query.derived.declaration import Coefficient, DerivedScalar, ScaledBy, Source
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import WeightName
from actstore.store.vocabulary import ActivationLocationType, PassType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PostNorm", "post_norm", "rescaled_source"]

_L = ActivationLocationType
_W = WeightLocationType

_NORMS = {
    _W.ATTN_TO_RESIDUAL: (_L.ATTN_OUTPUT_LAYER_NORM_SCALE, _W.LAYER_NORM_GAIN_POST_ATTN),
    _W.MLP_TO_RESIDUAL: (_L.MLP_OUTPUT_LAYER_NORM_SCALE, _W.LAYER_NORM_GAIN_POST_MLP),
}
"""What maps into the stream -> the denominator and the gain of the norm that follows."""


class _Values(Protocol):
    @property
    def dimensions(self) -> ModelDimensions: ...

    def raw(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> "Tensor": ...

    def weight(self, name: WeightName, layer: int | None) -> "Tensor": ...


class PostNorm:
    """The norm after attention or MLP of one layer, its denominator as in the pass.

    Attributes:
        scale: ``(token, 1)``, float64.
        gain: ``(channel,)``, float64.
    """

    def __init__(self, scale: "Tensor", gain: "Tensor") -> None:
        self.scale = scale
        self.gain = gain

    def divisor(self, axes: int, rows: "Tensor | None" = None) -> "Tensor":
        """The denominator for a tensor of so many axes, the first one tokens (or ``rows``)."""
        scale = self.scale if rows is None else self.scale[rows]
        return scale.reshape(-1, *[1] * (axes - 1))


def post_norm(values: _Values, weight: WeightName, layer: int | None) -> PostNorm | None:
    """The norm that what a weight maps into the stream passes; None where none follows.

    Args:
        values: of a sequence, and the model's.
        weight: attention's or the MLP's output weight; others have none.
        layer: the layer.

    Raises:
        Unavailable: its denominator cannot be had.
    """
    if not values.dimensions.has_post_norms or weight not in _NORMS:
        return None
    location, gain = _NORMS[WeightLocationType(weight)]
    return PostNorm(values.raw(location, PassType.FORWARD, layer), values.weight(gain, layer))


def rescaled_source(declared: DerivedScalar, dimensions: ModelDimensions) -> Source | None:
    """The raw source that a value is a fixed multiple of in a model; None for none.

    The size of a neuron's write is no fixed multiple of its activation where the MLP's output
    is normed: it follows the denominator of its token.
    """
    dependence = declared.dependence
    is_write = isinstance(dependence, ScaledBy) and dependence.coefficient is Coefficient.WRITE_NORM
    return None if is_write and dimensions.has_post_norms else declared.raw_source
