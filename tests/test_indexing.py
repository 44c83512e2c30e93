"""Indices of derived scalars, layers of a source, and indices as JSON."""

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.query.derived import SCALARS
from actstore.query.index_json import Pointer, from_json, to_json
from actstore.query.indexing import (
    DUMMY,
    ConstantLayerIndexer,
    DerivedScalarIndex,
    IdentityLayerIndexer,
    LayerIndexer,
    NoLayersLayerIndexer,
    OffsetLayerIndexer,
    SourceLayer,
    scalar_axes,
)
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import (
    NODE_LOCATIONS,
    Ablation,
    ActivationIndex,
    AttentionTraceType,
    AttnSubNodeIndex,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
    index_axes,
)
from actstore.store.vocabulary import ActivationLocationType, Dimension, NodeType, PassType

L = ActivationLocationType
N = NodeType
D = Dimension
places = st.none() | st.integers(0, 40)
layers = st.none() | st.integers(0, 11)
passes = st.sampled_from(PassType)


# Indices of derived scalars


def test_an_index_names_places_by_axis() -> None:
    index = DerivedScalarIndex("unflattened_attn_write_norm", (3, None), 1)
    assert index.tensor_index_by_dim == {D.TOKEN: 3, D.ATTENDED: None, D.HEAD: None}
    assert index.pass_type is PassType.FORWARD
    assert index.with_updates(layer_index=2).layer_index == 2
    assert hash(index) == hash(DerivedScalarIndex("unflattened_attn_write_norm", (3, None), 1))
    with pytest.raises(FrozenInstanceError):
        index.layer_index = 0  # type: ignore[misc]


def test_a_location_may_be_named_as_transformer_lens_does() -> None:
    assert DerivedScalarIndex("mlp_post", (0, 1), 0).dst == "mlp_post_act"


def test_an_unknown_scalar_is_refused() -> None:
    with pytest.raises(InvalidInput, match="mlp_writ_norm") as caught:
        DerivedScalarIndex("mlp_writ_norm", (), 0)
    assert caught.value.kind is ErrorKind.UNKNOWN_SCALAR


@pytest.mark.parametrize(
    ("indices", "layer"),
    [((1, 2, 3), 0), ((-1,), 0), ((True,), 0), ((1.0,), 0), (("0",), 0), ((0, 0), -1)],
)
def test_indices_that_do_not_fit_are_refused(indices: tuple[Any, ...], layer: int) -> None:
    with pytest.raises(InvalidInput, match="mlp_write_norm") as caught:
        DerivedScalarIndex("mlp_write_norm", indices, layer)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


# Nodes


@given(st.sampled_from(sorted(SCALARS)), st.data())
def test_an_index_that_has_a_node_comes_back_from_it(name: str, data: st.DataObject) -> None:
    declared = SCALARS[name]
    location = NODE_LOCATIONS.get(declared.node_type)
    axes = scalar_axes(declared)
    flat = (D.TOKEN, D.ATTENDED) if declared.is_flattened else (D.TOKEN,)
    whole = (*flat, *declared.axes)
    node_axes = whole if location is None else index_axes(location)
    drawn = [data.draw(places if axis in node_axes else st.none()) for axis in axes]
    if declared.is_flattened and D.ATTENDED not in node_axes:
        drawn[0] = None
    index = DerivedScalarIndex(name, tuple(drawn), data.draw(layers), data.draw(passes))
    node = index.to_node_index()
    assert (node.node_type, node.layer_index) == (declared.node_type, index.layer_index)
    assert len(node.tensor_indices) == len(node_axes)
    for axis, place in index.tensor_index_by_dim.items():
        if not (declared.is_flattened and axis is D.TOKEN):
            assert dict(zip(node_axes, node.tensor_indices, strict=True)).get(axis) == place
    assert DerivedScalarIndex.from_node_index(node, name) == index


def test_rows_of_a_flattened_scalar_are_the_lower_triangle_row_by_row() -> None:
    pairs = [(token, attended) for token in range(30) for attended in range(token + 1)]
    for row, (token, attended) in enumerate(pairs):
        index = DerivedScalarIndex("attn_write_norm", (row, 2), 0)
        node = NodeIndex(N.ATTENTION_HEAD, (token, attended, 2), 0)
        assert index.to_node_index() == node
        assert DerivedScalarIndex.from_node_index(node, "attn_write_norm") == index


@pytest.mark.parametrize("indices", [(3, 4, 0), (3, None, 0), (None, 1, 0)])
def test_a_flattened_scalar_has_no_row_for_half_a_pair(indices: tuple[int | None, ...]) -> None:
    node = NodeIndex(N.ATTENTION_HEAD, indices, 0)
    with pytest.raises(InvalidInput, match="flattened"):
        DerivedScalarIndex.from_node_index(node, "attn_write_norm")


def test_a_scalar_per_token_and_head_has_no_attended_token() -> None:
    name = "attn_write_norm_per_sequence_token"
    node = NodeIndex(N.ATTENTION_HEAD, (5, None, 2), 1)
    assert DerivedScalarIndex.from_node_index(node, name).tensor_indices == (5, 2)
    assert DerivedScalarIndex(name, (5, 2), 1).to_node_index() == node
    with pytest.raises(InvalidInput, match="attended is 3"):
        DerivedScalarIndex.from_node_index(node.with_updates(tensor_indices=(5, 3, 2)), name)


def test_a_neuron_of_a_write_vector_is_no_place_of_a_channel() -> None:
    assert DerivedScalarIndex("mlp_write", (1, None, 4), 0).to_node_index() == NodeIndex(
        N.RESIDUAL_STREAM_CHANNEL, (1, 4), 0
    )
    with pytest.raises(InvalidInput, match="neuron is 2"):
        DerivedScalarIndex("mlp_write", (1, 2, 4), 0).to_node_index()


def test_a_node_of_another_type_is_refused() -> None:
    node = NodeIndex(N.MLP_NEURON, (0, 1), 0)
    with pytest.raises(InvalidInput, match="not of mlp_neuron"):
        DerivedScalarIndex.from_node_index(node, "resid_post_mlp")


# Layers of a source


@pytest.mark.parametrize(
    ("indexer", "wanted", "expected"),
    [
        (IdentityLayerIndexer(), [2, 0], [2, 0]),
        (IdentityLayerIndexer(), [None], [None]),
        (OffsetLayerIndexer(-1), [0, 1, 2], [DUMMY, 0, 1]),
        (OffsetLayerIndexer(1), [0, 2, 3], [DUMMY, 3, DUMMY]),
        (ConstantLayerIndexer(2), [0, 1], [2, 2]),
        (NoLayersLayerIndexer(), [0, 1], [None, None]),
    ],
)
def test_source_layers(
    indexer: LayerIndexer, wanted: list[int | None], expected: list[SourceLayer]
) -> None:
    assert indexer.source_layers(wanted) == expected


def test_nothing_comes_before_a_value_outside_the_blocks() -> None:
    with pytest.raises(InvalidInput, match="outside the blocks"):
        OffsetLayerIndexer(-1).source_layers([None])


# JSON

neuron_nodes = st.builds(
    NodeIndex,
    st.sampled_from([N.MLP_NEURON, N.MLP_AUTOENCODER_LATENT, N.AUTOENCODER_LATENT]),
    st.tuples(places, places),
    st.integers(0, 11),
)
head_places = st.tuples(places, places, places)
head_nodes = st.builds(NodeIndex, st.just(N.ATTENTION_HEAD), head_places, st.integers(0, 11))
sub_nodes = st.builds(
    AttnSubNodeIndex,
    st.just(N.ATTENTION_HEAD),
    head_places,
    layers,
    passes,
    st.sampled_from([L.ATTN_QUERY, L.ATTN_KEY, L.ATTN_VALUE]),
)
activation_indices = st.builds(
    ActivationIndex,
    st.sampled_from([L.MLP_POST_ACT, L.ATTN_QK_PROBS, L.ONLINE_MLP_AUTOENCODER_ERROR]),
    st.tuples(places, places),
    st.integers(0, 11),
    passes,
)
plain_traces = st.builds(
    TraceConfig, neuron_nodes, st.sampled_from(PreOrPostAct), st.booleans()
) | st.builds(
    TraceConfig,
    head_nodes,
    st.sampled_from(PreOrPostAct),
    st.booleans(),
    st.sampled_from([AttentionTraceType.Q, AttentionTraceType.K, AttentionTraceType.QK]),
)
traces = plain_traces | st.builds(
    TraceConfig,
    head_nodes,
    attention_trace_type=st.just(AttentionTraceType.V),
    downstream_trace_config=st.none() | plain_traces,
)
pointers = st.one_of(
    st.builds(DerivedScalarIndex, st.just("mlp_write"), head_places, layers, passes),
    activation_indices,
    neuron_nodes,
    head_nodes,
    sub_nodes,
    traces,
    st.builds(Ablation, activation_indices, st.floats(allow_nan=False, allow_infinity=False)),
)


@given(pointers)
def test_every_pointer_survives_json(value: Pointer) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    assert "_" not in "".join(to_json(value))
    read = from_json(type(value), json.loads(text))
    assert read == value
    assert type(read) is type(value)


@given(sub_nodes)
def test_the_side_of_a_head_survives_as_a_node(node: AttnSubNodeIndex) -> None:
    assert from_json(NodeIndex, to_json(node)) == node


def test_the_members_are_those_of_the_original() -> None:
    trace = TraceConfig(NodeIndex(N.MLP_NEURON, (6, 3), 2))
    assert to_json(trace) == {
        "nodeIndex": {
            "nodeType": "mlp_neuron",
            "tensorIndices": [6, 3],
            "layerIndex": 2,
            "passType": "forward",
        },
        "preOrPostAct": "pre",
        "detachLayerNormScale": True,
        "attentionTraceType": None,
        "downstreamTraceConfig": None,
    }


def test_json_of_the_original_is_understood() -> None:
    index = from_json(
        ActivationIndex,
        {
            "activationLocationType": "attn_qk_probs",
            "tensorIndices": [4, "All", 1],
            "layerIndex": 0,
            "passType": "forward",
        },
    )
    assert index == ActivationIndex(L.ATTN_QK_PROBS, (4, None, 1), 0)
    head = {"nodeType": "attention_head", "tensorIndices": [6, 3, 1], "layerIndex": 2}
    trace = from_json(TraceConfig, {"nodeIndex": head, "attentionTraceType": "QK"})
    assert trace.attention_trace_type is AttentionTraceType.QK


NODE: dict[Any, Any] = {"nodeType": "mlp_neuron", "tensorIndices": [1, 2], "layerIndex": 0}


@pytest.mark.parametrize(
    ("kind", "data", "names"),
    [
        (NodeIndex, [], "no JSON object"),
        (NodeIndex, None, "no JSON object"),
        (NodeIndex, {}, "nodeType"),
        (NodeIndex, {**NODE, "colour": 1}, "colour"),
        (NodeIndex, {**NODE, 3: 1}, "3"),
        (NodeIndex, {**NODE, "nodeType": "neuron"}, "nodeType"),
        (NodeIndex, {**NODE, "nodeType": []}, "nodeType"),
        (NodeIndex, {**NODE, "tensorIndices": "12"}, "tensorIndices"),
        (NodeIndex, {**NODE, "tensorIndices": 5}, "tensorIndices"),
        (NodeIndex, {**NODE, "tensorIndices": [1.5]}, "tensorIndices"),
        (NodeIndex, {**NODE, "tensorIndices": [True]}, "tensorIndices"),
        (NodeIndex, {**NODE, "tensorIndices": [-1]}, "tensorIndices"),
        (NodeIndex, {**NODE, "tensorIndices": [1, 2, 3]}, "mlp_neuron"),
        (NodeIndex, {**NODE, "layerIndex": "0"}, "layerIndex"),
        (NodeIndex, {**NODE, "layerIndex": False}, "layerIndex"),
        (NodeIndex, {**NODE, "passType": "sideways"}, "passType"),
        (NodeIndex, {**NODE, "qKOrV": "attn_query"}, "mlp_neuron"),
        (AttnSubNodeIndex, {**NODE, "nodeType": "attention_head"}, "qKOrV"),
        (DerivedScalarIndex, {"dst": 3, "tensorIndices": [], "layerIndex": 0}, "dst"),
        (TraceConfig, {"nodeIndex": {**NODE, "nodeType": "x"}}, "nodeType"),
        (TraceConfig, {"nodeIndex": NODE, "detachLayerNormScale": 1}, "detachLayerNormScale"),
        (TraceConfig, {"nodeIndex": NODE, "attentionTraceType": "QK"}, "attention_trace_type"),
        (Ablation, {"index": {}, "value": 0.0}, "activationLocationType"),
        (ActivationIndex, {"activationLocationType": "mlp"}, "tensorIndices"),
    ],
)
def test_malformed_json_is_refused_by_name(kind: type[Pointer], data: object, names: str) -> None:
    with pytest.raises(InvalidInput, match=names) as caught:
        from_json(kind, data)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@pytest.mark.parametrize("value", ["0", True, float("nan"), float("inf"), None])
def test_an_ablation_sets_a_finite_number(value: object) -> None:
    index = to_json(ActivationIndex(L.MLP_POST_ACT, (0, 0), 0))
    with pytest.raises(InvalidInput, match="finite"):
        from_json(Ablation, {"index": index, "value": value})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*NODE, "passType", "qKOrV"]), inner, max_size=5)
        ),
        max_leaves=8,
    )
)
def test_no_json_raises_anything_untyped(data: object) -> None:
    for kind in (NodeIndex, ActivationIndex, DerivedScalarIndex, TraceConfig, Ablation):
        try:
            from_json(kind, data)
        except InvalidInput as error:
            assert error.kind is not None  # noqa: PT017
