"""Where a model family keeps its activations and weights: one declaration per family.

A family is one row, :class:`Architecture`: which module holds which location, how the
state dict's tensors become the weights of the derived scalars, which config keys carry
the sizes. Everybody else reads the row; nobody asks for a model's type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from actstore.store.model.dimensions import ModelDimensions, unsupported_model
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ConfigKeys",
    "Heads",
    "NormKind",
    "Reading",
    "Tap",
    "WeightSource",
    "architecture_of",
]


class NormKind(StrEnum):
    """What a norm's denominator is."""

    LAYER_NORM = "layer_norm"  # sqrt(variance + eps), the mean subtracted first


class Reading(StrEnum):
    """How a location's tensor is read off a module during the forward pass."""

    INPUT = "input"
    OUTPUT = "output"
    NORM_SCALE = "norm_scale"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    SCORES = "scores"
    PATTERN = "pattern"
    WEIGHTED_VALUES = "weighted_values"
    LOGITS = "logits"

    @property
    def is_attention(self) -> bool:
        """Whether only the attention function sees it."""
        return self in _ATTENTION_READINGS

    @property
    def needs_scores(self) -> bool:
        """Whether fused attention kernels never materialise it."""
        return self in (Reading.SCORES, Reading.PATTERN)


_ATTENTION_READINGS = frozenset(
    {
        Reading.QUERY,
        Reading.KEY,
        Reading.VALUE,
        Reading.SCORES,
        Reading.PATTERN,
        Reading.WEIGHTED_VALUES,
    }
)


@dataclass(frozen=True)
class Tap:
    """Where a location is read.

    Attributes:
        module: path of the module inside the causal language model, with ``{layer}``
            where it repeats; empty for the model itself.
        reading: what of that module.
    """

    module: str
    reading: Reading

    def module_name(self, layer: int | None) -> str:
        """The module's path for one layer."""
        return self.module.format(layer=layer)


class Heads(StrEnum):
    """Which axis of a weight runs over heads times head channels."""

    NONE = "none"
    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True)
class WeightSource:
    """How a weight is cut out of one tensor of the state dict.

    Attributes:
        name: the tensor's name, with ``{layer}`` where it repeats.
        transposed: stored as (out, in), as ``nn.Linear`` does.
        heads: the axis to split into (head, head_channel); the head axis goes first.
        part: which of ``parts`` fused projections.
        parts: how many projections are fused along the output axis.
        parts_within_head: fused head by head (q, k, v of head 0, then of head 1 …).
        addend: added to every element (1 for gains stored as their excess over 1).
    """

    name: str
    transposed: bool = False
    heads: Heads = Heads.NONE
    part: int = 0
    parts: int = 1
    parts_within_head: bool = False
    addend: float = 0.0

    def arrange(self, stored: npt.NDArray[Any], n_heads: int) -> npt.NDArray[Any]:
        """The weight in the orientation of ``WeightLocationType``; a view where possible.

        Args:
            stored: the tensor of the state dict, (in, out), (out, in) or (out,).
            n_heads: attention heads of the model.
        """
        array = stored.T if self.transposed else stored
        leading = array.shape[:-1]
        if self.parts > 1:
            if self.parts_within_head:
                array = array.reshape(*leading, n_heads, self.parts, -1)[..., self.part, :]
                array = array.reshape(*leading, -1)
            else:
                array = array.reshape(*leading, self.parts, -1)[..., self.part, :]
        if self.heads is Heads.OUTPUT:
            split = array.reshape(*leading, n_heads, -1)
            array = split.swapaxes(0, -2) if leading else split
        elif self.heads is Heads.INPUT:
            array = array.reshape(n_heads, -1, array.shape[-1])
        return array + self.addend if self.addend else array


@dataclass(frozen=True)
class ConfigKeys:
    """Which keys of a config carry the dimensions, with the value of an absent key.

    Attributes:
        sizes: dimension -> (key, default); a ``d_mlp`` of None is ``mlp_ratio * d_model``.
        mlp_ratio: see ``sizes``.
        epsilon: the norms' epsilon.
        activation: the activation function's name.
        scale_scores: whether scores are divided by sqrt(d_head).
        scale_scores_by_layer: whether they are divided by the layer's number too.
    """

    sizes: Mapping[str, tuple[str, int | None]]
    mlp_ratio: int
    epsilon: tuple[str, float]
    activation: tuple[str, str]
    scale_scores: tuple[str, bool]
    scale_scores_by_layer: tuple[str, bool]


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Attributes:
        name: the family's name, recorded in stores.
        model_types: ``model_type`` values of configs that this row describes.
        config_keys: where a config states the dimensions.
        requirements: config key -> the one value supported; an absent key has it.
        norm: kind of the norms.
        taps: where each location is read; a location that is absent does not exist here.
        weights: where each weight is kept.
        attention_biases: biases added to queries, keys and values.
    """

    name: str
    model_types: tuple[str, ...]
    config_keys: ConfigKeys
    requirements: Mapping[str, object]
    norm: NormKind
    taps: Mapping[ActivationLocationType, Tap]
    weights: Mapping[WeightLocationType, WeightSource]
    attention_biases: Mapping[ActivationLocationType, WeightSource]

    def dimensions(self, config: Mapping[str, Any]) -> ModelDimensions:
        """Read a config.

        Args:
            config: the members of ``config.json``.

        Raises:
            InvalidInput: the model has a feature that cannot be captured or recomputed.
        """
        for key, required in self.requirements.items():
            if config.get(key, required) != required:
                raise unsupported_model(
                    f"its config has {key} = {config[key]!r}, where only {required!r} is supported"
                )
        keys = self.config_keys
        sizes: dict[str, Any] = {
            name: config.get(key, default) for name, (key, default) in keys.sizes.items()
        }
        if sizes["d_mlp"] is None:
            sizes["d_mlp"] = keys.mlp_ratio * sizes["d_model"]
        if "d_head" not in sizes:
            if sizes["d_model"] % sizes["n_heads"]:
                raise unsupported_model(
                    f"d_model {sizes['d_model']} is no multiple of its {sizes['n_heads']} heads"
                )
            sizes["d_head"] = sizes["d_model"] // sizes["n_heads"]
        return ModelDimensions(
            **sizes,
            layer_norm_epsilon=float(config.get(*keys.epsilon)),
            activation_function=config.get(*keys.activation),
            score_scale=sizes["d_head"] ** -0.5 if config.get(*keys.scale_scores) else 1.0,
            score_scale_by_layer=bool(config.get(*keys.scale_scores_by_layer)),
        )


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row that describes a model.

    Args:
        config: the members of ``config.json``.

    Raises:
        InvalidInput: no row has its ``model_type``.

    >>> architecture_of({"model_type": "gpt2"}).name
    'gpt2'
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    supported = ", ".join(name for row in ARCHITECTURES for name in row.model_types)
    raise unsupported_model(
        f"model_type {model_type!r} is not among the supported ones: {supported}"
    )


_A = ActivationLocationType
_W = WeightLocationType
_BLOCK = "transformer.h.{layer}"
_QKV = f"{_BLOCK}.attn.c_attn"

_GPT2 = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    config_keys=ConfigKeys(
        sizes=MappingProxyType(
            {
                "n_layers": ("n_layer", 12),
                "d_model": ("n_embd", 768),
                "n_heads": ("n_head", 12),
                "d_mlp": ("n_inner", None),
                "vocabulary_size": ("vocab_size", 50257),
                "n_positions": ("n_positions", 1024),
            }
        ),
        mlp_ratio=4,
        epsilon=("layer_norm_epsilon", 1e-5),
        activation=("activation_function", "gelu_new"),
        scale_scores=("scale_attn_weights", True),
        scale_scores_by_layer=("scale_attn_by_inverse_layer_idx", False),
    ),
    requirements=MappingProxyType(
        {
            # Honoured by one attention implementation only, so it would change with the hooks.
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "is_causal": True,
            "quantization_config": None,
        }
    ),
    norm=NormKind.LAYER_NORM,
    taps=MappingProxyType(
        {
            _A.RESID_POST_EMBEDDING: Tap("transformer.h.0", Reading.INPUT),
            _A.ATTN_INPUT_LAYER_NORM_SCALE: Tap(f"{_BLOCK}.ln_1", Reading.NORM_SCALE),
            _A.ATTN_QUERY: Tap(f"{_BLOCK}.attn", Reading.QUERY),
            _A.ATTN_KEY: Tap(f"{_BLOCK}.attn", Reading.KEY),
            _A.ATTN_VALUE: Tap(f"{_BLOCK}.attn", Reading.VALUE),
            _A.ATTN_QK_LOGITS: Tap(f"{_BLOCK}.attn", Reading.SCORES),
            _A.ATTN_QK_PROBS: Tap(f"{_BLOCK}.attn", Reading.PATTERN),
            _A.ATTN_WEIGHTED_SUM_OF_VALUES: Tap(f"{_BLOCK}.attn", Reading.WEIGHTED_VALUES),
            _A.RESID_DELTA_ATTN: Tap(f"{_BLOCK}.attn", Reading.OUTPUT),
            _A.RESID_POST_ATTN: Tap(f"{_BLOCK}.ln_2", Reading.INPUT),
            _A.MLP_INPUT_LAYER_NORM_SCALE: Tap(f"{_BLOCK}.ln_2", Reading.NORM_SCALE),
            _A.MLP_PRE_ACT: Tap(f"{_BLOCK}.mlp.c_fc", Reading.OUTPUT),
            _A.MLP_POST_ACT: Tap(f"{_BLOCK}.mlp.c_proj", Reading.INPUT),
            _A.RESID_DELTA_MLP: Tap(f"{_BLOCK}.mlp", Reading.OUTPUT),
            _A.RESID_POST_MLP: Tap(_BLOCK, Reading.OUTPUT),
            _A.RESID_FINAL_LAYER_NORM_SCALE: Tap("transformer.ln_f", Reading.NORM_SCALE),
            _A.LOGITS: Tap("", Reading.LOGITS),
        }
    ),
    weights=MappingProxyType(
        {
            _W.EMBEDDING: WeightSource("transformer.wte.weight"),
            _W.UNEMBEDDING: WeightSource("lm_head.weight", transposed=True),
            _W.POSITION_EMBEDDING: WeightSource("transformer.wpe.weight"),
            _W.ATTN_TO_QUERY: WeightSource(f"{_QKV}.weight", heads=Heads.OUTPUT, part=0, parts=3),
            _W.ATTN_TO_KEY: WeightSource(f"{_QKV}.weight", heads=Heads.OUTPUT, part=1, parts=3),
            _W.ATTN_TO_VALUE: WeightSource(f"{_QKV}.weight", heads=Heads.OUTPUT, part=2, parts=3),
            _W.ATTN_TO_RESIDUAL: WeightSource(f"{_BLOCK}.attn.c_proj.weight", heads=Heads.INPUT),
            _W.ATTN_OUTPUT_BIAS: WeightSource(f"{_BLOCK}.attn.c_proj.bias"),
            _W.MLP_TO_HIDDEN: WeightSource(f"{_BLOCK}.mlp.c_fc.weight"),
            _W.MLP_HIDDEN_BIAS: WeightSource(f"{_BLOCK}.mlp.c_fc.bias"),
            _W.MLP_TO_RESIDUAL: WeightSource(f"{_BLOCK}.mlp.c_proj.weight"),
            _W.MLP_OUTPUT_BIAS: WeightSource(f"{_BLOCK}.mlp.c_proj.bias"),
            _W.LAYER_NORM_GAIN_PRE_ATTN: WeightSource(f"{_BLOCK}.ln_1.weight"),
            _W.LAYER_NORM_BIAS_PRE_ATTN: WeightSource(f"{_BLOCK}.ln_1.bias"),
            _W.LAYER_NORM_GAIN_PRE_MLP: WeightSource(f"{_BLOCK}.ln_2.weight"),
            _W.LAYER_NORM_BIAS_PRE_MLP: WeightSource(f"{_BLOCK}.ln_2.bias"),
            _W.LAYER_NORM_GAIN_FINAL: WeightSource("transformer.ln_f.weight"),
            _W.LAYER_NORM_BIAS_FINAL: WeightSource("transformer.ln_f.bias"),
        }
    ),
    attention_biases=MappingProxyType(
        {
            _A.ATTN_QUERY: WeightSource(f"{_QKV}.bias", heads=Heads.OUTPUT, part=0, parts=3),
            _A.ATTN_KEY: WeightSource(f"{_QKV}.bias", heads=Heads.OUTPUT, part=1, parts=3),
            _A.ATTN_VALUE: WeightSource(f"{_QKV}.bias", heads=Heads.OUTPUT, part=2, parts=3),
        }
    ),
)

ARCHITECTURES: tuple[Architecture, ...] = (_GPT2,)
"""Every family that can be ingested and answered for."""
