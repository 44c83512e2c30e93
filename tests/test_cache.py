"""The activation cache: sums, slices, ragged batches, stores and prompts, upstream's calls."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ingest import fresh_copy
from tiny_models import VARIANTS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import actstore
from actstore.ingest.model import LoadedModel, load_model
from actstore.prompt import Prompt
from actstore.query.cache import ActivationCache, UnknownHook
from actstore.query.sequence_values import SequenceValues
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import WeightLocationType

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data" / "tl"
LENGTHS = (9, 14, 1)
LAYERS = 3
# Some families' norms round to float32 inside a float64 model.
EXACT = 3e-6
LENS = "transformer_lens"


def random_ids(length: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 53, length).tolist()
    return ids


@cache
def loaded(variant: str) -> LoadedModel:
    return load_model((tiny_model(variant, dtype=torch.float64, implementation="eager"), None))


@cache
def prompts(variant: str) -> tuple[Prompt, ...]:
    model = loaded(variant)
    return tuple(Prompt(model, random_ids(length, length)) for length in LENGTHS)


def batch(variant: str, **options: Any) -> ActivationCache:
    first, *others = prompts(variant)
    return first.cache(*others, **{"dtype": "float64", **options})


def assert_equal(
    found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Equal where there are tokens; ``mask`` covers the last axes but the channels."""
    assert found.shape == expected.shape
    if mask is not None:
        assert found.movedim(-1, 0)[..., ~mask].isnan().all()
        found, expected = (one.movedim(-1, 0)[..., mask] for one in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def tensor(found: Any) -> torch.Tensor:
    assert isinstance(found, torch.Tensor)
    return found


# What sums to what


@pytest.mark.parametrize("variant", VARIANTS)
def test_decompositions_sum_to_the_stream(variant: str) -> None:
    found = batch(variant)
    mask = found.mask
    is_parallel = loaded(variant).dimensions.is_parallel
    for layer in (0, 1, LAYERS):
        entering = found["resid_pre", layer] if layer < LAYERS else found["resid_post", -1]
        middle = layer < LAYERS
        for expand in (True, False):
            parts = found.get_full_resid_decomposition(layer, expand_neurons=expand)
            assert_equal(tensor(parts).sum(0), entering, mask)
            if middle:
                read = entering if is_parallel else found["resid_mid", layer]
                parts = found.get_full_resid_decomposition(layer, True, expand)
                assert_equal(tensor(parts).sum(0), read, mask)
        assert_equal(tensor(found.decompose_resid(layer)).sum(0), entering, mask)
        heads = found.stack_head_results(layer, incl_remainder=True)
        assert_equal(tensor(heads).sum(0), entering, mask)
        neurons = found.stack_neuron_results(layer, neuron_slice=[3, 7], incl_remainder=True)
        assert_equal(tensor(neurons).sum(0), entering, mask)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attributions_and_the_constant_sum_to_the_logit(variant: str) -> None:
    found = batch(variant)
    logits = found.apply_slice_to_pos_dim(-1)["logits"]
    cap = loaded(variant).dimensions.logit_cap
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    rows = torch.arange(len(LENGTHS))
    target, against = torch.tensor([3, 7, 11]), torch.tensor([1, 2, 52])
    expected = logits[rows, target] - logits[rows, against]
    for stack in (
        found.decompose_resid(pos_slice=-1),
        found.get_full_resid_decomposition(pos_slice=-1),
        found.stack_head_results(pos_slice=-1, incl_remainder=True),
    ):
        parts = found.logit_attrs(tensor(stack), target, against, pos_slice=-1)
        total = parts.sum(0) + found.logit_constant(target, against)
        torch.testing.assert_close(total, expected, rtol=0, atol=EXACT)
    for by in ("layer", "head", "neuron"):
        table = found.direct_logit_attribution(target, against, by=by).table
        sums = table.group_by("sequence").aggregate([("value", "sum")]).sort_by("sequence")
        np.testing.assert_allclose(sums["value_sum"], expected.numpy(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_has_a_value_as_the_forward_pass_has_it(variant: str) -> None:
    found = batch(variant)
    first = prompts(variant)[0]
    sizes = loaded(variant).dimensions
    alone = first.cache(dtype="float64")
    names = list(found)
    assert len(found) == len(names) == len(set(names))
    for name in names:
        assert name in found
        value = found[name]
        assert value.shape[0] == len(LENGTHS)
        single = alone[name]
        cut = value[0][tuple(slice(size) for size in single.shape[1:])]
        torch.testing.assert_close(cut, single[0], rtol=0, atol=0, equal_nan=True)
    for layer in range(LAYERS):
        residual = found["resid_pre", layer]
        scores = alone["attn_scores", layer]
        assert_equal(scores.softmax(-1), alone["pattern", layer])
        z = alone["result", layer].sum(2)
        if not sizes.has_post_norms:
            bias = first.cache(dtype="float64").accumulated_bias(layer, mlp_input=True)
            less = first.cache(dtype="float64").accumulated_bias(layer)
            assert_equal(z + bias - less, alone["attn_out", layer])
        spread = residual - residual.mean(-1, keepdim=True) if sizes.norm.centres else residual
        scale = (spread.square().mean(-1, keepdim=True) + sizes.layer_norm_epsilon).sqrt()
        assert_equal(found["scale", layer, "ln1"], scale, found.mask)
        expected = spread / scale
        if sizes.norm.centres:
            # Upstream's hook stands after gain and bias here, and before the gain elsewhere.
            expected = found.apply_ln_to_stack(residual[None], layer, recompute_ln=True)[0]
        assert_equal(found["normalized", layer, "ln1"], expected, found.mask)
        grouped = alone["k", layer].shape[2]
        assert grouped == sizes.kv_heads


@pytest.mark.parametrize("variant", ["gpt2", "gemma2"])
def test_recomputed_streams_give_the_models_own_logits(variant: str) -> None:
    found = batch(variant)
    lens = found.logit_lens()
    assert lens.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert lens.logits is not None
    assert_equal(lens.logits[-1], found["logits"], found.mask)
    streams = tensor(found.accumulated_resid(apply_ln=True))
    weight = torch.from_numpy(loaded(variant).weights().weight(WeightLocationType.UNEMBEDDING))
    logits = streams @ weight
    cap = loaded(variant).dimensions.logit_cap
    assert_equal(lens.logits[1], (cap * (logits / cap).tanh() if cap else logits)[1], found.mask)


def test_the_lens_ranks_as_a_full_sort_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.query.cache import logits as module

    # Several chunks of the vocabulary.
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 4 * 14 * 10)
    found = batch("gpt2")
    full = found.logit_lens().logits
    assert full is not None
    lens = found.logit_lens(targets="next", top_k=5)
    assert lens.logits is None
    assert lens.target_ranks is not None
    assert lens.top_tokens is not None
    assert lens.target_log_probs is not None
    order = full.sort(dim=-1, descending=True, stable=True).indices
    for row, prompt in enumerate(prompts("gpt2")):
        for position in range(len(prompt.token_ids)):
            assert_equal(lens.top_tokens[:, row, position], order[:, row, position, :5])
            if position + 1 == len(prompt.token_ids):
                assert (lens.target_ranks[:, row, position] == -1).all()
                continue
            token = prompt.token_ids[position + 1]
            ranks = (order[:, row, position] == token).int().argmax(-1)
            assert lens.target_ranks[:, row, position].tolist() == ranks.tolist()
            expected = full[:, row, position].log_softmax(-1)[:, token]
            assert_equal(lens.target_log_probs[:, row, position], expected)
    assert (lens.top_tokens[:, ~found.mask] == -1).all()


def test_of_equal_logits_the_lower_token_comes_first() -> None:
    model = tiny_model("gpt2", dtype=torch.float64, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = Prompt(load_model((model, None)), [1, 2, 3]).cache()
    for token in (0, 7, 52):
        ranks = found.logit_lens(targets=token).target_ranks
        assert ranks is not None
        assert (ranks == token).all()
    tokens = found.logit_lens(top_k=4).top_tokens
    assert tokens is not None
    assert (tokens == torch.arange(4)).all()


# Norms


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [1, None])
def test_the_choices_of_a_norm_are_what_they_say(variant: str, layer: int | None) -> None:
    found = batch(variant)
    sizes, weights = loaded(variant).dimensions, loaded(variant).weights()
    stack = tensor(found.decompose_resid(layer))
    names = WeightLocationType
    gain_name = names.LAYER_NORM_GAIN_PRE_ATTN if layer else names.LAYER_NORM_GAIN_FINAL
    bias_name = names.LAYER_NORM_BIAS_PRE_ATTN if layer else names.LAYER_NORM_BIAS_FINAL
    gain = torch.from_numpy(weights.weight(gain_name, layer))
    centred = stack - stack.mean(-1, keepdim=True) if sizes.norm.centres else stack
    scale = found["scale", layer, "ln1"] if layer else found["scale"]
    mask = found.mask
    cached = centred / scale
    assert_equal(found.apply_ln_to_stack(stack, layer, ln="cached_scale"), cached, mask)
    assert_equal(found.apply_ln_to_stack(stack, layer), cached * gain, mask)
    own = (centred.square().mean(-1, keepdim=True) + sizes.layer_norm_epsilon).sqrt()
    expected = centred / own * gain
    if sizes.norm.centres:
        expected = expected + torch.from_numpy(weights.weight(bias_name, layer))
    assert_equal(found.apply_ln_to_stack(stack, layer, recompute_ln=True), expected, mask)
    for choice, value in (("cached_scale", cached), ("exact", cached * gain)):
        made = found.decompose_resid(layer, apply_ln=True, ln=choice)
        assert_equal(tensor(made), value, mask)


def test_upstreams_ways_are_kept_for_those_who_ask() -> None:
    ours, theirs = batch("gpt2"), batch("gpt2", compat=LENS)
    mask = ours.mask
    assert_equal(
        tensor(theirs.decompose_resid(1, apply_ln=True)),
        tensor(ours.decompose_resid(1, apply_ln=True, ln="cached_scale")),
        mask,
    )
    assert_equal(
        tensor(theirs.stack_head_results(0, incl_remainder=True))[0], ours["resid_post", -1], mask
    )
    assert_equal(
        tensor(ours.stack_head_results(0, incl_remainder=True))[0], ours["resid_pre", 0], mask
    )
    stack = tensor(ours.decompose_resid(2))
    theirs.apply_ln_to_stack(stack, None, mlp_input=True)
    with pytest.raises(InvalidInput, match="no block 3"):
        ours.apply_ln_to_stack(stack, None, mlp_input=True)
    gemma = batch("gemma2", compat=LENS)
    raw = tensor(gemma.stack_head_results(1))
    assert_equal(raw, gemma["result", 0].movedim(2, 0), gemma.mask)
    assert not torch.allclose(
        raw.nan_to_num(), tensor(batch("gemma2").stack_head_results(1)).nan_to_num()
    )
    one = prompts("gpt2")[0].cache(compat=LENS)
    assert one.remove_batch_dim() is one
    assert not one.has_batch_dim
    kept = prompts("gpt2")[0].cache()
    assert kept.remove_batch_dim() is not kept
    assert kept.has_batch_dim
    assert kept.to("float64") is not kept


def test_tokens_of_a_batch_stand_along_the_batch_axis() -> None:
    first = prompts("gpt2")[0]
    square = Prompt(loaded("gpt2"), random_ids(2, 5)).cache(
        Prompt(loaded("gpt2"), random_ids(2, 6)), dtype="float64"
    )
    stack = tensor(square.decompose_resid())
    both = square.logit_attrs(stack, [4, 9])
    for row, token in enumerate((4, 9)):
        assert_equal(both[:, row], square.logit_attrs(stack, token)[:, row])
    theirs = ActivationCache(square._view, LENS).logit_attrs(stack, [4, 9], ln="exact")
    for position, token in enumerate((4, 9)):
        assert_equal(theirs[:, :, position], square.logit_attrs(stack, token)[:, :, position])
    alone = first.cache(dtype="float64").remove_batch_dim()
    flat = tensor(alone.decompose_resid())
    ids = list(range(9))
    diagonal = alone.logit_attrs(flat, ids)
    for position in ids:
        expected = alone.logit_attrs(flat, position)[:, position]
        assert_equal(diagonal[:, position], expected)


# Slices and ragged batches


def calls(found: ActivationCache, pos_slice: Any) -> Iterator[tuple[str, torch.Tensor]]:
    onto = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(16, 2)
    yield "accumulated", tensor(found.accumulated_resid(incl_mid=True, pos_slice=pos_slice))
    yield "lens", tensor(found.accumulated_resid(apply_ln=True, pos_slice=pos_slice))
    yield "decomposed", tensor(found.decompose_resid(apply_ln=True, pos_slice=pos_slice))
    yield "heads", tensor(found.stack_head_results(2, pos_slice=pos_slice, apply_ln=True))
    yield "neurons", tensor(found.stack_neuron_results(1, pos_slice=pos_slice))
    yield (
        "full",
        tensor(found.get_full_resid_decomposition(pos_slice=pos_slice, project_output_onto=onto)),
    )
    stack = tensor(found.decompose_resid(pos_slice=pos_slice))
    yield "logits", found.logit_attrs(stack, 5, pos_slice=pos_slice)[..., None]


@settings(max_examples=15, deadline=None)
@given(pos_slice=st.sampled_from([-1, 0, None, (1, 8, 3), (-4, None), slice(None, 5), [0, -1]]))
def test_a_row_of_a_ragged_batch_is_the_row_alone(pos_slice: Any) -> None:
    rows = [prompt.cache(dtype="float64") for prompt in prompts("gpt2")]
    alone = [dict(calls(one, pos_slice)) for one in rows]
    whole = batch("gpt2")
    mask = whole.apply_slice_to_pos_dim(pos_slice).mask
    for name, found in calls(whole, pos_slice):
        for row, expected in enumerate(one[name] for one in alone):
            inside = found[:, row]
            if not isinstance(pos_slice, int):
                count = expected.shape[2]
                assert inside[:, count:].isnan().all()
                assert mask[row].tolist() == [place < count for place in range(mask.shape[1])]
                inside = inside[:, :count]
            torch.testing.assert_close(inside, expected[:, 0], rtol=0, atol=1e-12)


def test_slices_compose() -> None:
    whole = batch("gpt2")
    two = whole.apply_slice_to_batch_dim([1, 0])
    assert two.sequences == (1, 0)
    assert whole.apply_slice_to_batch_dim(1).mask.shape == (14,)
    assert whole.mask.shape == (3, 14)
    tail = two.apply_slice_to_pos_dim((-6, None))
    last = tensor(tail.accumulated_resid(pos_slice=-1))
    assert_equal(last, tensor(two.accumulated_resid(pos_slice=-1)))
    assert two.apply_slice_to_batch_dim(-1)["pattern", 1].shape == (4, 9, 9)
    assert tail["pattern", 1].shape == (2, 4, 6, 14)
    assert two.apply_slice_to_pos_dim(-1)["pattern", 1].shape == (2, 4, 14)
    assert whole.apply_slice_to_batch_dim((1, 1))["resid_pre", 0].shape[0] == 0
    for wrong, message in ((3, "no row of the batch 3"), ("all", "slice of the row")):
        with pytest.raises(InvalidInput, match=message):
            whole.apply_slice_to_batch_dim(wrong)
    with pytest.raises(InvalidInput, match="no position 9"):
        whole.accumulated_resid(pos_slice=9)
    with pytest.raises(InvalidInput, match="no position axis"):
        tail.apply_slice_to_pos_dim(-1).accumulated_resid(pos_slice=0)
    with pytest.raises(InvalidInput, match="no batch axis"):
        whole.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)
    with pytest.raises(InvalidInput, match="3 rows"):
        whole.remove_batch_dim()


# Projections


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The greatest number of elements of any tensor made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("variant", ["gpt2", "gemma2"])
@pytest.mark.parametrize("directions", [(), (3,)])
def test_a_projection_is_that_of_the_expanded_parts(
    variant: str, directions: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    onto = torch.randn(16, *directions, generator=generator, dtype=torch.float64)
    found = batch(variant)
    for apply_ln in (False, True):
        for choice in ("exact", "cached_scale", "recomputed"):
            options: dict[str, Any] = {"apply_ln": apply_ln, "ln": choice, "pos_slice": (0, 3)}
            for method in (
                found.get_full_resid_decomposition,
                found.stack_head_results,
                lambda **given: found.stack_neuron_results(2, incl_remainder=True, **given),
            ):
                expanded = tensor(method(**options)) @ onto
                projected = tensor(method(**options, project_output_onto=onto))
                assert projected.shape == expanded.shape
                torch.testing.assert_close(projected, expanded, rtol=0, atol=EXACT, equal_nan=True)
    rows = found.get_neuron_results(1, (2, 6))
    assert rows.shape == (3, 14, 4, 16)
    assert_equal(found.get_neuron_results(1, 3), rows[:, :, 1], found.mask)
    onto_rows = found.get_neuron_results(1, (2, 6), project_output_onto=onto)
    torch.testing.assert_close(onto_rows, rows @ onto, rtol=0, atol=EXACT, equal_nan=True)
    for wrong in (torch.zeros(15), torch.zeros(16, 2, 2)):
        with pytest.raises(InvalidInput, match="project_output_onto"):
            found.stack_head_results(project_output_onto=wrong)


def test_a_projection_never_makes_tokens_by_neurons_by_channels() -> None:
    model = load_model((tiny_model("gpt2", n_inner=400), None))
    found = Prompt(model, random_ids(30, 0)).cache()
    onto = torch.ones(16)
    limit = 30 * 400 * 4
    for call in (
        lambda: found.stack_neuron_results(None, project_output_onto=onto, apply_ln=True),
        lambda: found.get_full_resid_decomposition(project_output_onto=onto, apply_ln=True),
        lambda: found.direct_logit_attribution(3, by="neuron", position=None),
    ):
        with Largest() as largest:
            call()
        assert largest.elements <= limit < 30 * 400 * 16


# Stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[actstore.Store]:
    corpus = [random_ids(length, length) for length in LENGTHS]
    path = tmp_path_factory.mktemp("cache") / "store"
    model = (tiny_model("gpt2"), None)
    with actstore.ingest(
        model, corpus, path, locations="full", dtype="float32", segment_rows=512, context=32
    ) as opened:
        yield opened


def test_a_store_answers_as_its_prompts_do(store: actstore.Store) -> None:
    model = load_model((tiny_model("gpt2"), None))
    first, *others = (Prompt(model, random_ids(length, length)) for length in LENGTHS)
    fresh, stored = first.cache(*others), store.cache()
    assert stored.sequences == (0, 1, 2)
    assert list(stored) == list(fresh)
    for name in stored:
        torch.testing.assert_close(stored[name], fresh[name], rtol=0, atol=2e-5, equal_nan=True)
    for (name, found), (_, expected) in zip(calls(stored, None), calls(fresh, None), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, equal_nan=True, msg=name)
    table = store.direct_logit_attribution(3, 4, sequences=[1], by="head")
    assert set(table.table["sequence"].to_pylist()) == {1}
    assert set(table.table["position"].to_pylist()) == {13}
    assert pc.sum(table.table["value"]).as_py() == pytest.approx(
        float(fresh["logits"][1, 13, 3] - fresh["logits"][1, 13, 4]), abs=1e-4
    )
    kinds = Counter(row["kind"] for row in table)
    assert kinds == {
        "head": 12, "mlp_out": 3, "embed": 1, "pos_embed": 1, "bias": 1, "constant": 1
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["gpt2", "gemma3"])
def test_the_least_store_answers_too(variant: str, tmp_path: Path) -> None:
    corpus = [random_ids(length, length) for length in LENGTHS]
    model = (tiny_model(variant, implementation="eager"), None)
    choices: dict[str, Any] = {"locations": "minimal", "dtype": "float32", "context": 32}
    with actstore.ingest(model, corpus, tmp_path / "store", segment_rows=512, **choices) as opened:
        found = opened.cache(dtype="float64")
        for name, value in batch(variant).items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=3e-5, equal_nan=True)
        parts = tensor(found.get_full_resid_decomposition())
        streams = found["resid_post", -1]
        torch.testing.assert_close(parts.sum(0), streams, rtol=0, atol=3e-5, equal_nan=True)


def test_only_what_a_call_needs_is_read(
    store: actstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, int | None, int]] = Counter()
    read = SequenceValues._read

    def counted(self: SequenceValues, *place: Any) -> torch.Tensor:
        reads[str(place[0]), place[2], self.rows.sequence] += 1
        return read(self, *place)

    monkeypatch.setattr(SequenceValues, "_read", counted)
    found = store.cache([0, 1])
    list(found), len(found), repr(found), found.mask, "z0" in found
    found.compute_head_results()
    assert not reads
    found["resid_post", 1]
    assert reads == {("resid_post_mlp", 1, 0): 1, ("resid_post_mlp", 1, 1): 1}
    reads.clear()
    found.accumulated_resid(apply_ln=True)
    stream = [("resid_post_embedding", None), *(("resid_post_mlp", n) for n in range(3))]
    assert reads == {(*place, row): 1 for place in stream for row in (0, 1)}
    reads.clear()
    found.stack_head_results(2)
    assert set(reads) == {
        ("attn_weighted_sum_of_values", layer, row) for layer in (0, 1) for row in (0, 1)
    }
    # Nothing is kept for the next call.
    before = reads.total()
    found.stack_head_results(2)
    assert reads.total() == 2 * before


def test_results_have_a_limit_and_say_how_to_stay_below(store: actstore.Store) -> None:
    with actstore.Store(store.path, max_result_bytes=20_000) as small:
        found = small.cache()
        with pytest.raises(InvalidInput, match="project_output_onto") as caught:
            found.stack_neuron_results(None)
        assert caught.value.kind is ErrorKind.TOO_LARGE
        found.stack_neuron_results(None, pos_slice=-1, project_output_onto=torch.ones(16))


def test_sequences_are_whole_numbers_that_exist(store: actstore.Store) -> None:
    assert store.cache(1).sequences == (1,)
    assert store.cache(np.array([2, 0, 2])).sequences == (2, 0, 2)
    assert store.cache([])["resid_pre", 0].shape[0] == 0
    for wrong in ([3], [-1], [1.5], [True], "a"):
        with pytest.raises(InvalidInput):
            store.cache(wrong)  # type: ignore[arg-type]


# A mapping with manners


def test_it_is_a_mapping_that_reading_does_not_change() -> None:
    found = batch("gpt2", dtype="float32")
    names = list(found)
    assert list(found.keys()) == names
    assert [name for name, _ in found.items()] == names
    assert len(list(found.values())) == len(names) == 55
    assert "resid_mid1" in found
    assert ("scale", -1, "ln2") in found
    assert "rot_q0" not in found
    assert 7 not in found
    assert found.get("nonsense") is None
    with pytest.raises(UnknownHook, match="rot_q0"):
        found["rot_q0"]
    assert list(found) == names
    assert found.has_embed
    assert found.has_pos_embed
    assert not batch("llama").has_pos_embed
    assert "55 activations of 3 sequences (9, 14, 1 tokens)" in repr(found)


def test_nothing_is_printed_and_no_switch_is_thrown(capsys: pytest.CaptureFixture[str]) -> None:
    found = batch("gpt2")
    enabled = torch.is_grad_enabled()
    found.compute_head_results()
    found.stack_head_results()
    found.toggle_autodiff(False)
    with pytest.raises(InvalidInput, match="graph"):
        found.toggle_autodiff(True)
    assert torch.is_grad_enabled() is enabled
    assert capsys.readouterr() == ("", "")


def test_dtypes_and_labels() -> None:
    found = batch("gpt2", dtype="float32")
    assert found["z", 0].dtype is torch.float32
    for wanted in ("float16", torch.float16):
        assert found.to(wanted)["z", 0].dtype is torch.float16
    assert found.to("cpu", "float64").accumulated_bias(2).dtype is torch.float64
    with pytest.raises(InvalidInput, match="dtype"):
        found.to(dtype="int8")
    _, labels = found.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
    _, labels = found.stack_neuron_results(1, neuron_slice=-1, return_labels=True)
    assert labels == ["L0N19"]
    _, labels = found.get_full_resid_decomposition(1, expand_neurons=False, return_labels=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "0_mlp_out", "embed", "pos_embed", "bias"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.accumulated_resid(4), "layer is 4"),
        (lambda c: c.accumulated_resid(-2), "layer is -2"),
        (lambda c: c.accumulated_resid(True), "whole number"),
        (lambda c: c.decompose_resid(0, incl_embeds=False), "Nothing writes"),
        (lambda c: c.decompose_resid(mode="both"), "mode is"),
        (lambda c: c.decompose_resid(mlp_input=True), "no block 3"),
        (lambda c: c.decompose_resid(apply_ln=True, ln="best"), "ln is"),
        (lambda c: c.get_neuron_results(3), "no layer 3"),
        (lambda c: c.get_neuron_results(0, 20), "no neuron 20"),
        (lambda c: c.stack_activation("resid_post", 0), "No block"),
        (lambda c: c.stack_activation("scale"), "does not have"),
        (lambda c: c.logit_attrs(c.decompose_resid(), 53), "no token 53"),
        (lambda c: c.logit_attrs(c.decompose_resid(), " the"), "no tokenizer"),
        (lambda c: c.logit_attrs(c.decompose_resid(), 1.5), "whole numbers"),
        (lambda c: c.logit_attrs(c.decompose_resid(), [" a"]), "no numbers"),
        (lambda c: c.stack_head_results(project_output_onto="x"), "no numbers"),
        (lambda c: c.logit_attrs(c.decompose_resid(), 1, [1, 2, 3]), "one shape"),
        (lambda c: c.logit_attrs(c.decompose_resid(), [1, 2]), "one per row"),
        (lambda c: c.logit_attrs(c.decompose_resid(pos_slice=-1), 1), "pos_slice"),
        (lambda c: c.logit_attrs(torch.zeros(2, 3, 14, 5), 1), "stack has shape"),
        (lambda c: c.logit_lens(top_k=0), "top_k is 0"),
        (lambda c: c.logit_lens(targets=[1, 2]), "targets have shape"),
        (lambda c: c.direct_logit_attribution(1, by="word"), "by is 'word'"),
        (lambda c: c.direct_logit_attribution([1, 2]), "target has shape"),
        (lambda c: ActivationCache(c._view, "nnsight"), "compat is"),
    ],
)
def test_wrong_use_says_what_to_do(call: Callable[[ActivationCache], Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(batch("gpt2"))


def test_a_stream_that_a_model_lacks_is_an_error() -> None:
    found = batch("gpt_neox")
    assert "resid_mid0" not in found
    with pytest.raises(InvalidInput, match="no resid_mid"):
        found.accumulated_resid(incl_mid=True)
    with pytest.raises(InvalidInput, match="no resid_mid"):
        found.accumulated_resid(1, mlp_input=True)
    with pytest.raises(InvalidInput, match="one model"):
        prompts("gpt2")[0].cache(prompts("llama")[0])


def test_the_page_about_the_cache_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "activation_cache.md"
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 6
    with actstore.Store(fresh_copy(tmp_path / "store", locations="full")) as opened:
        names: dict[str, object] = {"store": opened}
        for snippet in snippets:
            exec(compile(snippet, page.name, "exec"), names)  # noqa: S102 - our own page
    assert "median rank" in capsys.readouterr().out


# Upstream's recorded calls


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = util.spec_from_file_location("parity_tl", ROOT / "scripts" / "parity_tl.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["parity_tl"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("through", ["prompt", "disk"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_recorded_calls_are_answered_alike(
    script: ModuleType, architecture: str, through: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = script.main([str(DATA / architecture), "--through", through, "--quiet"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "0 above" in printed


def test_a_wrong_value_shape_label_or_refusal_is_bad_news(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = script.Folder.calls
    wanted = "single23_nobatch/decompose_resid/pos=int,ln=True"

    def changed(change: Callable[[dict[str, Any], Any], Any]) -> Callable[[Any], Any]:
        def calls(self: Any) -> Iterator[Any]:
            for call, value in read(self):
                if call["id"] == wanted:
                    own = dict(call)
                    yield own, change(own, value)

        return calls

    def relabelled(call: dict[str, Any], value: Any) -> Any:
        call["labels"] = ["embed"]
        return value

    def reshaped(call: dict[str, Any], value: Any) -> Any:
        call["shape"] = [1]
        return value

    def refused(call: dict[str, Any], _: Any) -> None:
        call |= {"error": "KeyError", "error_message": ""}

    monkeypatch.setattr(script.Folder, "hooks", lambda _: iter(()))
    for change, message in (
        (lambda _, value: value + 1e-4, "pos=int,ln=True: 1.0"),
        (relabelled, "labels"),
        (reshaped, "shape"),
        (refused, "answered, where upstream raised"),
    ):
        monkeypatch.setattr(script.Folder, "calls", changed(change))
        assert script.main([str(DATA / "gpt2"), "--quiet"]) == 1
        assert message in capsys.readouterr().out
