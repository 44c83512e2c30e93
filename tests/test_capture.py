"""Hooked activations against golden values, plain mathematics and the bare model."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gpt2 import LOCATIONS, tiny_gpt2
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Model,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from actstore.ingest import attention
from actstore.ingest.capture import Capture
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.reference import independent_forward
from actstore.store.errors import ErrorKind, IngestStopped, InvalidInput
from actstore.store.location_names import PRESETS
from actstore.store.model.architecture import architecture_of
from actstore.store.vocabulary import ActivationLocationType

GOLDEN = Path(__file__).parent / "data" / "tdb_tiny_a"
L = ActivationLocationType
EVERYTHING = LOCATIONS
FUSED = tuple(location for location in LOCATIONS if not location.is_pair_shaped)
Run = dict[L, list[torch.Tensor]]


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model((tiny_gpt2(), None))


def ids(rows: int, width: int, seed: int = 0, vocabulary: int = 53) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, width), generator=generator)


def captured(
    loaded: LoadedModel, batch: torch.Tensor, locations: tuple[L, ...] = EVERYTHING
) -> Run:
    with Capture(loaded, locations) as capture:
        return capture.run(batch)


def bare_logits(loaded: LoadedModel, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        # A cache changes the memory layout of the keys, and so the last bit of some products.
        logits: torch.Tensor = loaded.model(batch, use_cache=False).logits
    return logits


def row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude of its (batch, token) row."""
    rows = found.shape[:2]
    found, expected = found.double().reshape(*rows, -1), expected.double().reshape(*rows, -1)
    assert torch.equal(found.isneginf(), expected.isneginf())
    found, expected = (torch.where(x.isinf(), 0, x) for x in (found, expected))
    return float(((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def assert_same(one: Run, other: Run) -> None:
    assert one.keys() == other.keys()
    for location in one:
        for layer, (left, right) in enumerate(zip(one[location], other[location], strict=True)):
            assert torch.equal(left, right), (location, layer)


# --- golden values ---------------------------------------------------------------------


def golden(prompt: str, location: L) -> list[torch.Tensor]:
    with np.load(GOLDEN / "raw" / "logit_diff" / prompt / f"{location.name}.FORWARD.npz") as file:
        tensors = [torch.from_numpy(file[key]) for key in sorted(file.files)]
    # Upstream orders pair-shaped tensors (token, attended, head).
    return [tensor.transpose(1, 2) if location.is_pair_shaped else tensor for tensor in tensors]


def golden_prompts() -> dict[str, torch.Tensor]:
    prompts = json.loads((GOLDEN / "prompts.json").read_text())
    return {prompt["id"]: torch.tensor([prompt["token_ids"]]) for prompt in prompts}


def in_upstream_units(location: L, tensor: torch.Tensor) -> torch.Tensor:
    scaled = location in (L.ATTN_QUERY, L.ATTN_KEY)
    return tensor * tensor.shape[-1] ** -0.25 if scaled else tensor


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-5)])
def test_every_location_equals_the_golden_run(dtype: str, tolerance: float) -> None:
    loaded = load_model(GOLDEN / "hf_model", dtype=dtype)
    for prompt, batch in golden_prompts().items():
        found = captured(loaded, batch)
        assert set(found) == set(LOCATIONS)
        for location in LOCATIONS:
            expected = golden(prompt, location)
            assert len(found[location]) == len(expected) == (3 if location.has_layers else 1)
            for mine, theirs in zip(found[location], expected, strict=True):
                assert mine.dtype == loaded.dtype
                error = row_error(in_upstream_units(location, mine), theirs[None])
                assert error <= tolerance, (prompt, location, error)


def test_independent_forward_equals_the_golden_run() -> None:
    loaded = load_model(GOLDEN / "hf_model")
    for prompt, batch in golden_prompts().items():
        found = independent_forward(loaded, batch)
        for location in LOCATIONS:
            for mine, theirs in zip(found[location], golden(prompt, location), strict=True):
                assert row_error(in_upstream_units(location, mine), theirs[None]) <= 1e-6, location


# --- the same computation as the bare model -----------------------------------------------


@pytest.mark.parametrize("locations", [PRESETS["neurons"], PRESETS["full"], FUSED])
def test_fused_capture_leaves_logits_bitwise_unchanged(
    loaded: LoadedModel, locations: tuple[L, ...]
) -> None:
    batch = ids(3, 20)
    before = bare_logits(loaded, batch)
    assert torch.equal(captured(loaded, batch, (*locations, L.LOGITS))[L.LOGITS][0], before)
    assert torch.equal(bare_logits(loaded, batch), before)


def test_stepwise_capture_equals_stock_eager_attention_bitwise(loaded: LoadedModel) -> None:
    batch = ids(3, 20)
    fused = bare_logits(loaded, batch)
    loaded.model.set_attn_implementation("eager")
    eager = bare_logits(loaded, batch)
    loaded.model.set_attn_implementation("sdpa")
    found = captured(loaded, batch)[L.LOGITS][0]
    assert torch.equal(found, eager)
    assert not torch.equal(eager, fused)


def test_a_model_in_eager_attention_stays_in_it(loaded: LoadedModel) -> None:
    loaded.model.set_attn_implementation("eager")
    batch = ids(2, 9)
    assert torch.equal(captured(loaded, batch, FUSED)[L.LOGITS][0], bare_logits(loaded, batch))
    assert loaded.model.config._attn_implementation == "eager"


def test_results_do_not_depend_on_what_else_is_captured(loaded: LoadedModel) -> None:
    batch = ids(2, 12)
    with_head = captured(loaded, batch, FUSED)
    without = captured(loaded, batch, PRESETS["full"])
    assert_same(without, {location: with_head[location] for location in without})
    for location in PRESETS["full"]:
        alone = captured(loaded, batch, (location,))
        assert_same(alone, {location: with_head[location]})


def test_the_head_is_skipped_unless_logits_are_wanted(loaded: LoadedModel) -> None:
    calls: list[nn.Module] = []
    loaded.model.lm_head.register_forward_hook(lambda module, _, __: calls.append(module))
    with Capture(loaded, PRESETS["neurons"]) as capture:
        calls.clear()
        capture.run(ids(1, 4))
        assert not calls
    with Capture(loaded, (L.LOGITS,)) as capture:
        calls.clear()
        capture.run(ids(1, 4))
        assert len(calls) == 1


def test_attention_is_left_alone_when_no_location_needs_it(loaded: LoadedModel) -> None:
    with Capture(loaded, PRESETS["neurons"]):
        assert loaded.model.config._attn_implementation == "sdpa"
    with Capture(loaded, (L.ATTN_KEY,)):
        assert loaded.model.config._attn_implementation == attention.FUSED
    with Capture(loaded, (L.ATTN_QK_PROBS,)):
        assert loaded.model.config._attn_implementation == attention.STEPWISE


@pytest.mark.parametrize("function", ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu"])
def test_capture_equals_the_independent_forward_pass(function: str) -> None:
    loaded = load_model((tiny_gpt2(seed=4, activation_function=function), None))
    batch = ids(2, 17, seed=1)
    found, expected = captured(loaded, batch), independent_forward(loaded, batch)
    assert found.keys() == expected.keys()
    for location in LOCATIONS:
        for mine, theirs in zip(found[location], expected[location], strict=True):
            assert row_error(mine, theirs) <= 1e-5, location


def test_the_independent_forward_pass_does_not_follow_the_hooks() -> None:
    loaded = load_model((tiny_gpt2(), None))
    mlp = loaded.model.get_submodule("transformer.h.0.mlp")
    mlp.register_forward_hook(lambda _, __, output: output * 1.001)
    batch = ids(1, 5)
    found, expected = captured(loaded, batch), independent_forward(loaded, batch)
    assert row_error(found[L.RESID_POST_ATTN][0], expected[L.RESID_POST_ATTN][0]) <= 1e-5
    assert row_error(found[L.RESID_DELTA_MLP][0], expected[L.RESID_DELTA_MLP][0]) > 5e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_captured_in_their_own_dtype(dtype: torch.dtype) -> None:
    loaded = load_model((tiny_gpt2(dtype=dtype), None))
    batch = ids(2, 8)
    found, expected = captured(loaded, batch, FUSED), independent_forward(loaded, batch)
    for location in FUSED:
        is_scale = location.axes[-1] == "singleton"
        assert {one.dtype for one in found[location]} == {torch.float32 if is_scale else dtype}
        for mine, theirs in zip(found[location], expected[location], strict=True):
            assert row_error(mine, theirs) <= (0.1 if dtype is torch.bfloat16 else 0.02), location


# --- what the tensors are -------------------------------------------------------------------


def test_the_residual_stream_adds_up_exactly(loaded: LoadedModel) -> None:
    found = captured(loaded, ids(2, 15))
    before = found[L.RESID_POST_EMBEDDING][0]
    for layer in range(2):
        middle = found[L.RESID_POST_ATTN][layer]
        assert torch.equal(before + found[L.RESID_DELTA_ATTN][layer], middle)
        before = found[L.RESID_POST_MLP][layer]
        assert torch.equal(middle + found[L.RESID_DELTA_MLP][layer], before)


def test_attention_tensors_follow_from_one_another(loaded: LoadedModel) -> None:
    found = captured(loaded, ids(2, 15))
    for layer in range(2):
        query, key, value = (
            found[location][layer] for location in (L.ATTN_QUERY, L.ATTN_KEY, L.ATTN_VALUE)
        )
        scores, pattern = found[L.ATTN_QK_LOGITS][layer], found[L.ATTN_QK_PROBS][layer]
        visible = torch.ones(15, 15).tril().bool()[None, :, None, :].expand_as(scores)
        assert torch.equal(scores.isneginf(), ~visible)
        expected = torch.einsum("bthc,buhc->bthu", query, key) * 8**-0.5
        assert torch.allclose(scores[visible], expected[visible], atol=1e-5)
        assert torch.equal(torch.softmax(scores, -1), pattern)
        weighted = torch.einsum("bthu,buhc->bthc", pattern, value)
        assert torch.allclose(weighted, found[L.ATTN_WEIGHTED_SUM_OF_VALUES][layer], atol=1e-6)


@pytest.mark.parametrize("locations", [FUSED, EVERYTHING])
def test_later_tokens_change_nothing_before_them(
    loaded: LoadedModel, locations: tuple[L, ...]
) -> None:
    batch = ids(2, 12)
    changed = batch.clone()
    changed[:, 7:] = ids(2, 5, seed=9)
    one, other = captured(loaded, batch, locations), captured(loaded, changed, locations)
    for location in locations:
        for left, right in zip(one[location], other[location], strict=True):
            assert torch.equal(left[:, :7], right[:, :7]), location
            assert not torch.equal(left[:, 7:], right[:, 7:]), location


def test_padded_rows_equal_the_sequences_alone(loaded: LoadedModel) -> None:
    lengths = [5, 20, 1, 13]
    batch = ids(4, 20)
    for row, length in enumerate(lengths):
        batch[row, length:] = 0
    with Capture(loaded, EVERYTHING) as capture:
        together = capture.run(batch, lengths)
        for row, length in enumerate(lengths):
            alone = capture.run(batch[row : row + 1, :length])
            for location in LOCATIONS:
                for mine, theirs in zip(together[location], alone[location], strict=True):
                    part = mine[row : row + 1, :length]
                    part = part[..., :length] if location.is_pair_shaped else part
                    assert row_error(part, theirs) <= 1e-5, location
                    assert mine[row, length:].isnan().all()


@pytest.mark.parametrize(
    ("flags", "scales"),
    [
        ({}, (8**-0.5, 8**-0.5)),
        ({"scale_attn_by_inverse_layer_idx": True}, (8**-0.5, 8**-0.5 / 2)),
        ({"scale_attn_weights": False}, (1.0, 1.0)),
        ({"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, (1.0, 0.5)),
    ],
)
def test_scores_carry_the_true_scaling_of_their_layer(
    flags: dict[str, Any], scales: tuple[float, float]
) -> None:
    model = tiny_gpt2(**flags)
    loaded = load_model((model, None))
    assert tuple(map(loaded.dimensions.attention_scaling, range(2))) == scales
    blocks = [model.get_submodule(f"transformer.h.{layer}.attn") for layer in range(2)]
    assert [block.scaling for block in blocks] == list(scales)
    batch = ids(2, 10)
    found, expected = captured(loaded, batch), independent_forward(loaded, batch)
    for layer, scale in enumerate(scales):
        scores = found[L.ATTN_QK_LOGITS][layer]
        query, key = found[L.ATTN_QUERY][layer], found[L.ATTN_KEY][layer]
        products = torch.einsum("bthc,buhc->bthu", query, key) * scale
        finite = scores.isfinite()
        assert torch.allclose(scores[finite], products[finite], atol=1e-5)
        assert row_error(scores, expected[L.ATTN_QK_LOGITS][layer]) <= 1e-5


# --- streaming ------------------------------------------------------------------------------


def test_stream_keeps_no_reference_and_follows_the_computation(loaded: LoadedModel) -> None:
    seen: list[tuple[L, int | None]] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def sink(location: L, layer: int | None, tensor: torch.Tensor) -> None:
        nonlocal most
        assert torch.is_inference_mode_enabled()
        assert tensor.shape[:2] == (2, 11)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        seen.append((location, layer))

    with Capture(loaded, EVERYTHING) as capture:
        capture.stream(ids(2, 11), sink)
    assert not any(reference() is not None for reference in alive)
    assert most <= 6 < len(seen)
    assert len(set(seen)) == len(seen) == sum(2 if one.has_layers else 1 for one in LOCATIONS)
    assert seen[0] == (L.RESID_POST_EMBEDDING, None)
    assert seen[-1] == (L.LOGITS, None)
    for layer in range(2):
        order = [location for location, place in seen if place == layer]
        assert order.index(L.ATTN_QUERY) < order.index(L.RESID_DELTA_ATTN)
        assert order.index(L.MLP_PRE_ACT) < order.index(L.MLP_POST_ACT)


def test_a_failing_sink_stops_the_run_and_the_capture_stays_usable(loaded: LoadedModel) -> None:
    def fail(location: L, layer: int | None, tensor: torch.Tensor) -> None:
        raise OSError("disk")

    batch = ids(1, 6)
    with Capture(loaded, FUSED) as capture:
        before = capture.run(batch)
        with pytest.raises(OSError, match="disk"):
            capture.stream(batch, fail)
        loaded.model(batch)
        assert_same(capture.run(batch), before)


# --- leaving no trace -------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def untouched(loaded: LoadedModel) -> Iterator[LoadedModel]:
    model = loaded.model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    yield loaded
    assert hooks(model) == 0
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == before
    assert not attention._recorders
    with Capture(loaded, EVERYTHING):
        assert hooks(model) > 0
        assert not any(module.training for module in model.modules())
    assert hooks(model) == 0


@pytest.mark.parametrize("locations", [PRESETS["neurons"], FUSED, EVERYTHING])
def test_exit_restores_the_model(untouched: LoadedModel, locations: tuple[L, ...]) -> None:
    with Capture(untouched, locations):
        pass


def test_exit_after_an_error_restores_the_model(untouched: LoadedModel) -> None:
    with pytest.raises(KeyError), Capture(untouched, EVERYTHING):
        raise KeyError("body")


def test_a_failed_check_restores_the_model(
    untouched: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(AttentionMaskInterface._global_mapping, attention.STEPWISE)
        with pytest.raises(IngestStopped, match="without a mask") as stopped:
            Capture(untouched, EVERYTHING).__enter__()
    assert stopped.value.kind is ErrorKind.CAPTURE_MISMATCH


def test_two_captures_of_one_model_are_refused(untouched: LoadedModel) -> None:
    with Capture(untouched, FUSED) as capture:
        other = load_model((untouched.model, None))
        with pytest.raises(InvalidInput, match="already"), Capture(other, FUSED):
            pass
        assert len(capture.run(ids(1, 3))) == len(FUSED)
    with Capture(other, FUSED):
        pass


# --- a capture that would lie stops ------------------------------------------------------------


def see_everything(**options: Any) -> torch.Tensor:
    return torch.zeros(1, 1, options["q_length"], options["kv_length"])


def test_attention_that_sees_the_future_stops(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention.STEPWISE, see_everything)
    with pytest.raises(IngestStopped, match="logits change") as stopped:
        Capture(loaded, EVERYTHING).__enter__()
    assert stopped.value.kind is ErrorKind.CAPTURE_MISMATCH


def test_a_model_that_sees_the_future_stops(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", see_everything)
    with pytest.raises(IngestStopped, match="later token") as stopped:
        Capture(loaded, PRESETS["neurons"]).__enter__()
    assert stopped.value.kind is ErrorKind.CAPTURE_MISMATCH


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_weights_are_not_finite_stops_and_names_them(
    loaded: LoadedModel, value: float
) -> None:
    with torch.no_grad():
        loaded.model.get_parameter("transformer.h.1.mlp.c_fc.weight")[0, 0] = value
    with pytest.raises(IngestStopped, match=r"own logits.*h\.1\.mlp\.c_fc\.weight") as stopped:
        Capture(loaded, PRESETS["neurons"]).__enter__()
    assert stopped.value.kind is ErrorKind.NUMERIC_OVERFLOW
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_a_model_too_large_for_its_dtype_stops(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.get_parameter("transformer.ln_f.weight").fill_(3e38)
        loaded.model.get_parameter("transformer.wte.weight").mul_(1e3)
    with pytest.raises(IngestStopped, match="its weights are finite, so") as stopped:
        Capture(loaded, PRESETS["neurons"]).__enter__()
    assert stopped.value.kind is ErrorKind.NUMERIC_OVERFLOW


def test_a_last_bit_of_difference_stops(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
        weighted, _ = sdpa_attention_forward(*arguments, **options)
        return weighted * (1 + 2**-22), None

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.FUSED, nearly)
    with pytest.raises(IngestStopped, match="bit by bit"):
        Capture(loaded, (L.ATTN_KEY,)).__enter__()


def test_a_module_that_no_longer_runs_stops(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = loaded.model.get_submodule("transformer.h.1.mlp")
    monkeypatch.setattr(mlp, "forward", torch.zeros_like)
    with pytest.raises(IngestStopped, match="mlp_post_act of layer 1 is"):
        Capture(loaded, PRESETS["neurons"]).__enter__()


# --- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "lengths", "kind"),
    [
        (torch.zeros(4, dtype=torch.int64), None, ErrorKind.INVALID_ARGUMENT),
        (torch.zeros(1, 4), None, ErrorKind.INVALID_ARGUMENT),
        (torch.zeros(1, 0, dtype=torch.int64), None, ErrorKind.INVALID_ARGUMENT),
        (torch.zeros(1, 33, dtype=torch.int64), None, ErrorKind.INVALID_ARGUMENT),
        (torch.tensor([[1, 53]]), None, ErrorKind.TOKEN_OUT_OF_VOCABULARY),
        (torch.tensor([[1, -1]]), None, ErrorKind.TOKEN_OUT_OF_VOCABULARY),
        (ids(2, 3), [3], ErrorKind.INVALID_ARGUMENT),
        (ids(2, 3), [0, 3], ErrorKind.INVALID_ARGUMENT),
        (ids(2, 3), [3, 4], ErrorKind.INVALID_ARGUMENT),
    ],
)
def test_bad_batches_are_refused(
    loaded: LoadedModel, batch: torch.Tensor, lengths: list[int] | None, kind: ErrorKind
) -> None:
    with Capture(loaded, FUSED) as capture, pytest.raises(InvalidInput) as refused:
        capture.run(batch, lengths)
    assert refused.value.kind is kind


def test_a_capture_works_only_inside_its_context(loaded: LoadedModel) -> None:
    capture = Capture(loaded, FUSED)
    with pytest.raises(InvalidInput, match="outside the context"):
        capture.run(ids(1, 2))
    with capture:
        capture.run(ids(1, 2))
    with pytest.raises(InvalidInput, match="outside the context"):
        capture.run(ids(1, 2))


def test_no_location_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidInput, match="none") as refused:
        Capture(loaded, ())
    assert refused.value.kind is ErrorKind.UNKNOWN_LOCATION


def test_a_sequence_of_one_token_and_of_the_whole_context_are_captured() -> None:
    for positions in (1, 32):
        loaded = load_model((tiny_gpt2(n_positions=positions), None))
        for location, tensors in captured(loaded, ids(2, positions)).items():
            shape = (2, positions, *loaded.dimensions.unit_shape(location))
            assert {tuple(tensor.shape) for tensor in tensors} == {shape}


# --- unsupported models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("is_causal", False),
        ("activation_function", "tanh"),
        ("n_embd", 15),
    ],
)
def test_unsupported_features_are_refused(flag: str, value: object) -> None:
    config = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, flag: value}
    with pytest.raises(InvalidInput) as refused:
        architecture_of(config).dimensions(config)
    assert refused.value.kind is ErrorKind.UNSUPPORTED_MODEL
    assert str(value) in str(refused.value)


def test_other_architectures_are_refused_with_the_supported_ones() -> None:
    config = OPTConfig(
        vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=8,
    )  # fmt: skip
    with pytest.raises(InvalidInput, match=r"'opt' is not among .* gpt2") as refused:
        load_model((OPTForCausalLM(config), None))
    assert refused.value.kind is ErrorKind.UNSUPPORTED_MODEL


def test_a_model_without_a_head_is_refused() -> None:
    model = GPT2Model(tiny_gpt2().config)
    with pytest.raises(InvalidInput, match="GPT2Model lacks transformer"):
        load_model((model, None))


def test_parameters_of_two_dtypes_are_refused() -> None:
    model = tiny_gpt2()
    model.transformer.h[0].half()
    with pytest.raises(InvalidInput, match="float16 on cpu, float32 on cpu"):
        load_model((model, None))
