"""Forward and backward passes over prompts, against autograd and finite differences."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import (
    ablate,
    assert_close,
    assert_same_value,
    both_kinds,
    random_autoencoder,
    random_ids,
    trace_of,
)
from tiny_gpt2 import LOCATIONS, tiny_gpt2

from actstore.ingest import attention
from actstore.ingest.capture import Capture
from actstore.ingest.live_pass import LivePass, run_pass
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import (
    LogitDiff,
    NextTokenLogProb,
    Objective,
    Probabilities,
    Target,
    Zero,
)
from actstore.ingest.reference import stream_independent_forward
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, Unavailable
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_functions import Normalisation
from actstore.store.nodes import (
    AttentionTraceType,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
)

L = ActivationLocationType
N = NodeType
FORWARD, BACKWARD = PassType.FORWARD, PassType.BACKWARD
PRE, POST = PreOrPostAct.PRE, PreOrPostAct.POST
V = AttentionTraceType.V
LOGIT_DIFF = LogitDiff((5, 40), (9, 61, 70))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model((tiny_gpt2(dtype=torch.float64), None))


# --- random models ---------------------------------------------------------------------


def independent_pass(
    loaded: LoadedModel, prompt: Sequence[int], objective: Objective
) -> dict[Any, torch.Tensor]:
    """Every location and its gradient by autograd through the independent forward."""
    graph: dict[tuple[L, int | None], torch.Tensor] = {}

    def keep(location: L, layer: int | None, tensor: torch.Tensor) -> None:
        if location is L.RESID_POST_EMBEDDING:
            tensor.requires_grad_()
        tensor.retain_grad()
        graph[location, layer] = tensor

    ids = torch.tensor([list(prompt)])
    stream_independent_forward(loaded, ids, keep, locations=LOCATIONS)
    objective(graph[L.LOGITS, None], ids, [len(prompt)], None).sum().backward()  # type: ignore[no-untyped-call]
    found: dict[Any, torch.Tensor] = {}
    for (location, layer), tensor in graph.items():
        assert tensor.grad is not None
        found[location, FORWARD, layer] = tensor.detach()[0]
        found[location, BACKWARD, layer] = tensor.grad[0]
    return found


@given(
    length=st.integers(1, 12),
    seed=st.integers(0, 5),
    by_layer=st.booleans(),
    function=st.sampled_from(["gelu_new", "gelu", "relu", "silu"]),
    objective=st.sampled_from([LOGIT_DIFF, NextTokenLogProb(), Probabilities((1, 2))]),
)
@settings(max_examples=15)
def test_gradients_equal_autograd_through_an_independent_forward(
    length: int, seed: int, by_layer: bool, function: str, objective: Objective
) -> None:
    model = tiny_gpt2(
        seed=seed,
        dtype=torch.float64,
        scale_attn_by_inverse_layer_idx=by_layer,
        activation_function=function,
        vocab_size=71,
    )
    loaded = load_model((model, None))
    prompt = random_ids(length, seed)
    [found] = run_pass(loaded, [prompt], objective=objective)
    expected = independent_pass(loaded, prompt, objective)
    assert_close(found.values, expected, 1e-11)
    assert found.token_ids == tuple(prompt)


def upstream_of(location: L, layer: int) -> set[tuple[L, int | None]]:
    """The places that a trace from a residual stream has gradients for."""
    every = [(one, at) for one in LOCATIONS for at in (range(2) if one.has_layers else (None,))]
    within = LOCATIONS[: LOCATIONS.index(location) + 1]
    return {
        (one, at)
        for one, at in every
        if one is L.RESID_POST_EMBEDDING
        or (at is not None and (at < layer or (at == layer and one in within)))
    }


@pytest.mark.parametrize(
    ("trace", "target", "residual", "upstream"),
    [
        (trace_of(N.MLP_NEURON, (4, 3), 1, PRE, False), L.MLP_PRE_ACT, L.RESID_POST_ATTN, 1),
        (trace_of(N.MLP_NEURON, (4, 3), 0, POST, False), L.MLP_POST_ACT, L.RESID_POST_ATTN, 0),
        (
            trace_of(N.ATTENTION_HEAD, (4, 2, 1), 1, PRE, False, AttentionTraceType.QK),
            L.ATTN_QK_LOGITS,
            L.RESID_POST_MLP,
            0,
        ),
        (
            trace_of(N.ATTENTION_HEAD, (4, 2, 1), 1, POST, False, AttentionTraceType.QK),
            L.ATTN_QK_PROBS,
            L.RESID_POST_MLP,
            0,
        ),
    ],
)
def test_a_trace_differentiates_the_activation_that_the_pass_records(
    loaded: LoadedModel, trace: TraceConfig, target: L, residual: L, upstream: int
) -> None:
    prompt = random_ids(7)
    [found] = run_pass(loaded, [prompt], trace=trace)
    graph: dict[tuple[L, int | None], torch.Tensor] = {}

    def keep(location: L, layer: int | None, tensor: torch.Tensor) -> None:
        if location is L.RESID_POST_EMBEDDING:
            tensor.requires_grad_()
        graph[location, layer] = tensor

    ids = torch.tensor([prompt])
    stream_independent_forward(loaded, ids, keep, locations=LOCATIONS)
    indices = trace.node_index.tensor_indices
    place = [indices[axis] for axis in ((0, 2, 1) if target.is_pair_shaped else (0, 1))]
    node = graph[target, trace.node_index.layer_index][0][tuple(place)]
    (expected,) = torch.autograd.grad(node, graph[L.RESID_POST_EMBEDDING, None])
    mine = found.values[L.RESID_POST_EMBEDDING, BACKWARD, None]
    torch.testing.assert_close(mine, expected[0], rtol=1e-10, atol=1e-12)
    assert found.objective_value == pytest.approx(node.item(), rel=1e-12)
    present = {(one, at) for one, kind, at in found.values if kind is BACKWARD}
    assert present == upstream_of(residual, upstream)


@pytest.mark.parametrize(
    "downstream",
    [
        trace_of(N.MLP_NEURON, (4, 3), 0, POST),
        trace_of(N.MLP_NEURON, (4, 3), 1, PRE, False),
        trace_of(N.MLP_AUTOENCODER_LATENT, (4, 3), 1),
        trace_of(N.ATTENTION_AUTOENCODER_LATENT, (4, 8), 1, POST, False),
        trace_of(N.ATTENTION_HEAD, (4, 2, 1), 1, POST, True, AttentionTraceType.QK),
    ],
)
def test_a_trace_through_v_is_what_the_head_adds_along_the_gradient_of_its_target(
    downstream: TraceConfig, loaded: LoadedModel
) -> None:
    prompt, families = random_ids(7, seed=5), both_kinds()
    [below] = run_pass(loaded, [prompt], trace=downstream, autoencoders=families)
    through_v = trace_of(N.ATTENTION_HEAD, (4, 2, 1), 0, kind=V, downstream=downstream)
    [found] = run_pass(loaded, [prompt], trace=through_v, autoencoders=families)
    layer = downstream.node_index.layer_index
    reads_mlp = downstream.node_index.node_type in (N.MLP_NEURON, N.MLP_AUTOENCODER_LATENT)
    read = (L.RESID_POST_ATTN, layer) if reads_mlp else (L.RESID_POST_MLP, 0)
    gradient = below.values[read[0], BACKWARD, read[1]][4]
    output = loaded.model.get_parameter("transformer.h.0.attn.c_proj.weight").detach()[8:]
    pattern = below.values[L.ATTN_QK_PROBS, FORWARD, 0][4, 1, 2]
    effect = pattern * below.values[L.ATTN_VALUE, FORWARD, 0][2, 1] @ output @ gradient
    assert abs(float(effect)) > 1e-8
    assert found.objective_value == pytest.approx(float(effect), rel=1e-9)
    start = found.values[L.RESID_POST_EMBEDDING, BACKWARD, None]
    assert start[2].any()
    assert not start[[0, 1, 3, 4, 5, 6]].any()


# --- batches ---------------------------------------------------------------------------

HEAD_TRACE = trace_of(N.ATTENTION_HEAD, (3, 1, 1), 1, POST, True, AttentionTraceType.Q)
RUNS: dict[str, dict[str, Any]] = {
    "forward": {},
    "objective": {"objective": LOGIT_DIFF},
    "every position": {"objective": NextTokenLogProb()},
    "trace": {"trace": HEAD_TRACE},
    "trace on the loss": {
        "objective": LOGIT_DIFF,
        "trace": trace_of(N.ATTENTION_HEAD, (3, 1, 1), 0, kind=V),
    },
    "splices": {"objective": LOGIT_DIFF, "autoencoders": both_kinds()},
    "latent": {
        "trace": trace_of(N.ATTENTION_AUTOENCODER_LATENT, (3, 4), 1),
        "autoencoders": both_kinds(),
    },
    "ablations": {
        "objective": LOGIT_DIFF,
        "ablations": [
            ablate(L.RESID_POST_ATTN, (None, 2), 0, 1.5),
            ablate(L.ATTN_QK_LOGITS, (None, None, 1), 1, 0.3),
            ablate(L.RESID_POST_MLP, (), 0, 0.7, BACKWARD),
            ablate(L.ATTN_VALUE, (2,), 1, -1.0),
        ],
    },
}


@pytest.fixture(scope="module")
def wide_vocabulary() -> LoadedModel:
    return load_model((tiny_gpt2(seed=3, dtype=torch.float64, vocab_size=71), None))


@pytest.mark.parametrize("run", RUNS)
def test_a_ragged_batch_equals_its_prompts_alone(run: str, wide_vocabulary: LoadedModel) -> None:
    prompts = [random_ids(length, seed=length) for length in (5, 12, 4, 9)]
    together = run_pass(wide_vocabulary, prompts, **RUNS[run])
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = run_pass(wide_vocabulary, [prompt], **RUNS[run])
        assert_close(found.values, alone.values, 1e-12)
        assert_same_value(found, alone)
        assert list(found.values) == list(alone.values)
        assert all(tensor.is_contiguous() for tensor in found.values.values())


def test_columns_reach_their_own_prompt(loaded: LoadedModel) -> None:
    prompts = [random_ids(6), random_ids(6)]
    columns: list[dict[str, object]] = [{"answer": 3}, {"answer": [4, 9]}]
    found = run_pass(loaded, prompts, objective=LogitDiff("answer"), columns=columns)
    targets: tuple[Target, ...] = (3, (4, 9))
    for one, target in zip(found, targets, strict=True):
        [expected] = run_pass(loaded, [prompts[0]], objective=LogitDiff(target))
        assert_close(one.values, expected.values, 1e-12)


# --- splices ---------------------------------------------------------------------------


@pytest.mark.parametrize("location", [L.MLP_POST_ACT, L.RESID_DELTA_MLP])
def test_splices_change_neither_values_nor_gradients(location: L, loaded: LoadedModel) -> None:
    prompt, objective = random_ids(8), LogitDiff(3, 4)
    [bare] = run_pass(loaded, [prompt], objective=objective)
    families = both_kinds(location)
    [spliced] = run_pass(loaded, [prompt], objective=objective, autoencoders=families)
    shared = {place: spliced.values[place] for place in bare.values}
    assert_close(shared, bare.values, 1e-10)
    online = {place[0] for place in spliced.values if place[0].is_online}
    assert L.ONLINE_AUTOENCODER_LATENT not in online
    assert len(online) == 4
    latents = {
        location: L.ONLINE_MLP_AUTOENCODER_LATENT,
        L.RESID_DELTA_ATTN: L.ONLINE_ATTENTION_AUTOENCODER_LATENT,
    }
    errors = {
        L.MLP_POST_ACT: L.ONLINE_MLP_AUTOENCODER_ERROR,
        L.RESID_DELTA_MLP: L.ONLINE_RESIDUAL_MLP_AUTOENCODER_ERROR,
        L.RESID_DELTA_ATTN: L.ONLINE_RESIDUAL_ATTENTION_AUTOENCODER_ERROR,
    }
    for autoencoder in families:
        at, layer = autoencoder.location, autoencoder.layer
        values = bare.values[at, FORWARD, layer]
        gradient = bare.values[at, BACKWARD, layer]
        encoded = autoencoder.encode(values)
        expected = {
            (latents[at], FORWARD, layer): encoded,
            (latents[at], BACKWARD, layer): gradient @ autoencoder.decoder.T,
            (errors[at], FORWARD, layer): values - autoencoder.decode(encoded),
            (errors[at], BACKWARD, layer): gradient,
        }
        assert_close({place: spliced.values[place] for place in expected}, expected, 1e-9)


@pytest.mark.parametrize("normalisation", Normalisation)
def test_a_normalised_autoencoder_changes_nothing_either(
    normalisation: Normalisation, loaded: LoadedModel
) -> None:
    prompt, objective = random_ids(8), LogitDiff(3, 4)
    [bare] = run_pass(loaded, [prompt], objective=objective)
    normalised = random_autoencoder(L.RESID_DELTA_MLP, 0, 16, normalisation=normalisation)
    [spliced] = run_pass(
        loaded, [prompt], objective=objective, autoencoders=Autoencoders([normalised])
    )
    assert_close({place: spliced.values[place] for place in bare.values}, bare.values, 1e-10)
    delta = (L.RESID_DELTA_MLP, FORWARD, 0)
    rows = normalised.decoder * normalised.output_scale(bare.values[delta])[..., None]
    expected = torch.einsum("tnd,td->tn", rows, bare.values[L.RESID_DELTA_MLP, BACKWARD, 0])
    found = spliced.values[L.ONLINE_MLP_AUTOENCODER_LATENT, BACKWARD, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_lone_family_goes_by_two_names(loaded: LoadedModel) -> None:
    lone = Autoencoders([random_autoencoder(L.RESID_DELTA_ATTN, 1, 16)])
    prompt, objective = random_ids(6), LogitDiff(3)
    for name in (L.ONLINE_AUTOENCODER_LATENT, L.ONLINE_ATTENTION_AUTOENCODER_LATENT):
        [found] = run_pass(
            loaded,
            [prompt],
            objective=objective,
            autoencoders=lone,
            ablations=[ablate(name, (2, 5), 1, 7.0)],
        )
        for kind in (FORWARD, BACKWARD):
            generic = found.values[L.ONLINE_AUTOENCODER_LATENT, kind, 1]
            named = found.values[L.ONLINE_ATTENTION_AUTOENCODER_LATENT, kind, 1]
            assert torch.equal(generic, named)
        assert named.shape == (6, 11)
        assert found.values[L.ONLINE_AUTOENCODER_LATENT, FORWARD, 1][2, 5] == 7.0
        assert not any(layer == 0 for location, _, layer in found.values if location.is_online)


def test_an_ablated_latent_keeps_the_error(loaded: LoadedModel) -> None:
    prompt, families = random_ids(6), both_kinds()
    [bare] = run_pass(loaded, [prompt], autoencoders=families)
    latent = (L.ONLINE_MLP_AUTOENCODER_LATENT, FORWARD, 1)
    token, unit = (int(at) for at in bare.values[latent].nonzero()[0])
    [found] = run_pass(
        loaded,
        [prompt],
        autoencoders=families,
        ablations=[ablate(latent[0], (token, unit), 1)],
    )
    error = (L.ONLINE_MLP_AUTOENCODER_ERROR, FORWARD, 1)
    assert torch.equal(found.values[error], bare.values[error])
    decoder = families.of(N.MLP_AUTOENCODER_LATENT).at_layer(1).decoder[unit]
    matrix = loaded.model.get_parameter("transformer.h.1.mlp.c_proj.weight").detach()
    lost = bare.values[latent][token, unit] * decoder @ matrix
    delta = (L.RESID_DELTA_MLP, FORWARD, 1)
    torch.testing.assert_close(bare.values[delta][token] - found.values[delta][token], lost)


# --- what is recorded ------------------------------------------------------------------


def test_a_pass_without_objective_is_the_capture(loaded: LoadedModel) -> None:
    prompt = random_ids(9)
    [found] = run_pass(loaded, [prompt])
    with Capture(loaded, LOCATIONS) as capture:
        captured = capture.run(torch.tensor([prompt]))
    assert found.objective_value is None
    assert len(found.values) == sum(map(len, captured.values()))
    for (location, kind, layer), tensor in found.values.items():
        assert kind is FORWARD
        assert not tensor.requires_grad
        assert torch.equal(tensor, captured[location][layer or 0][0])


def test_scores_are_masked_and_their_gradient_there_is_zero(loaded: LoadedModel) -> None:
    [found] = run_pass(loaded, [random_ids(7)], objective=NextTokenLogProb())
    above = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for layer in range(2):
        scores = found.values[L.ATTN_QK_LOGITS, FORWARD, layer].transpose(0, 1)
        gradient = found.values[L.ATTN_QK_LOGITS, BACKWARD, layer].transpose(0, 1)
        assert scores[:, above].isneginf().all()
        assert scores[:, ~above].isfinite().all()
        assert not gradient[:, above].any()
        assert gradient[:, ~above].any()


@pytest.mark.parametrize(
    "locations", [(L.MLP_POST_ACT,), (L.RESID_POST_MLP, L.ATTN_VALUE), (L.ATTN_QK_PROBS, L.LOGITS)]
)
@pytest.mark.parametrize("run", ["forward", "objective", "trace"])
def test_locations_restrict_what_is_recorded(
    locations: tuple[L, ...], run: str, wide_vocabulary: LoadedModel
) -> None:
    prompt = random_ids(6)
    [whole] = run_pass(wide_vocabulary, [prompt], **RUNS[run])
    [found] = run_pass(wide_vocabulary, [prompt], locations=locations, **RUNS[run])
    expected = {place: value for place, value in whole.values.items() if place[0] in locations}
    assert_close(found.values, expected, 1e-11)
    assert_same_value(found, whole)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_other_dtypes_follow_the_double_pass(dtype: torch.dtype, tolerance: float) -> None:
    loaded = load_model((tiny_gpt2(dtype=dtype), None))
    exact = load_model((tiny_gpt2(dtype=dtype).double(), None))
    prompt, families = random_ids(8), both_kinds()
    narrow = Autoencoders(one.to(dtype) for one in families)
    wide = Autoencoders(one.to(torch.float64) for one in narrow)
    for arguments in ({"objective": LogitDiff(3, 4)}, {"trace": HEAD_TRACE}):
        [found] = run_pass(loaded, [prompt], autoencoders=narrow, **arguments)
        [expected] = run_pass(exact, [prompt], autoencoders=wide, **arguments)
        assert found.values.keys() == expected.values.keys()
        for place, tensor in found.values.items():
            is_wide = (
                place[0].axes[0] in (Dimension.SINGLETON, Dimension.LATENT)
                or "ERROR" in place[0].name
            )
            assert tensor.dtype == (torch.float32 if is_wide else dtype), place
            difference = (tensor.double() - expected.values[place]).nan_to_num()
            scale = expected.values[place].nan_to_num(neginf=0).norm()
            assert difference.norm() <= tolerance * scale, place


def test_a_zero_objective_has_gradients_of_zero(loaded: LoadedModel) -> None:
    [found] = run_pass(loaded, [random_ids(4)], objective=Zero())
    assert found.objective_value == 0
    gradients = [tensor for (_, kind, _), tensor in found.values.items() if kind is BACKWARD]
    assert len(gradients) == 2 * 14 + 3
    assert not any(tensor.any() for tensor in gradients)


# --- the model stays as it was ---------------------------------------------------------


@pytest.fixture
def trainable() -> Iterator[LoadedModel]:
    model = tiny_gpt2(dtype=torch.float64)
    model.train()
    loaded = load_model((model, None))
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    yield loaded
    assert hooks == [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    assert not attention._recorders
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


class Watching(Zero):
    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        assert not any(parameter.requires_grad for parameter in self.model.parameters())
        assert not any(module.training for module in self.model.modules())
        return super().__call__(*arguments, **options)


class Failing(Zero):
    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("surroundings", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(surroundings: Any, trainable: LoadedModel) -> None:
    expected = run_pass(trainable, [random_ids(5)], objective=LogitDiff(3))[0]
    with surroundings():
        [found] = run_pass(trainable, [random_ids(5)], objective=LogitDiff(3))
        with pytest.raises(RuntimeError, match="on purpose"):
            run_pass(trainable, [random_ids(5)], objective=Failing())
        run_pass(trainable, [random_ids(5)], objective=Watching(trainable))
    assert_close(found.values, expected.values, 1e-14)
    assert not any(tensor.is_inference() for tensor in found.values.values())


def test_nothing_of_a_pass_outlives_it(trainable: LoadedModel) -> None:
    objective = LogitDiff(3)
    alive = weakref.ref(objective)
    through_v = trace_of(N.ATTENTION_HEAD, (3, 1, 1), 1, kind=V)
    shift = ablate(L.RESID_POST_ATTN, (2,), 0, 1.0)
    run_pass(trainable, [[1] * 5], objective=objective, trace=through_v, ablations=[shift])
    del objective
    gc.collect()
    assert alive() is None


def test_a_model_that_is_being_captured_is_refused(trainable: LoadedModel) -> None:
    run_pass(trainable, [[1]])
    with (
        Capture(trainable, [L.LOGITS]) as capture,
        pytest.raises(InvalidInput, match="captured already"),
    ):
        run_pass(trainable, [[1, 2]])
    assert not capture._open


# --- refusals --------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], ErrorKind]] = [
    ("No prompt", {"token_ids": []}, ErrorKind.INVALID_ARGUMENT),
    ("Prompt 1 has 0 tokens", {"token_ids": [[1], []]}, ErrorKind.INVALID_ARGUMENT),
    ("Prompt 0 has 33 tokens", {"token_ids": [[1] * 33]}, ErrorKind.INVALID_ARGUMENT),
    ("Token id 53 of prompt 1", {"token_ids": [[1], [53]]}, ErrorKind.TOKEN_OUT_OF_VOCABULARY),
    ("'a' of prompt 0 is no token", {"token_ids": ["ab"]}, ErrorKind.INVALID_ARGUMENT),
    ("1.5 of prompt 0 is no token", {"token_ids": [[1.5]]}, ErrorKind.INVALID_ARGUMENT),
    ("Token id -1", {"token_ids": [[-1]]}, ErrorKind.TOKEN_OUT_OF_VOCABULARY),
    ("1 columns for 2", {"token_ids": [[1], [2]], "columns": [{}]}, ErrorKind.INVALID_ARGUMENT),
    (
        "no online_autoencoder_latent",
        {"locations": [L.ONLINE_AUTOENCODER_LATENT]},
        ErrorKind.UNKNOWN_LOCATION,
    ),
    (
        "no online_autoencoder_latent",
        {"autoencoders": both_kinds(), "locations": [L.ONLINE_AUTOENCODER_LATENT]},
        ErrorKind.UNKNOWN_LOCATION,
    ),
    ("Layer 2", {"ablations": [ablate(L.MLP_POST_ACT, (0, 0), 2)]}, ErrorKind.UNKNOWN_LAYER),
    ("Token 5", {"ablations": [ablate(L.MLP_POST_ACT, (5, 0), 1)]}, ErrorKind.UNKNOWN_UNIT),
    ("Neuron 24", {"ablations": [ablate(L.MLP_POST_ACT, (0, 24), 1)]}, ErrorKind.UNKNOWN_UNIT),
    (
        "attends to itself",
        {"ablations": [ablate(L.ATTN_QK_PROBS, (1, 2, 0), 1)]},
        ErrorKind.UNKNOWN_UNIT,
    ),
    (
        "Token 3 .* shortest sequence",
        {"token_ids": [[1] * 5, [1] * 3], "ablations": [ablate(L.MLP_POST_ACT, (3,), 1)]},
        ErrorKind.UNKNOWN_UNIT,
    ),
    (
        "no backward pass",
        {"ablations": [ablate(L.MLP_POST_ACT, (), 1, 0.0, BACKWARD)]},
        ErrorKind.INVALID_ARGUMENT,
    ),
    (
        "Latent 11",
        {
            "autoencoders": both_kinds(),
            "ablations": [ablate(L.ONLINE_MLP_AUTOENCODER_LATENT, (0, 11), 1)],
        },
        ErrorKind.UNKNOWN_UNIT,
    ),
    (
        "A pass has one objective",
        {"objective": LogitDiff(3), "trace": HEAD_TRACE},
        ErrorKind.INVALID_ARGUMENT,
    ),
    (
        "needs an objective",
        {"trace": trace_of(N.ATTENTION_HEAD, (3, 1, 1), 0, kind=V)},
        ErrorKind.INVALID_ARGUMENT,
    ),
    (
        "Choose a later node",
        {
            "trace": trace_of(
                N.ATTENTION_HEAD,
                (3, 1, 1),
                1,
                kind=V,
                downstream=trace_of(N.MLP_NEURON, (3, 1), 0),
            )
        },
        ErrorKind.INVALID_ARGUMENT,
    ),
    ("Neuron 24", {"trace": trace_of(N.MLP_NEURON, (0, 24), 1)}, ErrorKind.UNKNOWN_UNIT),
    ("Layer 7", {"trace": trace_of(N.MLP_NEURON, (0, 1), 7)}, ErrorKind.UNKNOWN_LAYER),
    ("Token 5", {"trace": trace_of(N.MLP_NEURON, (5, 1), 1)}, ErrorKind.UNKNOWN_UNIT),
    ("one activation", {"trace": trace_of(N.MLP_NEURON, (None, 1), 1)}, ErrorKind.INVALID_ARGUMENT),
    ("one activation", {"trace": trace_of(N.MLP_NEURON, (1,), 1)}, ErrorKind.INVALID_ARGUMENT),
    (
        "No autoencoder here",
        {"trace": trace_of(N.MLP_AUTOENCODER_LATENT, (1, 1), 1)},
        ErrorKind.NOT_STORED,
    ),
    (
        "layer 4",
        {"autoencoders": Autoencoders([random_autoencoder(L.MLP_POST_ACT, 4, 24)])},
        ErrorKind.UNKNOWN_LAYER,
    ),
    (
        "a forward pass takes",
        {"autoencoders": Autoencoders([random_autoencoder(L.RESID_POST_MLP, 1, 16)])},
        ErrorKind.UNSUPPORTED_AUTOENCODER,
    ),
]


@pytest.mark.parametrize(("message", "arguments", "kind"), REFUSED)
def test_what_cannot_be_run_is_refused(
    message: str, arguments: dict[str, Any], kind: ErrorKind, loaded: LoadedModel
) -> None:
    with pytest.raises(ActstoreError, match=message) as caught:
        run_pass(loaded, arguments.pop("token_ids", [[1] * 5]), **arguments)
    assert caught.value.kind is kind
    assert isinstance(caught.value, InvalidInput | Unavailable)


def test_a_pass_of_other_lengths_than_its_prompt_is_refused() -> None:
    with pytest.raises(InvalidInput, match="prompt of 2 tokens"):
        LivePass((1, 2), {(L.MLP_POST_ACT, FORWARD, 0): torch.zeros(3, 4)})
