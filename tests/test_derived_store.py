"""Derived scalars in memory: lookups, filters, sums, rankings, groups; against the original."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from actstore.query.containers import ActivationsAndMetadata
from actstore.query.derived import SCALARS
from actstore.query.derived_store import DerivedScalarStore
from actstore.query.groups import GroupId, MultiGroupDerivedScalarStore
from actstore.query.indexing import DerivedScalarIndex
from actstore.query.raw_store import RawActivationStore
from actstore.query.reductions import LayerValues, total
from actstore.store.errors import ErrorKind, InvalidInput, NotAStore, StoreDamaged, Unavailable
from actstore.store.nodes import NodeIndex
from actstore.store.vocabulary import Dimension, NodeType, PassType

DATA = Path(__file__).parent / "data"
FORWARD, BACKWARD = PassType.FORWARD, PassType.BACKWARD
WRITE_NORM = "mlp_write_norm"
ACT_TIMES_GRAD = "mlp_act_times_grad"
DIRECT = "mlp_write_to_final_residual_grad"
HEADS = "unflattened_attn_write_to_final_residual_grad"

numbers = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.5, math.nan])


def scalars(
    dst: str, tensors: dict[int | None, Tensor], pass_type: PassType = FORWARD
) -> ActivationsAndMetadata:
    return ActivationsAndMetadata(dst, pass_type, tensors)


def small_store() -> DerivedScalarStore:
    """Neurons both ways, heads forwards, one scalar without layers."""
    return DerivedScalarStore.from_list(
        [
            scalars(WRITE_NORM, {0: torch.arange(6.0).reshape(3, 2), 1: -torch.ones(3, 2)}),
            scalars(WRITE_NORM, {0: torch.full((3, 2), 7.0)}, BACKWARD),
            scalars("attn_write_norm_per_sequence_token", {1: torch.full((3, 4), 0.5)}),
            scalars("token_attribution", {None: torch.tensor([[1.0], [9.0], [2.0]])}),
        ]
    )


# What is there


def test_a_store_tells_what_it_holds() -> None:
    store = small_store()
    assert store.dsts == [WRITE_NORM, "attn_write_norm_per_sequence_token", "token_attribution"]
    assert store.node_types == {NodeType.MLP_NEURON, NodeType.ATTENTION_HEAD, NodeType.LAYER}
    assert store.pass_types == {FORWARD, BACKWARD}
    assert (store.numel(), len(store), str(store.device)) == (12 + 6 + 12 + 3, 4, "cpu")
    assert DerivedScalarStore({}).device is None
    with pytest.raises(TypeError):
        store.activations[WRITE_NORM, FORWARD] = store[WRITE_NORM]  # type: ignore[index]


def test_undeclared_misplaced_and_repeated_scalars_are_refused() -> None:
    one = scalars(WRITE_NORM, {0: torch.ones(1, 1)})
    with pytest.raises(InvalidInput) as caught:
        DerivedScalarStore.from_list([scalars("my_scalar", {0: torch.ones(1)})])
    assert caught.value.kind is ErrorKind.UNKNOWN_SCALAR
    with pytest.raises(InvalidInput, match="stands under"):
        DerivedScalarStore({(WRITE_NORM, BACKWARD): one})
    for again in (one, scalars(WRITE_NORM, {1: torch.ones(1, 1)})):
        with pytest.raises(InvalidInput, match="twice"):
            DerivedScalarStore.from_list([one, again])
    elsewhere = scalars(DIRECT, {0: torch.ones(1, 1, device="meta")})
    with pytest.raises(InvalidInput, match="cpu, meta"):
        DerivedScalarStore.from_list([one, elsewhere])


def test_a_name_gives_the_forward_tensors() -> None:
    store = small_store()
    assert store[WRITE_NORM].layer_indices == [0, 1]
    assert store[WRITE_NORM].pass_type is FORWARD
    with pytest.raises(InvalidInput) as unknown:
        store["mlp_norm"]
    assert unknown.value.kind is ErrorKind.UNKNOWN_SCALAR
    with pytest.raises(Unavailable, match=f"{WRITE_NORM} backward") as absent:
        store[DIRECT]
    assert absent.value.kind is ErrorKind.NOT_STORED


def test_an_index_is_plain_indexing_of_a_copy() -> None:
    store = small_store()
    assert float(store[DerivedScalarIndex(WRITE_NORM, (1, 1), 0)]) == 3
    assert store[DerivedScalarIndex(WRITE_NORM, (None, 1), 0)].tolist() == [1, 3, 5]
    assert store[DerivedScalarIndex(WRITE_NORM, (2,), 0)].tolist() == [4, 5]
    assert float(store[DerivedScalarIndex(WRITE_NORM, (0, 0), 0, BACKWARD)]) == 7
    assert float(store[DerivedScalarIndex("token_attribution", (1, 0), None)]) == 9
    row = store[DerivedScalarIndex(WRITE_NORM, (0,), 0)]
    row += 100
    assert store[WRITE_NORM].at(0)[0].tolist() == [0, 1]
    stacked = store[[DerivedScalarIndex(WRITE_NORM, (at,), 0) for at in (2, 0)]]
    assert stacked.tolist() == [[4, 5], [0, 1]]


@pytest.mark.parametrize(
    ("places", "layer", "kind"),
    [
        ((0, 0), 2, ErrorKind.UNKNOWN_LAYER),
        ((0, 0), None, ErrorKind.UNKNOWN_LAYER),
        ((3, 0), 0, ErrorKind.UNKNOWN_UNIT),
        ((0, 2), 0, ErrorKind.UNKNOWN_UNIT),
    ],
)
def test_a_place_outside_is_refused(
    places: tuple[int, ...], layer: int | None, kind: ErrorKind
) -> None:
    with pytest.raises(InvalidInput, match=WRITE_NORM) as caught:
        small_store()[DerivedScalarIndex(WRITE_NORM, places, layer)]
    assert caught.value.kind is kind


def test_only_one_shape_is_stacked() -> None:
    store = small_store()
    mixed = [DerivedScalarIndex(WRITE_NORM, place, 0) for place in ((0,), (0, 0))]
    for indices in (mixed, []):
        with pytest.raises(InvalidInput, match="shape"):
            store[indices]


def test_nodes_find_their_values() -> None:
    store = small_store()
    nodes = [
        NodeIndex(NodeType.MLP_NEURON, (2, 1), 0),
        NodeIndex(NodeType.ATTENTION_HEAD, (1, None, 3), 1),
        NodeIndex(NodeType.LAYER, (1, 0), None),
    ]
    assert store.get_derived_scalars_for_node_indices(nodes).tolist() == [5, 0.5, 9]
    assert [index.dst for index in store.get_ds_indices_for_node_indices(nodes)] == store.dsts
    both = DerivedScalarStore.from_list([store[WRITE_NORM], scalars(DIRECT, {0: torch.ones(1, 1)})])
    with pytest.raises(InvalidInput, match=f"{WRITE_NORM}, {DIRECT}"):
        both.get_dst_for_node_type(NodeType.MLP_NEURON)
    with pytest.raises(InvalidInput, match="none"):
        both.get_dst_for_node_type(NodeType.LAYER)


# Choices


def test_filters_choose_and_leave_the_store_alone() -> None:
    store = small_store()
    keys = list(store.activations)
    assert list(store.filter_pass_type(BACKWARD).activations) == [(WRITE_NORM, BACKWARD)]
    assert store.filter_pass_type(FORWARD).pass_types == {FORWARD}
    assert list(store.filter_dsts([WRITE_NORM]).activations) == keys[:2]
    assert list(store.filter_dst_and_pass_types([keys[1], keys[3]]).activations) == [
        keys[1],
        keys[3],
    ]
    assert store.filter_node_types(NodeType.LAYER).dsts == ["token_attribution"]
    assert store.filter_with_function(lambda dst, kind: False).numel() == 0
    first = store.filter_layers([0])
    assert [values.layer_indices for values in first.activations.values()] == [[0], [0], [], [None]]
    assert store.filter_layers(None) == store
    assert list(store.activations) == keys
    with pytest.raises(InvalidInput, match="mlp_norm"):
        store.filter_dsts(["mlp_norm"])


# Functions of the tensors


@given(st.lists(hnp.arrays(np.float64, (2, 3), elements=st.floats(-9, 9)), min_size=2, max_size=5))
def test_stores_are_combined_place_by_place(arrays: list[np.ndarray[Any, Any]]) -> None:
    stores = [
        DerivedScalarStore.from_list([scalars(WRITE_NORM, {1: torch.from_numpy(array)})])
        for array in arrays
    ]
    first, second, *_ = stores
    mean = first.average(stores[1:])[WRITE_NORM].at(1)
    np.testing.assert_allclose(mean, np.mean(arrays, axis=0), atol=1e-12)
    np.testing.assert_array_equal((first + second)[WRITE_NORM].at(1), arrays[0] + arrays[1])
    np.testing.assert_array_equal((first - second)[WRITE_NORM].at(1), arrays[0] - arrays[1])
    np.testing.assert_array_equal(first[WRITE_NORM].at(1), arrays[0])
    doubled = first.apply_transform_fn_to_activations(lambda tensor: 2 * tensor)
    assert doubled == first + first
    largest = first.apply_transform_fn_to_multiple_activations(
        lambda *tensors: torch.stack(tensors).amax(0), stores[1:]
    )
    np.testing.assert_array_equal(largest[WRITE_NORM].at(1), np.max(arrays, axis=0))


def test_stores_of_other_scalars_are_not_combined() -> None:
    store = small_store()
    with pytest.raises(InvalidInput, match="different scalars"):
        store + store.filter_pass_type(FORWARD)
    assert store != store.filter_pass_type(FORWARD)
    assert store != store.apply_transform_fn_to_activations(lambda tensor: tensor + 1)
    assert store != 3


# Sums


def test_sums_are_over_one_pass_and_the_asked_layers() -> None:
    store = small_store()
    assert float(store.sum()) == 15 - 6 + 6 + 12
    assert float(store.sum_abs()) == 15 + 6 + 6 + 12
    assert float(store.sum(layer_indices=[0])) == 15 + 12
    assert float(store.sum(NodeType.MLP_NEURON)) == 9
    assert float(store.sum(pass_type=BACKWARD)) == 42
    assert store.num_nonzero() == 5 + 6 + 12 + 3
    assert store.num_nonzero(NodeType.MLP_NEURON, [0]) == 5
    with pytest.raises(Unavailable, match="backward"):
        store.sum(NodeType.LAYER, pass_type=BACKWARD)


def test_kept_axes_are_those_that_all_scalars_have() -> None:
    store = small_store()
    by_token = store.sum(dims_to_keep=[Dimension.TOKEN])
    assert by_token.tolist() == [1 - 2 + 2 + 1, 5 - 2 + 2 + 9, 9 - 2 + 2 + 2]
    by_neuron = store.sum(NodeType.MLP_NEURON, None, [Dimension.NEURON])
    assert by_neuron.tolist() == [6 - 3, 9 - 3]
    both = store.sum_abs(NodeType.MLP_NEURON, [1], [Dimension.NEURON, Dimension.TOKEN])
    assert torch.equal(both, torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(InvalidInput, match=r"attn_write_norm_per_sequence_token.*neuron"):
        store.sum(dims_to_keep=[Dimension.NEURON])


def test_axes_of_other_lengths_are_refused() -> None:
    # The original compares a scalar's shape with itself here.
    store = DerivedScalarStore.from_list(
        [
            scalars(WRITE_NORM, {0: torch.ones(3, 2)}),
            scalars(DIRECT, {0: torch.ones(4, 2)}),
        ]
    )
    assert float(store.sum()) == 14
    assert store.sum(dims_to_keep=[Dimension.NEURON]).tolist() == [7, 7]
    with pytest.raises(InvalidInput, match=r"\(4,\).*\(3,\)"):
        store.sum(dims_to_keep=[Dimension.TOKEN])
    summed = store.apply_transform_fn_to_activations(lambda tensor: tensor.sum(0))
    with pytest.raises(InvalidInput, match=r"is \(2,\)"):
        summed.sum(dims_to_keep=[Dimension.NEURON])


def test_axes_in_another_order_are_matched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = replace(
        SCALARS["mlp_write"], name="my_write", axes=(Dimension.CHANNEL, Dimension.NEURON)
    )
    known = {**SCALARS, "my_write": turned}
    for module in ("derived.registry", "reductions"):
        monkeypatch.setattr(f"actstore.query.{module}.SCALARS", known)
    tensor = torch.arange(18.0).reshape(2, 3, 3)
    pieces = [
        LayerValues("mlp_write", FORWARD, 0, tensor),
        LayerValues("my_write", FORWARD, 0, tensor.mT),
    ]
    summed = total(pieces, [Dimension.CHANNEL, Dimension.NEURON])
    assert torch.equal(summed, 2 * tensor.sum(0, dtype=torch.float64))


def test_pairs_are_no_tokens() -> None:
    flattened = DerivedScalarStore.from_list(
        [scalars("flattened_attn_post_softmax", {0: torch.ones(6, 2)})]
    )
    assert flattened.sum(dims_to_keep=[Dimension.HEAD]).tolist() == [6, 6]
    with pytest.raises(InvalidInput, match="pair"):
        flattened.sum(dims_to_keep=[Dimension.TOKEN])


def test_masked_scores_are_in_no_sum() -> None:
    ahead = torch.ones(3, 3).triu(1).bool()[:, :, None].expand(3, 3, 2)
    scores = torch.full((3, 3, 2), 2.0).masked_fill(ahead, -math.inf)
    store = DerivedScalarStore.from_list([scalars("attn_qk_logits", {0: scores})])
    assert float(store.sum()) == 2 * 12
    assert store.sum(dims_to_keep=[Dimension.TOKEN]).tolist() == [4, 8, 12]
    assert store.num_nonzero() == 12
    assert float(store.max_abs()[0]) == 2
    assert store.topk(1, largest=False)[0].tolist() == [2]


# Rankings


@st.composite
def stores(draw: st.DrawFn) -> DerivedScalarStore:
    names = draw(
        st.lists(
            st.sampled_from([WRITE_NORM, DIRECT, ACT_TIMES_GRAD, "token_attribution"]),
            min_size=1,
            unique=True,
        )
    )
    held = []
    for name in names:
        layers = [0, 1, 2] if SCALARS[name].has_layers else [None]
        shape = (3, 2 if SCALARS[name].has_layers else 1)
        tensors = {
            layer: torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=numbers)))
            for layer in layers
        }
        held.append(scalars(name, tensors))
    return DerivedScalarStore.from_list(held)


def every_value(
    store: DerivedScalarStore, keep: Callable[[str, int | None], bool]
) -> list[tuple[float, str, int | None, tuple[int, ...]]]:
    return [
        (float(value), dst, layer, place)
        for (dst, _), values in store.activations.items()
        for layer, tensor in values.activations_by_layer_index.items()
        for place, value in np.ndenumerate(tensor.numpy())
        if keep(dst, layer) and not np.isnan(value)
    ]


@given(stores(), st.none() | st.integers(1, 80), st.booleans(), st.data())
def test_topk_is_a_full_sort_over_all_scalars(
    store: DerivedScalarStore, k: int | None, largest: bool, data: st.DataObject
) -> None:
    dsts = data.draw(st.none() | st.lists(st.sampled_from(store.dsts), min_size=1))
    has_layers = any(SCALARS[dst].has_layers for dst in (store.dsts if dsts is None else dsts))
    wanted = data.draw(
        st.none() | (st.sets(st.integers(0, 2)) if has_layers else st.just(set[int]()))
    )
    found = every_value(
        store,
        lambda dst, layer: (
            (dsts is None or dst in dsts) and (wanted is None or layer is None or layer in wanted)
        ),
    )
    found.sort(key=lambda entry: -entry[0] if largest else entry[0])
    values, indices = store.topk(k, dsts=dsts, layer_indices=wanted, largest=largest)
    expected = found if k is None else found[:k]
    assert values.tolist() == [value for value, *_ in expected]
    assert [(index.dst, index.layer_index, index.tensor_indices) for index in indices] == [
        tuple(rest) for _, *rest in expected
    ]
    for value, index in zip(values, indices, strict=True):
        assert torch.equal(store[index], value)


@given(stores())
def test_the_greatest_are_those_of_a_full_sort(store: DerivedScalarStore) -> None:
    found = every_value(store, lambda dst, layer: True)
    if not found:
        with pytest.raises(InvalidInput, match="ranks"):
            store.max()
        return
    value, index = store.max()
    best = max(found, key=lambda entry: entry[0])
    assert (float(value), index.dst, index.layer_index, index.tensor_indices) == best
    value, index = store.max_abs()
    best = max(found, key=lambda entry: abs(entry[0]))
    assert (float(value), index.dst, index.layer_index) == (abs(best[0]), best[1], best[2])


def test_a_ranking_is_of_one_pass() -> None:
    store = small_store()
    values, indices = store.topk(2, BACKWARD)
    assert values.tolist() == [7, 7]
    assert all(index.pass_type is BACKWARD for index in indices)
    with pytest.raises(Unavailable, match="token_attribution backward"):
        store.topk(2, BACKWARD, ["token_attribution"])
    with pytest.raises(Unavailable, match="no backward"):
        store.filter_pass_type(FORWARD).topk(2, BACKWARD)


def test_what_cannot_be_ranked_is_refused() -> None:
    store = small_store()
    with pytest.raises(InvalidInput, match=r"layers \[7\]") as caught:
        store.topk(2, layer_indices=[0, 7])
    assert caught.value.kind is ErrorKind.UNKNOWN_LAYER
    with pytest.raises(InvalidInput, match="k is 0"):
        store.topk(0)


# Files


def test_a_store_survives_a_dict_and_a_file(tmp_path: Path) -> None:
    store = small_store()
    plain = store.to_dict()
    assert set(plain) == {(dst, str(kind)) for dst, kind in store.activations}
    plain[WRITE_NORM, "forward"]["activations_by_layer_index"][0].zero_()
    assert store == small_store()
    assert DerivedScalarStore.from_dict(store.to_dict()) == store
    path = tmp_path / "store.safetensors"
    store.save_to_file(path)
    loaded = DerivedScalarStore.load_from_file(path)
    assert loaded == store
    assert list(loaded.activations) == list(store.activations)
    with pytest.raises(StoreDamaged, match="not a raw_activation_store"):
        RawActivationStore.load_from_file(path)
    with pytest.raises(NotAStore):
        DerivedScalarStore.load_from_file(tmp_path / "absent")


def test_scalars_of_another_version_are_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.safetensors"
    small_store().save_to_file(path)
    plain = small_store().to_dict()
    known = {name: declared for name, declared in SCALARS.items() if name != WRITE_NORM}
    for module in ("derived.registry", "derived_store", "scalar_tensors"):
        monkeypatch.setattr(f"actstore.query.{module}.SCALARS", known)
    with pytest.raises(InvalidInput, match=WRITE_NORM) as caught:
        DerivedScalarStore.load_from_file(path)
    assert caught.value.kind is ErrorKind.UNKNOWN_SCALAR
    with pytest.raises(InvalidInput, match=WRITE_NORM):
        DerivedScalarStore.from_dict(plain)
    for kept in (
        DerivedScalarStore.load_from_file(path, skip_missing_dsts=True),
        DerivedScalarStore.from_dict(plain, skip_missing_dsts=True),
    ):
        assert kept.dsts == ["attn_write_norm_per_sequence_token", "token_attribution"]


@pytest.mark.parametrize(
    "entry", [{}, {"dst": WRITE_NORM}, None, {"dst": WRITE_NORM, "pass_type": "sideways"}]
)
def test_a_malformed_dict_is_refused(entry: Any) -> None:
    with pytest.raises(InvalidInput, match="malformed"):
        DerivedScalarStore.from_dict({(WRITE_NORM, "forward"): entry})


# What the original computed


def recorded_store() -> DerivedScalarStore:
    """The scalars of the recorded rankings, in their order."""
    of_dst = dict.fromkeys((ACT_TIMES_GRAD, DIRECT, HEADS), DATA / "tdb" / "topk")
    of_dst[WRITE_NORM] = DATA / "tdb_tiny_a" / "dst" / "logit_diff" / "p0"
    held = []
    for name in (ACT_TIMES_GRAD, WRITE_NORM, DIRECT, HEADS):
        with np.load(of_dst[name] / f"{name.upper()}.FORWARD.npz") as arrays:
            tensors: dict[int | None, Tensor] = {
                int(key.removeprefix("layer_")): torch.from_numpy(arrays[key]) for key in arrays
            }
        held.append(scalars(name, tensors))
    return DerivedScalarStore.from_list(held)


RECORDED: list[dict[str, Any]] = json.loads((DATA / "tdb" / "topk" / "topk.json").read_text())
Entry = tuple[float, str, int | None, tuple[int | None, ...]]


def entries(record: dict[str, Any]) -> list[Entry]:
    return [
        (value, dst.lower(), layer, tuple(place))
        for value, (dst, layer, place) in zip(record["values"], record["indices"], strict=True)
    ]


def answered(answer: tuple[Tensor, list[DerivedScalarIndex]]) -> list[Entry]:
    return [
        (float(value), index.dst, index.layer_index, index.tensor_indices)
        for value, index in zip(*answer, strict=True)
    ]


def named(name: str) -> list[dict[str, Any]]:
    found = [record for record in RECORDED if record["name"] == name]
    assert found
    return found


@pytest.mark.parametrize("record", named("topk"), ids=lambda record: str(record["call"]))
def test_rankings_are_the_recorded_ones_cut_and_put_in_order(record: dict[str, Any]) -> None:
    store, call = recorded_store(), record["call"]
    dsts = [dst.lower() for dst in call["dsts"]]
    layers = call.get("layer_indices")
    ours = answered(store.topk(call["k"], dsts=dsts, layer_indices=layers, largest=call["largest"]))
    theirs = entries(record)
    if layers is not None:
        # The original ranks every layer; what it says of the asked ones stands.
        assert {layer for _, _, layer, _ in ours} == set(layers)
        theirs = [entry for entry in theirs if entry[2] in layers]
        assert ours[: len(theirs)] == theirs
    elif call["k"] is None:
        assert len(ours) == store[dsts[0]].numel
        assert ours[: len(theirs)] == theirs
    else:
        # It lists k of each scalar, descending whatever was asked.
        theirs.sort(key=lambda entry: -entry[0] if call["largest"] else entry[0])
        assert ours == theirs[: call["k"]]


@pytest.mark.parametrize(
    "record", named("filter_layers_then_topk"), ids=lambda record: str(record["call"])
)
def test_rankings_of_filtered_layers_are_the_recorded_ones(record: dict[str, Any]) -> None:
    call = record["call"]
    store = recorded_store().filter_dsts([dst.lower() for dst in call["dsts"]])
    filtered = store.filter_layers(call["layer_indices"])
    assert answered(filtered.topk(call["k"], largest=call["largest"])) == entries(record)
    directly = store.topk(call["k"], layer_indices=call["layer_indices"], largest=call["largest"])
    assert answered(directly) == entries(record)


@pytest.mark.parametrize(
    "record", named("activations_and_metadata.topk"), ids=lambda record: str(record["call"])
)
def test_rankings_of_one_scalar_are_the_recorded_ones(record: dict[str, Any]) -> None:
    call = record["call"]
    values = recorded_store()[call["dst"].lower()]
    assert answered(values.topk(call["k"], call["largest"])) == entries(record)


def test_the_greatest_are_the_recorded_ones() -> None:
    store = recorded_store()
    all_of_it, of_neurons = named("max")
    value, index = store.max()
    assert answered((value[None], [index])) == entries(all_of_it)
    value, index = store.max_abs()
    assert answered((value[None], [index])) == entries(named("max_abs")[0])
    value, index = store.filter_dsts([ACT_TIMES_GRAD, HEADS]).max(NodeType.MLP_NEURON)
    assert answered((value[None], [index])) == entries(of_neurons)


def test_sums_are_the_recorded_ones() -> None:
    (record,) = named("sums")
    store = recorded_store().filter_dsts([record["dst"]])
    close = pytest.approx
    assert float(store.sum()) == close(record["sum"], rel=1e-12)
    assert float(store.sum_abs()) == close(record["sum_abs"], rel=1e-12)
    assert float(store.sum(layer_indices=[0])) == close(record["sum_layers_0"], rel=1e-12)
    kept = store.sum(dims_to_keep=[Dimension.TOKEN]).tolist()
    assert kept == close(record["sum_keep_tokens"], rel=1e-9, abs=1e-12)
    assert (store.num_nonzero(), store.numel()) == (record["num_nonzero"], record["numel"])


# Groups


def test_groups_are_the_recorded_ones_with_the_least_first() -> None:
    (record,) = named("multi_group.topk")
    store = recorded_store()
    groups = MultiGroupDerivedScalarStore(
        {
            GroupId.WRITE_NORM: store.filter_dsts([WRITE_NORM]),
            GroupId.ACT_TIMES_GRAD: store.filter_dsts([ACT_TIMES_GRAD]),
        }
    )
    nodes, values = groups.topk(record["call"]["k"])
    theirs = [
        NodeIndex(NodeType(node_type.lower()), tuple(place), layer)
        for node_type, layer, place in record["node_indices"]
    ]
    # The original lists the least descending; we list the most extreme first.
    order = [*range(8), *range(11, 7, -1)]
    assert nodes == [theirs[at] for at in order]
    for group, recorded in record["values"].items():
        assert values[GroupId(group.lower())].tolist() == [recorded[at] for at in order]


def test_a_group_may_leave_out_its_least_and_rank_what_was_chosen() -> None:
    store = small_store().filter_dsts([WRITE_NORM]).filter_pass_type(FORWARD)
    negative = store.apply_transform_fn_to_activations(lambda tensor: -tensor)
    both = MultiGroupDerivedScalarStore({"a": store, "b": negative}, {"a": True, "b": True})
    nodes, values = both.topk(1)
    assert [(node.layer_index, node.tensor_indices) for node in nodes] == [(0, (2, 1)), (1, (0, 0))]
    assert {group: found.tolist() for group, found in values.items()} == {
        "a": [5, -1],
        "b": [-5, 1],
    }
    with_least = MultiGroupDerivedScalarStore({"a": store})
    assert len(with_least.topk(1)[0]) == 2
    assert with_least.node_types == {NodeType.MLP_NEURON}
    last_token = both.topk(
        2,
        transform_activations_fn=lambda tensor: tensor[-1:],
        transform_indices_fn=lambda index: index.with_updates(
            tensor_indices=(2, *index.tensor_indices[1:])
        ),
    )
    assert {node.tensor_indices[0] for node in last_token[0]} == {2}
    assert last_token[1]["a"].tolist() == [5, 4, -1, -1]


def test_groups_have_the_same_nodes_one_scalar_each() -> None:
    store = small_store().filter_pass_type(FORWARD)
    neurons = store.filter_dsts([WRITE_NORM])
    with pytest.raises(InvalidInput, match="Group a has"):
        MultiGroupDerivedScalarStore({"a": store, "b": neurons})
    twice = DerivedScalarStore.from_list(
        [neurons[WRITE_NORM], scalars(DIRECT, {0: torch.ones(3, 2)})]
    )
    with pytest.raises(InvalidInput, match="exactly one"):
        MultiGroupDerivedScalarStore({"a": twice})
    with pytest.raises(InvalidInput, match="'c'"):
        MultiGroupDerivedScalarStore({"a": neurons}, {"c": True})
    with pytest.raises(InvalidInput, match="groups are"):
        MultiGroupDerivedScalarStore({})
