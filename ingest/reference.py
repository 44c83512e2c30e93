"""The same activations by plain mathematics, to check what the hooks saw.

Nothing here touches the model's modules: every location is computed in float64 from the
weights as the store reads them, one sequence length at a time and without padding. What
hooks, batching, padding, casts and the weight table could get wrong shows as a
difference. Formulas: spec/derived_scalars.md a.5 for GPT-2's blocks; the other families
as their forward passes in transformers compute them.

In float64 all locations of one long sequence are gigabytes, so they are handed on one by
one; no more than one layer of them is held here. So it is with the gradients: forwards,
the residual stream between the layers is kept, and backwards each layer is computed again
and differentiated alone.
"""

from collections.abc import Callable, Container
from functools import partial

import torch

from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import Columns, Objective
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.dimensions import NormKind
from actstore.store.model.weights import ModelWeights
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = [
    "Sink",
    "independent_forward",
    "stream_independent_forward",
    "stream_independent_gradients",
]

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
    read = _Reader(loaded.weights(), loaded.device, dtype)

    def give(location: ActivationLocationType, layer: int | None, tensor: torch.Tensor) -> None:
        if location in locations:
            sink(location, layer, tensor)

    stream = _embedded(loaded, read, input_ids)
    give(ActivationLocationType.RESID_POST_EMBEDDING, None, stream)
    for layer in range(loaded.dimensions.n_layers):
        stream = _block(loaded, read, layer, stream, give)
    logits = _logits(loaded, read, stream, give, ActivationLocationType.LOGITS in locations)
    if logits is not None:
        sink(ActivationLocationType.LOGITS, None, logits)


def stream_independent_gradients(
    loaded: LoadedModel,
    input_ids: torch.Tensor,
    objective: Objective,
    columns: Columns | None,
    sink: Sink,
    *,
    locations: Container[ActivationLocationType],
    dtype: torch.dtype = torch.float64,
) -> None:
    """Differentiate an objective by plain mathematics and hand each gradient on at once.

    Args:
        loaded: the model; only its weights and sizes are used.
        input_ids: int64 (batch, token), no padding.
        objective: what is differentiated, summed over the batch.
        columns: each sequence's targets, where the objective reads columns.
        sink: takes each gradient, from the last layer to the first.
        locations: those whose gradients the sink is given.
        dtype: what to compute in.

    Raises:
        InvalidInput: the sequences are longer than the model's context, or a target is
            missing.
    """
    read = _Reader(loaded.weights(), loaded.device, dtype)

    def watch(location: ActivationLocationType, layer: int | None, tensor: torch.Tensor) -> None:
        if location in locations:
            tensor.register_hook(partial(sink, location, layer))  # type: ignore[no-untyped-call]

    streams = [_embedded(loaded, read, input_ids)]
    for layer in range(loaded.dimensions.n_layers):
        streams.append(_block(loaded, read, layer, streams[-1], _no_sink))
    with torch.enable_grad():
        leaf = streams.pop().detach().requires_grad_(True)
        logits = _logits(loaded, read, leaf, watch, True)
        assert logits is not None, "they were asked for"
        watch(ActivationLocationType.LOGITS, None, logits)
        lengths = [input_ids.shape[1]] * len(input_ids)
        value = objective(logits, input_ids.to(loaded.device), lengths, columns).sum()
        del logits
        (gradient,) = torch.autograd.grad(value, leaf)
        for layer in reversed(range(loaded.dimensions.n_layers)):
            leaf = streams.pop().detach().requires_grad_(True)
            after = _block(loaded, read, layer, leaf, watch)
            (gradient,) = torch.autograd.grad(after, leaf, gradient)
    if ActivationLocationType.RESID_POST_EMBEDDING in locations:
        sink(ActivationLocationType.RESID_POST_EMBEDDING, None, gradient)


def _no_sink(location: ActivationLocationType, layer: int | None, tensor: torch.Tensor) -> None:
    """Keep nothing."""


def _embedded(loaded: LoadedModel, read: "_Reader", input_ids: torch.Tensor) -> torch.Tensor:
    tokens = input_ids.shape[1]
    if tokens > loaded.dimensions.n_positions:
        raise InvalidInput(
            f"{tokens} tokens are more than the model's {loaded.dimensions.n_positions} positions. "
            "Use shorter sequences.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    stream = read(WeightLocationType.EMBEDDING)[input_ids.to(loaded.device)]
    if WeightLocationType.POSITION_EMBEDDING in loaded.architecture.weights:
        return stream + read(WeightLocationType.POSITION_EMBEDDING)[:tokens]
    if not loaded.architecture.scales_embedding:
        return stream
    # The model rounds the product once more, to the dtype it runs in.
    return (stream * loaded.dimensions.embedding_scale).to(loaded.dtype).to(stream.dtype)


def _logits(
    loaded: LoadedModel, read: "_Reader", stream: torch.Tensor, give: Sink, is_wanted: bool
) -> torch.Tensor | None:
    normed, scale = read.norm(
        stream, WeightLocationType.LAYER_NORM_GAIN_FINAL, WeightLocationType.LAYER_NORM_BIAS_FINAL
    )
    give(ActivationLocationType.RESID_FINAL_LAYER_NORM_SCALE, None, scale)
    if not is_wanted:
        return None
    return _capped(normed @ read(WeightLocationType.UNEMBEDDING), loaded.dimensions.logit_cap)


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

    def norm(
        self,
        values: torch.Tensor,
        gain: WeightLocationType,
        bias: WeightLocationType | None,
        layer: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A norm's output and its denominator."""
        dimensions = self._weights.dimensions
        centred = values
        if dimensions.norm is NormKind.LAYER_NORM:
            centred = values - values.mean(dim=-1, keepdim=True)
        square = (centred * centred).mean(dim=-1, keepdim=True)
        scale = torch.sqrt(square + dimensions.layer_norm_epsilon)
        normed = centred / scale * self(gain, layer)
        if bias is not None and dimensions.norm is NormKind.LAYER_NORM:
            normed = normed + self(bias, layer)
        return normed, scale


def _block(
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, give: Sink
) -> torch.Tensor:
    location = ActivationLocationType
    written = _attention(loaded, read, layer, stream, give)
    give(location.RESID_DELTA_ATTN, layer, written)
    after = stream + written
    if loaded.dimensions.is_parallel:
        delta = _mlp(loaded, read, layer, stream, give)
    else:
        give(location.RESID_POST_ATTN, layer, after)
        delta = _mlp(loaded, read, layer, after, give)
    give(location.RESID_DELTA_MLP, layer, delta)
    after = after + delta
    give(location.RESID_POST_MLP, layer, after)
    return after


def _attention(
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, give: Sink
) -> torch.Tensor:
    location, weight = ActivationLocationType, WeightLocationType
    dimensions = loaded.dimensions
    normed, scale = read.norm(
        stream, weight.LAYER_NORM_GAIN_PRE_ATTN, weight.LAYER_NORM_BIAS_PRE_ATTN, layer
    )
    give(location.ATTN_INPUT_LAYER_NORM_SCALE, layer, scale)
    query, key, value = (
        torch.einsum("btd,hdc->bthc", normed, read(maps, layer)) + read.bias(place, layer)
        for maps, place in (
            (weight.ATTN_TO_QUERY, location.ATTN_QUERY),
            (weight.ATTN_TO_KEY, location.ATTN_KEY),
            (weight.ATTN_TO_VALUE, location.ATTN_VALUE),
        )
    )
    if dimensions.has_query_key_norms:
        query, _ = read.norm(query, weight.QUERY_NORM_GAIN, None, layer)
        key, _ = read.norm(key, weight.KEY_NORM_GAIN, None, layer)
    rotary = dimensions.rotary_at(layer)
    if rotary is not None:
        cosine, sine = rotary.turns(torch.arange(stream.shape[1]), dimensions.run_dtype)
        pairs = rotary.channels // 2
        turn = torch.complex(cosine[:, :pairs], sine[:, :pairs]).to(stream.device)
        query, key = _turned(query, turn), _turned(key, turn)
    for place, tensor in (
        (location.ATTN_QUERY, query),
        (location.ATTN_KEY, key),
        (location.ATTN_VALUE, value),
    ):
        give(place, layer, tensor)
    # Query heads in groups that share a head of keys and values.
    heads = (dimensions.kv_heads, -1)
    groups = query.reshape(*query.shape[:2], *heads, dimensions.d_head)
    scores = torch.einsum("btkgc,bukc->btkgu", groups, key).flatten(2, 3)
    # In place: scores grow with the square of the tokens, and every copy of them counts.
    scores *= dimensions.attention_scaling(layer)
    scores = _capped(scores, dimensions.score_cap)
    tokens = torch.arange(stream.shape[1], device=stream.device)
    distance = tokens[:, None] - tokens[None, :]
    window = dimensions.window_at(layer)
    unseen = (distance < 0) | (distance >= (len(tokens) if window is None else window))
    scores.masked_fill_(unseen[:, None, :], -torch.inf)
    give(location.ATTN_QK_LOGITS, layer, scores)
    pattern = torch.softmax(scores, dim=-1)
    del scores
    give(location.ATTN_QK_PROBS, layer, pattern)
    shared = pattern.reshape(*query.shape[:2], *heads, len(tokens))
    weighted = torch.einsum("btkgu,bukc->btkgc", shared, value).flatten(2, 3)
    del pattern, shared
    give(location.ATTN_WEIGHTED_SUM_OF_VALUES, layer, weighted)
    delta = torch.einsum("bthc,hcd->btd", weighted, read(weight.ATTN_TO_RESIDUAL, layer))
    delta = delta + read(weight.ATTN_OUTPUT_BIAS, layer)
    if dimensions.has_post_norms:
        delta, scale = read.norm(delta, weight.LAYER_NORM_GAIN_POST_ATTN, None, layer)
        give(location.ATTN_OUTPUT_LAYER_NORM_SCALE, layer, scale)
    return delta


def _mlp(
    loaded: LoadedModel, read: _Reader, layer: int, stream: torch.Tensor, give: Sink
) -> torch.Tensor:
    location, weight = ActivationLocationType, WeightLocationType
    normed, scale = read.norm(
        stream, weight.LAYER_NORM_GAIN_PRE_MLP, weight.LAYER_NORM_BIAS_PRE_MLP, layer
    )
    before = normed @ read(weight.MLP_TO_HIDDEN, layer) + read(weight.MLP_HIDDEN_BIAS, layer)
    give(location.MLP_INPUT_LAYER_NORM_SCALE, layer, scale)
    give(location.MLP_PRE_ACT, layer, before)
    hidden = _ACTIVATIONS[loaded.dimensions.activation_function](before)
    if loaded.dimensions.is_gated:
        linear = normed @ read(weight.MLP_TO_HIDDEN_LINEAR, layer)
        linear = linear + read(weight.MLP_HIDDEN_LINEAR_BIAS, layer)
        give(location.MLP_PRE_LINEAR, layer, linear)
        hidden = hidden * linear
    give(location.MLP_POST_ACT, layer, hidden)
    delta = hidden @ read(weight.MLP_TO_RESIDUAL, layer) + read(weight.MLP_OUTPUT_BIAS, layer)
    if loaded.dimensions.has_post_norms:
        delta, scale = read.norm(delta, weight.LAYER_NORM_GAIN_POST_MLP, None, layer)
        give(location.MLP_OUTPUT_LAYER_NORM_SCALE, layer, scale)
    return delta


def _turned(heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate ``(batch, token, head, channel)``: channel i and i + pairs are one complex number."""
    pairs = turn.shape[-1]
    first, second, still = (
        heads[..., :pairs],
        heads[..., pairs : 2 * pairs],
        heads[..., 2 * pairs :],
    )
    product = torch.complex(first, second) * turn[:, None, :].to(torch.complex(first, second))
    return torch.cat((product.real, product.imag, still), dim=-1)


def _capped(values: torch.Tensor, cap: float | None) -> torch.Tensor:
    return values if cap is None else torch.tanh(values / cap) * cap


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
}
