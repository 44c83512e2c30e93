"""The measured error: which arrays it is of, and how little memory measuring it takes."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import TEXTS, amplified, run
from tiny_gpt2 import tiny_gpt2
from tiny_ingest import fresh_copy, tiny_model

from actstore.ingest.model import load_model
from actstore.ingest.reference import independent_forward, stream_independent_forward
from actstore.ingest.selfcheck import check_store
from actstore.query.session import Store
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.reader import StoreReader
from actstore.store.records import encode_record
from actstore.store.selfcheck import SelfCheck, publish_selfcheck, read_selfchecks
from actstore.store.verification import verify_store
from actstore.store.vocabulary import ActivationLocationType

L = ActivationLocationType


# Which arrays


def test_error_of_a_further_set_is_kept(tmp_path: Path) -> None:
    store = fresh_copy(tmp_path / "s")
    before = read_selfchecks(LocalBlobs(store))
    assert "attn_value/forward" not in before
    report = run(store, None, set_name="attention", locations="attn_value,attn_qk_probs")
    after = read_selfchecks(LocalBlobs(store))
    assert before.items() <= after.items()
    assert after["attn_value/forward"] == report.errors["attn_value"] > 0
    with Store(store) as opened:
        assert opened.locations["attn_value"].measured_error == report.errors["attn_value"]
        assert "measured error" in opened.raw("attn_value", sequences=[0]).source
    assert verify_store(store).ok


def test_array_stored_anew_shows_its_own_error(tmp_path: Path) -> None:
    loaded = amplified(3e3)
    first = run(tmp_path / "s", TEXTS[:1], loaded=loaded, dtype="float16")
    run(
        tmp_path / "s",
        None,
        loaded=loaded,
        set_name="fine",
        locations="mlp_post_act",
        dtype="float32",
    )
    errors = read_selfchecks(LocalBlobs(tmp_path / "s"))
    assert errors["mlp_post_act/forward"] == first.errors["mlp_post_act"]
    assert errors["mlp_post_act/forward@fine"] < 1e-5 < errors["mlp_post_act/forward"]
    with Store(tmp_path / "s") as store:
        assert store.locations["mlp_post_act"].measured_error == errors["mlp_post_act/forward@fine"]


def test_array_that_lacks_segments_is_measured_again_when_it_has_them(tmp_path: Path) -> None:
    """What was compared with fewer sequences must not stand in the way of the whole."""
    store = fresh_copy(tmp_path / "s")
    run(store, None, set_name="attention", locations="attn_value")
    for path in (store / "selfcheck").iterdir():
        path.unlink()
    reader = StoreReader(store)
    partial = StoreReader(store)
    array = partial.array(L.ATTN_VALUE)
    array.segments = [0]
    check_store(partial, tiny_model())
    (alone,) = [
        check
        for path in (store / "selfcheck").iterdir()
        if "attn_value/forward"
        in (check := SelfCheck.decode(path.read_bytes(), f"selfcheck/{path.name}")).errors
    ]
    first = set(range(reader.segment(0).n_sequences))
    assert set(alone.sequences) <= first
    errors = check_store(reader, tiny_model())
    assert read_selfchecks(reader.blobs)["attn_value/forward"] == errors["attn_value"]
    assert verify_store(store).ok


def test_replay_of_the_same_arrays_is_kept_once(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    once = SelfCheck((0, 1), {"a/forward": "float16"}, {"a/forward": 0.25})
    publish_selfcheck(blobs, once)
    publish_selfcheck(blobs, SelfCheck((0, 1), {"a/forward": "float16"}, {"a/forward": 0.5}))
    assert read_selfchecks(blobs) == {"a/forward": 0.25}
    for other in (
        SelfCheck((0, 2), {"a/forward": "float16"}, {"a/forward": 0.5}),
        SelfCheck((0, 1), {"a/forward": "float32"}, {"a/forward": 0.125}),
        SelfCheck((0, 1), {"b/forward": "float16"}, {"b/forward": 0.0625}),
    ):
        publish_selfcheck(blobs, other)
    assert read_selfchecks(blobs) == {"a/forward": 0.5, "b/forward": 0.0625}
    assert len(list(blobs.listing())) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"sequences": [0], "errors": {"a/forward": 0.5}},
        {"sequences": [0], "dtypes": {}, "errors": {"a/forward": 0.5}},
        {"sequences": 3, "dtypes": {}, "errors": {}},
        {"sequences": [0], "dtypes": {}, "errors": []},
        {"sequences": [], "dtypes": {}, "errors": {}},
    ],
)
def test_record_of_another_sort_is_damage(tmp_path: Path, fields: dict[str, object]) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.publish("selfcheck/x.json", [encode_record(fields)])
    with pytest.raises(StoreDamaged, match=r"selfcheck/x\.json") as caught:
        read_selfchecks(blobs)
    assert caught.value.kind is ErrorKind.MALFORMED_FILE


# Memory


def test_streamed_tensors_are_those_that_are_collected() -> None:
    loaded = load_model((tiny_gpt2(), None))
    ids = torch.arange(24).reshape(2, 12)
    collected = independent_forward(loaded, ids)
    wanted = {L.RESID_POST_MLP, L.ATTN_QK_LOGITS, L.LOGITS, L.RESID_POST_EMBEDDING}
    seen: list[tuple[L, int | None]] = []

    def compare(location: L, layer: int | None, tensor: torch.Tensor) -> None:
        seen.append((location, layer))
        torch.testing.assert_close(tensor, collected[location][layer or 0], rtol=0, atol=0)

    stream_independent_forward(loaded, ids, compare, locations=wanted)
    assert seen == [
        (L.RESID_POST_EMBEDDING, None),
        (L.ATTN_QK_LOGITS, 0),
        (L.RESID_POST_MLP, 0),
        (L.ATTN_QK_LOGITS, 1),
        (L.RESID_POST_MLP, 1),
        (L.LOGITS, None),
    ]


def test_no_more_than_one_layer_is_alive_at_once() -> None:
    loaded = load_model((tiny_gpt2(n_layer=4), None))
    alive: list[tuple[L, int | None, weakref.ref[torch.Tensor]]] = []

    def watch(location: L, layer: int | None, tensor: torch.Tensor) -> None:
        held = [(at, of) for at, of, tensor in alive if tensor() is not None]
        # The residual stream goes on into the next layer; nothing else does.
        assert all(of in (layer, None) or at is L.RESID_POST_MLP for at, of in held), held
        if location is L.ATTN_QK_PROBS:
            assert (L.ATTN_QK_LOGITS, layer) not in held
        if location is L.ATTN_WEIGHTED_SUM_OF_VALUES:
            assert (L.ATTN_QK_PROBS, layer) not in held
        alive.append((location, layer, weakref.ref(tensor)))

    everything = loaded.architecture.taps.keys() - {L.LOGITS, L.RESID_FINAL_LAYER_NORM_SCALE}
    stream_independent_forward(loaded, torch.arange(8)[None], watch, locations=everything)
    assert len(alive) > 4 * 10


def test_selfcheck_keeps_no_collected_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only stored locations are computed on, and the largest is asked for by windows of rows."""
    store = fresh_copy(tmp_path / "s")
    reader = StoreReader(store)
    expected = check_store(reader, tiny_model())
    array = reader.array(L.MLP_POST_ACT)
    monkeypatch.setattr("actstore.ingest.selfcheck._WINDOW_ROWS", 5)
    sizes: list[int] = []
    window = array.reader.window

    def watched(segment: int, layer: int, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return window(segment, layer, start, stop)

    monkeypatch.setattr(array.reader, "window", watched)
    assert check_store(reader, tiny_model()) == expected
    assert max(sizes) == 5
