"""Families whose norms centre: GPT-2 and GPT-NeoX."""

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

__all__ = ["GPT2", "GPT_NEOX", "GPT_NEOX_SEQUENTIAL"]

_A = ActivationLocationType
_W = WeightLocationType
_BLOCK = "transformer.h.{layer}"
_QKV = f"{_BLOCK}.attn.c_attn"

GPT2 = Architecture(
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
    softmax_in_float32=False,
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

_NEOX = "gpt_neox.layers.{layer}"
_NEOX_QKV = f"{_NEOX}.attention.query_key_value"


def _neox_rotary(config: Mapping[str, Any], _: str) -> Mapping[str, Any]:
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    given.setdefault("rope_theta", config.get("rotary_emb_base", 10000.0))
    given.setdefault("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return given


def _neox_projection(part: int, kind: str) -> WeightSource:
    return WeightSource(
        f"{_NEOX_QKV}.{kind}",
        transposed=kind == "weight",
        heads=Heads.OUTPUT,
        part=part,
        parts=3,
        parts_within_head=True,
        is_optional=kind == "bias",
    )


_NEOX_TAPS = {
    _A.RESID_POST_EMBEDDING: Tap("gpt_neox.layers.0", Reading.INPUT),
    _A.ATTN_INPUT_LAYER_NORM_SCALE: Tap(f"{_NEOX}.input_layernorm", Reading.NORM_SCALE),
    _A.ATTN_QUERY: Tap(f"{_NEOX}.attention", Reading.QUERY),
    _A.ATTN_KEY: Tap(f"{_NEOX}.attention", Reading.KEY),
    _A.ATTN_VALUE: Tap(f"{_NEOX}.attention", Reading.VALUE),
    _A.ATTN_QK_LOGITS: Tap(f"{_NEOX}.attention", Reading.SCORES),
    _A.ATTN_QK_PROBS: Tap(f"{_NEOX}.attention", Reading.PATTERN),
    _A.ATTN_WEIGHTED_SUM_OF_VALUES: Tap(f"{_NEOX}.attention", Reading.WEIGHTED_VALUES),
    _A.RESID_DELTA_ATTN: Tap(f"{_NEOX}.attention", Reading.OUTPUT),
    _A.MLP_INPUT_LAYER_NORM_SCALE: Tap(f"{_NEOX}.post_attention_layernorm", Reading.NORM_SCALE),
    _A.MLP_PRE_ACT: Tap(f"{_NEOX}.mlp.dense_h_to_4h", Reading.OUTPUT),
    _A.MLP_POST_ACT: Tap(f"{_NEOX}.mlp.dense_4h_to_h", Reading.INPUT),
    _A.RESID_DELTA_MLP: Tap(f"{_NEOX}.mlp", Reading.OUTPUT),
    _A.RESID_POST_MLP: Tap(_NEOX, Reading.OUTPUT),
    _A.RESID_FINAL_LAYER_NORM_SCALE: Tap("gpt_neox.final_layer_norm", Reading.NORM_SCALE),
    _A.LOGITS: Tap("", Reading.LOGITS),
}

GPT_NEOX = Architecture(
    name="gpt_neox",
    model_types=("gpt_neox",),
    where=("use_parallel_residual", True, True),
    config_keys=ConfigKeys(
        sizes=MappingProxyType(
            {
                "n_layers": ("num_hidden_layers", 44),
                "d_model": ("hidden_size", 6144),
                "n_heads": ("num_attention_heads", 64),
                "d_mlp": ("intermediate_size", 24576),
                "vocabulary_size": ("vocab_size", 50432),
                "n_positions": ("max_position_embeddings", 2048),
            }
        ),
        epsilon=("layer_norm_eps", 1e-5),
        activation=("hidden_act", "gelu"),
    ),
    requirements=MappingProxyType({"quantization_config": None}),
    norm=NormKind.LAYER_NORM,
    rotary=_neox_rotary,
    is_parallel=True,
    taps=MappingProxyType(_NEOX_TAPS),
    weights=MappingProxyType(
        {
            _W.EMBEDDING: WeightSource("gpt_neox.embed_in.weight"),
            _W.UNEMBEDDING: WeightSource("lm_head.weight", transposed=True),
            _W.ATTN_TO_QUERY: _neox_projection(0, "weight"),
            _W.ATTN_TO_KEY: _neox_projection(1, "weight"),
            _W.ATTN_TO_VALUE: _neox_projection(2, "weight"),
            _W.ATTN_TO_RESIDUAL: WeightSource(
                f"{_NEOX}.attention.dense.weight", transposed=True, heads=Heads.INPUT
            ),
            _W.ATTN_OUTPUT_BIAS: WeightSource(f"{_NEOX}.attention.dense.bias", is_optional=True),
            _W.MLP_TO_HIDDEN: WeightSource(f"{_NEOX}.mlp.dense_h_to_4h.weight", transposed=True),
            _W.MLP_HIDDEN_BIAS: WeightSource(f"{_NEOX}.mlp.dense_h_to_4h.bias"),
            _W.MLP_TO_RESIDUAL: WeightSource(f"{_NEOX}.mlp.dense_4h_to_h.weight", transposed=True),
            _W.MLP_OUTPUT_BIAS: WeightSource(f"{_NEOX}.mlp.dense_4h_to_h.bias"),
            _W.LAYER_NORM_GAIN_PRE_ATTN: WeightSource(f"{_NEOX}.input_layernorm.weight"),
            _W.LAYER_NORM_BIAS_PRE_ATTN: WeightSource(f"{_NEOX}.input_layernorm.bias"),
            _W.LAYER_NORM_GAIN_PRE_MLP: WeightSource(f"{_NEOX}.post_attention_layernorm.weight"),
            _W.LAYER_NORM_BIAS_PRE_MLP: WeightSource(f"{_NEOX}.post_attention_layernorm.bias"),
            _W.LAYER_NORM_GAIN_FINAL: WeightSource("gpt_neox.final_layer_norm.weight"),
            _W.LAYER_NORM_BIAS_FINAL: WeightSource("gpt_neox.final_layer_norm.bias"),
        }
    ),
    attention_biases=MappingProxyType(
        {
            _A.ATTN_QUERY: _neox_projection(0, "bias"),
            _A.ATTN_KEY: _neox_projection(1, "bias"),
            _A.ATTN_VALUE: _neox_projection(2, "bias"),
        }
    ),
)
"""GPT-NeoX and Pythia: attention and MLP side by side."""

GPT_NEOX_SEQUENTIAL = replace(
    GPT_NEOX,
    name="gpt_neox_sequential",
    where=("use_parallel_residual", False, True),
    is_parallel=False,
    taps=MappingProxyType(
        {
            **_NEOX_TAPS,
            _A.RESID_POST_ATTN: Tap(f"{_NEOX}.post_attention_layernorm", Reading.INPUT),
        }
    ),
)
"""GPT-NeoX with attention before the MLP."""
