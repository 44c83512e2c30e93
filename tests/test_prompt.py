"""A prompt is asked like a store, and a store like a prompt: the same values from both."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_gpt2 import tiny_gpt2

import actstore
from actstore.ingest.model import LoadedModel, load_model
from actstore.prompt import Prompt
from actstore.query.derived import SCALARS
from actstore.query.derived.config import DstConfig
from actstore.query.session import Store
from actstore.store.errors import InvalidInput, Unavailable
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_functions import ReLU
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.nodes import ActivationIndex, AttnSubNodeIndex, NodeIndex, TraceConfig
from actstore.store.vocabulary import OPTIONAL_LOCATIONS, ActivationLocationType, NodeType, PassType

L = ActivationLocationType
LAYERS, LATENTS, OBJECTIVE = 2, 11, "next_token_log_prob"

CANCELLING = {
    # The residual stream that feeds the final norm, on that norm's own gradient: zero but
    # for rounding, because the norm does not see its length.
    "resid_post_mlp_proj_to_final_residual_grad",
}


def autoencoders(read: ActivationLocationType = L.MLP_POST_ACT) -> Autoencoders:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return Autoencoders(
        Autoencoder(
            name=f"{location}.{layer}",
            location=location,
            layer=layer,
            encoder=draw(width, LATENTS),
            decoder=draw(LATENTS, width),
            latent_bias=draw(LATENTS),
            input_bias=draw(width),
            output_bias=draw(width),
            activation=ReLU(),
        )
        for location, width in (
            (read, 24 if read is L.MLP_POST_ACT else 16),
            (L.RESID_DELTA_ATTN, 16),
        )
        for layer in range(LAYERS)
    )


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model((tiny_gpt2(seed=3, dtype=torch.float64), None))


@pytest.fixture(scope="module")
def corpus() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [9, 4, 21, 2, 14, 30, 7]
    return [torch.randint(53, (length,), generator=generator).tolist() for length in lengths]


def build(path: Path, loaded: LoadedModel, corpus: list[list[int]], dtype: str) -> Store:
    return actstore.ingest(
        (loaded.model, None),
        corpus,
        path,
        locations="attention",
        objective=OBJECTIVE,
        dtype=dtype,
        segment_rows=512,
    )


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, loaded: LoadedModel, corpus: list[list[int]]
) -> dict[str, Store]:
    path = tmp_path_factory.mktemp("prompt")
    return {dtype: build(path / dtype, loaded, corpus, dtype) for dtype in ("float32", "float16")}


def config_for(name: str, length: int) -> DstConfig:
    """A config that the scalar accepts, its node at the sequence's last token."""
    declared, token = SCALARS[name], length - 1
    neuron = NodeIndex(NodeType.MLP_NEURON, (token, 3), 1)
    options: dict[str, Any] = {"autoencoders": autoencoders()}
    if name == "online_residual_mlp_autoencoder_error":
        options["autoencoders"] = autoencoders(L.RESID_DELTA_MLP)
    if declared.latents is NodeType.AUTOENCODER_LATENT or "autoencoder_in_edge" in name:
        options["autoencoders"] = Autoencoders(
            one for one in autoencoders() if one.location is L.MLP_POST_ACT
        )
    if declared.about == "node_index_for_attribution":
        into = "_in_edge_" in name or name.startswith("single_node")
        options["node_index_for_attribution"] = neuron.with_updates(layer_index=0 if into else 1)
    elif declared.about == "activation_index_for_fake_grad":
        options["activation_index_for_fake_grad"] = ActivationIndex(L.MLP_POST_ACT, (0, 3), 1)
    elif declared.about == "trace_config":
        kind = NodeType.MLP_AUTOENCODER_LATENT
        if "residual_input" in name or name.startswith(("attn_write_to_latent", "flattened")):
            kind = NodeType.ATTENTION_AUTOENCODER_LATENT
        if "final_activation" in name:
            options["trace_config"] = TraceConfig(neuron)
        else:
            options["trace_config"] = TraceConfig(NodeIndex(kind, (None, 4), 1))
            if kind is NodeType.MLP_AUTOENCODER_LATENT or "wrt_residual" in name:
                options["autoencoders"] = autoencoders()
    return DstConfig(**options)


def relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(found), finite)
    largest = float(np.abs(expected[finite]).max(initial=0))
    difference = float(np.abs(found[finite] - expected[finite]).max(initial=0))
    return difference / largest if largest else difference


@pytest.mark.parametrize("name", sorted(SCALARS.keys() - {one.label for one in OPTIONAL_LOCATIONS}))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 2e-3)])
def test_every_scalar_from_disk_equals_a_fresh_pass(
    stores: dict[str, Store],
    loaded: LoadedModel,
    corpus: list[list[int]],
    dtype: str,
    tolerance: float,
    name: str,
) -> None:
    for sequence in (2, 4):
        config = config_for(name, len(corpus[sequence]))
        prompt = Prompt(
            loaded,
            corpus[sequence],
            objective=OBJECTIVE,
            autoencoders=config.autoencoders or (),
        )
        expected = prompt.derive(name, config=config, dtype="float64")
        found = stores[dtype].derive(name, sequences=sequence, config=config, dtype="float64")
        assert found.dims == expected.dims
        assert found.layers == expected.layers
        assert found.shape == expected.shape
        if name not in CANCELLING:
            error = relative(found.numpy(), expected.numpy())
            assert error <= tolerance, f"{name} of sequence {sequence}: {error:.1e}"


@pytest.mark.parametrize(
    "location", [L.ATTN_QK_PROBS, L.ATTN_QK_LOGITS, L.ATTN_VALUE, L.MLP_PRE_ACT]
)
def test_gradients_that_were_not_stored_follow_from_those_that_were(
    stores: dict[str, Store],
    loaded: LoadedModel,
    corpus: list[list[int]],
    location: ActivationLocationType,
) -> None:
    store = stores["float32"]
    assert store.sources.describe(location, PassType.BACKWARD).startswith("reconstructed from")
    prompt = Prompt(loaded, corpus[5], objective=OBJECTIVE)
    expected = prompt.raw(location.label, pass_type="backward", dtype="float64").numpy()
    found = store.raw(location.label, pass_type="backward", sequences=5, dtype="float64").numpy()
    assert relative(found, expected) <= 1e-5


def test_a_gradient_that_follows_from_nothing_says_how_to_add_it(stores: dict[str, Store]) -> None:
    with pytest.raises(Unavailable, match="--objective"):
        stores["float32"].raw("logits", pass_type="backward", sequences=0)


def test_a_text_gets_the_tokens_that_ingest_gives_it() -> None:
    prompt = Prompt("demo", "import os\n", objective="next_token_log_prob")
    assert prompt.token_ids[0] == 0
    assert "".join(prompt.tokens[1:]) == "import os\n"
    assert prompt.objective_value is not None
    assert prompt.objective_value < 0
    assert prompt.derive("mlp_act_times_grad").sizes["neuron"] == 512


def test_an_error_needs_an_autoencoder_that_reads_the_same(loaded: LoadedModel) -> None:
    prompt = Prompt(loaded, [4, 8, 15, 16], autoencoders=autoencoders())
    assert prompt.derive("online_mlp_autoencoder_error").sizes["neuron"] == 24
    with pytest.raises(Unavailable, match="reads mlp_post_act"):
        prompt.derive("online_residual_mlp_autoencoder_error")


def test_a_prompt_that_cannot_run_says_why(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidInput, match="no tokenizer"):
        Prompt(loaded, "text")
    with pytest.raises(InvalidInput):
        Prompt(loaded, [])
    with pytest.raises(InvalidInput, match="53"):
        Prompt(loaded, [1, 53])
    with pytest.raises(InvalidInput, match="Unknown objective"):
        Prompt(loaded, [1, 2], objective="loss")
    with pytest.raises(Unavailable, match="objective or a trace"):
        Prompt(loaded, [1, 2]).derive("mlp_act_times_grad")
    with pytest.raises(Unavailable, match="not recorded"):
        Prompt(loaded, [1, 2]).raw("online_mlp_autoencoder_latent")


def test_the_container_of_a_prompt_has_the_axes_of_the_scalars(loaded: LoadedModel) -> None:
    prompt = Prompt(loaded, [4, 8, 15, 16], objective=OBJECTIVE)
    probabilities = prompt.raw_store.get_activations_and_metadata(L.ATTN_QK_PROBS)
    expected = prompt.derive("attn_qk_probs", dtype="float64")
    for layer in range(LAYERS):
        found = probabilities.activations_by_layer_index[layer].numpy()
        assert np.array_equal(found, expected.layer(layer).numpy())


def test_a_container_is_filled_from_a_model(loaded: LoadedModel) -> None:
    tokens = [4, 8, 15, 16]
    found = actstore.RawActivationStore.from_model(loaded, tokens, objective=OBJECTIVE)
    expected = Prompt(loaded, tokens, objective=OBJECTIVE).raw_store
    assert found.activations.keys() == expected.activations.keys()
    for key, values in expected.activations.items():
        assert values == found.activations[key]


def test_a_head_without_a_side_says_so(loaded: LoadedModel) -> None:
    prompt = Prompt(loaded, [4, 8, 15, 16], objective=OBJECTIVE)
    head = NodeIndex(NodeType.ATTENTION_HEAD, (2, 1, 0), 1)
    with pytest.raises(InvalidInput, match="AttnSubNodeIndex"):
        prompt.derive("mlp_out_edge_attribution", config=DstConfig(node_index_for_attribution=head))
    side = AttnSubNodeIndex(NodeType.ATTENTION_HEAD, (2, 1, 0), 1, q_k_or_v=L.ATTN_KEY)
    found = prompt.derive(
        "mlp_out_edge_attribution", config=DstConfig(node_index_for_attribution=side)
    )
    assert found.numpy()[0].any()
