"""Every way to read a store gives the values that are in its arrays, at the right rows."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import build_store, commit_segments, stored_rows

from actstore.query.batches import BatchReader
from actstore.query.derived import scalar
from actstore.query.session import Store
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, InvalidInput, NotAStore, StoreDamaged, Unavailable
from actstore.store.plan import load_plans
from actstore.store.planning import build_plan
from actstore.store.selfcheck import SelfCheck, publish_selfcheck
from actstore.store.token_stream import TokenizedDocument
from actstore.store.vocabulary import (
    FORWARD_LOCATIONS,
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
)

LENGTHS = [100, 37, 5, 120, 90, 128, 61, 1, 77, 128, 33, 128, 128, 64, 11, 128]
ROWS = 512


class World:
    """A shuffled, ragged store of several segments, and what is in it by global row."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(3)
        total = sum(LENGTHS)
        self.values = {
            "resid_post_embedding": rng.normal(size=(total, 8)),
            "resid_post_mlp": rng.normal(size=(3, total, 8)),
            "mlp_post_act": rng.normal(size=(3, total, 40)),
            "attn_value": rng.normal(size=(3, total, 2, 4)),
        }
        self.path = build_store(
            root,
            self.values,
            LENGTHS,
            dtype="float16",
            segment_rows=ROWS,
            special_token_ids=[7],
            shuffle=5,
            columns=[
                {"label": f"doc {n}", "score": n / 2, "even": n % 2 == 0}
                for n in range(len(LENGTHS))
            ],
        )
        self.store = Store(self.path)
        self.rows = stored_rows(self.path)
        self.document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
        self.position = np.concatenate([np.arange(length) for length in LENGTHS])

    def at(self, name: str, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The stored values at global rows, ``(layer, row, *unit)`` or ``(row, *unit)``."""
        corpus = {row: index for index, row in enumerate(self.rows.tolist())}
        index = [corpus[row] for row in np.asarray(tokens).tolist()]
        axis = 0 if name == "resid_post_embedding" else 1
        return self.values[name].take(index, axis).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("session") / "store")


@pytest.mark.parametrize(
    "name", ["resid_post_embedding", "resid_post_mlp", "mlp_post_act", "attn_value"]
)
def test_whole_sequences_are_read_as_stored(world: World, name: str) -> None:
    for sequences in ([0], [3, 1], list(range(len(LENGTHS))), np.array([2, 2])):
        found = world.store.raw(name, sequences=sequences)
        tokens = found.coordinates["token"]
        assert np.array_equal(found.numpy(), world.at(name, tokens))
        assert list(dict.fromkeys(found.coordinates["sequence"].tolist())) == list(
            dict.fromkeys(np.asarray(sequences).tolist())
        )
        assert found.source == "stored float16"


def test_coordinates_are_those_of_the_plan(world: World) -> None:
    found = world.store.raw("mlp_post_act")
    order = np.argsort(world.rows)
    assert np.array_equal(found.coordinates["token"], world.rows[order])
    assert np.array_equal(found.coordinates["position"], world.position[order])
    assert found.coordinates["layer"].tolist() == [0, 1, 2]
    assert np.array_equal(found.numpy(), world.at("mlp_post_act", world.rows[order]))
    assert found.dims == ("layer", "token", "neuron")
    assert dict(found.sizes) == {"layer": 3, "token": sum(LENGTHS), "neuron": 40}
    assert repr(found) == "mlp_post_act(layer=3, token=1239, neuron=40) float32, stored float16"


@settings(max_examples=40)
@given(data=st.data())
def test_any_rows_in_any_order_are_gathered(world: World, data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.sampled_from(world.rows.tolist()), min_size=1, max_size=60)
        | st.permutations(world.rows[:200].tolist())
    )
    layers = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=3))
    tensor, table = world.store.gather(
        "mlp_post_act", layers=layers, tokens=rows, columns=["label", "even"]
    )
    expected = world.at("mlp_post_act", rows)
    assert np.array_equal(tensor.numpy(), expected if layers is None else expected[layers])
    corpus = {row: index for index, row in enumerate(world.rows.tolist())}
    places = [corpus[row] for row in rows]
    assert table.column("token").to_pylist() == rows
    assert table.column("position").to_pylist() == world.position[places].tolist()
    documents = world.document[places].tolist()
    assert table.column("document").to_pylist() == documents
    assert table.column("label").to_pylist() == [f"doc {n}" for n in documents]
    assert table.column("even").to_pylist() == [n % 2 == 0 for n in documents]


def test_the_table_says_what_stands_at_a_row(world: World) -> None:
    segment = world.store.reader.segment(0)
    tokens = [5, 0, 7]
    table = world.store.gather("resid_post_embedding", tokens=tokens)[1]
    assert table.column_names == [
        "token",
        "sequence",
        "position",
        "token_id",
        "text",
        "special",
        "document",
    ]
    assert table.column("token_id").to_pylist() == segment.token_ids[tokens].tolist()
    assert table.column("special").to_pylist() == segment.special[tokens].tolist()
    texts = [
        "<|special-7|>" if n == 7 else world.store.texts([n])[0]
        for n in segment.token_ids[tokens].tolist()
    ]
    assert table.column("text").to_pylist() == texts
    assert world.store.texts([0, 24, 46, 47, 1000]) == ["a", " a", "\n", "\ufffd", "<1000>"]
    rows = world.store.row_map.of_tokens(tokens)
    assert rows.position.tolist() == table.column("position").to_pylist() == [4, 0, 6]
    assert world.store.row_texts(rows) == texts


def test_names_of_transformer_lens_and_layers_within_them(world: World) -> None:
    whole = world.store.raw("mlp_post_act", sequences=[0])
    for name, layers in (("mlp_post", [2]), ("blocks.2.mlp.hook_post", None)):
        found = world.store.raw(name, sequences=[0], layers=layers)
        assert found.name == "mlp_post_act"
        assert found.layers == (2,)
        assert np.array_equal(found.numpy()[0], whole.numpy()[2])
    assert np.array_equal(
        world.store.raw("blocks.0.hook_resid_pre", sequences=[0]).numpy(),
        world.store.raw("resid_post_embedding", sequences=[0]).numpy(),
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_of_results(world: World, dtype: str) -> None:
    wide = world.store.raw("mlp_post_act", sequences=[1]).values
    found = world.store.raw("mlp_post_act", sequences=[1], dtype=dtype).values
    assert found.dtype is getattr(torch, dtype)
    assert torch.equal(found, wide.to(found.dtype))
    derived = world.store.derive("mlp_write_norm", sequences=[1], dtype=dtype).values
    canonical = world.store.derive("mlp_write_norm", sequences=[1]).values
    assert torch.equal(derived.to(torch.float32), canonical.to(derived.dtype).to(torch.float32))


def test_parts_of_a_labelled_tensor(world: World) -> None:
    found = world.store.raw("attn_value", sequences=[4, 1], layers=[2, 0])
    alone = world.store.raw("attn_value", sequences=[1], layers=[0])
    part = found.sequence(1).layer(0)
    assert np.array_equal(part.numpy(), alone.numpy()[0])
    assert part.dims == ("token", "kv_head", "head_channel")
    assert np.array_equal(part.coordinates["token"], alone.coordinates["token"])
    with pytest.raises(InvalidInput, match=r"no layer 1; it has \(2, 0\)"):
        found.layer(1)
    with pytest.raises(InvalidInput, match="no row of sequence 9"):
        found.sequence(9)


def test_several_scalars_at_once(world: World) -> None:
    names = ["mlp_write_norm", "mlp_post", "resid_post_embedding_norm"]
    found = world.store.derive(names, sequences=[2, 0], layers=[1])
    assert list(found) == ["mlp_write_norm", "mlp_post_act", "resid_post_embedding_norm"]
    assert "mlp_post" not in found
    assert found.get("nothing") is None
    for name, tensor in found.items():
        layers = [1] if tensor.layers else None
        alone = world.store.derive(name, sequences=[2, 0], layers=layers)
        assert np.array_equal(tensor.numpy(), alone.numpy())


def test_pair_shaped_values_end_with_their_sequence(world: World) -> None:
    found = world.store.raw("attn_qk_probs", sequences=[0, 1], layers=[1])
    lengths = [len(world.store.raw("mlp_post", sequences=[n], layers=0).rows) for n in (0, 1)]
    assert found.dims == ("layer", "token", "head", "attended")
    assert found.sizes["attended"] == max(lengths)
    for number, length in enumerate(lengths):
        values = found.sequence(number).numpy()
        assert np.isnan(values[..., length:]).all()
        inside = values[0, :, :, :length]
        assert not np.isnan(inside).any()
        np.testing.assert_allclose(inside.sum(-1), 1, atol=1e-6)
        assert (inside[np.triu_indices(length, 1)[0], :, np.triu_indices(length, 1)[1]] == 0).all()


def test_windows_for_ranking_are_the_derived_values(world: World) -> None:
    for name in ("mlp_write_norm", "mlp_pre_act", "resid_post_mlp_norm", "logits"):
        declared = scalar(name)
        window = world.store.derive_window(declared, 3, 1)
        derived = world.store.derive(name, sequences=[3])
        expected = derived.layer(1).numpy() if declared.has_layers else derived.numpy()
        assert np.array_equal(window, expected.reshape(len(expected), -1))
        assert window.shape[1] == int(np.prod(world.store.unit_shape(declared)))
    declared = scalar("attn_qk_probs")
    window = world.store.derive_window(declared, 3, 1).reshape(-1, 128, 2).swapaxes(1, 2)
    derived = world.store.derive("attn_qk_probs", sequences=[3], layers=1).numpy()[0].swapaxes(1, 2)
    length = len(window)
    past = np.tril(np.ones((length, length), bool))
    for head in range(2):
        assert np.array_equal(window[:, head, :length][past], derived[:, head][past])
        assert np.isnan(window[:, head, :length][~past]).all()
    assert np.isnan(window[:, :, length:]).all()
    assert world.store.unit_restriction(declared, (5, 1)) == {"heads": 1, "attended": 5}
    assert world.store.unit_restriction(scalar("resid_post_mlp_norm"), (0,)) == {}


# Batches


def collect(batches: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[int]]:
    parts = list(batches)
    return (
        torch.cat([values for values, _ in parts]).numpy(),
        np.concatenate([rows for _, rows in parts]),
        [len(rows) for _, rows in parts],
    )


@pytest.mark.parametrize("shuffle", [None, 0, 9])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("size", [1000, 64, 5000])
def test_batches_hold_every_row_once(
    world: World, size: int, special: bool, shuffle: int | None
) -> None:
    values, rows, sizes = collect(
        world.store.batches("mlp_post", layer=1, size=size, shuffle=shuffle, special=special)
    )
    all_rows = world.store.raw("mlp_post", layers=1).rows
    ordinary = ~world.store.row_map.special(all_rows)
    expected = all_rows.token if special else all_rows.token[ordinary]
    assert 0 < (~ordinary).sum() < len(ordinary)
    assert np.array_equal(np.sort(rows), expected)
    assert np.array_equal(values, world.at("mlp_post_act", rows)[1])
    assert all(count == size for count in sizes[:-1])
    assert 0 < sizes[-1] <= size
    assert np.array_equal(rows, expected) == (shuffle is None)


@settings(max_examples=25)
@given(
    size=st.integers(1, 700),
    window_rows=st.integers(1, 1500),
    seed=st.none() | st.integers(0, 3),
    name=st.sampled_from(["resid_post_mlp", "resid_post_attn"]),
)
def test_batches_in_small_windows(
    world: World, size: int, window_rows: int, seed: int | None, name: str
) -> None:
    location = ActivationLocationType[name.upper()]
    store = world.store
    reader = BatchReader(store.sources, store.row_map, location, 2, window_rows * 32)
    values, rows, sizes = collect(reader.batches(size, seed, True, torch.float32))
    everything = store.raw(name, layers=2)
    assert np.array_equal(np.sort(rows), everything.rows.token)
    place = {row: index for index, row in enumerate(everything.rows.token.tolist())}
    assert np.array_equal(values, everything.numpy()[0][[place[row] for row in rows.tolist()]])
    assert all(count == size for count in sizes[:-1])


def test_a_shuffle_is_fixed_by_its_seed_and_mixes(world: World) -> None:
    def order(seed: int) -> npt.NDArray[np.int64]:
        return collect(world.store.batches("resid_post_mlp", layer=0, size=256, shuffle=seed))[1]

    assert np.array_equal(order(1), order(1))
    assert not np.array_equal(order(1), order(2))
    # Rows of one window come in no order of their own.
    ranks = np.argsort(np.argsort(order(1)))
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.15


def test_batches_refuse_before_the_first_is_read(world: World) -> None:
    for arguments, kind in (
        ({"location": "mlp_post"}, ErrorKind.INVALID_ARGUMENT),
        ({"location": "mlp_post", "layer": 3}, ErrorKind.UNKNOWN_LAYER),
        ({"location": "mlp_post", "layer": 0, "size": 0}, ErrorKind.INVALID_ARGUMENT),
        ({"location": "pattern", "layer": 0}, ErrorKind.INVALID_ARGUMENT),
        ({"location": "nowhere", "layer": 0}, ErrorKind.UNKNOWN_LOCATION),
        ({"location": "mlp_post", "layer": 0, "dtype": "int8"}, ErrorKind.INVALID_ARGUMENT),
    ):
        with pytest.raises(InvalidInput) as caught:
            world.store.batches(**arguments)
        assert caught.value.kind is kind


# What it holds


def test_info_counts_what_is_committed(world: World) -> None:
    info = world.store.info()
    assert (info.tokens, info.tokens_planned) == (1239, 1239)
    assert (info.sequences, info.documents) == (16, 16)
    assert (info.segments_committed, info.segments_planned) == (3, 3)
    assert info.is_complete
    assert info.coverage == {"base": 3}
    assert (info.model, info.architecture, info.layers) == ("tiny", "gpt2", 3)
    assert list(info.locations) == [
        "resid_post_embedding",
        "attn_value",
        "mlp_post_act",
        "resid_post_mlp",
    ]
    entry = info.locations["mlp_post_act"]
    shards = [
        path
        for path in (world.path / "arrays/mlp_post_act/forward").iterdir()
        if path.name.startswith("c.")
    ]
    assert entry.bytes == sum(path.stat().st_size for path in shards)
    assert (entry.dtype, entry.retention, entry.axes) == ("float16", "raw", ("neuron",))
    assert info.to_json()["locations"]["mlp_post_act"]["kind"] == "stored"
    text = repr(world.store)
    assert "tiny, 3 layers; 1,239 tokens in 16 sequences of 16 documents" in text
    assert "mlp_post_act float16" in text


def test_a_measured_error_is_named(tmp_path: Path) -> None:
    values = {"mlp_post_act": np.zeros((1, 100, 4))}
    path = build_store(tmp_path / "store", values, [100])
    key = "mlp_post_act/forward"
    publish_selfcheck(LocalBlobs(path), SelfCheck((0,), {key: "float16"}, {key: 0.00031}))
    store = Store(path)
    assert store.raw("mlp_post_act").source == "stored float16 (measured error 3.1e-04)"
    assert store.locations["mlp_post_act"].measured_error == 0.00031
    assert store.locations["mlp_pre_act"].measured_error is None


def test_all_seventeen_locations_are_listed(world: World) -> None:
    locations = world.store.locations
    assert list(locations) == [location.label for location in FORWARD_LOCATIONS]
    absent = {name for name, entry in locations.items() if entry.kind == "not obtainable"}
    assert absent == {location.label for location in OPTIONAL_LOCATIONS}
    assert "gated" in locations["mlp_pre_linear"].source
    assert locations["attn_query"].kind == "reconstructed"
    assert locations["attn_query"].dtype is None
    assert locations["attn_query"].bytes == 0


@pytest.fixture
def half(tmp_path: Path) -> Store:
    """A store with two of its four segments committed."""
    values = {"mlp_post_act": np.random.default_rng(0).normal(size=(1, 1600, 4))}
    return Store(build_store(tmp_path / "half", values, [100] * 16, commit=[0, 2]))


def test_what_is_not_committed_is_never_read_as_something(half: Store) -> None:
    info = half.info()
    assert (info.tokens, info.tokens_planned) == (1000, 1600)
    assert (info.sequences, info.documents) == (10, 10)
    assert info.missing == ((1, 1), (3, 3))
    found = half.raw("mlp_post_act")
    assert sorted(set(found.coordinates["sequence"].tolist())) == [*range(5), *range(10, 15)]
    for call in (
        lambda: half.raw("mlp_post_act", sequences=[4, 5]),
        lambda: half.raw("mlp_post_act", tokens=[600]),
        lambda: half.derive("mlp_write_norm", sequences=15),
        lambda: half.gather("mlp_post_act", tokens=[0, 1536]),
    ):
        with pytest.raises(Unavailable, match="planned but not ingested yet") as caught:
            call()
        assert caught.value.kind is ErrorKind.NOT_STORED
    rows = collect(half.batches("mlp_post_act", layer=0, size=64, shuffle=0, special=True))[1]
    assert np.array_equal(np.sort(rows), found.coordinates["token"])


def test_nothing_committed(tmp_path: Path) -> None:
    values = {"mlp_post_act": np.zeros((1, 100, 4))}
    store = Store(build_store(tmp_path / "store", values, [100], commit=[]))
    assert store.info().tokens == 0
    assert "0 tokens" in repr(store)
    with pytest.raises(Unavailable) as caught:
        store.raw("mlp_post_act", sequences=[0])
    assert caught.value.kind is ErrorKind.NOTHING_COMMITTED


def test_groups_of_rows(half: Store) -> None:
    first, label = half.row_groups("sequence")
    assert label.tolist() == list(range(16))
    assert first.tolist() == [512 * (n // 5) + 100 * (n % 5) for n in range(16)]
    assert np.array_equal(half.row_groups("document")[1], label)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"layers": [3]}, ErrorKind.UNKNOWN_LAYER, "There is no layer 3.*0 to 2"),
        ({"layers": -1}, ErrorKind.UNKNOWN_LAYER, "There is no layer -1"),
        ({"layers": [True]}, ErrorKind.UNKNOWN_LAYER, "There is no layer True"),
        ({"sequences": [16]}, ErrorKind.UNKNOWN_ROW, "There is no sequence 16.*0 to 15"),
        ({"sequences": -1}, ErrorKind.UNKNOWN_ROW, "There is no sequence -1"),
        ({"tokens": [1536]}, ErrorKind.UNKNOWN_ROW, "There is no token 1536.*0 to 1535"),
        ({"tokens": [0, 1535]}, ErrorKind.UNKNOWN_ROW, "Row 1535 holds no token"),
        ({"sequences": [0.5]}, ErrorKind.INVALID_ARGUMENT, "whole numbers"),
        ({"sequences": [[0]]}, ErrorKind.INVALID_ARGUMENT, "one-dimensional"),
        ({"sequences": [0], "tokens": [0]}, ErrorKind.INVALID_ARGUMENT, "give one of them"),
        ({"dtype": "int8"}, ErrorKind.INVALID_ARGUMENT, "dtype is 'int8'"),
    ],
)
def test_bad_arguments_say_what_is_valid(
    world: World, arguments: dict[str, Any], kind: ErrorKind, message: str
) -> None:
    for read in (world.store.raw, world.store.derive):
        with pytest.raises(InvalidInput, match=message) as caught:
            read("mlp_post_act", **arguments)
        assert caught.value.kind is kind


def test_layers_that_contradict_the_name(world: World) -> None:
    with pytest.raises(InvalidInput, match="belongs to no layer"):
        world.store.raw("resid_post_embedding", layers=[0])
    with pytest.raises(InvalidInput, match="The name says layer 1"):
        world.store.raw("blocks.1.mlp.hook_post", layers=[0])
    with pytest.raises(InvalidInput, match="There is no layer 5"):
        world.store.derive("blocks.5.mlp.hook_post")
    with pytest.raises(InvalidInput, match="pass_type is 'sideways'"):
        world.store.raw("mlp_post_act", pass_type="sideways")


def test_unknown_names(world: World) -> None:
    with pytest.raises(InvalidInput) as caught:
        world.store.raw("mlp_past_act")
    assert caught.value.kind is ErrorKind.UNKNOWN_LOCATION
    with pytest.raises(InvalidInput, match="Did you mean mlp_post_act"):
        world.store.derive("mlp_past_act")
    with pytest.raises(InvalidInput, match="no column 'colour'; they have document, source"):
        world.store.gather("mlp_post_act", tokens=[0], columns=["colour"])


def test_an_empty_question_has_an_empty_answer(world: World) -> None:
    found = world.store.raw("mlp_post_act", tokens=[])
    assert found.shape == (3, 0, 40)
    assert world.store.derive("attn_qk_probs", sequences=[]).shape == (3, 0, 0, 2)
    assert world.store.gather("mlp_post_act", tokens=[])[1].num_rows == 0


def test_results_have_a_limit(world: World) -> None:
    size = 3 * 1239 * 40 * 4
    with Store(world.path, max_result_bytes=size) as store:
        assert store.raw("mlp_post_act").values.nbytes == size
        assert store.derive("mlp_write_norm").values.nbytes == size
        with pytest.raises(InvalidInput, match="`batches`") as caught:
            store.raw("mlp_post_act", dtype="float64")
        assert caught.value.kind is ErrorKind.TOO_LARGE
        with pytest.raises(InvalidInput, match="more than the limit of"):
            store.derive("mlp_write")
        with pytest.raises(InvalidInput, match="rows are asked for"):
            store.raw("mlp_post_act", tokens=np.zeros(size, np.int64))
        with (
            Store(world.path, max_result_bytes=1000) as narrow,
            pytest.raises(InvalidInput, match="mlp_write of one sequence is"),
        ):
            narrow.derive_window(scalar("mlp_write"), 3, 0)
        with pytest.raises(InvalidInput, match="rows are asked for"):
            store.raw("mlp_post_act", sequences=np.zeros(size, np.int64))


def test_a_path_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(NotAStore):
        Store(tmp_path)


def test_damage_is_never_returned_as_numbers(tmp_path: Path) -> None:
    values = {"mlp_post_act": np.random.default_rng(0).normal(size=(1, 228, 4))}
    path = build_store(tmp_path / "store", values, [100, 128])
    shard = path / "arrays/mlp_post_act/forward/c.0.0.0"
    data = bytearray(shard.read_bytes())
    # Row 150 of the only chunk of 32 columns.
    data[150 * 64] ^= 1
    shard.write_bytes(data)
    store = Store(path)
    for read in (
        lambda: store.raw("mlp_post_act", sequences=[1]),
        lambda: store.gather("mlp_post_act", tokens=[150]),
        lambda: store.derive("mlp_write_norm", sequences=[1]),
        lambda: store.derive("mlp_write", sequences=[1]),
        lambda: list(store.batches("mlp_post_act", layer=0)),
    ):
        with pytest.raises(StoreDamaged):
            read()
    assert len(store.raw("mlp_post_act", tokens=[0])) == 1


def test_closing_releases_the_files(world: World) -> None:
    with Store(world.path) as store:
        first = store.raw("mlp_post_act", tokens=[3])
    assert isinstance(first.values, torch.Tensor)
    assert isinstance(world.store.gather("mlp_post_act", tokens=[0])[1], pa.Table)


def test_sql_and_its_predicates(world: World) -> None:
    counted = world.store.sql("SELECT count(*), max(position) FROM tokens").fetchall()
    assert counted == [(1239, 127)]
    chosen = world.store.sql("SELECT token FROM tokens WHERE document = ?", [3]).fetchall()
    assert sorted(row for (row,) in chosen) == sorted(world.rows[world.document == 3].tolist())
    rows = world.store.rows_where("score > 4 AND position < 2")
    expected = world.rows[(world.document / 2 > 4) & (world.position < 2)]
    assert rows.tolist() == sorted(expected.tolist())
    units = world.store.units_where("neuron < 2 AND layer = 1")
    assert units == [(1, 0), (1, 1)]
    with pytest.raises(InvalidInput):
        world.store.sql("SELECT * FROM nowhere")


def test_plans_may_bring_different_columns(tmp_path: Path) -> None:
    values = {"mlp_post_act": np.zeros((1, 60, 4))}
    path = build_store(
        tmp_path / "store", values, [30, 30], columns=[{"year": 1}, {"year": 2, "only": "x"}]
    )
    documents = [
        TokenizedDocument(np.array([1, 2, 3], np.int32), "later", {"Year": 2.5, "other": True})
    ]
    plans = load_plans(path)
    build_plan(LocalBlobs(path), plans[0].config, documents, plans, append=True)
    commit_segments(path, {"mlp_post_act": np.zeros((1, 63, 4))})
    store = Store(path)
    table = store.gather("mlp_post_act", tokens=[512, 30, 0], columns=["year", "only", "other"])[1]
    assert table.column("year").to_pylist() == [2.5, 2.0, 1.0]
    assert table.column("only").to_pylist() == [None, "x", None]
    assert table.column("other").to_pylist() == [True, None, None]
    assert table.column("document").to_pylist() == [2, 1, 0]


def test_a_ranking_reads_what_derive_gives(world: World) -> None:
    best = world.store.topk("mlp_write_norm", k=5)
    everything = world.store.derive("mlp_write_norm")
    ordinary = ~world.store.row_map.special(everything.rows)
    values = everything.numpy()[:, ordinary]
    assert best.column("value") == sorted(values.reshape(-1).tolist(), reverse=True)[:5]
    example = world.store.examples("mlp_post_act", (1, 3), k=1)[0]
    assert example.value == world.store.raw("mlp_post_act", layers=1).numpy()[0, ordinary, 3].max()
