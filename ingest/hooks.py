"""Standing at a location while a model runs: seeing its tensor, or putting another there.

Hooks on the model's own modules and one registered attention function hand each tensor
to a handler the moment it exists. A handler that returns a tensor puts it in the place of
the one it got, also in the graph of a backward pass; one that returns None leaves the
model's own. No model code is copied or changed.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from actstore.ingest.attention import (
    AttentionRecorder,
    Handler,
    attention_implementation,
    recorded_attention,
)
from actstore.ingest.model import LoadedModel
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.architecture import Reading
from actstore.store.vocabulary import ActivationLocationType

__all__ = [
    "Handler",
    "Place",
    "evaluating",
    "exclusively",
    "frozen",
    "handled",
    "norm_centred",
    "norm_gain",
    "wide_dtype",
]

Place = tuple[ActivationLocationType, int | None]
"""A location and its layer; None outside the blocks."""

_in_use: WeakSet[nn.Module] = WeakSet()


@contextmanager
def exclusively(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model for one user of its hooks.

    Raises:
        InvalidInput: it has one already.
    """
    if model in _in_use:
        raise InvalidInput(
            "This model is being captured already. Leave the other Capture first.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    _in_use.add(model)
    try:
        yield
    finally:
        _in_use.discard(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, then every module as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model take a gradient, then every one as before."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


@contextmanager
def handled(loaded: LoadedModel, handlers: Mapping[Place, Handler]) -> Iterator[str]:
    """Call a handler at each place while the model runs.

    What a handler returns at a module's input reaches that module alone: where the
    residual stream passes by it too (the norm before the MLP), the stream keeps its own.
    A replaced scale of a norm is what the norm then divides by. The logits have no hook,
    since their reader already holds them.

    Args:
        loaded: the model.
        handlers: place -> what to call with (batch, token, unit …).

    Yields:
        The stock attention implementation that is reproduced bit by bit as long as no
        handler replaces anything.
    """
    model = loaded.model
    attention: dict[nn.Module, dict[Reading, Handler]] = {}
    with ExitStack() as stack:
        for (location, layer), handler in handlers.items():
            tap = loaded.architecture.taps[location]
            module = model.get_submodule(tap.module_name(layer))
            if tap.reading.is_attention:
                attention.setdefault(module, {})[tap.reading] = handler
            elif tap.reading is not Reading.LOGITS:
                stack.callback(_hook(loaded, module, tap.reading, handler).remove)
        recorders: Mapping[nn.Module, AttentionRecorder] = attention
        if recorders:
            yield stack.enter_context(recorded_attention(model, recorders))
        else:
            yield attention_implementation(model)


def _hook(
    loaded: LoadedModel, module: nn.Module, reading: Reading, handler: Handler
) -> RemovableHandle:
    if reading is Reading.OUTPUT:

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                first = handler(output[0])
                return None if first is None else (first, *output[1:])
            return handler(output)

        return module.register_forward_hook(after)
    if reading is Reading.INPUT:

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            first = handler(inputs[0])
            return None if first is None else (first, *inputs[1:])

        return module.register_forward_pre_hook(before)
    epsilon = loaded.dimensions.layer_norm_epsilon

    def measure(norm: nn.Module, inputs: tuple[Any, ...], _: Any) -> Any:
        scale = handler(torch.sqrt(_variance(loaded, inputs[0]) + epsilon))
        if scale is None:
            return None
        normed = norm_centred(loaded, inputs[0]) / scale * norm_gain(loaded, norm)
        if loaded.architecture.norm.centres:
            normed = normed + norm.get_parameter("bias")
        return normed.to(inputs[0].dtype)

    return module.register_forward_hook(measure)


def _variance(loaded: LoadedModel, inputs: torch.Tensor) -> torch.Tensor:
    wide = inputs.to(wide_dtype(inputs.dtype))
    if loaded.architecture.norm.centres:
        return wide.var(dim=-1, correction=0, keepdim=True)
    return (wide * wide).mean(dim=-1, keepdim=True)


def norm_centred(loaded: LoadedModel, inputs: torch.Tensor) -> torch.Tensor:
    """What a norm divides by its scale: its input in wide dtype, less the mean if it centres."""
    wide = inputs.to(wide_dtype(inputs.dtype))
    return wide - wide.mean(dim=-1, keepdim=True) if loaded.architecture.norm.centres else wide


def norm_gain(loaded: LoadedModel, norm: nn.Module) -> torch.Tensor:
    """The gain that a norm multiplies by, ``(channel,)``; some keep its excess over 1."""
    gain = norm.get_parameter("weight")
    offset = loaded.architecture.gain_offset
    return gain.to(wide_dtype(gain.dtype)) + offset if offset else gain


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what norms compute in, whatever the model's dtype."""
    return torch.float32 if dtype.itemsize < 4 else dtype
