"""Attention seen from inside: one registered function, two ways of computing it.

Every supported model calls its attention through transformers' registry, so one
registered function sees queries, keys and values and makes scores, pattern and the
weighted values; what is put in the place of one of them is computed on with. Where neither
scores nor pattern are wanted it hands the work to the model's own fused kernel and only
notes what goes in and out; where they are, it computes them step by step, exactly as
transformers' eager attention does: key heads repeated for the query heads that share them,
the soft cap before the mask, the probabilities in the dtype of the family.

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
from actstore.store.model.architecture import Reading, architecture_of

__all__ = [
    "AttentionRecorder",
    "Handler",
    "attention_implementation",
    "recorded_attention",
    "switched_to",
]

Handler = Callable[[torch.Tensor], torch.Tensor | None]
"""Gets a location's tensor, (batch, token, unit …); returns what takes its place, None to leave
it. The tensor may be a view that lives on in the model, and is never written into."""

AttentionRecorder = Mapping[Reading, Handler]
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


def _seen(module: nn.Module, reading: Reading, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or what its handler puts in its place; (batch, head, token, …) both ways."""
    handler = _recorders.get(module, {}).get(reading)
    # Heads are recorded after the tokens.
    other = None if handler is None else handler(tensor.transpose(1, 2))
    return tensor if other is None else other.transpose(1, 2)


def _seen_inputs(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _seen(module, Reading.QUERY, query),
        _seen(module, Reading.KEY, key),
        _seen(module, Reading.VALUE, value),
    )


def _seen_output(module: nn.Module, weighted: torch.Tensor) -> torch.Tensor:
    handler = _recorders.get(module, {}).get(Reading.WEIGHTED_VALUES)
    other = None if handler is None else handler(weighted)
    return weighted if other is None else other


def _fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    query, key, value = _seen_inputs(module, query, key, value)
    weighted, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _seen_output(module, weighted), None


def _stepwise(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if attention_mask is None:
        raise IngestStopped(
            "Attention was called without a mask, so tokens would see the future. "
            "Nothing was stored; use a transformers version that actstore supports.",
            kind=ErrorKind.CAPTURE_MISMATCH,
        )
    query, key, value = _seen_inputs(module, query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, _repeated(key, shared).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    handler = _recorders.get(module, {}).get(Reading.SCORES)
    if handler is not None:
        # transformers masks with the least finite number; recorded scores are minus infinity there.
        hidden = attention_mask < 0
        other = handler(scores.masked_fill(hidden, -torch.inf).transpose(1, 2))
        if other is not None:
            scores = other.transpose(1, 2)
    dtype = torch.float32 if _is_in_float32(module) else None
    pattern = torch.softmax(scores + attention_mask, dim=-1, dtype=dtype).to(value.dtype)
    del scores
    pattern = _seen(module, Reading.PATTERN, pattern)
    weighted = torch.matmul(pattern, _repeated(value, shared)).transpose(1, 2)
    return _seen_output(module, weighted), pattern


def _repeated(heads: torch.Tensor, shared: int) -> torch.Tensor:
    """Keys or values for the query heads that share them, (batch, head, token, …)."""
    if shared == 1:
        return heads
    rows, n_heads, *rest = heads.shape
    # As transformers does it: of a single head this is a view, which is multiplied otherwise.
    return heads[:, :, None].expand(rows, n_heads, shared, *rest).reshape(rows, -1, *rest)


def _is_in_float32(module: nn.Module) -> bool:
    """Whether a module's family computes probabilities in float32, whatever its dtype."""
    config: Any = module.config
    return architecture_of({"model_type": config.model_type}).softmax_in_float32


AttentionInterface.register(FUSED, _fused)
AttentionInterface.register(STEPWISE, _stepwise)
AttentionMaskInterface.register(FUSED, sdpa_mask)
AttentionMaskInterface.register(STEPWISE, eager_mask)
