"""The same activations by plain mathematics, to check what the hooks saw.

Nothing here touches the model's modules: every location is computed in float64 from the
weights as the store reads them, one sequence length at a time and without padding. What
hooks, batching, padding, casts and the weight table could get wrong shows as a
difference. Formulas: spec/derived_scalars.md a.5 (GPT-2 pre-norm blocks).
"""

from collections.abc import Callable

import torch

from actstore.ingest.model import LoadedModel
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.weights import ModelWeights
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = ["independent_forward"]

_Found = dict[ActivationLocationType, list[torch.Tensor]]


def independent_forward(
    loaded: LoadedModel, input_ids: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> _Found:
    """Compute every location of a batch of equally long sequences.

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
    found: _Found = {location: [] for location in loaded.architecture.taps}
    stream = read(WeightLocationType.EMBEDDING)[ids]
    stream = stream + read(WeightLocationType.POSITION_EMBEDDING)[:tokens]
    found[ActivationLocationType.RESID_POST_EMBEDDING].append(stream)
    for layer in range(dimensions.n_layers):
        stream = _attention(loaded, read, layer, stream, found)
        stream = _mlp(loaded, read, layer, stream, found)
    normed, scale = _norm(
        stream,
        read(WeightLocationType.LAYER_NORM_GAIN_FINAL),
        read(WeightLocationType.LAYER_NORM_BIAS_FINAL),
        dimensions.layer_norm_epsilon,
    )
    found[ActivationLocationType.RESID_FINAL_LAYER_NORM_SCALE].append(scale)
    found[ActivationLocationType.LOGITS].append(normed @ read(WeightLocationType.UNEMBEDDING))
    return found


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
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, found: _Found
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
    scores = torch.einsum("bthc,buhc->bthu", query, key)
    scores = scores * loaded.dimensions.attention_scaling(layer)
    tokens = torch.arange(stream.shape[1], device=stream.device)
    later = tokens[None, :] > tokens[:, None]
    scores = scores.masked_fill(later[:, None, :], -torch.inf)
    pattern = torch.softmax(scores, dim=-1)
    weighted = torch.einsum("bthu,buhc->bthc", pattern, value)
    delta = torch.einsum("bthc,hcd->btd", weighted, read(weight.ATTN_TO_RESIDUAL, layer))
    delta = delta + read(weight.ATTN_OUTPUT_BIAS, layer)
    after = stream + delta
    for place, tensor in (
        (location.ATTN_INPUT_LAYER_NORM_SCALE, scale),
        (location.ATTN_QUERY, query),
        (location.ATTN_KEY, key),
        (location.ATTN_VALUE, value),
        (location.ATTN_QK_LOGITS, scores),
        (location.ATTN_QK_PROBS, pattern),
        (location.ATTN_WEIGHTED_SUM_OF_VALUES, weighted),
        (location.RESID_DELTA_ATTN, delta),
        (location.RESID_POST_ATTN, after),
    ):
        found[place].append(tensor)
    return after


def _mlp(
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, found: _Found
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
        found[place].append(tensor)
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
