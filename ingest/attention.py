"""Attention seen from inside: one registered function, two ways of computing it.

Every supported model calls its attention through transformers' registry, so one
registered function sees queries, keys and values and makes scores, pattern and the
weighted values. Where neither scores nor pattern are wanted it hands the work to the
model's own fused kernel and only notes what goes in and out; where they are, it
computes them step by step, exactly as transformers' eager attention does.

A name without a registered mask would get no mask at all, and attend to the future
without a word: both names are registered in both tables, and the stepwise function
refuses to run without a mask.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from actstore.store.errors import ErrorKind, IngestStopped
from actstore.store.model.architecture import Reading

__all__ = ["AttentionRecorder", "attention_implementation", "recorded_attention", "switched_to"]

AttentionRecorder = Mapping[Reading, Callable[[torch.Tensor], None]]
"""What to do with each tensor of one attention module; only wanted readings are in it."""

FUSED = "actstore_fused"
STEPWISE = "actstore_stepwise"

_recorders: WeakKeyDictionary[nn.Module, AttentionRecorder] = WeakKeyDictionary()


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention implementation that a model runs now."""
    name: str = model.config._attn_implementation
    return name


@contextmanager
def switched_to(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run a model with another attention implementation, then as before."""
    before = attention_implementation(model)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def recorded_attention(
    model: PreTrainedModel, recorders: Mapping[nn.Module, AttentionRecorder]
) -> Iterator[str]:
    """Let the attention modules of a model report to ``recorders``.

    Args:
        model: the model, switched as a whole.
        recorders: attention module -> what is wanted of it.

    Yields:
        The stock implementation whose result is reproduced bit by bit: the model's own
        fused kernel, or ``eager`` where scores or pattern are wanted.
    """
    wanted = {reading for recorder in recorders.values() for reading in recorder}
    stepwise = attention_implementation(model) != "sdpa" or any(
        reading.needs_scores for reading in wanted
    )
    _recorders.update(recorders)
    try:
        with switched_to(model, STEPWISE if stepwise else FUSED):
            yield "eager" if stepwise else "sdpa"
    finally:
        for module in recorders:
            _recorders.pop(module, None)


def _record(module: nn.Module, reading: Reading, tensor: torch.Tensor) -> None:
    recorder = _recorders.get(module)
    if recorder is not None and reading in recorder:
        recorder[reading](tensor)


def _record_inputs(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    # The function receives (batch, head, token, head_channel); heads are recorded last.
    _record(module, Reading.QUERY, query.transpose(1, 2))
    _record(module, Reading.KEY, key.transpose(1, 2))
    _record(module, Reading.VALUE, value.transpose(1, 2))


def _fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    _record_inputs(module, query, key, value)
    weighted, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    _record(module, Reading.WEIGHTED_VALUES, weighted)
    return weighted, None


def _stepwise(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if attention_mask is None:
        raise IngestStopped(
            "Attention was called without a mask, so tokens would see the future. "
            "Nothing was stored; use a transformers version that actstore supports.",
            kind=ErrorKind.CAPTURE_MISMATCH,
        )
    _record_inputs(module, query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    # transformers masks with the least finite number; recorded scores are minus infinity there.
    hidden = attention_mask < 0
    _record(module, Reading.SCORES, scores.masked_fill(hidden, -torch.inf).transpose(1, 2))
    pattern = torch.softmax(scores + attention_mask, dim=-1).to(value.dtype)
    del scores
    _record(module, Reading.PATTERN, pattern.transpose(1, 2))
    weighted = torch.matmul(pattern, value).transpose(1, 2)
    _record(module, Reading.WEIGHTED_VALUES, weighted)
    return weighted, pattern


AttentionInterface.register(FUSED, _fused)
AttentionInterface.register(STEPWISE, _stepwise)
AttentionMaskInterface.register(FUSED, sdpa_mask)
AttentionMaskInterface.register(STEPWISE, eager_mask)
