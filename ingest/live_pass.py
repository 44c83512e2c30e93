"""A fresh forward and backward pass over prompts.

The model runs once over a right-padded batch, with handlers at every place that is
recorded, ablated or spliced; the sum of the sequences' objectives is differentiated once.
No parameter takes a gradient: the residual stream before the first block is the only leaf.
Rules: spec/derived_scalars.md a.5, (f), (g), h.3, h.4.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import index
from types import MappingProxyType
from weakref import WeakSet

import torch
from torch import nn

from actstore.ingest.ablations import Ablations, unknown_location
from actstore.ingest.capture import Capture
from actstore.ingest.hooks import Place, evaluating, exclusively, frozen, handled
from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import Columns, Objective
from actstore.ingest.splicing import Splice, splices_of
from actstore.ingest.traces import Trace
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.nodes import Ablation, TraceConfig
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["LivePass", "RecordedPlace", "run_pass"]

RecordedPlace = tuple[ActivationLocationType, PassType, int | None]
"""A location, whether its values or their gradient, and the layer (None outside the blocks)."""

_L = ActivationLocationType
_PADDING = 0
_verified: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class LivePass:
    """What one prompt's pass gave.

    Attributes:
        token_ids: the prompt.
        values: place -> (token, *unit axes), detached, on the model's device and in its dtype
            (scales of norms and latents at least float32). Axes are in stored order, pairs
            (token, head, attended); scores are minus infinity, and their gradient 0, above
            the diagonal. A gradient is there for every place upstream of the objective.
        objective_value: the objective, or the traced activation; None without a backward pass.

    Raises:
        InvalidInput: a tensor is not of as many tokens as the prompt.
    """

    token_ids: tuple[int, ...]
    values: Mapping[RecordedPlace, torch.Tensor]
    objective_value: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        for (location, pass_type, layer), tensor in self.values.items():
            if tensor.ndim != 1 + len(location.axes) or len(tensor) != len(self.token_ids):
                raise _invalid(
                    f"{location} ({pass_type}) of layer {layer} has shape {tuple(tensor.shape)} "
                    f"for a prompt of {len(self.token_ids)} tokens. Pass (token, unit …)."
                )


def run_pass(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    *,
    objective: Objective | None = None,
    trace: TraceConfig | None = None,
    ablations: Iterable[Ablation] = (),
    autoencoders: Autoencoders | None = None,
    columns: Columns | None = None,
    locations: Iterable[ActivationLocationType] | None = None,
) -> list[LivePass]:
    """Run a model over prompts, forward and, with an objective or a trace, backward.

    Args:
        loaded: the model; as before afterwards, also after an error.
        token_ids: the prompts, of any lengths; they run as one batch.
        objective: what is differentiated; the gradients of different prompts do not mix.
        trace: a node whose activation is differentiated instead. With an objective, only a
            trace through V without a downstream trace.
        ablations: values and gradients that are set to constants, in every prompt.
        autoencoders: spliced into the pass; all of them.
        columns: the caller's own values of each prompt, for objectives that ask for some.
        locations: what is recorded; everything there is when None.

    Returns:
        One pass per prompt, in order.

    Raises:
        InvalidInput: a prompt is empty, too long, or not of the vocabulary; a location, node,
            or ablation is not of this model and these prompts; arguments exclude each other.
        Unavailable: the traced node is a latent, and its autoencoder is not given.
        IngestStopped: the model does not run under hooks as it does without.
    """
    # A caller's inference mode would leave nothing to differentiate.
    with torch.inference_mode(False):
        batch, lengths = _batch(loaded, token_ids)
        if columns is not None and len(columns) != len(lengths):
            raise _invalid(f"{len(columns)} columns for {len(lengths)} prompts. Give one each.")
        family = Autoencoders() if autoencoders is None else autoencoders
        splices = splices_of(loaded, family)
        settings = Ablations(ablations, loaded, splices, lengths)
        traced = None
        if trace is not None:
            traced = Trace(trace, loaded, splices, family, objective, lengths)
        elif objective is None and settings.places(PassType.BACKWARD):
            raise _invalid(
                "A gradient is ablated, and no backward pass runs. Pass an objective or a trace."
            )
        wanted = _wanted(loaded, splices, locations)
        _verify(loaded)
        run = _Run(loaded, splices, settings, wanted, traced)
        objectives = run.objectives(batch, lengths, objective, columns)
        return run.passes(token_ids, objectives)


class _Run:
    """One run of the model: what stands at its places, and what has been seen there."""

    def __init__(
        self,
        loaded: LoadedModel,
        splices: Mapping[Place, Splice],
        ablations: Ablations,
        wanted: set[ActivationLocationType],
        trace: Trace | None,
    ) -> None:
        self._loaded = loaded
        self._splices = splices
        self._ablations = ablations
        self._wanted = wanted
        self._shifted = {
            layer: (_L.RESID_POST_ATTN, layer)
            for location, layer in ablations.places(PassType.FORWARD)
            if location is _L.RESID_POST_ATTN
        }
        self._trace = trace
        self._kept = set() if trace is None else trace.places
        self._kept |= {_stream_before(layer) for layer in self._shifted}
        self._residuals: dict[Place, torch.Tensor] = {}
        self._seen: dict[RecordedPlace, torch.Tensor] = {}
        self._leaf: torch.Tensor | None = None

    def objectives(
        self,
        batch: torch.Tensor,
        lengths: Sequence[int],
        objective: Objective | None,
        columns: Columns | None,
    ) -> torch.Tensor | None:
        """Run the model and differentiate; what was differentiated, (batch,)."""
        is_differentiated = self._trace is not None or objective is not None
        with (
            self._released(),
            exclusively(self._loaded.model),
            evaluating(self._loaded.model),
            frozen(self._loaded.model),
            torch.set_grad_enabled(is_differentiated),
        ):
            logits = self._forward(batch, needs_logits=objective is not None)
            if self._trace is not None:
                values = self._traced(self._trace, batch, lengths, columns)
            elif objective is not None:
                assert logits is not None, "they were asked for"
                values = objective(logits, batch, lengths, columns)
            else:
                return None
            self._backward(values)
            return values

    @contextmanager
    def _released(self) -> Iterator[None]:
        try:
            yield
        finally:
            # Their graph holds hooks, and those this run: a ring that nobody would collect.
            self._residuals.clear()
            self._leaf = None

    def _forward(self, batch: torch.Tensor, *, needs_logits: bool) -> torch.Tensor | None:
        model = self._loaded.model
        places = self._places()
        handlers = {
            place: partial(self._handle, place) for place in sorted(places, key=_place_order)
        }
        with handled(self._loaded, handlers):
            if needs_logits or (_L.LOGITS, None) in places:
                return self._observe(((_L.LOGITS, None),), model(batch, use_cache=False).logits)
            model.base_model(batch, use_cache=False)
            return None

    def _traced(
        self,
        trace: Trace,
        batch: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        return torch.stack(
            [
                trace.objective(
                    {place: tensor[row, :length] for place, tensor in self._residuals.items()},
                    batch[row, :length],
                    None if columns is None else columns[row : row + 1],
                )
                for row, length in enumerate(lengths)
            ]
        )

    def _backward(self, objectives: torch.Tensor) -> None:
        if not objectives.requires_grad:
            raise _invalid("The objective does not depend on the logits. Pass one that does.")
        assert self._leaf is not None, "the stream before the first block is always handled"
        torch.autograd.grad(objectives.sum(), self._leaf, allow_unused=True)

    def passes(
        self, token_ids: Sequence[Sequence[int]], objectives: torch.Tensor | None
    ) -> list[LivePass]:
        """What was seen, cut into prompts."""
        found = None if objectives is None else objectives.detach().tolist()
        return [
            LivePass(
                tuple(int(token) for token in prompt),
                {
                    place: _cut(place[0], tensor[row], len(prompt))
                    for place, tensor in sorted(self._seen.items(), key=_order)
                },
                None if found is None else found[row],
            )
            for row, prompt in enumerate(token_ids)
        ]

    def _places(self) -> set[Place]:
        dimensions = self._loaded.dimensions
        recorded = {
            (location, layer)
            for location in self._wanted
            for layer in (range(dimensions.n_layers) if location.has_layers else (None,))
        }
        ablated = self._ablations.places(PassType.FORWARD)
        ablated |= self._ablations.places(PassType.BACKWARD)
        shifting = {(_L.RESID_DELTA_ATTN, layer) for layer in self._shifted}
        start: set[Place] = {(_L.RESID_POST_EMBEDDING, None)}
        every = recorded | ablated | shifting | start | self._kept | self._splices.keys()
        return {place for place in every if not place[0].is_online}

    def _handle(self, place: Place, tensor: torch.Tensor) -> torch.Tensor | None:
        location, layer = place
        if location is _L.RESID_POST_EMBEDDING and torch.is_grad_enabled():
            self._leaf = tensor.detach().requires_grad_()
            result = self._leaf.view_as(self._leaf)
        else:
            result = tensor
        result = self._observe((place,), result)
        if place in self._kept:
            self._residuals[place] = result
        if location is _L.RESID_POST_ATTN:
            return None
        if place in self._splices:
            result = self._splices[place](result, self._observe)
        if location is _L.RESID_DELTA_ATTN and layer in self._shifted:
            before = self._residuals[_stream_before(layer)]
            result = self._ablations.shifted(self._shifted[layer], before, result)
        # Without a graph the model's own tensors, and its own arithmetic in norms, stay.
        return result if torch.is_grad_enabled() or result is not tensor else None

    def _observe(self, places: tuple[Place, ...], tensor: torch.Tensor) -> torch.Tensor:
        location, _ = places[0]
        # After attention only the norm can be given another tensor; see `_shifted`.
        if location is not _L.RESID_POST_ATTN:
            tensor = self._ablations.apply(places[0], PassType.FORWARD, tensor)
        for name, layer in places:
            if name in self._wanted:
                self._seen[name, PassType.FORWARD, layer] = tensor.detach()
        if tensor.requires_grad:
            tensor.register_hook(partial(self._differentiate, places))  # type: ignore[no-untyped-call]
        return tensor

    def _differentiate(
        self, places: tuple[Place, ...], gradient: torch.Tensor
    ) -> torch.Tensor | None:
        for name, layer in places:
            if name in self._wanted:
                self._seen[name, PassType.BACKWARD, layer] = gradient.detach()
        ablated = self._ablations.apply(places[0], PassType.BACKWARD, gradient)
        return None if ablated is gradient else ablated


def _stream_before(layer: int | None) -> Place:
    """The residual stream that a block reads."""
    return (_L.RESID_POST_MLP, layer - 1) if layer else (_L.RESID_POST_EMBEDDING, None)


_NUMBERS = {location: number for number, location in enumerate(_L)}


def _place_order(place: Place) -> tuple[int, int]:
    return _NUMBERS[place[0]], -1 if place[1] is None else place[1]


def _order(entry: tuple[RecordedPlace, torch.Tensor]) -> tuple[int, bool, int]:
    (location, pass_type, layer), _ = entry
    number, where = _place_order((location, layer))
    return number, pass_type is PassType.BACKWARD, where


def _cut(location: ActivationLocationType, tensor: torch.Tensor, length: int) -> torch.Tensor:
    rows = tensor[:length, ..., :length] if location.is_pair_shaped else tensor[:length]
    return rows.contiguous()


def _wanted(
    loaded: LoadedModel,
    splices: Mapping[Place, Splice],
    locations: Iterable[ActivationLocationType] | None,
) -> set[ActivationLocationType]:
    present = set(loaded.architecture.taps)
    for splice in splices.values():
        present |= {name for name, _ in (*splice.latents, splice.error)}
    if locations is None:
        return present
    wanted = set(locations)
    for location in _L:
        if location in wanted - present:
            raise unknown_location(location, present, loaded)
    return wanted


def _verify(loaded: LoadedModel) -> None:
    """Once per model, compare it under hooks with itself, and see that attention is causal."""
    if loaded.model not in _verified:
        with Capture(loaded, loaded.architecture.taps):
            _verified.add(loaded.model)


def _batch(
    loaded: LoadedModel, token_ids: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[int]]:
    """The prompts as one batch, padded on the right, and their lengths."""
    if not len(token_ids):
        raise _invalid("No prompt is given. Pass at least one.")
    dimensions = loaded.dimensions
    lengths = [len(prompt) for prompt in token_ids]
    for number, (prompt, length) in enumerate(zip(token_ids, lengths, strict=True)):
        if not 1 <= length <= dimensions.n_positions:
            raise _invalid(
                f"Prompt {number} has {length} tokens; the model takes 1 to "
                f"{dimensions.n_positions}. Pass another one."
            )
        for token in prompt:
            _check_token(token, number, dimensions.vocabulary_size)
    batch = torch.full((len(lengths), max(lengths)), _PADDING, dtype=torch.int64)
    for row, prompt in enumerate(token_ids):
        batch[row, : len(prompt)] = torch.tensor([int(token) for token in prompt])
    return batch.to(loaded.device), lengths


def _check_token(token: object, prompt: int, vocabulary_size: int) -> None:
    try:
        number = index(token)  # type: ignore[arg-type]
    except TypeError:
        raise _invalid(
            f"{token!r} of prompt {prompt} is no token id. Tokenise the prompts first."
        ) from None
    if not 0 <= number < vocabulary_size:
        raise InvalidInput(
            f"Token id {number} of prompt {prompt} is outside the vocabulary of "
            f"{vocabulary_size}. Tokenise with this model's own tokenizer.",
            kind=ErrorKind.TOKEN_OUT_OF_VOCABULARY,
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
