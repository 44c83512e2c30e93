"""Reading a model's activations off a plain forward pass.

Hooks on the model's own modules and one registered attention function hand each tensor
to a sink the moment it exists; no model code is copied or changed. On entry a tiny
batch runs with and without the hooks, so a version of transformers that would make
them see something else stops the run instead of filling a store with it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from actstore.ingest.attention import attention_implementation, switched_to
from actstore.ingest.hooks import Handler, evaluating, exclusively, handled
from actstore.ingest.model import LoadedModel
from actstore.store.errors import ErrorKind, IngestStopped, InvalidInput
from actstore.store.vocabulary import ActivationLocationType

__all__ = ["Capture", "Sink"]

Sink = Callable[[ActivationLocationType, int | None, torch.Tensor], None]
"""Receives (location, layer, tensor); the tensor may be a view that lives on in the model,
so a sink copies what it keeps, and never writes into it."""

_CHECKED_TOKENS = 6
_CHECKED_ROWS = 2
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


class Capture:
    """Captures locations of a model for as long as the context is open.

    Inside the context the model is in evaluation mode; on exit, also after an error,
    its hooks, mode and attention implementation are as they were.

    Args:
        loaded: the model.
        locations: what to capture.

    Raises:
        InvalidInput: on creation, when no location is given or the architecture lacks
            one; on entry, when the model is being captured already.
        IngestStopped: on entry, when the hooked model does not compute what the bare
            one does, or attends to later tokens; or when the bare one's logits are not finite.
    """

    def __init__(self, loaded: LoadedModel, locations: Iterable[ActivationLocationType]) -> None:
        wanted = set(locations)
        known = loaded.architecture.taps
        absent = ", ".join(sorted(str(location) for location in wanted - known.keys()))
        reasons = "".join(
            f"{loaded.architecture.why_absent(location)}. "
            for location in ActivationLocationType
            if location in wanted - known.keys()
        )
        if absent or not wanted:
            raise InvalidInput(
                f"Locations to capture: {absent or 'none'}. {reasons}A {loaded.architecture.name} "
                f"model has {', '.join(str(location) for location in known)}; name some of these.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            )
        self.locations = tuple(
            location for location in ActivationLocationType if location in wanted
        )
        self._loaded = loaded
        self._model = loaded.model
        self._sink: Sink | None = None
        self._open = False
        self._exit = ExitStack()
        # The language-modelling head is most of a small model's work, and changes nothing before it.
        self._needs_head = ActivationLocationType.LOGITS in wanted

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(exclusively(self._model))
            stack.enter_context(evaluating(self._model))
            implementation = attention_implementation(self._model)
            bare = self._check_logits()
            reference = self._install(stack)
            self._open = True
            stack.callback(self._close)
            self._check(bare, None if reference == implementation else reference)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _close(self) -> None:
        self._open = False

    def stream(self, input_ids: torch.Tensor, sink: Sink) -> None:
        """Run one batch and hand every tensor to ``sink`` as it appears.

        Nothing is kept, so memory is that of the bare forward pass. Sequences of unequal
        length are padded on the right with any token: attention is causal, so no token
        sees the padding, and what the sink receives for padded places means nothing.

        Args:
            input_ids: int64 (batch, token), on any device.
            sink: called once per location and layer, in the order of the computation,
                under ``torch.inference_mode``, with (batch, token, unit …); the layer is
                None where there is none. Tensors have the model's dtype; the norms' scales are
                at least float32, as the norms compute them.

        Raises:
            InvalidInput: the ids have another shape or dtype, are outside the
                vocabulary, or are more than the model has positions; or the context is
                not open.
        """
        if not self._open:
            raise InvalidInput(
                "Nothing is captured outside the context. Write `with Capture(…) as capture:`.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        self._check_input(input_ids)
        self._sink = sink
        try:
            with torch.inference_mode():
                batch = input_ids.to(self._loaded.device)
                if self._needs_head:
                    logits = self._model(batch, use_cache=False).logits
                    sink(ActivationLocationType.LOGITS, None, logits)
                else:
                    self._model.base_model(batch, use_cache=False)
        finally:
            self._sink = None

    def run(
        self, input_ids: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> dict[ActivationLocationType, list[torch.Tensor]]:
        """Run one batch and keep everything.

        Args:
            input_ids: int64 (batch, token), padded on the right.
            lengths: true length of each sequence; all of them full when None.

        Returns:
            Location -> one tensor per layer (one in all for a location without layers),
            each (batch, token, unit …) and contiguous; NaN past a sequence's length.

        Raises:
            InvalidInput: as ``stream``, or the lengths do not fit.
        """
        self._check_input(input_ids)
        rows, width = input_ids.shape
        if lengths is not None and (
            len(lengths) != rows or not all(1 <= length <= width for length in lengths)
        ):
            raise InvalidInput(
                f"lengths {list(lengths)} do not fit ids of shape ({rows}, {width}): "
                "give one length of 1 or more per row.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        found: dict[ActivationLocationType, list[torch.Tensor]] = {
            location: [] for location in self.locations
        }

        def keep(location: ActivationLocationType, _: int | None, tensor: torch.Tensor) -> None:
            copy = tensor.clone(memory_format=torch.contiguous_format)
            for row, length in enumerate(lengths or ()):
                copy[row, length:] = torch.nan
            found[location].append(copy)

        self.stream(input_ids, keep)
        return found

    def _install(self, stack: ExitStack) -> str:
        handlers = {
            (location, layer): self._emitter(location, layer)
            for location in self.locations
            for layer in (
                range(self._loaded.dimensions.n_layers) if location.has_layers else (None,)
            )
        }
        return stack.enter_context(handled(self._loaded, handlers))

    def _emitter(self, location: ActivationLocationType, layer: int | None) -> Handler:
        def emit(tensor: torch.Tensor) -> None:
            if self._sink is not None:
                self._sink(location, layer, tensor)

        return emit

    def _check_input(self, input_ids: torch.Tensor) -> None:
        dimensions = self._loaded.dimensions
        if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or not input_ids.numel():
            raise InvalidInput(
                f"Token ids of shape {tuple(input_ids.shape)} and {input_ids.dtype}: "
                "a batch is int64 (batch, token), and not empty.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if input_ids.shape[1] > dimensions.n_positions:
            raise InvalidInput(
                f"A batch of {input_ids.shape[1]} tokens is longer than the model's "
                f"{dimensions.n_positions} positions. Use a smaller context.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        # On a GPU an id outside the vocabulary would end the process's use of the device.
        least, greatest = (int(bound) for bound in torch.aminmax(input_ids))
        if least < 0 or greatest >= dimensions.vocabulary_size:
            raise InvalidInput(
                f"Token id {least if least < 0 else greatest} is outside the vocabulary of "
                f"{dimensions.vocabulary_size}. Tokenise with this model's own tokenizer.",
                kind=ErrorKind.TOKEN_OUT_OF_VOCABULARY,
            )

    def _check_batches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two batches that differ in their last token only."""
        dimensions = self._loaded.dimensions
        shape = (_CHECKED_ROWS, min(_CHECKED_TOKENS, dimensions.n_positions))
        generator = torch.Generator().manual_seed(0)
        first = torch.randint(dimensions.vocabulary_size, shape, generator=generator)
        second = first.clone()
        second[:, -1] = (first[:, -1] + 1) % dimensions.vocabulary_size
        return first, second

    @torch.inference_mode()
    def _check_logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (batch.to(self._loaded.device) for batch in self._check_batches())
        return (
            self._model(first, use_cache=False).logits,
            self._model(second, use_cache=False).logits,
        )

    def _check(self, bare: tuple[torch.Tensor, torch.Tensor], reference: str | None) -> None:
        """Compare the hooked model with the bare one, and what the hooks see with the table.

        Args:
            bare: logits of the two batches before the hooks.
            reference: the stock attention implementation to equal bit by bit; None: the
                model's own, which computed ``bare``.
        """
        self._require_finite(bare)
        hooked = self._check_logits()
        dtype = self._loaded.dtype
        if self._loaded.architecture.softmax_in_float32 and dtype is torch.float64:
            # The stepwise function rounds probabilities that fused kernels do not.
            dtype = torch.float32
        allowed = _TOLERANCE[dtype] * float(bare[0].abs().max())
        difference = _distance(bare[0], hooked[0])
        if not difference <= allowed:
            raise _mismatch(f"its logits change by {difference:.3g} (allowed: {allowed:.3g})")
        stock = bare
        if reference is not None:
            with switched_to(self._model, reference):
                stock = self._check_logits()
        # A device that does not repeat itself cannot be held to the bit, only to the tolerance.
        if not torch.equal(stock[0], hooked[0]) and torch.equal(hooked[0], self._check_logits()[0]):
            raise _mismatch(
                f"its logits differ by {_distance(stock[0], hooked[0]):.3g} from those of "
                f"transformers' {reference or 'own'} attention, and should be equal bit by bit"
            )
        leak = _distance(hooked[0][:, :-1], hooked[1][:, :-1])
        if not leak <= _distance(bare[0][:, :-1], bare[1][:, :-1]) <= allowed:
            raise _mismatch(f"a later token changes the logits before it by {leak:.3g}")
        self._check_seen()

    def _require_finite(self, bare: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Stop at a model whose own logits are not numbers: NaN would equal nothing, itself included."""
        if all(bool(logits.isfinite().all()) for logits in bare):
            return
        broken = [
            name
            for name, weight in self._model.named_parameters()
            if not bool(weight.isfinite().all())
        ]
        cause = (
            f"its weights {', '.join(broken[:3])} hold NaN or infinite values"
            if broken
            else f"its weights are finite, so {self._loaded.dtype} is too narrow for them"
        )
        raise IngestStopped(
            f"The bare model's own logits are not finite: {cause}. Nothing was stored; download "
            "or save the model again, or load it in a wider dtype.",
            kind=ErrorKind.NUMERIC_OVERFLOW,
        )

    def _check_seen(self) -> None:
        batch, _ = self._check_batches()
        rows, width = batch.shape
        seen: dict[tuple[ActivationLocationType, int | None], list[tuple[int, ...]]] = {}

        def note(location: ActivationLocationType, layer: int | None, tensor: torch.Tensor) -> None:
            seen.setdefault((location, layer), []).append(tuple(tensor.shape))

        self.stream(batch, note)
        dimensions = self._loaded.dimensions
        for location in self.locations:
            expected = [(rows, width, *dimensions.unit_shape(location, attended=width))]
            for layer in range(dimensions.n_layers) if location.has_layers else (None,):
                found = seen.get((location, layer), [])
                if found != expected:
                    raise _mismatch(f"{location} of layer {layer} is {found}, not {expected}")


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def _mismatch(what: str) -> IngestStopped:
    return IngestStopped(
        f"The model does not compute the same under capture: {what}. Nothing was stored; use a "
        "transformers version that actstore supports, and a model without patches of its own.",
        kind=ErrorKind.CAPTURE_MISMATCH,
    )
