"""Where a model family keeps its activations and weights: one declaration per family.

A family is one row, :class:`Architecture`: which module holds which location, how the
state dict's tensors become the weights of the derived scalars, which config keys carry
the sizes. Everybody else reads the row; nobody asks for a model's type.
"""

from collections.abc import Mapping
from typing import Any

from actstore.store.model.description import Architecture, Heads, Reading, Tap, WeightSource
from actstore.store.model.dimensions import NormKind, unsupported_model
from actstore.store.model.families import GPT2, GPT_NEOX, GPT_NEOX_SEQUENTIAL
from actstore.store.model.gated_families import (
    GEMMA,
    GEMMA2,
    GEMMA3,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Heads",
    "NormKind",
    "Reading",
    "Tap",
    "WeightSource",
    "architecture_of",
]


ARCHITECTURES: tuple[Architecture, ...] = (
    GPT2,
    GPT_NEOX,
    GPT_NEOX_SEQUENTIAL,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
)
"""Every family that can be ingested and answered for."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row that describes a model.

    Args:
        config: the members of ``config.json``.

    Raises:
        InvalidInput: no row has its ``model_type``.

    >>> architecture_of({"model_type": "gpt2"}).name
    'gpt2'
    """
    for architecture in ARCHITECTURES:
        if architecture.describes(config):
            return architecture
    supported = dict.fromkeys(name for row in ARCHITECTURES for name in row.model_types)
    raise unsupported_model(
        f"model_type {config.get('model_type')!r} is not among the supported ones: "
        f"{', '.join(supported)}"
    )
