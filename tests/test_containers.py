"""Tensors of one location by layer, what a pass recorded, and their files."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from actstore.query.containers import ActivationsAndMetadata
from actstore.query.indexing import (
    ConstantLayerIndexer,
    DerivedScalarIndex,
    IdentityLayerIndexer,
    NoLayersLayerIndexer,
    OffsetLayerIndexer,
)
from actstore.query.raw_store import (
    PromptCombo,
    PromptId,
    RawActivationStore,
    combine_prompts,
)
from actstore.store.errors import (
    ActstoreError,
    ErrorKind,
    InvalidInput,
    NotAStore,
    StoreDamaged,
    Unavailable,
    WriteFailed,
)
from actstore.store.vocabulary import ActivationLocationType, PassType

L = ActivationLocationType
FORWARD, BACKWARD = PassType.FORWARD, PassType.BACKWARD

# Few distinct values, so that ties, both zeros, infinities and NaN are common.
numbers = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.5, math.inf, -math.inf, math.nan])


def neurons(
    tensors: dict[int | None, Tensor], pass_type: PassType = FORWARD
) -> ActivationsAndMetadata:
    return ActivationsAndMetadata("mlp_post_act", pass_type, tensors)


def keyed(tensors: dict[int, Tensor]) -> dict[int | None, Tensor]:
    return {layer: tensor for layer, tensor in tensors.items()}  # noqa: C416


def arrays(shape: tuple[int, ...], dtype: type = np.float64) -> st.SearchStrategy[Tensor]:
    return hnp.arrays(dtype, shape, elements=numbers).map(torch.from_numpy)


@st.composite
def by_layer(draw: st.DrawFn) -> dict[int, Tensor]:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    layers = draw(st.sets(st.integers(0, 5), min_size=1, max_size=3))
    return {layer: draw(arrays(shape)) for layer in layers}


def same(left: ActivationsAndMetadata, right: dict[int | None, Tensor]) -> bool:
    return set(left.layer_indices) == set(right) and all(
        torch.equal(left.at(layer), tensor) for layer, tensor in right.items()
    )


# What is there


def test_layers_are_ascending_and_cannot_be_written() -> None:
    given_tensors: dict[int | None, Tensor] = {2: torch.ones(3, 4), 0: torch.zeros(3, 4)}
    values = neurons(given_tensors)
    given_tensors[1] = torch.ones(3, 4)
    assert values.layer_indices == [0, 2]
    assert (values.shape, values.numel, str(values.device)) == ((3, 4), 24, "cpu")
    with pytest.raises(TypeError):
        values.activations_by_layer_index[5] = torch.ones(1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        values.dst = "other"  # type: ignore[misc]


def test_nothing_has_no_device_and_no_shape() -> None:
    empty = neurons({})
    assert (empty.layer_indices, empty.numel, empty.device) == ([], 0, None)
    with pytest.raises(InvalidInput, match="no layer"):
        _ = empty.shape


@pytest.mark.parametrize("layers", [(None, 0), (-1,), (True,), ("0",)])
def test_layers_that_cannot_be_are_refused(layers: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        neurons({layer: torch.ones(1) for layer in layers})
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_tensors_stand_on_one_device() -> None:
    with pytest.raises(InvalidInput, match="cpu, meta"):
        neurons({0: torch.ones(1), 1: torch.ones(1, device="meta")})
    assert neurons({0: torch.ones(1)}).cpu().at(0).device.type == "cpu"


def test_an_absent_layer_is_named() -> None:
    with pytest.raises(InvalidInput, match="no layer 3") as caught:
        neurons({0: torch.ones(1)}).at(3)
    assert caught.value.kind is ErrorKind.UNKNOWN_LAYER


def test_a_clone_is_detached_and_its_own() -> None:
    tensor = torch.ones(2, 2, requires_grad=True)
    copy = neurons({0: tensor}).clone()
    assert not copy.at(0).requires_grad
    copy.at(0).zero_()
    assert tensor.sum() == 4


@given(by_layer(), st.sets(st.integers(0, 5)))
def test_filtering_layers_keeps_the_listed_and_the_layerless(
    tensors: dict[int, Tensor], wanted: set[int]
) -> None:
    values = neurons(keyed(tensors))
    assert values.filter_layers(wanted).layer_indices == sorted(set(tensors) & wanted)
    assert values.filter_layers(None) is values
    outside = ActivationsAndMetadata("logits", FORWARD, {None: torch.ones(1, 2)})
    assert outside.filter_layers([]).layer_indices == [None]


# Layers of a source


@given(by_layer(), st.lists(st.integers(0, 6), unique=True))
def test_missing_source_layers_are_zero_and_the_original_stays(
    tensors: dict[int, Tensor], desired: list[int]
) -> None:
    values = neurons(keyed(tensors), BACKWARD)
    result = values.apply_layer_indexer(IdentityLayerIndexer(), desired)
    assert result.layer_indices == sorted(desired)
    shape = next(iter(tensors.values())).shape
    for layer in desired:
        expected = tensors[layer] if layer in tensors else torch.zeros(shape)
        assert torch.equal(result.at(layer).nan_to_num(9), expected.to(torch.float64).nan_to_num(9))
    assert values.layer_indices == sorted(tensors)
    assert (result.dst, result.pass_type) == ("mlp_post_act", BACKWARD)


def test_indexers_choose_source_layers() -> None:
    values = neurons({layer: torch.full((2, 2), float(layer)) for layer in range(3)})
    previous = values.apply_layer_indexer(OffsetLayerIndexer(-1))
    assert [float(previous.at(layer).mean()) for layer in range(3)] == [0, 0, 1]
    assert previous.at(0).shape == ()
    last = values.apply_layer_indexer(ConstantLayerIndexer(2), [0, 1])
    assert torch.equal(last.at(0), values.at(2))
    assert torch.equal(last.at(1), values.at(2))
    assert values.apply_layer_indexer(IdentityLayerIndexer()) == values


def test_a_layerless_value_serves_every_layer() -> None:
    outside = ActivationsAndMetadata("always_one", FORWARD, {None: torch.ones(3, 1)})
    for indexer in (NoLayersLayerIndexer(), IdentityLayerIndexer(), ConstantLayerIndexer(1)):
        result = outside.apply_layer_indexer(indexer, [0, 1])
        assert same(result, {0: torch.ones(3, 1), 1: torch.ones(3, 1)})


def test_without_a_tensor_zeros_have_no_axes() -> None:
    result = neurons({}).apply_layer_indexer(IdentityLayerIndexer(), [0, 2])
    assert same(result, {0: torch.zeros(()), 2: torch.zeros(())})


def test_the_layerless_value_of_layers_is_an_error_not_zero() -> None:
    with pytest.raises(InvalidInput, match="outside the blocks") as caught:
        neurons({0: torch.ones(1)}).apply_layer_indexer(NoLayersLayerIndexer())
    assert caught.value.kind is ErrorKind.UNKNOWN_LAYER


# Functions of the tensors


@given(by_layer())
def test_functions_are_applied_layer_by_layer(tensors: dict[int, Tensor]) -> None:
    values = neurons({layer: tensor.nan_to_num() for layer, tensor in tensors.items()})
    finite = values.activations_by_layer_index
    plain = values.apply_transform_fn_to_activations(torch.tanh, "mlp_pre_act", BACKWARD)
    assert (plain.dst, plain.pass_type) == ("mlp_pre_act", BACKWARD)
    assert same(plain, {layer: tensor.tanh() for layer, tensor in finite.items()})
    layerwise = values.apply_layerwise_transform_fn_to_activations(
        lambda tensor, layer: tensor * layer
    )
    assert (layerwise.dst, layerwise.pass_type) == ("mlp_post_act", FORWARD)
    assert all(torch.equal(layerwise.at(at), one * at) for at, one in finite.items() if at)
    several = values.apply_transform_fn_to_multiple_activations(torch.maximum, [plain])
    assert same(several, {at: torch.maximum(one, one.tanh()) for at, one in finite.items()})
    all_of_it = values.apply_layerwise_transform_fn_to_multiple_activations(
        lambda mine, theirs, layer: mine * 0 + theirs * 0 + (layer or 0), [plain]
    )
    assert all(float(all_of_it.at(at).nan_to_num().max()) == at for at in finite)


def test_other_layers_are_refused() -> None:
    left, right = neurons({0: torch.ones(1)}), neurons({1: torch.ones(1)})
    with pytest.raises(InvalidInput, match="layers") as caught:
        left + right
    assert caught.value.kind is ErrorKind.UNKNOWN_LAYER
    with pytest.raises(InvalidInput, match="layers"):
        left.apply_transform_fn_to_multiple_activations(torch.add, [left, right])


def test_sums_and_differences_keep_the_left_name() -> None:
    left = neurons({0: torch.tensor([[1.0, 2.0]])})
    right = ActivationsAndMetadata("mlp_pre_act", BACKWARD, {0: torch.tensor([[10.0, 20.0]])})
    assert same(left + right, {0: torch.tensor([[11.0, 22.0]])})
    assert same(left - right, {0: torch.tensor([[-9.0, -18.0]])})
    assert ((left + right).dst, (left + right).pass_type) == ("mlp_post_act", FORWARD)


def test_equality_is_of_layers_shapes_and_values_alone() -> None:
    values = neurons({0: torch.ones(2, 2)})
    nearly = ActivationsAndMetadata("mlp_pre_act", BACKWARD, {0: torch.ones(2, 2) + 1e-7})
    assert values == nearly
    assert values == neurons({0: torch.ones(2, 2, dtype=torch.float64)})
    assert values != neurons({0: torch.ones(2, 2) + 1e-3})
    assert values != neurons({0: torch.ones(1, 2)})
    assert values != neurons({1: torch.ones(2, 2)})
    assert values != "something else"


# Numbers


def brute_force(
    tensors: dict[int, np.ndarray[Any, Any]],
    k: int | None,
    largest: bool,
    exists: Callable[[tuple[int, ...]], bool] = lambda place: True,
) -> list[tuple[float, int, tuple[int, ...]]]:
    found = [
        (float(value), layer, place)
        for layer in sorted(tensors)
        for place, value in np.ndenumerate(tensors[layer])
        if not np.isnan(value) and exists(place)
    ]
    found.sort(key=lambda entry: -entry[0] if largest else entry[0])
    return found if k is None else found[:k]


def matches(
    answer: tuple[Tensor, list[DerivedScalarIndex]],
    expected: list[tuple[float, int, tuple[int, ...]]],
) -> bool:
    values, indices = answer
    return values.tolist() == [value for value, _, _ in expected] and [
        (index.layer_index, index.tensor_indices) for index in indices
    ] == [(layer, place) for _, layer, place in expected]


@given(by_layer(), st.none() | st.integers(1, 60), st.booleans())
def test_topk_is_a_full_sort(tensors: dict[int, Tensor], k: int | None, largest: bool) -> None:
    expected = brute_force({at: one.numpy() for at, one in tensors.items()}, k, largest)
    answer = neurons(keyed(tensors)).topk(k, largest)
    assert matches(answer, expected)
    assert all(index.dst == "mlp_post_act" for index in answer[1])


@given(arrays((4, 4, 2)), st.none() | st.integers(1, 40), st.booleans())
def test_pairs_ahead_of_the_token_never_rank(values: Tensor, k: int | None, largest: bool) -> None:
    ahead = torch.arange(4)[None, :, None] > torch.arange(4)[:, None, None]
    scores = values.masked_fill(ahead, -math.inf)
    held = ActivationsAndMetadata("attn_qk_logits", FORWARD, {1: scores})
    expected = brute_force({1: scores.numpy()}, k, largest, lambda at: at[1] <= at[0])
    assert matches(held.topk(k, largest), expected)
    finite = held.apply_transform_fn_to_activations(
        lambda tensor: torch.where(ahead, tensor, tensor.nan_to_num(0, 5, -5))
    )
    behind = finite.at(1)[~ahead.expand(4, 4, 2)]
    assert float(finite.sum()) == pytest.approx(float(behind.sum()))
    assert float(finite.sum_abs()) == pytest.approx(float(behind.abs().sum()))
    assert float(finite.max()) == float(behind.max())


def test_a_choice_of_tokens_keeps_all_its_pairs() -> None:
    one_token = ActivationsAndMetadata("attn_qk_probs", FORWARD, {0: torch.ones(1, 5, 2)})
    assert len(one_token.topk()[1]) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_topk_of_other_dtypes(dtype: torch.dtype) -> None:
    held = neurons({0: torch.tensor([[0, 1], [1, 0]]).to(dtype)})
    values, indices = held.topk(3)
    assert values.dtype is dtype
    assert [index.tensor_indices for index in indices] == [(0, 1), (1, 0), (0, 0)]


@pytest.mark.parametrize("k", [0, -1, True, 1.0, "3"])
def test_k_counts_values(k: Any) -> None:
    with pytest.raises(InvalidInput, match="k is") as caught:
        neurons({0: torch.ones(2, 2)}).topk(k)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_sums_and_the_greatest_are_over_all_layers_of_any_shape() -> None:
    held = neurons({0: torch.tensor([[1.0, -4.0]]), 2: torch.tensor([[2.5], [math.nan]])})
    assert float(held.max()) == 2.5
    assert math.isnan(held.sum())
    finite = held.filter_layers([0])
    assert (float(finite.sum()), float(finite.sum_abs())) == (-3, 5)
    half = neurons({0: torch.full((40, 50), 60000.0, dtype=torch.float16)})
    assert float(half.sum()) == 40 * 50 * 60000
    with pytest.raises(InvalidInput, match="no value"):
        neurons({0: torch.full((2, 2), math.nan)}).max()


# What a pass recorded


def raw_store(scale: float = 1.0) -> RawActivationStore:
    return RawActivationStore.from_nested_dict_of_activations(
        {
            (L.MLP_POST_ACT, FORWARD): {1: scale * torch.ones(3, 4), 0: torch.zeros(3, 4)},
            (L.MLP_POST_ACT, BACKWARD): {0: scale * torch.ones(3, 4)},
            (L.RESID_POST_EMBEDDING, FORWARD): {None: scale * torch.ones(3, 2)},
        }
    )


def test_a_raw_store_answers_by_location_and_pass() -> None:
    store = raw_store()
    assert store.get_activations_and_metadata(L.MLP_POST_ACT).layer_indices == [0, 1]
    assert store.get_activations_and_metadata(L.MLP_POST_ACT, BACKWARD).layer_indices == [0]
    assert len(store) == 3
    with pytest.raises(TypeError):
        store.activations[L.LOGITS, FORWARD] = neurons({})  # type: ignore[index]


def test_what_was_not_recorded_is_named_with_what_was() -> None:
    with pytest.raises(Unavailable, match=r"logits forward.*mlp_post_act backward") as caught:
        raw_store().get_activations_and_metadata(L.LOGITS)
    assert caught.value.kind is ErrorKind.NOT_STORED


@pytest.mark.parametrize(
    ("location", "layer"), [(L.MLP_POST_ACT, None), (L.RESID_POST_EMBEDDING, 0)]
)
def test_layers_fit_the_location(location: ActivationLocationType, layer: int | None) -> None:
    with pytest.raises(InvalidInput, match=str(location)):
        RawActivationStore.from_nested_dict_of_activations(
            {(location, FORWARD): {layer: torch.ones(1)}}
        )


def test_a_key_is_the_name_of_what_it_holds() -> None:
    with pytest.raises(InvalidInput, match="mlp_pre_act"):
        RawActivationStore({(L.MLP_PRE_ACT, FORWARD): neurons({0: torch.ones(1)})})


# Two prompts


def test_two_prompts_are_combined_before_a_formula() -> None:
    stores = {PromptId.MAIN: raw_store(3.0), PromptId.BASELINE: raw_store(1.0)}
    key = (L.MLP_POST_ACT, FORWARD)
    for combo, expected in (
        (PromptCombo.MAIN, 3.0),
        (PromptCombo.BASELINE, 1.0),
        (PromptCombo.SUBTRACT_BASELINE, 2.0),
    ):
        combined = combine_prompts(stores, combo)
        assert set(combined.activations) == set(raw_store().activations)
        assert float(combined.get_activations_and_metadata(*key).at(1)[0, 0]) == expected
    small = RawActivationStore({key: stores[PromptId.BASELINE].activations[key]})
    of_small = combine_prompts({**stores, PromptId.BASELINE: small}, PromptCombo.BASELINE)
    assert set(of_small.activations) == {key}
    mixed = combine_prompts(
        stores, {key: PromptCombo.SUBTRACT_BASELINE, (key[0], BACKWARD): PromptCombo.BASELINE}
    )
    assert set(mixed.activations) == {key, (key[0], BACKWARD)}
    assert float(mixed.get_activations_and_metadata(key[0], BACKWARD).at(0)[0, 0]) == 1.0


def test_prompts_that_cannot_be_combined_are_refused() -> None:
    with pytest.raises(InvalidInput, match="baseline"):
        combine_prompts({PromptId.MAIN: raw_store()}, PromptCombo.MAIN)
    longer = RawActivationStore.from_nested_dict_of_activations(
        {(L.MLP_POST_ACT, FORWARD): {0: torch.ones(9, 4), 1: torch.ones(9, 4)}}
    )
    stores = {PromptId.MAIN: longer, PromptId.BASELINE: raw_store()}
    with pytest.raises(InvalidInput, match=r"\(9, 4\).*\(3, 4\)"):
        combine_prompts(stores, PromptCombo.SUBTRACT_BASELINE)
    backwards = {PromptId.MAIN: raw_store(), PromptId.BASELINE: longer}
    with pytest.raises(Unavailable, match="mlp_post_act backward"):
        combine_prompts(backwards, {(L.MLP_POST_ACT, BACKWARD): PromptCombo.SUBTRACT_BASELINE})


# Files


def bits(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(deadline=None, max_examples=30)
@given(
    hnp.arrays(np.uint32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
    ),
)
def test_a_file_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory,
    words: np.ndarray[Any, np.dtype[np.uint32]],
    dtype: torch.dtype,
) -> None:
    tensor = torch.from_numpy(words.astype(np.int64)).to(torch.int32)
    if dtype is torch.bool:
        tensor = tensor > 0
    elif tensor.ndim:
        tensor = tensor.view(dtype) if tensor.numel() else tensor.to(dtype)
    path = tmp_path_factory.getbasetemp() / "bits.safetensors"
    store = RawActivationStore.from_nested_dict_of_activations(
        {
            (L.MLP_POST_ACT, BACKWARD): {11: tensor, 2: tensor},
            (L.LOGITS, FORWARD): {None: tensor.mT if tensor.ndim > 1 else tensor},
            (L.RESID_POST_MLP, FORWARD): {},
        }
    )
    store.save_to_file(path)
    loaded = RawActivationStore.load_from_file(path)
    assert list(loaded.activations) == list(store.activations)
    for key, values in store.activations.items():
        again = loaded.activations[key]
        assert again.layer_indices == values.layer_indices
        for layer in values.layer_indices:
            mine, theirs = values.at(layer), again.at(layer)
            assert (mine.dtype, mine.shape, bits(mine)) == (
                theirs.dtype,
                theirs.shape,
                bits(theirs),
            )


def test_a_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "raw.safetensors"
    raw_store().save_to_file(path)
    assert sorted(load_file(path)) == [
        "mlp_post_act/backward/0",
        "mlp_post_act/forward/0",
        "mlp_post_act/forward/1",
        "resid_post_embedding/forward/none",
    ]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    RawActivationStore.from_nested_dict_of_activations(
        {(L.MLP_POST_ACT, FORWARD): {0: torch.tensor([[1.0, 2.0]])}}
    ).save_to_file(path)
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(StoreDamaged) as caught:
            RawActivationStore.load_from_file(path)
        assert caught.value.kind in (ErrorKind.CHECKSUM_MISMATCH, ErrorKind.MALFORMED_FILE)


def test_every_cut_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    raw_store().save_to_file(path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(StoreDamaged):
            RawActivationStore.load_from_file(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    with pytest.raises(NotAStore) as caught:
        RawActivationStore.load_from_file(path)
    assert caught.value.kind is ErrorKind.MISSING_FILE
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(StoreDamaged, match="no description"):
        RawActivationStore.load_from_file(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    raw_store().save_to_file(path)
    before = path.read_bytes()
    unwritable = RawActivationStore.from_nested_dict_of_activations(
        {(L.MLP_POST_ACT, FORWARD): {0: torch.ones(2, dtype=torch.complex128)}}
    )
    with pytest.raises(InvalidInput, match="complex128"):
        unwritable.save_to_file(path)
    with pytest.raises(WriteFailed) as caught:
        raw_store().save_to_file(tmp_path / "absent" / "raw.safetensors")
    assert isinstance(caught.value, ActstoreError)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    raw_store(7.0).save_to_file(path)
    loaded = RawActivationStore.load_from_file(path)
    assert loaded.get_activations_and_metadata(L.RESID_POST_EMBEDDING).max() == 7


def test_importing_does_not_pay_for_torch() -> None:
    names = [
        "containers",
        "derived_store",
        "groups",
        "index_json",
        "indexing",
        "raw_store",
        "reductions",
    ]
    code = f"import sys, {', '.join(f'actstore.query.{name}' for name in names)}"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
