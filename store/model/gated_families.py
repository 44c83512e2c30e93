"""Families with RMS norms, rotary positions and a gated MLP: Llama and its relatives.

They name their modules alike, so one row is the others' pattern. Biases are optional: a
model without one has zeros.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from actstore.store.model.description import (
    Architecture,
    ConfigKeys,
    Heads,
    Reading,
    Tap,
    WeightSource,
)
from actstore.store.model.dimensions import NormKind
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = ["GEMMA", "GEMMA2", "GEMMA3", "LLAMA", "MISTRAL", "QWEN2", "QWEN3"]

_A = ActivationLocationType
_W = WeightLocationType
_BLOCK = "model.layers.{layer}"
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _sizes(**defaults: int | None) -> Mapping[str, tuple[str, int | None]]:
    keys = {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_head": "head_dim",
        "d_mlp": "intermediate_size",
        "vocabulary_size": "vocab_size",
        "n_positions": "max_position_embeddings",
    }
    return MappingProxyType({name: (key, defaults[name]) for name, key in keys.items()})


def _rotary(config: Mapping[str, Any], _: str) -> Mapping[str, Any]:
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    given.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return given


def _rotary_by_kind(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Gemma 3's: local layers turn faster, and only global ones are scaled."""
    nested = dict((config.get("rope_parameters") or {}).get(kind) or {})
    if kind == _SLIDING:
        nested.setdefault("rope_theta", config.get("rope_local_base_freq", 10_000.0))
        return nested
    nested = {**nested, **(config.get("rope_scaling") or {})}
    nested.setdefault("rope_theta", config.get("rope_theta", 1_000_000.0))
    return nested


def _every_layer_slides(config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    return (_FULL if config.get("sliding_window", 4096) is None else _SLIDING,) * n_layers


def _upper_layers_slide(config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    is_used = config.get("use_sliding_window", False) and config.get("sliding_window", 4096)
    first = config.get("max_window_layers", 28) if is_used else n_layers
    return tuple(_SLIDING if layer >= first else _FULL for layer in range(n_layers))


def _every_other_layer_slides(_: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    return tuple(_FULL if layer % 2 else _SLIDING for layer in range(n_layers))


def _all_but_each_sixth_slide(config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return tuple(_SLIDING if (layer + 1) % pattern else _FULL for layer in range(n_layers))


def _linear(name: str, heads: Heads = Heads.NONE) -> WeightSource:
    return WeightSource(f"{_BLOCK}.{name}.weight", transposed=True, heads=heads)


def _bias(name: str, heads: Heads = Heads.NONE) -> WeightSource:
    return WeightSource(f"{_BLOCK}.{name}.bias", heads=heads, is_optional=True)


def _gain(name: str, offset: float = 0.0) -> WeightSource:
    return WeightSource(f"{name}.weight", addend=offset)


def _weights(
    norms: Mapping[WeightLocationType, str], offset: float = 0.0
) -> Mapping[WeightLocationType, WeightSource]:
    return MappingProxyType(
        {
            _W.EMBEDDING: WeightSource("model.embed_tokens.weight"),
            _W.UNEMBEDDING: WeightSource("lm_head.weight", transposed=True),
            _W.ATTN_TO_QUERY: _linear("self_attn.q_proj", Heads.OUTPUT),
            _W.ATTN_TO_KEY: _linear("self_attn.k_proj", Heads.OUTPUT),
            _W.ATTN_TO_VALUE: _linear("self_attn.v_proj", Heads.OUTPUT),
            _W.ATTN_TO_RESIDUAL: _linear("self_attn.o_proj", Heads.INPUT),
            _W.ATTN_OUTPUT_BIAS: _bias("self_attn.o_proj"),
            _W.MLP_TO_HIDDEN: _linear("mlp.gate_proj"),
            _W.MLP_HIDDEN_BIAS: _bias("mlp.gate_proj"),
            _W.MLP_TO_HIDDEN_LINEAR: _linear("mlp.up_proj"),
            _W.MLP_HIDDEN_LINEAR_BIAS: _bias("mlp.up_proj"),
            _W.MLP_TO_RESIDUAL: _linear("mlp.down_proj"),
            _W.MLP_OUTPUT_BIAS: _bias("mlp.down_proj"),
            **{weight: _gain(f"{_BLOCK}.{name}", offset) for weight, name in norms.items()},
            _W.LAYER_NORM_GAIN_FINAL: _gain("model.norm", offset),
        }
    )


_PRE_NORMS = {
    _W.LAYER_NORM_GAIN_PRE_ATTN: "input_layernorm",
    _W.LAYER_NORM_GAIN_PRE_MLP: "post_attention_layernorm",
}
_QUERY_KEY_NORMS = {
    _W.QUERY_NORM_GAIN: "self_attn.q_norm",
    _W.KEY_NORM_GAIN: "self_attn.k_norm",
}
_ALL_NORMS = {
    _W.LAYER_NORM_GAIN_PRE_ATTN: "input_layernorm",
    _W.LAYER_NORM_GAIN_POST_ATTN: "post_attention_layernorm",
    _W.LAYER_NORM_GAIN_PRE_MLP: "pre_feedforward_layernorm",
    _W.LAYER_NORM_GAIN_POST_MLP: "post_feedforward_layernorm",
}
_TAPS = {
    _A.RESID_POST_EMBEDDING: Tap("model.layers.0", Reading.INPUT),
    _A.ATTN_INPUT_LAYER_NORM_SCALE: Tap(f"{_BLOCK}.input_layernorm", Reading.NORM_SCALE),
    _A.ATTN_QUERY: Tap(f"{_BLOCK}.self_attn", Reading.QUERY),
    _A.ATTN_KEY: Tap(f"{_BLOCK}.self_attn", Reading.KEY),
    _A.ATTN_VALUE: Tap(f"{_BLOCK}.self_attn", Reading.VALUE),
    _A.ATTN_QK_LOGITS: Tap(f"{_BLOCK}.self_attn", Reading.SCORES),
    _A.ATTN_QK_PROBS: Tap(f"{_BLOCK}.self_attn", Reading.PATTERN),
    _A.ATTN_WEIGHTED_SUM_OF_VALUES: Tap(f"{_BLOCK}.self_attn", Reading.WEIGHTED_VALUES),
    _A.RESID_DELTA_ATTN: Tap(f"{_BLOCK}.self_attn", Reading.OUTPUT),
    _A.RESID_POST_ATTN: Tap(f"{_BLOCK}.post_attention_layernorm", Reading.INPUT),
    _A.MLP_INPUT_LAYER_NORM_SCALE: Tap(f"{_BLOCK}.post_attention_layernorm", Reading.NORM_SCALE),
    _A.MLP_PRE_ACT: Tap(f"{_BLOCK}.mlp.gate_proj", Reading.OUTPUT),
    _A.MLP_PRE_LINEAR: Tap(f"{_BLOCK}.mlp.up_proj", Reading.OUTPUT),
    _A.MLP_POST_ACT: Tap(f"{_BLOCK}.mlp.down_proj", Reading.INPUT),
    _A.RESID_DELTA_MLP: Tap(f"{_BLOCK}.mlp", Reading.OUTPUT),
    _A.RESID_POST_MLP: Tap(_BLOCK, Reading.OUTPUT),
    _A.RESID_FINAL_LAYER_NORM_SCALE: Tap("model.norm", Reading.NORM_SCALE),
    _A.LOGITS: Tap("", Reading.LOGITS),
}
_AFTER_ATTENTION = f"{_BLOCK}.post_attention_layernorm"
_BEFORE_MLP = f"{_BLOCK}.pre_feedforward_layernorm"
_AFTER_MLP = f"{_BLOCK}.post_feedforward_layernorm"
_POST_NORM_TAPS = {
    **_TAPS,
    _A.ATTN_OUTPUT_LAYER_NORM_SCALE: Tap(_AFTER_ATTENTION, Reading.NORM_SCALE),
    _A.RESID_DELTA_ATTN: Tap(_AFTER_ATTENTION, Reading.OUTPUT),
    _A.RESID_POST_ATTN: Tap(_BEFORE_MLP, Reading.INPUT),
    _A.MLP_INPUT_LAYER_NORM_SCALE: Tap(_BEFORE_MLP, Reading.NORM_SCALE),
    _A.MLP_OUTPUT_LAYER_NORM_SCALE: Tap(_AFTER_MLP, Reading.NORM_SCALE),
    _A.RESID_DELTA_MLP: Tap(_AFTER_MLP, Reading.OUTPUT),
}

LLAMA = Architecture(
    name="llama",
    model_types=("llama",),
    config_keys=ConfigKeys(
        sizes=_sizes(
            n_layers=32,
            d_model=4096,
            n_heads=32,
            n_kv_heads=None,
            d_head=None,
            d_mlp=11008,
            vocabulary_size=32000,
            n_positions=2048,
        ),
        epsilon=("rms_norm_eps", 1e-6),
        activation=("hidden_act", "silu"),
    ),
    requirements=MappingProxyType({"quantization_config": None}),
    norm=NormKind.RMS_NORM,
    rotary=_rotary,
    is_gated=True,
    taps=MappingProxyType(_TAPS),
    weights=_weights(_PRE_NORMS),
    attention_biases=MappingProxyType(
        {
            _A.ATTN_QUERY: _bias("self_attn.q_proj", Heads.OUTPUT),
            _A.ATTN_KEY: _bias("self_attn.k_proj", Heads.OUTPUT),
            _A.ATTN_VALUE: _bias("self_attn.v_proj", Heads.OUTPUT),
        }
    ),
)
"""Llama 1 to 3, and what shares its ``model_type``."""

MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    config_keys=replace(
        LLAMA.config_keys,
        sizes=_sizes(
            n_layers=32,
            d_model=4096,
            n_heads=32,
            n_kv_heads=8,
            d_head=None,
            d_mlp=14336,
            vocabulary_size=32000,
            n_positions=4096 * 32,
        ),
        window=("sliding_window", 4096),
    ),
    layer_kinds=_every_layer_slides,
)
"""Mistral: sliding attention in every layer, where the config has a window."""

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    config_keys=replace(
        LLAMA.config_keys,
        sizes=_sizes(
            n_layers=32,
            d_model=4096,
            n_heads=32,
            n_kv_heads=32,
            d_head=None,
            d_mlp=22016,
            vocabulary_size=151936,
            n_positions=32768,
        ),
        window=("sliding_window", 4096),
    ),
    layer_kinds=_upper_layers_slide,
)
"""Qwen 1.5, 2 and 2.5: biases on queries, keys and values."""

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    config_keys=replace(
        QWEN2.config_keys,
        sizes=MappingProxyType({**QWEN2.config_keys.sizes, "d_head": ("head_dim", 128)}),
    ),
    has_query_key_norms=True,
    weights=_weights({**_PRE_NORMS, **_QUERY_KEY_NORMS}),
)
"""Qwen 3, dense: queries and keys are normed per head."""

_CAUSAL = {"quantization_config": None, "use_bidirectional_attention": None}

GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma",),
    config_keys=ConfigKeys(
        sizes=_sizes(
            n_layers=28,
            d_model=3072,
            n_heads=16,
            n_kv_heads=16,
            d_head=256,
            d_mlp=24576,
            vocabulary_size=256000,
            n_positions=8192,
        ),
        epsilon=("rms_norm_eps", 1e-6),
        activation=("hidden_act", "gelu_pytorch_tanh"),
        # The first releases said gelu and meant its approximation.
        activation_names=MappingProxyType({"gelu": "gelu_pytorch_tanh"}),
    ),
    requirements=MappingProxyType(_CAUSAL),
    scales_embedding=True,
    weights=_weights(_PRE_NORMS, 1.0),
)
"""Gemma 1: gains stored as their excess over 1, the embedding scaled."""

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2",),
    config_keys=ConfigKeys(
        sizes=_sizes(
            n_layers=26,
            d_model=2304,
            n_heads=8,
            n_kv_heads=4,
            d_head=256,
            d_mlp=9216,
            vocabulary_size=256000,
            n_positions=8192,
        ),
        epsilon=("rms_norm_eps", 1e-6),
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        score_scalar=("query_pre_attn_scalar", 256),
        score_cap=("attn_logit_softcapping", 50.0),
        logit_cap=("final_logit_softcapping", 30.0),
        window=("sliding_window", 4096),
    ),
    layer_kinds=_every_other_layer_slides,
    has_post_norms=True,
    taps=MappingProxyType(_POST_NORM_TAPS),
    weights=_weights(_ALL_NORMS, 1.0),
)
"""Gemma 2: norms after attention and MLP too, soft caps, every other layer local."""

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    config_keys=replace(
        GEMMA2.config_keys,
        sizes=_sizes(
            n_layers=26,
            d_model=2304,
            n_heads=8,
            n_kv_heads=4,
            d_head=256,
            d_mlp=9216,
            vocabulary_size=262_208,
            n_positions=131_072,
        ),
        # Its attention takes no cap, whatever the config says.
        score_cap=None,
        logit_cap=("final_logit_softcapping", None),
    ),
    layer_kinds=_all_but_each_sixth_slide,
    rotary=_rotary_by_kind,
    has_query_key_norms=True,
    weights=_weights({**_ALL_NORMS, **_QUERY_KEY_NORMS}, 1.0),
)
"""Gemma 3, text alone: norms of queries and keys, two rotations."""
