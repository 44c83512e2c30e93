"""Models and text of the benchmarks: the shipped one, and random ones of known shapes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from actstore.ingest.demo import DEMO_MODEL, standard_library_files
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.preparation import Corpus

__all__ = ["bare_forward", "demo_model", "random_ids", "random_model", "standard_library"]

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 256, "n_positions": 64},
    "demo": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 4096, "n_positions": 256},
    "gpt2-small": {
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
    },
}


def random_model(shape: str) -> LoadedModel:
    """A GPT-2 of a known shape with random weights and no tokenizer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            **_SHAPES[shape],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    torch.nn.Module.eval(model)
    return load_model((model.requires_grad_(False), None))


def demo_model() -> tuple[LoadedModel, str]:
    """The shipped model and what to call it; a random one of its shape in a bare checkout."""
    if (Path(DEMO_MODEL) / "config.json").exists():
        return load_model("demo"), "shipped model"
    return random_model("demo"), "random model of the shipped one's shape"


def random_ids(loaded: LoadedModel, rows: int, width: int) -> torch.Tensor:
    """int64 ``(row, token)``."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.dimensions.vocabulary_size
    return torch.randint(vocabulary, (rows, width), generator=generator)


@torch.inference_mode()
def bare_forward(loaded: LoadedModel, input_ids: torch.Tensor) -> None:
    """The forward pass without the language-modelling head, as capture needs it, unhooked."""
    loaded.model.base_model(input_ids, use_cache=False)


def standard_library(loaded: LoadedModel) -> Corpus:
    """The standard library's source; random ids of as many tokens without a tokenizer."""
    if loaded.tokenizer is not None:
        return Corpus([str(path) for path in standard_library_files()])
    rng = np.random.default_rng(0)
    vocabulary = loaded.dimensions.vocabulary_size
    return Corpus([rng.integers(0, vocabulary, 4096).tolist() for _ in range(512)])
