"""The same activations by plain mathematics, to check what the hooks saw.

Nothing here touches the model's modules: every location is computed in float64 from the
weights as the store reads them, one sequence length at a time and without padding. What
hooks, batching, padding, casts and the weight table could get wrong shows as a
difference. Formulas: spec/derived_scalars.md a.5 (GPT-2 pre-norm blocks).

In float64 all locations of one long sequence are gigabytes, so they are handed on one by
one; no more than one layer of them is held here.
"""

from collections.abc import Callable, Container

import torch

from actstore.ingest.model import LoadedModel
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.weights import ModelWeights
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = ["Sink", "independent_forward", "stream_independent_forward"]

Sink = Callable[[ActivationLocationType, int | None, torch.Tensor], None]
"""Takes a location, its layer (None outside the blocks) and (batch, token, unit …)."""


def independent_forward(
    loaded: LoadedModel, input_ids: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> dict[ActivationLocationType, list[torch.Tensor]]:
    """Compute every location of a batch of equally long sequences, and keep them all.

    Args:
        loaded: the model; only its weights and sizes are used.
        input_ids: int64 (batch, token), no padding.
        dtype: what to compute in.

    Returns:
        Location -> one tensor per layer (one in all for a location without layers), each
        (batch, token, unit …), as ``Capture.run``.

    Raises:
        InvalidInput: the sequences are longer than the model's context.
    """
    found: dict[ActivationLocationType, list[torch.Tensor]] = {
        location: [] for location in loaded.architecture.taps
    }

    def keep(location: ActivationLocationType, _: int | None, tensor: torch.Tensor) -> None:
        found[location].append(tensor)

    stream_independent_forward(loaded, input_ids, keep, locations=found, dtype=dtype)
    return found


def stream_independent_forward(
    loaded: LoadedModel,
    input_ids: torch.Tensor,
    sink: Sink,
    *,
    locations: Container[ActivationLocationType],
    dtype: torch.dtype = torch.float64,
) -> None:
    """Compute locations of a batch of equally long sequences and hand each on at once.

    Args:
        loaded: the model; only its weights and sizes are used.
        input_ids: int64 (batch, token), no padding.
        sink: takes each tensor, in the order of the forward pass.
        locations: those that the sink is given.
        dtype: what to compute in.

    Raises:
        InvalidInput: the sequences are longer than the model's context.
    """
    dimensions = loaded.dimensions
    tokens = input_ids.shape[1]
    if tokens > dimensions.n_positions:
        raise InvalidInput(
            f"{tokens} tokens are more than the model's {dimensions.n_positions} positions. "
            "Use shorter sequences.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    read = _Reader(loaded.weights(), loaded.device, dtype)
    ids = input_ids.to(loaded.device)

    def give(location: ActivationLocationType, layer: int | None, tensor: torch.Tensor) -> None:
        if location in locations:
            sink(location, layer, tensor)

    stream = read(WeightLocationType.EMBEDDING)[ids]
    stream = stream + read(WeightLocationType.POSITION_EMBEDDING)[:tokens]
    give(ActivationLocationType.RESID_POST_EMBEDDING, None, stream)
    for layer in range(dimensions.n_layers):
        stream = _attention(loaded, read, layer, stream, give)
        stream = _mlp(loaded, read, layer, stream, give)
    normed, scale = _norm(
        stream,
        read(WeightLocationType.LAYER_NORM_GAIN_FINAL),
        read(WeightLocationType.LAYER_NORM_BIAS_FINAL),
        dimensions.layer_norm_epsilon,
    )
    give(ActivationLocationType.RESID_FINAL_LAYER_NORM_SCALE, None, scale)
    if ActivationLocationType.LOGITS in locations:
        sink(ActivationLocationType.LOGITS, None, normed @ read(WeightLocationType.UNEMBEDDING))


class _Reader:
    """Weights as torch tensors."""

    def __init__(self, weights: ModelWeights, device: torch.device, dtype: torch.dtype) -> None:
        self._weights = weights
        self._device = device
        self._dtype = dtype

    def __call__(self, location: WeightLocationType, layer: int | None = None) -> torch.Tensor:
        weight = torch.from_numpy(self._weights.weight(location, layer))
        return weight.to(self._device, self._dtype)

    def bias(self, location: ActivationLocationType, layer: int) -> torch.Tensor:
        bias = torch.from_numpy(self._weights.attention_bias(location, layer))
        return bias.to(self._device, self._dtype)


def _attention(
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, give: Sink
) -> torch.Tensor:
    location, weight = ActivationLocationType, WeightLocationType
    normed, scale = _norm(
        stream,
        read(weight.LAYER_NORM_GAIN_PRE_ATTN, layer),
        read(weight.LAYER_NORM_BIAS_PRE_ATTN, layer),
        loaded.dimensions.layer_norm_epsilon,
    )
    query, key, value = (
        torch.einsum("btd,hdc->bthc", normed, read(maps, layer)) + read.bias(place, layer)
        for maps, place in (
            (weight.ATTN_TO_QUERY, location.ATTN_QUERY),
            (weight.ATTN_TO_KEY, location.ATTN_KEY),
            (weight.ATTN_TO_VALUE, location.ATTN_VALUE),
        )
    )
    for place, tensor in (
        (location.ATTN_INPUT_LAYER_NORM_SCALE, scale),
        (location.ATTN_QUERY, query),
        (location.ATTN_KEY, key),
        (location.ATTN_VALUE, value),
    ):
        give(place, layer, tensor)
    # In place: scores grow with the square of the tokens, and every copy of them counts.
    scores = torch.einsum("bthc,buhc->bthu", query, key)
    scores *= loaded.dimensions.attention_scaling(layer)
    tokens = torch.arange(stream.shape[1], device=stream.device)
    later = tokens[None, :] > tokens[:, None]
    scores.masked_fill_(later[:, None, :], -torch.inf)
    give(location.ATTN_QK_LOGITS, layer, scores)
    pattern = torch.softmax(scores, dim=-1)
    del scores
    give(location.ATTN_QK_PROBS, layer, pattern)
    weighted = torch.einsum("bthu,buhc->bthc", pattern, value)
    del pattern
    delta = torch.einsum("bthc,hcd->btd", weighted, read(weight.ATTN_TO_RESIDUAL, layer))
    delta = delta + read(weight.ATTN_OUTPUT_BIAS, layer)
    after = stream + delta
    for place, tensor in (
        (location.ATTN_WEIGHTED_SUM_OF_VALUES, weighted),
        (location.RESID_DELTA_ATTN, delta),
        (location.RESID_POST_ATTN, after),
    ):
        give(place, layer, tensor)
    return after


def _mlp(
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, give: Sink
) -> torch.Tensor:
    location, weight = ActivationLocationType, WeightLocationType
    normed, scale = _norm(
        stream,
        read(weight.LAYER_NORM_GAIN_PRE_MLP, layer),
        read(weight.LAYER_NORM_BIAS_PRE_MLP, layer),
        loaded.dimensions.layer_norm_epsilon,
    )
    before = normed @ read(weight.MLP_TO_HIDDEN, layer) + read(weight.MLP_HIDDEN_BIAS, layer)
    hidden = _ACTIVATIONS[loaded.dimensions.activation_function](before)
    delta = hidden @ read(weight.MLP_TO_RESIDUAL, layer) + read(weight.MLP_OUTPUT_BIAS, layer)
    after = stream + delta
    for place, tensor in (
        (location.MLP_INPUT_LAYER_NORM_SCALE, scale),
        (location.MLP_PRE_ACT, before),
        (location.MLP_POST_ACT, hidden),
        (location.RESID_DELTA_MLP, delta),
        (location.RESID_POST_MLP, after),
    ):
        give(place, layer, tensor)
    return after


def _norm(
    stream: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    centred = stream - stream.mean(dim=-1, keepdim=True)
    scale = torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + epsilon)
    return centred / scale * gain + bias, scale


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
}
