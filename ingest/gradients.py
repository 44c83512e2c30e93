"""Both passes of a corpus' batches: values as they appear, then their gradients.

The backward pass differentiates an objective with respect to the tensors at the asked
locations and to nothing else: the parameters are frozen and the embedding's output is
made the leaf, so no gradient of a weight is ever computed. Hooks on the tensors hand on
each gradient the moment it is complete, and autograd drops it afterwards.

The scale of a norm is no tensor of the graph where the norm is one fused kernel. Its
gradient follows from that of the norm's output y = gain * c / s + bias, with c the input,
less its mean in norms that centre: dy/ds = -gain * c / s^2, summed over the channels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from actstore.ingest.capture import Capture
from actstore.ingest.hooks import (
    Handler,
    Place,
    evaluating,
    exclusively,
    frozen,
    handled,
    norm_centred,
    norm_gain,
)
from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import Columns, Objective
from actstore.store.errors import ErrorKind, IngestStopped, InvalidInput
from actstore.store.model.architecture import Reading
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["GradientCapture", "PassSink", "gradient_parts"]

_MOST_TOKENS = 8192
_MOST_LOGITS = 2**28


class PassSink(Protocol):
    """Receives a location's tensor or its gradient; copies what it keeps."""

    def __call__(
        self,
        location: ActivationLocationType,
        layer: int | None,
        tensor: torch.Tensor,
        pass_type: PassType,
    ) -> None:
        """Take ``(batch, token, unit …)`` of one location, layer and pass."""
        ...


def gradient_parts(rows: int, width: int, vocabulary_size: int) -> Iterator[range]:
    """Rows of a batch that go through both passes together.

    A backward pass keeps what the forward pass made, and all logits; a batch that fits an
    accelerator forwards may not fit it so. The parts follow from the batch alone, so a
    resumed run makes the same ones.

    Args:
        rows: sequences of the batch.
        width: padded tokens of each.
        vocabulary_size: logits of a token.

    >>> list(gradient_parts(5, 4096, 50257))
    [range(0, 1), range(1, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    tokens = min(_MOST_TOKENS, _MOST_LOGITS // vocabulary_size)
    step = max(1, tokens // width)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


class GradientCapture:
    """Captures values and gradients for as long as the context is open.

    Inside the context the model is in evaluation mode and its parameters take no gradient;
    on exit, also after an error, all is as it was.

    Args:
        loaded: the model.
        locations: where values are wanted; may be none.
        gradients: where gradients are wanted.
        objective: what is differentiated.

    Raises:
        InvalidInput: on creation, when the architecture lacks a location or a gradient is
            asked of an attended pair; on entry, when the model is being captured already.
        IngestStopped: on entry, when the hooked model does not compute what the bare one does.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        locations: Iterable[ActivationLocationType],
        gradients: Iterable[ActivationLocationType],
        objective: Objective,
    ) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._objective = objective
        self._values = frozenset(locations)
        self._gradients = frozenset(gradients)
        pairs = sorted(location.label for location in self._gradients if location.is_pair_shaped)
        if pairs or not self._gradients:
            raise InvalidInput(
                f"Gradients to capture: {', '.join(pairs) or 'none'}. Name locations with one row "
                "per token; those of attended pairs follow from attn_weighted_sum_of_values.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            )
        # Checks the names, and on entry that hooks change nothing.
        self._checked = Capture(loaded, self._values | self._gradients)
        self._sink: PassSink | None = None
        self._seen: set[Place] = set()
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with self._checked:
            pass
        with ExitStack() as stack:
            stack.enter_context(exclusively(self._model))
            stack.enter_context(evaluating(self._model))
            stack.enter_context(frozen(self._model))
            # A scale as measured is beside the graph: its norm is watched instead.
            scales = {location for location in self._gradients if self._is_scale(location)}
            tapped = self._values | (self._gradients - scales)
            leaf = ActivationLocationType.RESID_POST_EMBEDDING
            handlers = {place: self._handler(place) for place in self._places(tapped | {leaf})}
            stack.enter_context(handled(self._loaded, handlers))
            for place in self._places(scales):
                stack.callback(self._watch_norm(place).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def stream(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
        sink: PassSink,
    ) -> None:
        """Run one batch forwards and backwards and hand every tensor to ``sink``.

        Args:
            input_ids: int64 (batch, token), padded on the right with any token.
            lengths: tokens of each sequence; gradients at padded places are zero.
            columns: each sequence's targets, where the objective reads columns.
            sink: called once per location, layer and pass: values in the order of the
                computation, gradients in the reverse one. Tensors have the model's dtype,
                those of norms' scales at least float32.

        Raises:
            InvalidInput: a target is missing or outside the vocabulary.
            IngestStopped: a gradient did not arrive, or the sink refuses a value.
        """
        logits_of = ActivationLocationType.LOGITS
        self._sink = sink
        self._seen.clear()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                # A copy, since a caller's inference tensor cannot be saved for the way back.
                batch = input_ids.to(self._loaded.device).clone()
                logits = self._model(batch, use_cache=False).logits
                if logits_of in self._values:
                    sink(logits_of, None, logits.detach(), PassType.FORWARD)
                if logits_of in self._gradients:
                    _hook(logits, partial(self._give, (logits_of, None)))
                objective = self._objective(logits, batch, lengths, columns)
                del logits
                torch.autograd.backward(objective.sum())
        finally:
            self._sink = None
        missing = set(self._places(self._gradients)) - self._seen
        if missing:
            location, layer = min(missing, key=str)
            raise IngestStopped(
                f"No gradient of {self._objective.name} arrived at {location}, layer {layer}. "
                "Nothing of this segment was stored; use a transformers version that actstore "
                "supports.",
                kind=ErrorKind.CAPTURE_MISMATCH,
            )

    def _places(self, locations: Iterable[ActivationLocationType]) -> Iterator[Place]:
        for location in locations:
            if location.has_layers:
                yield from ((location, layer) for layer in range(self._loaded.dimensions.n_layers))
            else:
                yield location, None

    def _is_scale(self, location: ActivationLocationType) -> bool:
        return self._loaded.architecture.taps[location].reading is Reading.NORM_SCALE

    def _handler(self, place: Place) -> Handler:
        location, layer = place
        wants_value = location in self._values
        wants_gradient = location in self._gradients and not self._is_scale(location)

        def handle(tensor: torch.Tensor) -> torch.Tensor | None:
            if self._sink is None:
                return None
            if wants_value:
                self._sink(location, layer, tensor.detach(), PassType.FORWARD)
            if location is ActivationLocationType.RESID_POST_EMBEDDING:
                tensor.requires_grad_(True)
            if not wants_gradient:
                return None
            _hook(tensor, partial(self._give, place))
            # Attention hands out views; what is returned is what it computes on with.
            return tensor

        return handle

    def _watch_norm(self, place: Place) -> Any:
        tap = self._loaded.architecture.taps[place[0]]
        epsilon = self._loaded.dimensions.layer_norm_epsilon

        def watch(norm: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if self._sink is None:
                return
            stream = inputs[0].detach()

            def give(gradient: torch.Tensor) -> None:
                centred = norm_centred(self._loaded, stream)
                variance = (centred * centred).mean(dim=-1, keepdim=True) + epsilon
                weighted = gradient.to(centred.dtype) * norm_gain(self._loaded, norm) * centred
                self._give(place, -weighted.sum(dim=-1, keepdim=True) / variance)

            _hook(output, give)

        return self._model.get_submodule(tap.module_name(place[1])).register_forward_hook(watch)

    def _give(self, place: Place, gradient: torch.Tensor) -> None:
        assert self._sink is not None, "gradients come during the pass"
        self._seen.add(place)
        self._sink(*place, gradient, PassType.BACKWARD)


def _hook(tensor: torch.Tensor, give: Callable[[torch.Tensor], None]) -> None:
    tensor.register_hook(give)  # type: ignore[no-untyped-call]
