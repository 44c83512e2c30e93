"""Every family: what is captured, what follows from it, and a store end to end."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VARIANTS, tiny_config, tiny_model
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actstore.ingest.attention import switched_to
from actstore.ingest.capture import Capture
from actstore.ingest.live_pass import run_pass
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import NextTokenLogProb
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.ingest.reference import independent_forward, stream_independent_gradients
from actstore.ingest.settings import IngestSettings
from actstore.prompt import Prompt
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import evaluate
from actstore.query.derived.registry import SCALARS
from actstore.query.gradients import GradientGraph, pull_back
from actstore.query.pass_values import PassValues
from actstore.query.postprocess import postprocess
from actstore.query.session import Store
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.model.architecture import ARCHITECTURES, architecture_of
from actstore.store.model.description import _rounded
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import RECIPES, Recipe, Setting, WeightName
from actstore.store.model.sources import Source
from actstore.store.nodes import (
    Ablation,
    ActivationIndex,
    AttentionTraceType,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import (
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
    NodeType,
    PassType,
    WeightLocationType,
)

L = ActivationLocationType
W = WeightLocationType
TOKENS = 9
POST_NORMED = ("gemma2", "gemma3")
every_variant = pytest.mark.parametrize("variant", sorted(VARIANTS))

Place = tuple[L, int | None]


def described(variant: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model((tiny_model(variant, dtype=dtype).requires_grad_(False), None))


@cache
def wide(variant: str) -> LoadedModel:
    """In float64, for what is to be equal beyond the dtype of a run."""
    return described(variant, torch.float64)


def batch(rows: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(53, (rows, tokens), generator=torch.Generator().manual_seed(1))


@cache
def reference(variant: str) -> dict[Place, torch.Tensor]:
    """Every place of one sequence by plain mathematics, float64 ``(token, …)``."""
    found = independent_forward(wide(variant), batch(1))
    return {
        (location, layer if location.has_layers else None): tensor[0]
        for location, tensors in found.items()
        for layer, tensor in enumerate(tensors)
    }


def finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().nan_to_num(neginf=-1e9)


def place_of(source: Source, layer: int | None) -> Place:
    of, at = source.place(layer, 3)
    assert isinstance(of, L)
    return of, at


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found, expected = finite(found), finite(expected)
    assert found.shape == expected.shape
    largest = max(1.0, float(expected[expected > -1e9].abs().max()) if expected.numel() else 0.0)
    assert float((found - expected).abs().max()) <= tolerance * largest


# Capture


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits


@every_variant
@pytest.mark.parametrize("with_pairs", [False, True])
def test_logits_are_the_models_own_bit_by_bit(variant: str, with_pairs: bool) -> None:
    loaded = described(variant)
    ids = batch()
    bare = logits_of(loaded.model, ids)
    locations = [one for one in loaded.architecture.taps if with_pairs or not one.is_pair_shaped]
    with Capture(loaded, locations) as capture:
        found = capture.run(ids)[L.LOGITS][0]
    with switched_to(loaded.model, "eager"):
        stepwise = logits_of(loaded.model, ids)
    assert torch.equal(found, stepwise if with_pairs else bare)
    assert torch.equal(logits_of(loaded.model, ids), bare)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_captured_values_are_those_of_plain_mathematics(variant: str, dtype: torch.dtype) -> None:
    loaded = described(variant, dtype)
    with Capture(loaded, loaded.architecture.taps) as capture:
        found = capture.run(batch())
    expected = independent_forward(loaded, batch())
    assert set(found) == set(loaded.architecture.taps)
    for location, tensors in found.items():
        for one, other in zip(tensors, expected[location], strict=True):
            assert tuple(one.shape[2:]) == loaded.dimensions.unit_shape(location, TOKENS)
            # RMS norms and probabilities are float32 in transformers, whatever the model is.
            assert_close(one, other, 2e-6)


@every_variant
def test_what_is_added_sums_to_the_stream(variant: str) -> None:
    loaded = described(variant)
    with Capture(loaded, loaded.architecture.taps) as capture:
        found = capture.run(batch())
    entering = found[L.RESID_POST_EMBEDDING][0]
    for layer in range(loaded.dimensions.n_layers):
        attention, mlp = found[L.RESID_DELTA_ATTN][layer], found[L.RESID_DELTA_MLP][layer]
        after = found[L.RESID_POST_MLP][layer]
        if loaded.dimensions.is_parallel:
            assert L.RESID_POST_ATTN not in found
            assert torch.equal(after, mlp + attention + entering)
        else:
            middle = found[L.RESID_POST_ATTN][layer]
            assert torch.equal(middle, entering + attention)
            assert torch.equal(after, middle + mlp)
        entering = after


@every_variant
def test_attention_follows_from_queries_keys_and_values(variant: str) -> None:
    loaded = described(variant, torch.float64)
    with Capture(loaded, loaded.architecture.taps) as capture:
        found = capture.run(batch())
    dimensions = loaded.dimensions
    shared = dimensions.n_heads // dimensions.kv_heads
    for layer in range(dimensions.n_layers):
        pattern = found[L.ATTN_QK_PROBS][layer]
        rows = finite(found[L.ATTN_QK_LOGITS][layer]).softmax(-1)
        assert_close(pattern, rows, 1e-6)
        assert float((pattern.sum(-1) - 1).abs().max()) < 1e-6
        value = found[L.ATTN_VALUE][layer]
        assert value.shape[2] == dimensions.kv_heads
        for head in range(dimensions.n_heads):
            z = pattern[:, :, head] @ value[:, :, head // shared]
            assert_close(found[L.ATTN_WEIGHTED_SUM_OF_VALUES][layer][:, :, head], z, 1e-6)
        window = dimensions.window_at(layer)
        seen = (pattern > 0).any(2)[0]
        for token, attended in itertools.product(range(TOKENS), repeat=2):
            allowed = 0 <= token - attended < (window or TOKENS)
            assert bool(seen[token, attended]) == allowed


@every_variant
def test_the_norms_denominators_are_what_the_norms_divide_by(variant: str) -> None:
    loaded = described(variant, torch.float64)
    taps = loaded.architecture.taps
    scales = [one for one in taps if one.label.endswith("layer_norm_scale")]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = []
    for location in scales:
        name = taps[location].module_name(1 if location.has_layers else None)

        def note(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor, key: str) -> None:
            seen[key] = (inputs[0].detach(), output.detach())

        module = loaded.model.get_submodule(name)
        hooks.append(module.register_forward_hook(partial(note, key=location.label)))
    with Capture(loaded, scales) as capture:
        found = capture.run(batch())
    for hook in hooks:
        hook.remove()
    weights = loaded.weights()
    for location in scales:
        scale = found[location][1 if location.has_layers else 0]
        x, y = seen[location.label]
        assert scale.shape == (*x.shape[:2], 1)
        if loaded.dimensions.norm.centres:
            x = x - x.mean(-1, keepdim=True)
        name = loaded.architecture.taps[location].module_name(1 if location.has_layers else None)
        gain = loaded.model.get_submodule(name).get_parameter("weight")
        expected = x / scale * (gain + loaded.architecture.gain_offset)
        if loaded.dimensions.norm.centres:
            expected = expected + loaded.model.get_submodule(name).get_parameter("bias")
        assert_close(y, expected, 1e-6)
    final = weights.weight(W.LAYER_NORM_GAIN_FINAL)
    assert abs(float(final.mean()) - 1) < 0.3


# Reconstruction


@cache
def weight_reader(variant: str) -> Callable[[WeightName, int | None], torch.Tensor]:
    weights = wide(variant).weights()

    @cache
    def read(name: WeightName, layer: int | None) -> torch.Tensor:
        if isinstance(name, WeightLocationType):
            return torch.from_numpy(weights.weight(name, layer if name.has_layers else None))
        assert layer is not None
        return torch.from_numpy(weights.attention_bias(name, layer))

    return read


def recipes_of(variant: str) -> tuple[Recipe, ...]:
    return RECIPES[wide(variant).architecture.name]


def followed(
    variant: str, recipe: Recipe, layer: int | None, values: Mapping[Place, torch.Tensor]
) -> torch.Tensor:
    dimensions = wide(variant).dimensions
    read = weight_reader(variant)
    inputs = [values[source.place(layer, dimensions.n_layers)] for source in recipe.inputs]  # type: ignore[index]
    weights = [read(name, layer) for name in recipe.weights]
    return recipe.function(inputs, weights, Setting(dimensions, layer, batch(1)[0]))


@every_variant
def test_each_recipe_gives_the_value_that_is_recorded(variant: str) -> None:
    values = reference(variant)
    targets = set()
    for recipe in recipes_of(variant):
        targets.add(recipe.target)
        for layer in range(3) if recipe.target.has_layers else (None,):
            assert_close(
                followed(variant, recipe, layer, values), values[recipe.target, layer], 1e-11
            )
    assert targets == set(wide(variant).architecture.taps)


def needed_sets(variant: str, target: L) -> Iterator[frozenset[L]]:
    """Every minimal set of locations (all layers of each) that a location follows from."""
    recipes = recipes_of(variant)
    taps = [one for one in wide(variant).architecture.taps if one is not target]
    found: list[frozenset[L]] = []
    for size in (1, 2):
        for chosen in itertools.combinations(taps, size):
            given = frozenset(chosen)
            if any(smaller <= given for smaller in found):
                continue
            if target in reachable(recipes, given):
                found.append(given)
                yield given


def reachable(recipes: tuple[Recipe, ...], given: frozenset[L]) -> set[L]:
    # Without the tokens, from which everything follows.
    known = set(given)
    streams = {L.RESID_POST_EMBEDDING, L.RESID_POST_MLP}
    changed = True
    while changed:
        changed = False
        for recipe in recipes:
            inputs = {source.location for source in recipe.inputs}
            if any(source.layer == "previous" for source in recipe.inputs):
                inputs |= streams
            if recipe.inputs and recipe.target not in known and inputs <= known:
                known.add(recipe.target)
                changed = True
    return known


@every_variant
def test_each_location_follows_from_every_minimal_set_that_suffices(variant: str) -> None:
    values = reference(variant)
    recipes = recipes_of(variant)
    tried = 0
    for target in wide(variant).architecture.taps:
        for given in needed_sets(variant, target):
            known = {place: tensor for place, tensor in values.items() if place[0] in given}
            changed = True
            while changed and not all(place in known for place in values if place[0] is target):
                changed = False
                for recipe in recipes:
                    if not recipe.inputs or recipe.target in given:
                        continue
                    for layer in range(3) if recipe.target.has_layers else (None,):
                        place = (recipe.target, layer)
                        places = {source.place(layer, 3) for source in recipe.inputs}
                        if place in known or not places <= known.keys():
                            continue
                        known[place] = followed(variant, recipe, layer, known)
                        changed = True
            for place in values:
                if place[0] is target:
                    assert_close(known[place], values[place], 1e-9)
            tried += 1
    assert tried > 20


# Gradients


@every_variant
def test_the_gradient_chain_is_autograds(variant: str) -> None:
    loaded, ids = wide(variant), batch(1)
    expected: dict[Place, torch.Tensor] = {}

    def keep(location: L, layer: int | None, gradient: torch.Tensor) -> None:
        expected[location, layer] = gradient[0]

    stream_independent_gradients(
        loaded, ids, NextTokenLogProb(), None, keep, locations=set(loaded.architecture.taps)
    )
    values, read, dimensions = reference(variant), weight_reader(variant), loaded.dimensions
    graph = GradientGraph(recipes_of(variant), 3, {(L.LOGITS, None)})
    assert set(graph.reachable) == set(expected)
    found: dict[Place, torch.Tensor] = {(L.LOGITS, None): expected[L.LOGITS, None]}

    def gradient(place: Place) -> torch.Tensor:
        if place not in found:
            parts = []
            for consumer in graph.consumers(place):
                inputs = [values[place_of(one, consumer.layer)] for one in consumer.recipe.inputs]
                weights = [read(name, consumer.layer) for name in consumer.recipe.weights]
                setting = Setting(dimensions, consumer.layer, ids[0])
                after = gradient(consumer.place)
                scale = partial(values.__getitem__, place)
                parts.append(pull_back(consumer, after, inputs, weights, setting, scale))
            found[place] = torch.stack(parts).sum(0)
        return found[place]

    for place, truth in expected.items():
        assert_close(gradient(place), truth, 1e-9)


@every_variant
def test_gradients_of_a_live_pass_are_those_of_plain_mathematics(variant: str) -> None:
    loaded, ids = described(variant), batch(1)
    (found,) = run_pass(loaded, ids.tolist(), objective=NextTokenLogProb())
    expected: dict[Place, torch.Tensor] = {}
    stream_independent_gradients(
        loaded,
        ids,
        NextTokenLogProb(),
        None,
        lambda location, layer, gradient: expected.update({(location, layer): gradient[0]}),
        locations=set(loaded.architecture.taps),
    )
    compared = 0
    for (location, layer), gradient in expected.items():
        place = (location, PassType.BACKWARD, layer)
        assert place in found.values
        assert_close(found.values[place], gradient, 1e-4)
        compared += 1
    assert compared == len(expected) > 40


# Writes


def pass_values(variant: str) -> PassValues:
    loaded = wide(variant)
    (found,) = run_pass(loaded, batch(1).tolist(), objective=NextTokenLogProb())
    return PassValues(found.values, loaded.weights())


@every_variant
def test_writes_of_heads_and_neurons_sum_to_what_the_layer_adds(variant: str) -> None:
    values = pass_values(variant)
    read, dimensions = weight_reader(variant), wide(variant).dimensions
    for layer in range(3):
        for name, place, bias in (
            ("attn_write_sum_heads", L.RESID_DELTA_ATTN, W.ATTN_OUTPUT_BIAS),
            ("resid_delta_mlp_from_mlp_post_act", L.RESID_DELTA_MLP, W.MLP_OUTPUT_BIAS),
        ):
            written = evaluate(SCALARS[name], values, layer)
            if name.startswith("attn"):
                written = written.sum(1)
            added = values.raw(place, PassType.FORWARD, layer)
            if not dimensions.has_post_norms:
                written = written + read(bias, layer)
            assert_close(written, added, 5e-6)


@every_variant
def test_views_of_a_write_agree(variant: str) -> None:
    values = pass_values(variant)

    def derive(name: str) -> torch.Tensor:
        return evaluate(SCALARS[name], values, 1)

    write = derive("mlp_write")
    norms = write.square().sum(-1).sqrt()
    assert_close(derive("mlp_write_norm").abs(), norms, 1e-9)
    direction = values.raw(L.RESID_POST_MLP, PassType.BACKWARD, 2)
    assert_close(
        derive("mlp_write_to_final_residual_grad"),
        torch.einsum("tfd,td->tf", write, direction),
        1e-9,
    )
    heads = derive("attn_write")
    assert heads.shape[2] == wide(variant).dimensions.n_heads
    assert_close(derive("unflattened_attn_write_norm"), heads.square().sum(-1).sqrt(), 1e-9)
    assert_close(derive("attn_write_sum_heads"), heads.sum(2), 1e-9)
    assert_close(
        derive("attn_write_norm_per_sequence_token"),
        heads.sum(1).square().sum(-1).sqrt(),
        1e-9,
    )
    assert_close(
        derive("unflattened_attn_write_to_final_residual_grad"),
        torch.einsum("qkhd,qd->qkh", heads, direction),
        1e-9,
    )


# Nodes


HEAD, NEURON = NodeType.ATTENTION_HEAD, NodeType.MLP_NEURON


def note_input(into: list[torch.Tensor], _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    into.append(inputs[0])


def give_leaf(into: list[torch.Tensor], _: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
    into.append(inputs[0].detach().requires_grad_())
    return (into[0], *inputs[1:])


@every_variant
def test_traces_differentiate_what_the_model_computes(variant: str) -> None:
    loaded, ids = described(variant), batch(1)
    for node in (NodeIndex(NEURON, (6, 3), 1), NodeIndex(HEAD, (6, 4, 2), 1)):
        is_head = node.node_type is HEAD
        trace = TraceConfig(
            node,
            PreOrPostAct.POST,
            detach_layer_norm_scale=False,
            attention_trace_type=AttentionTraceType.QK if is_head else None,
        )
        (found,) = run_pass(loaded, ids.tolist(), trace=trace)
        seen: list[torch.Tensor] = []
        tap = loaded.architecture.taps[L.MLP_POST_ACT]
        module = loaded.model.get_submodule(tap.module_name(1))
        keep = module.register_forward_pre_hook(partial(note_input, seen))
        leaves: list[torch.Tensor] = []
        first = loaded.model.get_submodule(
            loaded.architecture.taps[L.RESID_POST_EMBEDDING].module_name(None)
        )
        start = first.register_forward_pre_hook(partial(give_leaf, leaves))
        with switched_to(loaded.model, "eager"):
            attentions = loaded.model(ids, output_attentions=True).attentions
        keep.remove()
        start.remove()
        value = attentions[1][0, 2, 6, 4] if is_head else seen[0][0, 6, 3]
        (expected,) = torch.autograd.grad(value, leaves)
        assert found.objective_value == pytest.approx(float(value.detach()), abs=1e-5)
        gradient = found.values[L.RESID_POST_EMBEDDING, PassType.BACKWARD, None]
        assert float(expected.abs().max()) > 1e-4
        assert_close(gradient, expected[0], 1e-5)


@every_variant
def test_what_a_node_reads_is_the_gradient_of_its_trace(variant: str) -> None:
    loaded, ids = wide(variant), batch(1)
    prompt = Prompt(loaded, ids[0].tolist(), objective="next_token_log_prob")
    cases: list[tuple[NodeIndex, AttentionTraceType | None, int]] = [
        (NodeIndex(NEURON, (6, 3), 1), None, 6)
    ]
    head = NodeIndex(HEAD, (6, 4, 2), 1)
    cases += [(head, AttentionTraceType.Q, 6), (head, AttentionTraceType.K, 4)]
    for node, side, token in cases:
        trace = TraceConfig(node, PreOrPostAct.PRE, attention_trace_type=side)
        (found,) = run_pass(loaded, ids.tolist(), trace=trace)
        place = L.RESID_POST_ATTN if node.node_type is NEURON else L.RESID_POST_MLP
        is_before = place not in loaded.architecture.taps
        place, layer = (L.RESID_POST_MLP, 0) if is_before else (place, 1 if side is None else 0)
        gradient = found.values[place, PassType.BACKWARD, layer]
        asked = node
        if side is not None:
            of = {AttentionTraceType.Q: L.ATTN_QUERY, AttentionTraceType.K: L.ATTN_KEY}[side]
            asked = node.to_subnode_index(of)
        (read,) = postprocess("residual_read", [asked], prompt.values)
        # The other side's constants are recorded ones, which RMS norms rounded to float32.
        assert_close(torch.as_tensor(read), gradient[token], 1e-6)


@every_variant
def test_what_one_node_writes_is_its_part_of_the_whole(variant: str) -> None:
    loaded = wide(variant)
    prompt = Prompt(loaded, batch(1)[0].tolist(), objective="next_token_log_prob")
    for node, name in (
        (NodeIndex(NEURON, (5, 3), 1), "mlp_write"),
        (NodeIndex(HEAD, (5, 4, 3), 1), "attn_write"),
    ):
        config = DstConfig(node_index_for_attribution=node)
        alone = prompt.derive("single_node_write", config=config, dtype="float64").numpy()
        whole = prompt.derive(name, dtype="float64").numpy()[1]
        assert np.abs(whole[node.tensor_indices]).max() > 0
        np.testing.assert_allclose(alone.reshape(TOKENS, -1)[5], whole[node.tensor_indices])
        (written,) = postprocess("residual_write", [node], prompt.values)
        np.testing.assert_allclose(written, whole[node.tensor_indices], rtol=1e-5, atol=1e-7)


@every_variant
def test_a_trace_through_a_value_is_the_write_along_what_reads_it(variant: str) -> None:
    loaded, ids = wide(variant), batch(1)
    reader = NodeIndex(NEURON, (6, 3), 2)
    trace = TraceConfig(
        NodeIndex(HEAD, (6, 4, 2), 1),
        attention_trace_type=AttentionTraceType.V,
        downstream_trace_config=TraceConfig(reader),
    )
    (found,) = run_pass(loaded, ids.tolist(), trace=trace)
    prompt = Prompt(loaded, ids[0].tolist(), objective="next_token_log_prob")
    write = prompt.derive("attn_write", dtype="float64").numpy()[1][6, 4, 2]
    (read,) = postprocess("residual_read", [reader], prompt.values)
    assert found.objective_value == pytest.approx(float(write @ read.numpy()), rel=1e-4)
    assert abs(float(write @ read.numpy())) > 1e-5


@every_variant
def test_ablations_set_what_the_model_computes_on_with(variant: str) -> None:
    loaded, ids = wide(variant), batch(1)
    (plain,) = run_pass(loaded, ids.tolist())
    for location, indices in (
        (L.ATTN_VALUE, (3, 0, 2)),
        (L.ATTN_QK_PROBS, (6, 2, 1)),
        (L.RESID_DELTA_ATTN, (4, 5)),
        (L.MLP_PRE_ACT, (4, 5)),
        (L.RESID_POST_ATTN, (4, 5)),
    ):
        ablation = Ablation(ActivationIndex(location, indices, 1), 2.5)
        if location not in loaded.architecture.taps:
            with pytest.raises(InvalidInput, match="a parallel residual"):
                run_pass(loaded, ids.tolist(), ablations=[ablation])
            continue
        (found,) = run_pass(loaded, ids.tolist(), ablations=[ablation])
        place = (location, PassType.FORWARD, 1)
        # An index has the attended token before the head, a stored tensor after it.
        at = (indices[0], *reversed(indices[1:])) if location.is_pair_shaped else indices
        assert float(found.values[place][at]) == pytest.approx(2.5)
        logits = (L.LOGITS, PassType.FORWARD, None)
        moved = (found.values[logits] - plain.values[logits]).abs().amax(-1)
        assert float(moved[indices[0]]) > 1e-6
        assert not moved[: indices[0]].any()


@every_variant
def test_edges_reach_what_reads_later(variant: str) -> None:
    loaded = wide(variant)
    prompt = Prompt(loaded, batch(1)[0].tolist(), objective="next_token_log_prob")
    config = DstConfig(node_index_for_attribution=NodeIndex(HEAD, (5, 4, 3), 1))
    reached = prompt.derive("mlp_in_edge_activation", config=config, dtype="float64").numpy()
    assert not reached[0].any()
    # Side by side, the MLP reads what attention reads.
    assert reached[1].any() == (not loaded.dimensions.is_parallel)
    assert reached[2].any()
    through = prompt.derive("attn_value_in_edge_attribution", config=config, dtype="float64")
    assert through.numpy()[2].any()
    into = DstConfig(node_index_for_attribution=NodeIndex(NEURON, (6, 3), 1))
    effects = prompt.derive("mlp_out_edge_attribution", config=into, dtype="float64").numpy()
    assert effects[0].any()
    assert not effects[1:].any()
    heads = prompt.derive("attn_out_edge_attribution", config=into, dtype="float64").numpy()
    assert heads[1].any() == (not loaded.dimensions.is_parallel)


# Stores


@cache
def ingested(variant: str, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 53, length).tolist() for length in (17, 32, 9, 24)]
    source = folder / "documents.jsonl"
    source.write_text("\n".join(f'{{"token_ids": {tokens}}}' for tokens in documents))
    settings = IngestSettings(
        locations="full",
        keep={"logits": "raw"},
        objective="next_token_log_prob",
        segment_rows=512,
        dtype="float32",
    )
    report = ingest(described(variant), Corpus(str(source)), folder / "store", settings)
    assert max(report.errors.values()) < 1e-3, report.errors
    return folder / "store"


@every_variant
def test_a_store_from_end_to_end(variant: str, tmp_path: Path) -> None:
    loaded = described(variant)
    store_path = ingested(variant, tmp_path)
    with Store(store_path) as store:
        taps = loaded.architecture.taps
        assert set(store.locations) >= {one.label for one in taps}
        for location in taps:
            entry = store.locations[location.label]
            assert entry.kind in ("stored", "reconstructed")
            assert (entry.kind == "stored") == (not location.is_pair_shaped)
            assert (entry.measured_error is None) == location.is_pair_shaped
        ids = torch.tensor(store.reader.segment(0).sequence_token_ids(1))[None]
        expected = independent_forward(loaded, ids)
        for location in taps:
            found = store.raw(location.label, sequences=[1], dtype="float64").numpy()
            if not location.has_layers:
                found = found[None]
            for layer, truth in enumerate(expected[location]):
                assert_close(torch.from_numpy(found[layer].copy()), truth[0], 1e-5)
        assert_topk(store, "mlp_write_norm", layers=[1])
        assert_topk(store, "attn_write_norm_per_sequence_token")
        assert_topk(store, "attn_value", layers=[2])
        assert_topk(store, "mlp_act_times_grad")
        (row,) = store.sql("SELECT count(*), min(write_norm) FROM neurons").fetchall()
        assert row[0] == 60
        assert row[1] > 0
        (row,) = store.sql("SELECT count(*), min(value_output_norm) FROM heads").fetchall()
        assert row[0] == 12
        assert row[1] > 0


def assert_topk(store: Store, name: str, **options: Any) -> None:
    """The best values are those of all derived values, whatever finds them."""
    best = store.topk(name, k=5, special=True, **options).column("value")
    values = store.derive(name, layers=options.get("layers"), dtype="float64").numpy()
    every = np.sort(values[~np.isnan(values)])
    np.testing.assert_allclose(best, every[::-1][:5], rtol=1e-6)


def test_presets_have_what_a_model_has() -> None:
    settings = IngestSettings(locations="attention,logits", objective="next_token_log_prob")
    parallel = settings.for_model(described("gpt_neox").architecture.taps)
    assert L.RESID_POST_ATTN not in {*parallel.chosen, *parallel.chosen_gradients}
    assert set(settings.chosen) - set(parallel.chosen) == {L.RESID_POST_ATTN}
    whole = IngestSettings(locations="full").for_model(described("gemma2").architecture.taps)
    assert {*OPTIONAL_LOCATIONS} < set(whole.chosen)
    named = IngestSettings(locations="resid_mid").for_model(described("gpt_neox").architecture.taps)
    assert named.chosen == (L.RESID_POST_ATTN,)
    plain = IngestSettings().for_model(described("llama").architecture.taps)
    assert plain.chosen == IngestSettings().chosen


def test_a_parallel_model_says_why_it_has_no_stream_between(tmp_path: Path) -> None:
    loaded = described("gpt_neox")
    with pytest.raises(InvalidInput, match="read the same residual stream") as refused:
        Capture(loaded, [L.RESID_POST_ATTN])
    assert refused.value.kind is ErrorKind.UNKNOWN_LOCATION
    with Store(ingested("gpt_neox", tmp_path)) as store:
        assert store.locations["resid_post_attn"].kind == "not obtainable"
        with pytest.raises(Unavailable, match="a parallel residual"):
            store.raw("resid_post_attn", sequences=[0])
        with pytest.raises(Unavailable, match="a parallel residual"):
            store.derive("resid_post_attn_norm", sequences=[0])
        with pytest.raises(Unavailable, match="not gated"):
            store.raw("mlp_pre_linear", sequences=[0])


# Configs


@every_variant
def test_a_description_reads_back_from_a_manifest(variant: str) -> None:
    dimensions = wide(variant).dimensions
    assert ModelDimensions(**dimensions.record()) == dimensions
    if variant == "gpt2":
        assert set(dimensions.record()) == {
            "n_layers", "d_model", "n_heads", "d_head", "d_mlp", "vocabulary_size",
            "n_positions", "layer_norm_epsilon", "activation_function", "score_scale",
            "score_scale_by_layer",
        }  # fmt: skip


def test_configs_of_older_files_mean_the_same() -> None:
    new = tiny_config("gpt_neox").to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rotary_pct": 0.5, "rotary_emb_base": 10000}
    assert architecture_of(old).dimensions(old) == architecture_of(new).dimensions(new)
    new = Gemma3TextConfig(num_hidden_layers=7).to_dict()
    left_out = ("rope_parameters", "layer_types", "_sliding_window_pattern")
    old = {key: value for key, value in new.items() if key not in left_out}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    found = architecture_of(old).dimensions(old)
    assert found == architecture_of(new).dimensions(new)
    assert [window is None for window in found.sliding_windows] == [False] * 5 + [True, False]
    assert {one.theta for one in found.rotary} == {1e4, 1e6}


@pytest.mark.parametrize(
    ("variant", "changes", "match"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_act": "mish"}, "mish"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2", {"model_type": "qwen2_moe"}, "qwen2_moe"),
        ("gemma3", {"model_type": "gemma3"}, "gemma3_text"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    variant: str, changes: dict[str, Any], match: str
) -> None:
    config = {**tiny_config(variant).to_dict(), **changes}
    with pytest.raises(InvalidInput, match=match) as refused:
        architecture_of(config).dimensions(config)
    assert refused.value.kind is ErrorKind.UNSUPPORTED_MODEL


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_variant
def test_half_precision_from_files(variant: str, dtype: str, tmp_path: Path) -> None:
    wide_heads: dict[str, Any] = {"hidden_size": 24} if variant.startswith("gemma") else {}
    tiny_model(variant, **wide_heads).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.tokenizer is None
    assert str(loaded.dtype) == f"torch.{dtype}"
    with Capture(loaded, loaded.architecture.taps) as capture:
        found = capture.run(batch())
    expected = independent_forward(loaded, batch())
    for location, tensors in found.items():
        for one, other in zip(tensors, expected[location], strict=True):
            one, other = (each.double().nan_to_num(neginf=0) for each in (one, other))
            assert float((one - other).norm() / other.norm()) < (
                5e-2 if dtype == "bfloat16" else 6e-3
            )
    if variant.startswith("gemma"):
        (embedded,) = found[L.RESID_POST_EMBEDDING]
        assert torch.equal(embedded.double(), expected[L.RESID_POST_EMBEDDING][0])
        assert loaded.dimensions.embedding_scale != pytest.approx(24**0.5, abs=1e-4)


def test_rounded_rotations_are_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    torch.nn.Module.to(model, torch.bfloat16)
    with pytest.raises(InvalidInput, match=r"inv_freq are not those of its config"):
        load_model((model, None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("width", [2304, 3072, 2560, 3840, 640])
def test_the_embeddings_factor_is_rounded_as_the_model_rounds_it(dtype: str, width: int) -> None:
    expected = torch.tensor(width**0.5).to(getattr(torch, dtype))
    assert _rounded(width**0.5, dtype) == float(expected)


def test_each_family_has_a_variant() -> None:
    found = {wide(variant).architecture.name for variant in VARIANTS}
    assert found == {family.name for family in ARCHITECTURES}
