"""Small random GPT-2 models whose every parameter matters: biases and gains are random too."""

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from actstore.store.model.architecture import architecture_of

LOCATIONS = tuple(architecture_of({"model_type": "gpt2"}).taps)
"""Every place of GPT-2's forward pass, in its order."""

SIZES: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "n_inner": 24,
    "vocab_size": 53,
    "n_positions": 32,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tiny_gpt2(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> GPT2LMHeadModel:
    """A model in evaluation mode; ``config`` overrides the sizes."""
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = ".ln_" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_gain else 0.3 * noise)
    nn.Module.to(model, dtype)
    nn.Module.eval(model)
    return model
