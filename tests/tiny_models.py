"""Small random models of every family; every parameter matters, biases and gains included.

The variants reach what a family's config can switch: parallel and sequential residuals,
shared key heads, sliding windows, soft caps, biases, scaled rotations.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

__all__ = ["VARIANTS", "tiny_config", "tiny_model"]

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "vocab_size": 53,
    "max_position_embeddings": 32,
    **_SPECIAL,
}
_SHARED = {**_SIZES, "num_key_value_heads": 2}
# Heads wider than the stream divided by their number.
_WIDE = {**_SHARED, "head_dim": 6}

VARIANTS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (
        GPT2Config,
        {
            "n_layer": 3,
            "n_embd": 16,
            "n_head": 4,
            "n_inner": 20,
            "vocab_size": 53,
            "n_positions": 32,
            **_SPECIAL,
        },
    ),
    "gpt_neox": (GPTNeoXConfig, {**_SIZES, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "gpt_neox_sequential": (
        GPTNeoXConfig,
        {
            **_SIZES,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"partial_rotary_factor": 1.0},
        },
    ),
    "llama": (LlamaConfig, {**_SHARED, "attention_bias": True, "mlp_bias": True}),
    "llama3": (
        LlamaConfig,
        {
            **_SHARED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": (MistralConfig, {**_WIDE, "sliding_window": 5}),
    "qwen2": (
        Qwen2Config,
        {**_SHARED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {**_WIDE, "attention_bias": True}),
    "gemma": (GemmaConfig, {**_WIDE, "num_key_value_heads": 1}),
    "gemma2": (
        Gemma2Config,
        {
            **_WIDE,
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_WIDE,
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}
"""Name -> config class and its arguments."""


def tiny_config(variant: str, **changes: Any) -> PreTrainedConfig:
    """The config of a variant; ``changes`` override its arguments."""
    kind, arguments = VARIANTS[variant]
    return kind(**{**arguments, **changes})


def tiny_model(
    variant: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    implementation: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """A model in evaluation mode.

    Args:
        variant: a key of :data:`VARIANTS`.
        seed: of its parameters.
        dtype: what it runs in; wide ones only, which round no rotation.
        implementation: of attention; the family's default when None.
        changes: arguments of the config.
    """
    config = tiny_config(variant, **changes)
    model: PreTrainedModel = Auto.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=implementation
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = "norm" in name or ".ln_" in name
            if is_gain and name.endswith("weight"):
                # Gains: around 1, or around 0 where they are kept as their excess over 1.
                parameter.copy_(parameter.mean().round() + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    nn.Module.to(model, dtype)
    nn.Module.eval(model)
    return model
