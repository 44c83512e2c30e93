"""What must hold of derived scalars whatever the model: sums, products, the chain rule."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt2 import tiny_gpt2

from actstore.ingest.model import load_model
from actstore.prompt import Prompt
from actstore.query.derived import SCALARS
from actstore.query.derived.config import DstConfig
from actstore.store.errors import InvalidInput
from actstore.store.model.autoencoder_functions import Normalisation, ReLU
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.nodes import (
    AttentionTraceType,
    AttnSubNodeIndex,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import ActivationLocationType, NodeType
from actstore.store.vocabulary import WeightLocationType as Weight

L = ActivationLocationType
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One random model and prompt, in float64."""

    prompt: Prompt
    layers: int

    def derive(self, name: str, config: DstConfig | None = None) -> Array:
        return self.prompt.derive(name, dtype="float64", config=config).numpy()


def case(seed: int, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(seed)
    layers, heads = 1 + seed % 3, 1 + seed % 2
    model = tiny_gpt2(seed=seed, dtype=torch.float64, n_layer=layers, n_head=heads)
    loaded = load_model((model, None))
    size = loaded.dimensions.vocabulary_size
    tokens = torch.randint(size, (3 + seed % 7,), generator=generator).tolist()
    chosen = {"objective": f"logit_diff({seed % size}, {(seed + 5) % size})", **options}
    return Case(Prompt(loaded, tokens, **chosen), layers)


SEEDS = st.integers(0, 200)
FEW = settings(max_examples=12)


def near(found: Array, expected: Array, scale: float = 1.0) -> None:
    largest = max(float(np.abs(expected).max(initial=0)), scale)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * largest)


@FEW
@given(SEEDS)
def test_writes_sum_to_the_residual(seed: int) -> None:
    one = case(seed)
    embedding = one.derive("resid_post_embedding")
    total = embedding + one.derive("resid_delta_attn").sum(0) + one.derive("resid_delta_mlp").sum(0)
    near(total, one.derive("resid_post_mlp")[-1])


@FEW
@given(SEEDS)
def test_heads_and_neurons_sum_to_what_their_layers_write(seed: int) -> None:
    one = case(seed)
    weights = one.prompt.values
    heads, neurons = one.derive("attn_write"), one.derive("mlp_write")
    for layer in range(one.layers):
        bias = weights.weight(Weight.ATTN_OUTPUT_BIAS, layer).numpy()
        near(heads[layer].sum((1, 2)) + bias, one.derive("resid_delta_attn")[layer])
        bias = weights.weight(Weight.MLP_OUTPUT_BIAS, layer).numpy()
        near(neurons[layer].sum(1) + bias, one.derive("resid_delta_mlp")[layer])
    near(one.derive("attn_write_sum_heads"), heads.sum(3))
    near(one.derive("resid_delta_mlp_from_mlp_post_act"), neurons.sum(2))


@FEW
@given(SEEDS)
def test_direct_effects_sum_to_the_projection_of_the_residual(seed: int) -> None:
    one = case(seed)
    gradient = one.prompt.raw("resid_post_mlp", pass_type="backward", dtype="float64").numpy()[-1]
    final = one.derive("resid_post_mlp")[-1]
    parts = (
        one.derive("resid_post_embedding_proj_to_final_residual_grad")
        + one.derive("attn_layer_write_to_final_residual_grad").sum(0)
        + one.derive("mlp_layer_write_to_final_residual_grad").sum(0)
    )
    near(parts[:, 0], (final * gradient).sum(-1), float(np.abs(final).max()))


@FEW
@given(SEEDS)
def test_pairs_sum_to_tokens(seed: int) -> None:
    one = case(seed)
    for pairs, tokens in (
        ("unflattened_attn_act_times_grad", "attn_act_times_grad_per_sequence_token"),
        (
            "unflattened_attn_write_to_final_residual_grad",
            "attn_write_to_final_residual_grad_per_sequence_token",
        ),
    ):
        near(one.derive(pairs).sum(2), one.derive(tokens))


@FEW
@given(SEEDS)
def test_flattened_scalars_are_the_lower_triangle(seed: int) -> None:
    one = case(seed)
    first, second = np.tril_indices(len(one.prompt.token_ids))
    for flat, square in (
        ("attn_write_norm", "unflattened_attn_write_norm"),
        ("flattened_attn_post_softmax", "attn_qk_probs"),
        ("attn_act_times_grad", "unflattened_attn_act_times_grad"),
        ("attn_write_to_final_residual_grad", "unflattened_attn_write_to_final_residual_grad"),
    ):
        assert np.array_equal(one.derive(flat), one.derive(square)[:, first, second])


@FEW
@given(SEEDS)
def test_attributions_sum_to_what_they_attribute(seed: int) -> None:
    # The values that a head reads are linear in z, and z is linear in the pattern.
    one = case(seed)
    z = one.prompt.raw("z", dtype="float64").numpy()
    grad_z = one.prompt.raw("z", pass_type="backward", dtype="float64").numpy()
    expected = (z * grad_z).sum(-1)
    near(one.derive("attn_act_times_grad_per_sequence_token"), expected)
    grad_embedding = one.prompt.raw("embed", pass_type="backward", dtype="float64").numpy()
    embedding = one.derive("resid_post_embedding")
    near(one.derive("token_attribution")[:, 0], (embedding * grad_embedding).sum(-1))


def traces(one: Case, seed: int) -> Iterator[TraceConfig]:
    last, token = one.layers - 1, len(one.prompt.token_ids) - 1
    kinds = list(PreOrPostAct)
    yield TraceConfig(
        NodeIndex(NodeType.MLP_NEURON, (token, seed % 7), last), kinds[seed % 2], seed % 3 == 0
    )
    for side in (AttentionTraceType.Q, AttentionTraceType.K, AttentionTraceType.QK):
        node = NodeIndex(NodeType.ATTENTION_HEAD, (token, token // 2, 0), last)
        yield TraceConfig(node, kinds[seed % 2], seed % 3 != 0, side)


@settings(max_examples=6)
@given(SEEDS)
def test_two_routes_to_the_gradient_of_a_trace_agree(seed: int) -> None:
    # Recomputed from the residual alone, and by the backward pass that was run.
    for trace in traces(case(seed), seed):
        one = case(seed, objective=None, trace=trace)
        for run, local in (
            ("mlp_write_to_final_residual_grad", "mlp_write_to_final_activation_residual_grad"),
            (
                "unflattened_attn_write_to_final_residual_grad",
                "unflattened_attn_write_to_final_activation_residual_grad",
            ),
            (
                "resid_post_embedding_proj_to_final_residual_grad",
                "resid_post_embedding_proj_to_final_activation_residual_grad",
            ),
        ):
            # The residual's projection on a gradient that does not see its length is noise.
            near(one.derive(local), one.derive(run), scale=1e-3)


EDGES = ("attn_query", "attn_key", "attn_value")


@settings(max_examples=6)
@given(SEEDS, st.booleans())
def test_in_edges_and_out_edges_are_one_number(seed: int, detach: bool) -> None:
    """From a neuron of layer 0 to a later node: by the node's write, and by the gradient."""
    one = case(3 * (seed // 3) + 2)
    token, layer = len(one.prompt.token_ids) - 1, 1
    upstream = NodeIndex(NodeType.MLP_NEURON, (token, 3), 0)
    options: dict[str, Any] = {"detach_layer_norm_scale_for_attribution": detach}
    into = DstConfig(node_index_for_attribution=upstream, **options)
    neuron = NodeIndex(NodeType.MLP_NEURON, (token, 5), layer)
    out = DstConfig(node_index_for_attribution=neuron, **options)
    near(
        one.derive("mlp_out_edge_attribution", out)[0, token, 3],
        one.derive("mlp_in_edge_attribution", into)[layer, token, 5],
        scale=1e-6,
    )
    for side in EDGES:
        head = AttnSubNodeIndex(
            NodeType.ATTENTION_HEAD,
            (token, token, 0),
            layer,
            q_k_or_v=ActivationLocationType[side.upper()],
        )
        out = DstConfig(node_index_for_attribution=head, **options)
        near(
            one.derive("mlp_out_edge_attribution", out)[0, token, 3],
            one.derive(f"{side}_in_edge_attribution", into)[layer, token, token, 0],
            scale=1e-6,
        )


@settings(max_examples=6)
@given(SEEDS)
def test_a_detached_attribution_is_the_activations_change_times_the_gradient(seed: int) -> None:
    one = case(3 * (seed // 3) + 1)
    token = len(one.prompt.token_ids) - 1
    config = DstConfig(
        node_index_for_attribution=NodeIndex(NodeType.MLP_NEURON, (token, 1), 0),
        detach_layer_norm_scale_for_attribution=True,
    )
    gradient = one.prompt.raw("mlp_post", pass_type="backward", dtype="float64").numpy()
    near(
        one.derive("mlp_in_edge_attribution", config),
        one.derive("mlp_in_edge_activation", config) * gradient,
        scale=1e-6,
    )
    pattern = one.prompt.raw("pattern", pass_type="backward", dtype="float64").numpy()
    for side in ("attn_query", "attn_key"):
        near(
            one.derive(f"{side}_in_edge_attribution", config),
            one.derive(f"{side}_in_edge_activation", config) * pattern.swapaxes(2, 3),
            scale=1e-6,
        )


def test_a_write_reaches_only_what_comes_strictly_after_it() -> None:
    one = case(5)
    token = len(one.prompt.token_ids) - 1
    config = DstConfig(node_index_for_attribution=NodeIndex(NodeType.MLP_NEURON, (token, 1), 1))
    for name in SCALARS:
        if "_in_edge_" in name and not name.startswith("online"):
            found = one.derive(name, config)
            assert not found[:2].any(), name
            assert found[2].any(), name
    last = one.derive("resid_post_mlp_proj_to_final_residual_grad")
    assert not last[-1].any()
    assert last[0].any()


@pytest.mark.parametrize("name", ["mlp_in_edge_activation", "mlp_out_edge_attribution"])
def test_an_edge_without_its_node_says_what_to_pass(name: str) -> None:
    with pytest.raises(InvalidInput, match="node_index_for_attribution"):
        case(1).derive(name)


@FEW
@given(SEEDS, st.sampled_from(list(Normalisation)))
def test_latents_write_what_their_decoder_writes(seed: int, normalisation: Normalisation) -> None:
    # Whatever normalises its input, an autoencoder's output is its latents' writes and a bias.
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    place, width = ((L.RESID_DELTA_MLP, 16), (L.MLP_POST_ACT, 24))[seed % 2]
    autoencoder = Autoencoder(
        name="random",
        location=place,
        layer=0,
        encoder=draw(width, 9),
        decoder=draw(9, width),
        latent_bias=draw(9),
        input_bias=torch.zeros(width, dtype=torch.float64),
        output_bias=torch.zeros(width, dtype=torch.float64),
        activation=ReLU(),
        normalisation=normalisation,
        rescale_acts_by_decoder_norm=seed % 3 == 0,
    )
    one = case(seed, autoencoders=[autoencoder])
    read = one.prompt.values.raw(place, layer=0)
    decoded = autoencoder.decode(autoencoder.encode(read), read)
    nothing = autoencoder.decode(torch.zeros(len(read), 9, dtype=torch.float64), read)
    expected = decoded - nothing
    if place is L.MLP_POST_ACT:
        expected = expected @ one.prompt.values.weight(Weight.MLP_TO_RESIDUAL, 0)
    writes = one.derive("online_mlp_autoencoder_write")[0]
    near(writes.sum(1), expected.numpy())
    norms = one.derive("online_mlp_autoencoder_write_norm")[0]
    near(np.abs(norms), np.linalg.norm(writes, axis=-1))
    token = len(one.prompt.token_ids) - 1
    latent = NodeIndex(NodeType.MLP_AUTOENCODER_LATENT, (token, 3), 0)
    config = DstConfig(node_index_for_attribution=latent)
    near(one.derive("single_node_write", config)[0, token], writes[token, 3])
    near(one.prompt.postprocess("residual_write", latent).numpy(), writes[token, 3])
