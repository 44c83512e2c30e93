"""The words in which a model family is described; ``families`` has the descriptions."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.model.dimensions import ModelDimensions, NormKind, unsupported_model
from actstore.store.model.rotary import Rotary
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = [
    "Architecture",
    "ConfigKeys",
    "Heads",
    "LayerKinds",
    "Reading",
    "RotaryOf",
    "Tap",
    "WeightSource",
]


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
        is_optional: a bias that models of the family may lack; it is zeros then.
    """

    name: str
    transposed: bool = False
    heads: Heads = Heads.NONE
    part: int = 0
    parts: int = 1
    parts_within_head: bool = False
    addend: float = 0.0
    is_optional: bool = False

    def arrange(self, stored: npt.NDArray[Any], n_heads: int) -> npt.NDArray[Any]:
        """The weight in the orientation of ``WeightLocationType``; a view where possible.

        Args:
            stored: the tensor of the state dict, (in, out), (out, in) or (out,).
            n_heads: heads that this weight has.
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
        if not self.addend:
            return array
        # In float32 as the models do it: half precision would round the sum.
        return array.astype(np.promote_types(array.dtype, np.float32)) + self.addend


LayerKinds = Callable[[Mapping[str, Any], int], tuple[str, ...]]
"""(config, layers) -> ``full_attention`` or ``sliding_attention`` of each layer."""

RotaryOf = Callable[[Mapping[str, Any], str], Mapping[str, Any]]
"""(config, kind of layer) -> its ``rope_parameters`` with the defaults filled in."""


@dataclass(frozen=True)
class ConfigKeys:
    """Which keys of a config carry the dimensions, with the value of an absent key.

    Attributes:
        sizes: dimension -> (key, default); a ``d_mlp`` of None is ``mlp_ratio * d_model``, a
            ``d_head`` of None ``d_model / n_heads``, an ``n_kv_heads`` of None ``n_heads``.
        epsilon: the norms' epsilon.
        activation: the activation function's name.
        mlp_ratio: see ``sizes``.
        activation_names: names that mean another function in this family.
        scale_scores: whether scores are divided by sqrt(d_head).
        scale_scores_by_layer: whether they are divided by the layer's number too.
        score_scalar: what scores are divided by the square root of, instead of ``d_head``.
        score_cap, logit_cap: the soft caps.
        window: tokens that a token attends to in the layers with sliding attention.
    """

    sizes: Mapping[str, tuple[str, int | None]]
    epsilon: tuple[str, float]
    activation: tuple[str, str]
    mlp_ratio: int = 4
    activation_names: Mapping[str, str] | None = None
    scale_scores: tuple[str, bool] | None = None
    scale_scores_by_layer: tuple[str, bool] | None = None
    score_scalar: tuple[str, float] | None = None
    score_cap: tuple[str, float | None] | None = None
    logit_cap: tuple[str, float | None] | None = None
    window: tuple[str, int | None] | None = None


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
        where: (config key, value, value of an absent key) that tells this row from another
            of the same ``model_types``.
        layer_kinds: which layers have sliding attention; None for none.
        rotary: the rotation of queries and keys; None without.
        is_gated, is_parallel, has_post_norms, has_query_key_norms: see ``ModelDimensions``.
        scales_embedding: the token embedding is multiplied by sqrt(d_model).
        softmax_in_float32: whether probabilities are computed in float32 in any dtype.
    """

    name: str
    model_types: tuple[str, ...]
    config_keys: ConfigKeys
    requirements: Mapping[str, object]
    norm: NormKind
    taps: Mapping[ActivationLocationType, Tap]
    weights: Mapping[WeightLocationType, WeightSource]
    attention_biases: Mapping[ActivationLocationType, WeightSource]
    where: tuple[str, object, object] | None = None
    layer_kinds: LayerKinds | None = None
    rotary: RotaryOf | None = None
    is_gated: bool = False
    is_parallel: bool = False
    has_post_norms: bool = False
    has_query_key_norms: bool = False
    scales_embedding: bool = False
    softmax_in_float32: bool = True

    @property
    def gain_offset(self) -> float:
        """What the norms add to their stored gains."""
        return self.weights[WeightLocationType.LAYER_NORM_GAIN_FINAL].addend

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is one of this row's."""
        if config.get("model_type") not in self.model_types:
            return False
        if self.where is None:
            return True
        key, value, default = self.where
        return bool(config.get(key, default) == value)

    def why_absent(self, location: ActivationLocationType) -> str:
        """Why models of this family have no such location, for people."""
        reason = _REASONS.get(location, "it is not part of their forward pass")
        return f"{self.name} models have no {location}: {reason}"

    def dimensions(self, config: Mapping[str, Any], run_dtype: str = "float32") -> ModelDimensions:
        """Read a config.

        Args:
            config: the members of ``config.json``, in the form of any transformers version.
            run_dtype: what the model runs in.

        Raises:
            InvalidInput: the model has a feature that cannot be captured or recomputed.
        """
        for key, required in self.requirements.items():
            # Configs say "not used" with None and with False.
            if (config.get(key, required) or None) != (required or None):
                raise unsupported_model(
                    f"its config has {key} = {config[key]!r}, where only {required!r} is supported"
                )
        keys = self.config_keys
        sizes: dict[str, Any] = {
            name: config.get(key, default) for name, (key, default) in keys.sizes.items()
        }
        if sizes["d_mlp"] is None:
            sizes["d_mlp"] = keys.mlp_ratio * sizes["d_model"]
        if sizes.get("d_head") is None:
            if sizes["d_model"] % sizes["n_heads"]:
                raise unsupported_model(
                    f"d_model {sizes['d_model']} is no multiple of its {sizes['n_heads']} heads"
                )
            sizes["d_head"] = sizes["d_model"] // sizes["n_heads"]
        if sizes.get("n_kv_heads") == sizes["n_heads"]:
            sizes["n_kv_heads"] = None
        activation = config.get(*keys.activation)
        windows = self._windows(config, sizes["n_layers"])
        return ModelDimensions(
            **sizes,
            layer_norm_epsilon=float(config.get(*keys.epsilon)),
            activation_function=(keys.activation_names or {}).get(activation, activation),
            score_scale=self._score_scale(config, sizes["d_head"]),
            score_scale_by_layer=bool(_value(config, keys.scale_scores_by_layer)),
            norm=self.norm,
            rotary=self._rotary(config, sizes),
            sliding_windows=() if not any(windows) else windows,
            is_gated=self.is_gated,
            is_parallel=self.is_parallel,
            has_post_norms=self.has_post_norms,
            has_query_key_norms=self.has_query_key_norms,
            score_cap=_value(config, keys.score_cap),
            logit_cap=_value(config, keys.logit_cap),
            embedding_scale=(
                _rounded(sizes["d_model"] ** 0.5, run_dtype) if self.scales_embedding else 1.0
            ),
            run_dtype=run_dtype if self.rotary is not None else "float32",
        )

    def _score_scale(self, config: Mapping[str, Any], d_head: int) -> float:
        keys = self.config_keys
        if keys.score_scalar is not None:
            return float(config.get(*keys.score_scalar) ** -0.5)
        is_scaled = keys.scale_scores is None or config.get(*keys.scale_scores)
        return float(d_head**-0.5) if is_scaled else 1.0

    def _kinds(self, config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
        if self.layer_kinds is None:
            return ("full_attention",) * n_layers
        kinds = config.get("layer_types") or self.layer_kinds(config, n_layers)
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if strange or len(kinds) != n_layers:
            raise unsupported_model(
                f"its layers have attention of the kinds {', '.join(strange) or kinds}, where "
                f"full_attention or sliding_attention for each of {n_layers} is supported"
            )
        return tuple(kinds)

    def _windows(self, config: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
        window = _value(config, self.config_keys.window)
        kinds = self._kinds(config, n_layers)
        if window is None and "sliding_attention" in kinds:
            raise unsupported_model("layers with sliding attention need a sliding_window")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def _rotary(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[Rotary, ...]:
        if self.rotary is None:
            return ()
        head, positions = sizes["d_head"], sizes["n_positions"]
        return tuple(
            Rotary.of(self.rotary(config, kind), head, positions)
            for kind in self._kinds(config, sizes["n_layers"])
        )


_REASONS = {
    ActivationLocationType.RESID_POST_ATTN: (
        "attention and MLP of a block read the same residual stream (a parallel residual), so "
        "none lies between them; the one that both read is resid_post_mlp of the layer before"
    ),
    ActivationLocationType.MLP_PRE_LINEAR: "their MLPs are not gated",
    ActivationLocationType.ATTN_OUTPUT_LAYER_NORM_SCALE: "no norm follows attention",
    ActivationLocationType.MLP_OUTPUT_LAYER_NORM_SCALE: "no norm follows the MLP",
}


def _value(config: Mapping[str, Any], key: tuple[str, Any] | None) -> Any:
    return None if key is None else config.get(*key)


def _rounded(value: float, dtype: str) -> float:
    """A factor as a model holds it: a float32 tensor, converted to the run's dtype."""
    single = np.float32(value)
    if dtype == "float16":
        return float(np.float16(single))
    if dtype != "bfloat16":
        return float(single)
    (bits,) = struct.unpack("<I", struct.pack("<f", single))
    # To nearest, ties to even.
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (half,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(half)
