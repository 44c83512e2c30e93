"""The sizes and constants of one model, and the shapes that follow from them."""

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.rotary import Rotary
from actstore.store.vocabulary import ActivationLocationType, Dimension, WeightLocationType

__all__ = ["ACTIVATION_FUNCTIONS", "ModelDimensions", "NormKind", "unsupported_model"]

ACTIVATION_FUNCTIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")
"""Activation functions that can be recomputed from stored values, by their config names."""


class NormKind(StrEnum):
    """What a norm's denominator is."""

    LAYER_NORM = "layer_norm"  # sqrt(variance + eps), the mean subtracted first
    RMS_NORM = "rms_norm"  # sqrt(mean square + eps), nothing subtracted

    @property
    def centres(self) -> bool:
        """Whether the mean over channels is subtracted first."""
        return self is NormKind.LAYER_NORM


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes and constants of one model.

    The members with defaults are those that GPT-2 does without, so that a store's manifest
    of any version can be read.

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
        n_kv_heads: heads of keys and values, each shared by equally many query heads;
            None for as many as query heads.
        norm: kind of all norms.
        rotary: the rotation of queries and keys, one per layer; empty without.
        sliding_windows: tokens that a token attends to, itself included, one per layer
            (None for all before it); empty for all.
        is_gated: the MLP multiplies its activation function by a linear branch.
        is_parallel: attention and MLP of a block read the same residual stream.
        has_post_norms: what attention and MLP give passes a norm before it is added.
        has_query_key_norms: queries and keys pass a norm per head before they turn.
        score_cap, logit_cap: ``c`` of a soft cap ``c * tanh(x / c)``; None without.
        embedding_scale: factor on the token embedding, rounded as the model rounds it.
        run_dtype: what the model ran in; rotations are rounded to it.
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
    n_kv_heads: int | None = None
    norm: NormKind = NormKind.LAYER_NORM
    rotary: tuple[Rotary, ...] = ()
    sliding_windows: tuple[int | None, ...] = ()
    is_gated: bool = False
    is_parallel: bool = False
    has_post_norms: bool = False
    has_query_key_norms: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    run_dtype: str = "float32"

    def __post_init__(self) -> None:
        # A manifest has them as JSON does.
        given: tuple[Any, ...] = self.rotary
        rotary = tuple(one if isinstance(one, Rotary) else Rotary(**one) for one in given)
        object.__setattr__(self, "rotary", rotary)
        object.__setattr__(self, "sliding_windows", tuple(self.sliding_windows))
        object.__setattr__(self, "norm", NormKind(self.norm))
        for name in ("rotary", "sliding_windows"):
            if len(getattr(self, name)) not in (0, self.n_layers):
                raise unsupported_model(
                    f"{name} has {len(getattr(self, name))} members for {self.n_layers} layers"
                )
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise unsupported_model(f"{name} is {value!r}, and must be a whole number above 0")
        if self.n_heads % self.kv_heads:
            raise unsupported_model(
                f"its {self.n_heads} query heads cannot share {self.kv_heads} key heads equally"
            )
        if self.activation_function not in ACTIVATION_FUNCTIONS:
            raise unsupported_model(
                f"activation function {self.activation_function!r} is not one of "
                f"{', '.join(ACTIVATION_FUNCTIONS)}"
            )

    def record(self) -> dict[str, Any]:
        """The members as JSON values; those that GPT-2 does without only where they say something.

        So a store of GPT-2 has the manifest that it had before there were others.
        """
        later = fields(self)[_FIRST_MEMBERS:]
        plain = {one.name for one in later if getattr(self, one.name) == one.default}
        return {name: value for name, value in asdict(self).items() if name not in plain}

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def rotary_at(self, layer: int) -> Rotary | None:
        """The rotation of a layer's queries and keys; None without."""
        return self.rotary[layer] if self.rotary else None

    def window_at(self, layer: int) -> int | None:
        """How many tokens one attends to in a layer, itself included; None for all before it."""
        return self.sliding_windows[layer] if self.sliding_windows else None

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
            Dimension.KV_HEAD: self.kv_heads,
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
        into_kv_head = (self.kv_heads, self.d_model, self.d_head)
        return {
            weight.EMBEDDING: (self.vocabulary_size, self.d_model),
            weight.UNEMBEDDING: (self.d_model, self.vocabulary_size),
            weight.POSITION_EMBEDDING: (self.n_positions, self.d_model),
            weight.ATTN_TO_QUERY: into_head,
            weight.ATTN_TO_KEY: into_kv_head,
            weight.ATTN_TO_VALUE: into_kv_head,
            weight.ATTN_TO_RESIDUAL: (self.n_heads, self.d_head, self.d_model),
            weight.MLP_TO_HIDDEN: (self.d_model, self.d_mlp),
            weight.MLP_HIDDEN_BIAS: (self.d_mlp,),
            weight.MLP_TO_HIDDEN_LINEAR: (self.d_model, self.d_mlp),
            weight.MLP_HIDDEN_LINEAR_BIAS: (self.d_mlp,),
            weight.QUERY_NORM_GAIN: (self.d_head,),
            weight.KEY_NORM_GAIN: (self.d_head,),
            weight.MLP_TO_RESIDUAL: (self.d_mlp, self.d_model),
        }.get(location, (self.d_model,))


_FIRST_MEMBERS = 11
_SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "vocabulary_size", "n_positions")


def unsupported_model(reason: str) -> InvalidInput:
    """The error for a model with a feature that cannot be captured or recomputed."""
    return InvalidInput(
        f"This model is not supported: {reason}. Choose another model.",
        kind=ErrorKind.UNSUPPORTED_MODEL,
    )
