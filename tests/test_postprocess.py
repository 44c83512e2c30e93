"""Vectors of nodes: against an independent implementation, against autograd, by identities."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden_store import build_golden_store
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import both_kinds, random_autoencoder, random_ids
from safetensors.torch import load_file
from tiny_gpt2 import tiny_gpt2
from transformers import GPT2LMHeadModel

from actstore.ingest.live_pass import run_pass
from actstore.ingest.model import LoadedModel, load_model
from actstore.query import postprocess as module
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN, RawValues
from actstore.query.index_json import from_json
from actstore.query.pass_values import PassValues
from actstore.query.postprocess import POSTPROCESSORS, postprocess, postprocessor
from actstore.query.postprocess_nodes import NodeGroup, NodeRule, Prepared
from actstore.query.session import Store
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.location_names import PRESETS
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_functions import JumpReLU, Normalisation, ReLU
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.nodes import AttnSubNodeIndex, NodeIndex
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "tdb" / "postprocessors.json").read_text())
L = ActivationLocationType
N = NodeType
W = WeightLocationType
FORWARD = PassType.FORWARD
TOKENS = 9


# Models and passes


@cache
def golden_model() -> LoadedModel:
    return load_model(
        (GPT2LMHeadModel.from_pretrained(DATA / "tiny_a" / "hf_model").double(), None)
    )


@cache
def golden_autoencoder(name: str) -> tuple[Autoencoder, ...]:
    described = json.loads((DATA / "tiny_a" / "saes" / "saes.json").read_text())[name]
    members = []
    for layer, path in enumerate(described["files"]):
        tensors = {key: at.double() for key, at in load_file(DATA / "tiny_a" / path).items()}
        members.append(
            Autoencoder(
                name=name,
                location=ActivationLocationType[described["input_dst"].upper()],
                layer=layer,
                encoder=tensors["encoder.weight"].T,
                decoder=tensors["decoder.weight"].T,
                latent_bias=tensors["latent_bias"],
                input_bias=tensors["pre_bias"],
                output_bias=tensors["pre_bias"],
                activation=ReLU(),
            )
        )
    return tuple(members)


@cache
def golden_case(names: tuple[str, ...], spliced: bool) -> tuple[PassValues, DstConfig]:
    prompt = json.loads((DATA / "tiny_a" / "prompts.json").read_text())[0]["token_ids"]
    used = Autoencoders([one for name in names for one in golden_autoencoder(name)])
    [found] = run_pass(golden_model(), [prompt], autoencoders=used if spliced else None)
    return PassValues(found.values, golden_model().weights()), DstConfig(autoencoders=used)


@cache
def tiny_values(spliced: bool = True) -> tuple[PassValues, DstConfig]:
    """A random model's pass, with autoencoders of both kinds."""
    loaded = load_model((tiny_gpt2(dtype=torch.float64), None))
    used = both_kinds()
    [found] = run_pass(loaded, [random_ids(TOKENS)], autoencoders=used if spliced else None)
    return PassValues(found.values, loaded.weights()), DstConfig(autoencoders=used)


def with_autoencoder(one: Autoencoder) -> DstConfig:
    return DstConfig(autoencoders=Autoencoders([one]))


def neuron(token: int, unit: int, layer: int = 1) -> NodeIndex:
    return NodeIndex(N.MLP_NEURON, (token, unit), layer)


def head(query: int, key: int, unit: int, layer: int = 1) -> NodeIndex:
    return NodeIndex(N.ATTENTION_HEAD, (query, key, unit), layer)


def score(node: NodeIndex, side: L) -> AttnSubNodeIndex:
    return node.to_subnode_index(side)


def embedding(token: int) -> NodeIndex:
    return NodeIndex(N.LAYER, (token, 0), None)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert found.dtype == torch.float64
    scale = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


# Against the independent implementation


def golden_sets() -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(entry["autoencoders"]) for entry in GOLDEN["outputs"]))


@pytest.mark.parametrize("spliced", [True, False])
@pytest.mark.parametrize("names", golden_sets())
def test_values_equal_the_reference_alone_and_together(
    names: tuple[str, ...], spliced: bool
) -> None:
    values, config = golden_case(names, spliced)
    entries = [one for one in GOLDEN["outputs"] if tuple(one["autoencoders"]) == names]
    with np.load(DATA / "tdb" / "postprocessors.npz") as arrays:
        expected = {entry["key"]: torch.from_numpy(arrays[entry["key"]]) for entry in entries}
    for name in {entry["postprocessor"] for entry in entries}:
        chosen = [entry for entry in entries if entry["postprocessor"] == name]
        nodes = [from_json(NodeIndex, entry["node"]) for entry in chosen]
        together = postprocess(name, nodes, values, config)
        for node, entry, row in zip(nodes, chosen, together, strict=True):
            reference = expected[entry["key"]]
            scale = float(reference.abs().max())
            alone = postprocess(name, node, values, config)
            for found in (alone, row):
                # An inactive latent writes nothing at all, and the reference holds zeros.
                torch.testing.assert_close(found, reference, rtol=0, atol=1e-9 * scale)


def test_the_reference_covers_every_postprocessor() -> None:
    assert len(GOLDEN["outputs"]) == 80
    assert {entry["postprocessor"] for entry in GOLDEN["outputs"]} == set(POSTPROCESSORS)
    kinds = {entry["node"]["nodeType"] for entry in GOLDEN["outputs"]}
    assert kinds == {
        str(kind) for declared in POSTPROCESSORS.values() for kind in declared.node_types
    }


def test_what_the_reference_refuses_is_refused_with_an_error_of_ours_or_answered() -> None:
    answered = []
    for entry in GOLDEN["errors"]:
        values, config = golden_case(tuple(entry["autoencoders"]), True)
        node = from_json(NodeIndex, entry["node"])
        asked = (entry["postprocessor"], entry["node"].get("qKOrV"))
        if asked in (("residual_read", "attn_query"), ("token_read", "attn_query")):
            # Reads of a head through its query: the reference only has a message for them.
            answered.append(postprocess(entry["postprocessor"], node, values, config))
            continue
        with pytest.raises(InvalidInput) as error:
            postprocess(entry["postprocessor"], node, values, config)
        assert error.value.kind is ErrorKind.INVALID_ARGUMENT
    assert len(GOLDEN["errors"]) == 30
    assert [vector.numel() for vector in answered] == [32, 211]


# Reads through queries and keys, by autograd on formulas written out here


def score_of_rows(
    values: RawValues, node: NodeIndex, rows: dict[L, torch.Tensor], scale: dict[L, torch.Tensor]
) -> torch.Tensor:
    _, _, unit = node.tensor_indices
    sides = []
    for side, weight in ((L.ATTN_QUERY, W.ATTN_TO_QUERY), (L.ATTN_KEY, W.ATTN_TO_KEY)):
        centred = rows[side] - rows[side].mean()
        normed = centred / scale[side] * values.weight(W.LAYER_NORM_GAIN_PRE_ATTN, node.layer_index)
        normed = normed + values.weight(W.LAYER_NORM_BIAS_PRE_ATTN, node.layer_index)
        matrix = values.weight(weight, node.layer_index)[unit]
        sides.append(normed @ matrix + values.weight(side, node.layer_index)[unit])
    return sides[0] @ sides[1] / math.sqrt(len(sides[0]))


@given(
    st.integers(0, TOKENS - 1),
    st.integers(0, TOKENS - 1),
    st.integers(0, 1),
    st.integers(0, 1),
    st.sampled_from([L.ATTN_QUERY, L.ATTN_KEY]),
)
@settings(max_examples=25, deadline=None)
def test_reads_of_heads_equal_autograd(
    first: int, second: int, unit: int, layer: int, side: L
) -> None:
    values, _ = tiny_values()
    query, key = max(first, second), min(first, second)
    node = head(query, key, unit, layer)
    place = (L.RESID_POST_EMBEDDING, None) if layer == 0 else (L.RESID_POST_MLP, 0)
    residual = values.raw(place[0], FORWARD, place[1])
    rows = {L.ATTN_QUERY: residual[query].clone(), L.ATTN_KEY: residual[key].clone()}
    scale = {of: (row.var(correction=0) + 1e-5).sqrt() for of, row in rows.items()}
    leaf = rows[side].requires_grad_()
    value = score_of_rows(values, node, rows, scale)
    recorded = values.raw(L.ATTN_QK_LOGITS, FORWARD, layer)[query, unit, key]
    assert float(value.detach()) == pytest.approx(float(recorded), rel=1e-10, abs=1e-12)
    (expected,) = torch.autograd.grad(value, leaf)
    found = postprocess("residual_read", score(node, side), values)
    assert_close(found, expected, 1e-11)
    assert_close(
        postprocess("token_read", score(node, side), values),
        values.weight(W.EMBEDDING, None) @ expected,
        1e-11,
    )


def test_the_other_side_of_a_score_is_what_the_pass_recorded() -> None:
    values, _ = tiny_values()
    keys = values.raw(L.ATTN_KEY, FORWARD, 1)
    changed = PassValues({**values._values, (L.ATTN_KEY, FORWARD, 1): 2 * keys}, values._weights)
    query, key = score(head(5, 3, 1), L.ATTN_QUERY), score(head(5, 3, 1), L.ATTN_KEY)
    assert_close(
        postprocess("residual_read", query, changed),
        2 * postprocess("residual_read", query, values),
    )
    assert_close(
        postprocess("residual_read", key, changed), postprocess("residual_read", key, values)
    )


# Identities


def test_writes_of_neurons_and_heads_sum_to_what_their_layer_adds() -> None:
    values, _ = tiny_values()
    for layer in range(2):
        neurons = [neuron(4, unit, layer) for unit in range(24)]
        written = postprocess("residual_write", neurons, values).sum(0)
        bias = values.weight(W.MLP_OUTPUT_BIAS, layer)
        assert_close(written + bias, values.raw(L.RESID_DELTA_MLP, FORWARD, layer)[4])
        heads = [head(4, key, unit, layer) for key in range(TOKENS) for unit in range(2)]
        written = postprocess("residual_write", heads, values).sum(0)
        bias = values.weight(W.ATTN_OUTPUT_BIAS, layer)
        assert_close(written + bias, values.raw(L.RESID_DELTA_ATTN, FORWARD, layer)[4])
    embedded = values.raw(L.RESID_POST_EMBEDDING)
    assert_close(postprocess("residual_write", embedding(3), values), embedded[3])


@pytest.mark.parametrize("normalisation", Normalisation)
@pytest.mark.parametrize(
    ("location", "channels", "output"),
    [
        (L.MLP_POST_ACT, 24, W.MLP_TO_RESIDUAL),
        (L.ATTN_WEIGHTED_SUM_OF_VALUES, 16, W.ATTN_TO_RESIDUAL),
        (L.RESID_DELTA_MLP, 16, None),
        (L.RESID_DELTA_ATTN, 16, None),
        (L.RESID_POST_MLP, 16, None),
    ],
)
def test_writes_of_latents_sum_to_what_they_decode(
    location: L, channels: int, output: W | None, normalisation: Normalisation
) -> None:
    values, _ = tiny_values(spliced=False)
    one = random_autoencoder(location, 1, channels, normalisation=normalisation)
    one = replace(one, rescale_acts_by_decoder_norm=True)
    nodes = [NodeIndex(one.node_type, (6, latent), 1) for latent in range(one.n_latents)]
    written = postprocess("residual_write", nodes, values, with_autoencoder(one)).sum(0)
    read = values.raw(location, FORWARD, 1)[6:7]
    latents = one.encode(read)
    assert float(latents.sum()) > 0
    decoded = (one.decode(latents, read) - one.decode(0 * latents, read))[0].flatten()
    if output is not None:
        matrix = values.weight(output, 1)
        decoded = decoded @ matrix.reshape(-1, matrix.shape[-1])
    assert_close(written, decoded)


def test_a_transcoder_writes_where_its_output_stands() -> None:
    values, _ = tiny_values(spliced=False)
    one = replace(random_autoencoder(L.RESID_DELTA_ATTN, 1, 16), writes_to=(L.MLP_POST_ACT, 0))
    one = replace(one, decoder=torch.ones(11, 24).double(), output_bias=torch.zeros(24).double())
    latents = one.encode(values.raw(L.RESID_DELTA_ATTN, FORWARD, 1))
    latent = int(latents[2].argmax())
    found = postprocess(
        "residual_write", NodeIndex(one.node_type, (2, latent), 1), values, with_autoencoder(one)
    )
    assert_close(found, latents[2, latent] * values.weight(W.MLP_TO_RESIDUAL, 0).sum(0))


def test_latents_of_the_pass_count_where_they_were_recorded() -> None:
    values, config = tiny_values()
    place = (L.ONLINE_MLP_AUTOENCODER_LATENT, FORWARD, 1)
    ablated = PassValues({**values._values, place: values._values[place] * 0}, values._weights)
    active = int(values.raw(place[0], FORWARD, 1)[5].argmax())
    node = NodeIndex(N.MLP_AUTOENCODER_LATENT, (5, active), 1)
    assert postprocess("residual_write", node, values, config).abs().max() > 0
    assert postprocess("residual_write", node, ablated, config).abs().max() == 0


def test_what_a_neuron_reads_gives_its_value_back() -> None:
    values, _ = tiny_values()
    for layer in range(2):
        nodes = [neuron(token, unit, layer) for token in (0, 7) for unit in range(24)]
        reads = postprocess("residual_read", nodes, values).reshape(2, 24, 16)
        residual = values.raw(L.RESID_POST_ATTN, FORWARD, layer)[[0, 7]]
        # With the denominator a constant the value is linear in the residual stream.
        constant = values.weight(W.LAYER_NORM_BIAS_PRE_MLP, layer) @ values.weight(
            W.MLP_TO_HIDDEN, layer
        ) + values.weight(W.MLP_HIDDEN_BIAS, layer)
        found = torch.einsum("tnd,td->tn", reads, residual) + constant
        assert_close(found, values.raw(L.MLP_PRE_ACT, FORWARD, layer)[[0, 7]])
        assert float(reads.sum(-1).abs().max()) < 1e-12


def test_a_latent_of_a_residual_stream_reads_its_encoder_row() -> None:
    values, _ = tiny_values(spliced=False)
    for location, layer in ((L.RESID_POST_EMBEDDING, None), (L.RESID_POST_MLP, 1)):
        one = random_autoencoder(L.RESID_POST_MLP, 1, 16)
        one = replace(one, location=location, layer=layer)
        node = NodeIndex(one.node_type, (3, 4), layer)
        found = postprocess("residual_read", node, values, with_autoencoder(one))
        assert_close(found, one.encoder[:, 4])


@pytest.mark.parametrize(
    ("location", "channels"), [(L.RESID_DELTA_ATTN, 16), (L.ATTN_WEIGHTED_SUM_OF_VALUES, 16)]
)
def test_a_latent_after_attention_reads_through_its_own_token_alone(
    location: L, channels: int
) -> None:
    values, _ = tiny_values(spliced=False)
    one = random_autoencoder(location, 1, channels)
    row = values.raw(L.RESID_POST_MLP, FORWARD, 0)[6].clone().requires_grad_()
    centred = row - row.mean()
    scale = (centred.square().mean() + 1e-5).sqrt().detach()
    normed = centred / scale * values.weight(W.LAYER_NORM_GAIN_PRE_ATTN, 1)
    read = (normed @ values.weight(W.ATTN_TO_VALUE, 1)).flatten()
    if location is L.RESID_DELTA_ATTN:
        read = read @ values.weight(W.ATTN_TO_RESIDUAL, 1).flatten(0, 1)
    (expected,) = torch.autograd.grad((read @ one.encoder)[4], row)
    node = NodeIndex(one.node_type, (6, 4), 1)
    assert_close(postprocess("residual_read", node, values, with_autoencoder(one)), expected)


@pytest.mark.parametrize("rescaled", [False, True])
def test_token_pair_attributions_sum_to_the_latents_value(rescaled: bool) -> None:
    values, _ = tiny_values(spliced=False)
    one = random_autoencoder(L.RESID_DELTA_ATTN, 1, 16, seed=3)
    one = replace(one, rescale_acts_by_decoder_norm=rescaled)
    read = values.raw(L.RESID_DELTA_ATTN, FORWARD, 1)
    latents = one.encode(read)
    places = (latents > 0).nonzero().tolist()
    assert len(places) > 10
    nodes = [NodeIndex(one.node_type, tuple(place), 1) for place in places]
    found = postprocess("token_pair_attribution", nodes, values, with_autoencoder(one))
    bias = values.weight(W.ATTN_OUTPUT_BIAS, 1)
    constant = one.encode_pre_act(bias)
    for row, (token, latent) in zip(found, places, strict=True):
        assert float(row[token + 1 :].abs().sum()) == 0
        assert float(row.sum() + constant[latent]) == pytest.approx(
            float(latents[token, latent]), rel=1e-9, abs=1e-9
        )


def test_token_vectors_are_projections_of_residual_ones() -> None:
    values, config = tiny_values()
    nodes = [
        neuron(3, 5),
        head(4, 2, 1),
        embedding(0),
        NodeIndex(N.MLP_AUTOENCODER_LATENT, (1, 2), 0),
    ]
    written = postprocess("residual_write", nodes, values, config)
    gain = values.weight(W.LAYER_NORM_GAIN_FINAL, None)
    logits = written @ torch.diag(gain) @ values.weight(W.UNEMBEDDING, None)
    found = postprocess("token_write", nodes, values, config)
    assert_close(found, logits - logits.mean(1, keepdim=True))
    nodes = [neuron(3, 5), score(head(4, 2, 1), L.ATTN_KEY)]
    read = postprocess("residual_read", nodes, values)
    assert_close(
        postprocess("token_read", nodes, values), read @ values.weight(W.EMBEDDING, None).T
    )


# Many nodes


def any_node() -> st.SearchStrategy[tuple[str, NodeIndex]]:
    token, layer = st.integers(0, TOKENS - 1), st.integers(0, 1)
    neurons = st.builds(neuron, token, st.integers(0, 23), layer)
    heads = st.builds(head, token, token, st.integers(0, 1), layer)
    seen = st.builds(
        lambda a, b, unit, at, side: score(head(max(a, b), min(a, b), unit, at), side),
        token,
        token,
        st.integers(0, 1),
        layer,
        st.sampled_from([L.ATTN_QUERY, L.ATTN_KEY]),
    )
    latents = st.builds(
        lambda kind, at, unit, where: NodeIndex(kind, (at, unit), where),
        st.sampled_from([N.MLP_AUTOENCODER_LATENT, N.ATTENTION_AUTOENCODER_LATENT]),
        token,
        st.integers(0, 10),
        layer,
    )
    writes = neurons | heads | latents | st.builds(embedding, token)
    reads = neurons | seen | latents
    return st.tuples(st.just("write"), writes) | st.tuples(st.just("read"), reads)


@given(st.lists(any_node(), min_size=1, max_size=12), st.sampled_from(["residual", "token"]))
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_what_else_is_asked_for(
    chosen: list[tuple[str, NodeIndex]], space: str
) -> None:
    values, config = tiny_values()
    for verb in ("write", "read"):
        nodes = [node for kind, node in chosen if kind == verb]
        if not nodes:
            continue
        name = f"{space}_{verb}"
        together = postprocess(name, nodes, values, config)
        with patch.object(module, "_BLOCK_BYTES", 3000):
            in_blocks = postprocess(name, nodes, values, config)
        backwards = postprocess(name, nodes[::-1], values, config).flip(0)
        alone = torch.stack([postprocess(name, node, values, config) for node in nodes])
        for found in (together, in_blocks, backwards):
            assert_close(found, alone)


def test_memory_is_bounded_by_blocks_and_answers_by_a_limit() -> None:
    values, _ = tiny_values()
    blocks: list[int] = []

    def prepare(group: NodeGroup) -> Prepared:
        def rows(at: torch.Tensor) -> torch.Tensor:
            blocks.append(len(at))
            return at[:, 1:].double().expand(-1, 16)

        return Prepared(TOKENS, 1000, rows)

    counted = replace(
        postprocessor("residual_write"), rules=(NodeRule(N.MLP_NEURON, "f", prepare),)
    )
    nodes = [neuron(index % TOKENS, index % 24, index % 2) for index in range(1000)]
    with patch.object(module, "_BLOCK_BYTES", 8 * 1000 * 64):
        found = postprocess(counted, nodes, values)
    assert found[:, 0].tolist() == [index % 24 for index in range(1000)]
    assert sum(blocks) == 1000
    assert max(blocks) == 64
    blocks.clear()
    with pytest.raises(InvalidInput, match="at a time") as error:
        postprocess(counted, nodes, values, max_bytes=8 * 16 * 999)
    assert error.value.kind is ErrorKind.TOO_LARGE
    assert not blocks
    assert postprocess(counted, nodes[:999], values, max_bytes=8 * 16 * 999).shape == (999, 16)


def test_nothing_is_changed_by_a_call() -> None:
    values, config = tiny_values()
    before = {place: tensor.clone() for place, tensor in values._values.items()}
    nodes = [
        neuron(3, 5),
        head(4, 2, 1),
        embedding(0),
        NodeIndex(N.MLP_AUTOENCODER_LATENT, (1, 2), 0),
    ]
    for name in ("residual_write", "token_write"):
        postprocess(name, nodes, values, config).zero_()
    postprocess("residual_write", embedding(0), values).zero_()
    postprocess("token_read", [neuron(3, 5), score(head(4, 2, 1), L.ATTN_QUERY)], values).zero_()
    for place, tensor in before.items():
        assert torch.equal(values._values[place], tensor)
        assert not values._values[place].requires_grad
    # The original kept an autoencoder's node types for every later instance.
    with pytest.raises(InvalidInput, match="Autoencoders are needed"):
        postprocess("residual_write", nodes[3], values)
    with pytest.raises(TypeError):
        POSTPROCESSORS["mine"] = postprocessor("token_write")  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        postprocessor("token_write").rules = ()  # type: ignore[misc]


def test_a_callers_inference_mode_changes_nothing() -> None:
    expected = postprocess("residual_read", neuron(3, 5), tiny_values()[0])
    with torch.inference_mode():
        fresh = PassValues(tiny_values()[0]._values, tiny_values()[0]._weights)
        assert torch.equal(postprocess("residual_read", neuron(3, 5), fresh), expected)


# From a store


def test_a_store_gives_what_a_pass_gives(tmp_path: Path) -> None:
    values, config = golden_case(("sae_resid_delta_attn",), False)
    latents = golden_autoencoder("sae_resid_delta_attn")[1].encode(
        values.raw(L.RESID_DELTA_ATTN, FORWARD, 1)
    )
    active = NodeIndex(N.ATTENTION_AUTOENCODER_LATENT, (12, int(latents[12].argmax())), 1)
    writes = [neuron(15, 9), head(15, 2, 3), embedding(5), active]
    reads = [neuron(15, 9), score(head(15, 2, 3), L.ATTN_KEY), active]
    path = build_golden_store(tmp_path / "store", PRESETS["neurons"])
    with Store(path) as store:
        stored = store.sources.sequence(store.row_map.sequence(0))
        for name, nodes in (
            ("residual_write", writes),
            ("token_write", writes),
            ("residual_read", reads),
            ("token_read", reads),
            ("token_pair_attribution", [active]),
        ):
            found = postprocess(name, nodes, stored, config)
            assert_close(found, postprocess(name, nodes, values, config), 1e-5)


# Wrong use


Refused = tuple[str, Callable[[], Any], DstConfig, ErrorKind, str]


def refused() -> list[Refused]:
    invalid, unit = ErrorKind.INVALID_ARGUMENT, ErrorKind.UNKNOWN_UNIT
    config = DstConfig(autoencoders=both_kinds())
    plain = both_kinds().of(N.ATTENTION_AUTOENCODER_LATENT).at_layer(1)
    jump = with_autoencoder(replace(plain, activation=JumpReLU(torch.zeros(11).double())))
    normed = with_autoencoder(replace(plain, normalisation=Normalisation.LAYER_NORM))
    hidden = with_autoencoder(random_autoencoder(L.MLP_PRE_ACT, 1, 24))
    narrow = with_autoencoder(
        replace(
            random_autoencoder(L.MLP_POST_ACT, 1, 24),
            encoder=torch.ones(24, 5).double(),
            decoder=torch.ones(5, 24).double(),
            latent_bias=torch.ones(5).double(),
        )
    )
    latent = NodeIndex(N.ATTENTION_AUTOENCODER_LATENT, (5, 1), 1)
    generic = NodeIndex(N.AUTOENCODER_LATENT, (5, 1), 1)
    channel = NodeIndex(N.RESIDUAL_STREAM_CHANNEL, (5, 1), 1)
    backward = neuron(5, 1).with_updates(pass_type=PassType.BACKWARD)
    value = score(head(4, 2, 1), L.ATTN_VALUE)
    query = score(head(4, 2, 1), L.ATTN_QUERY)
    layer = ErrorKind.UNKNOWN_LAYER
    return [
        ("residual_wrote", lambda: neuron(5, 1), PLAIN, invalid, "residual_write"),
        ("residual_write", list, PLAIN, invalid, "at least one"),
        ("residual_write", lambda: neuron(TOKENS, 1), PLAIN, ErrorKind.UNKNOWN_ROW, "has 9"),
        ("residual_read", lambda: neuron(TOKENS, 1), PLAIN, ErrorKind.UNKNOWN_ROW, "has 9"),
        ("residual_write", lambda: head(4, 9, 1), PLAIN, ErrorKind.UNKNOWN_ROW, "has 9"),
        ("residual_write", lambda: neuron(5, 24), PLAIN, unit, "there are 24"),
        ("residual_write", lambda: head(4, 2, 2), PLAIN, unit, "there are 2"),
        ("residual_write", lambda: neuron(5, 1, 2), PLAIN, layer, "0 to 1"),
        ("residual_read", lambda: neuron(5, 1, -1), PLAIN, layer, "0 to 1"),
        ("residual_write", lambda: embedding(1).with_updates(layer_index=0), PLAIN, layer, "None"),
        (
            "residual_write",
            lambda: NodeIndex(N.LAYER, (1, 1), None),
            PLAIN,
            unit,
            "there are 1",
        ),
        ("residual_write", lambda: NodeIndex(N.LAYER, (1,), None), PLAIN, invalid, "token, sing"),
        ("residual_write", lambda: NodeIndex(N.MLP_NEURON, (1,), 0), PLAIN, invalid, "neuron"),
        ("residual_write", lambda: NodeIndex(N.MLP_NEURON, (1, None), 0), PLAIN, invalid, "each"),
        ("residual_write", lambda: backward, PLAIN, invalid, "forward"),
        ("residual_read", lambda: backward, PLAIN, invalid, "forward"),
        ("residual_write", lambda: query, PLAIN, invalid, "without a side"),
        ("token_write", lambda: value, PLAIN, invalid, "without a side"),
        ("residual_write", lambda: channel, PLAIN, invalid, "mlp_neuron"),
        ("residual_read", lambda: head(4, 2, 1), PLAIN, invalid, "ATTN_QUERY or ATTN_KEY"),
        ("token_read", lambda: value, PLAIN, invalid, "attn_value_in_edge_attribution"),
        ("residual_read", lambda: embedding(1), PLAIN, invalid, "mlp_neuron"),
        (
            "residual_read",
            lambda: score(head(2, 4, 1), L.ATTN_KEY),
            PLAIN,
            invalid,
            "later token",
        ),
        ("residual_write", lambda: latent, PLAIN, invalid, "Autoencoders are needed"),
        ("residual_write", lambda: generic, config, invalid, "several"),
        (
            "residual_read",
            lambda: latent.with_updates(layer_index=2),
            config,
            layer,
            "layers 0, 1",
        ),
        (
            "residual_write",
            lambda: latent.with_updates(tensor_indices=(5, 11)),
            config,
            unit,
            "there are 11",
        ),
        ("residual_write", lambda: generic, hidden, invalid, "mlp_pre_act"),
        (
            "residual_write",
            lambda: NodeIndex(N.MLP_AUTOENCODER_LATENT, (5, 1), 1),
            narrow,
            invalid,
            "spliced",
        ),
        ("token_pair_attribution", lambda: neuron(5, 1), config, invalid, "attention_auto"),
        ("token_pair_attribution", lambda: generic, config, invalid, "attention_auto"),
        ("token_pair_attribution", lambda: latent, PLAIN, invalid, "Autoencoders are needed"),
        (
            "token_pair_attribution",
            lambda: latent,
            jump,
            ErrorKind.UNSUPPORTED_AUTOENCODER,
            "jumprelu",
        ),
        (
            "token_pair_attribution",
            lambda: latent,
            normed,
            ErrorKind.UNSUPPORTED_AUTOENCODER,
            "layer_norm",
        ),
    ]


@pytest.mark.parametrize("case", refused(), ids=lambda case: f"{case[0]}: {case[4]}")
def test_wrong_use_is_refused(case: Refused) -> None:
    name, nodes, config, kind, message = case
    with pytest.raises(InvalidInput, match=message) as error:
        postprocess(name, nodes(), tiny_values()[0], config)
    assert error.value.kind is kind


def test_an_inactive_latent_has_no_attribution() -> None:
    values, config = tiny_values(spliced=False)
    one = both_kinds().of(N.ATTENTION_AUTOENCODER_LATENT).at_layer(1)
    latents = one.encode(values.raw(L.RESID_DELTA_ATTN, FORWARD, 1))
    on, off = ((latents > 0).nonzero()[0].tolist(), (latents == 0).nonzero()[0].tolist())
    nodes = [NodeIndex(one.node_type, tuple(place), 1) for place in (on, off)]
    assert postprocess("token_pair_attribution", nodes[:1], values, config).shape == (1, TOKENS)
    with pytest.raises(InvalidInput, match="inactive") as error:
        postprocess("token_pair_attribution", nodes, values, config)
    assert error.value.kind is ErrorKind.INVALID_ARGUMENT
    assert str(tuple(off)) in str(error.value)


def test_missing_values_and_autoencoders_are_named() -> None:
    values, _ = tiny_values()
    place = (L.RESID_POST_ATTN, FORWARD, 1)
    partial = PassValues(
        {at: tensor for at, tensor in values._values.items() if at != place}, values._weights
    )
    with pytest.raises(Unavailable, match="resid_post_attn"):
        postprocess("residual_read", neuron(3, 5), partial)
    only = with_autoencoder(random_autoencoder(L.RESID_DELTA_MLP, 1, 16))
    with pytest.raises(Unavailable, match="attention_autoencoder_latent"):
        postprocess(
            "residual_read", NodeIndex(N.ATTENTION_AUTOENCODER_LATENT, (1, 2), 1), values, only
        )


# The table


def test_the_declarations_can_be_listed_without_torch() -> None:
    code = (
        "import sys; from actstore.query.postprocess import POSTPROCESSORS; "
        "print([str(one) for one in POSTPROCESSORS.values()], 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{list(POSTPROCESSORS)} False"


def test_every_declaration_says_what_it_is() -> None:
    assert list(POSTPROCESSORS) == [
        "residual_write",
        "token_write",
        "residual_read",
        "token_read",
        "token_pair_attribution",
    ]
    axes = {Dimension.CHANNEL, Dimension.VOCABULARY, Dimension.ATTENDED}
    assert {declared.axis for declared in POSTPROCESSORS.values()} == axes
    for name, declared in POSTPROCESSORS.items():
        assert declared.name == name
        assert declared.meaning
        assert len({(rule.node_type, rule.side) for rule in declared.rules}) == len(declared.rules)
        for rule in declared.rules:
            assert rule.formula
            assert rule.axes[0] is Dimension.TOKEN
