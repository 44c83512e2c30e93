"""The sizes and constants of one model, and the shapes that follow from them."""

from dataclasses import dataclass

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import ActivationLocationType, Dimension, WeightLocationType

__all__ = ["ACTIVATION_FUNCTIONS", "ModelDimensions", "unsupported_model"]

ACTIVATION_FUNCTIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")
"""Activation functions that can be recomputed from stored values, by their config names."""


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes and constants of one model.

    Attributes:
        n_layers: blocks.
        d_model: residual stream channels.
        n_heads: attention heads per layer.
        d_head: channels per head.
        d_mlp: MLP neurons per layer.
        vocabulary_size: rows of the embedding.
        n_positions: greatest context length.
        layer_norm_epsilon: added to the variance inside the square root.
        activation_function: name as in the config.
        score_scale: factor on q·k in layer 0.
        score_scale_by_layer: whether layer ``n`` divides it by ``n + 1``.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    vocabulary_size: int
    n_positions: int
    layer_norm_epsilon: float
    activation_function: str
    score_scale: float
    score_scale_by_layer: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise unsupported_model(f"{name} is {value!r}, and must be a whole number above 0")
        if self.activation_function not in ACTIVATION_FUNCTIONS:
            raise unsupported_model(
                f"activation function {self.activation_function!r} is not one of "
                f"{', '.join(ACTIVATION_FUNCTIONS)}"
            )

    def attention_scaling(self, layer: int) -> float:
        """The factor between q·k and the attention scores of a layer."""
        # In this order, so that the float is the very one that the model multiplies by.
        return (
            self.score_scale / float(layer + 1) if self.score_scale_by_layer else self.score_scale
        )

    def size(self, dimension: Dimension) -> int:
        """The length of an axis that the model fixes (an attended axis: the context limit).

        Raises:
            KeyError: the model does not fix it (tokens, latents).
        """
        return {
            Dimension.LAYER: self.n_layers,
            Dimension.ATTENDED: self.n_positions,
            Dimension.HEAD: self.n_heads,
            Dimension.HEAD_CHANNEL: self.d_head,
            Dimension.NEURON: self.d_mlp,
            Dimension.CHANNEL: self.d_model,
            Dimension.VOCABULARY: self.vocabulary_size,
            Dimension.SINGLETON: 1,
        }[dimension]

    def unit_shape(
        self, location: ActivationLocationType, attended: int | None = None
    ) -> tuple[int, ...]:
        """Lengths of a location's axes after the token axis.

        Args:
            location: the location.
            attended: length of an attended axis; the context limit when None.
        """
        return tuple(
            attended if axis is Dimension.ATTENDED and attended is not None else self.size(axis)
            for axis in location.axes
        )

    def weight_shape(self, location: WeightLocationType) -> tuple[int, ...]:
        """The shape of a weight (spec/derived_scalars.md a.6)."""
        weight = WeightLocationType
        into_head = (self.n_heads, self.d_model, self.d_head)
        return {
            weight.EMBEDDING: (self.vocabulary_size, self.d_model),
            weight.UNEMBEDDING: (self.d_model, self.vocabulary_size),
            weight.POSITION_EMBEDDING: (self.n_positions, self.d_model),
            weight.ATTN_TO_QUERY: into_head,
            weight.ATTN_TO_KEY: into_head,
            weight.ATTN_TO_VALUE: into_head,
            weight.ATTN_TO_RESIDUAL: (self.n_heads, self.d_head, self.d_model),
            weight.MLP_TO_HIDDEN: (self.d_model, self.d_mlp),
            weight.MLP_HIDDEN_BIAS: (self.d_mlp,),
            weight.MLP_TO_RESIDUAL: (self.d_mlp, self.d_model),
        }.get(location, (self.d_model,))


_SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "vocabulary_size", "n_positions")


def unsupported_model(reason: str) -> InvalidInput:
    """The error for a model with a feature that cannot be captured or recomputed."""
    return InvalidInput(
        f"This model is not supported: {reason}. Choose another model.",
        kind=ErrorKind.UNSUPPORTED_MODEL,
    )
