"""Copies of arrays by column: the same bits, in another order, and never a wrong one."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from store_builder import append_plan, build_store, commit_segments

from actstore.query.session import Store
from actstore.store import column_copies
from actstore.store.blobs import LocalBlobs
from actstore.store.column_copies import copy_columns
from actstore.store.commits import commit_path
from actstore.store.errors import InvalidInput, StoreDamaged, Unavailable
from actstore.store.layout import StoredDtype
from actstore.store.manifest import SetRecord
from actstore.store.publishing import publish_metadata, publish_segment, segment_files
from actstore.store.reader import StoreReader
from actstore.store.shards import SegmentBuffer
from actstore.store.verification import verify_store
from actstore.store.vocabulary import ActivationLocationType, PassType

NAME = "mlp_post_act"
PLACE = (ActivationLocationType.MLP_POST_ACT, PassType.FORWARD)
LAYERS, NEURONS = 2, 40
LENGTHS = [100, 128, 90, 120, 77, 128, 110, 99, 128, 101, 60, 128, 127, 37, 128]
TOKENS = sum(LENGTHS)


def values(seed: int = 0, tokens: int = TOKENS) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((LAYERS, tokens, NEURONS)).astype(np.float32)
    found[0, 5, 3] = 0.0
    found[1, 7, 39] = -0.0
    return found


def build(path: Path, dtype: str = "float16") -> Path:
    return build_store(path, {NAME: values()}, LENGTHS, dtype=dtype, segment_rows=512)


def files(path: Path) -> dict[str, bytes]:
    found = {}
    for one in sorted(path.rglob("*")):
        if one.is_file() and "locks" not in one.parts and "catalog" not in one.parts:
            found[str(one.relative_to(path))] = one.read_bytes()
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_bit_is_the_arrays(tmp_path: Path, dtype: str) -> None:
    path = build(tmp_path / "store", dtype)
    done = copy_columns(path, "mlp_post")
    assert (done.segments, done.written, done.location) == (4, 4, NAME)
    reader = StoreReader(path)
    copy, array = reader.column_copies[PLACE], reader.arrays[PLACE]
    assert copy is not array
    assert copy.spec.chunk_width == 1
    for segment in array.segments:
        for layer in range(LAYERS):
            whole = array.reader.window(segment, layer, 0, 512)
            assert whole.tobytes() == copy.reader.window(segment, layer, 0, 512).tobytes()
            part = copy.reader.window(segment, layer, 100, 290, [39, 3])
            assert part.tobytes() == whole[100:290][:, [39, 3]].tobytes()
    # Other software reads the same array.
    ours = zarr.open_array(path / "arrays" / copy.spec.key, mode="r")
    theirs = zarr.open_array(path / "arrays" / array.spec.key, mode="r")
    assert ours.shape == theirs.shape
    assert np.asarray(ours[...]).tobytes() == np.asarray(theirs[...]).tobytes()
    assert verify_store(path).ok
    assert copy_columns(path, NAME).written == 0
    reader.close()


def test_answers_are_the_same_with_and_without_it(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    with Store(path) as before:
        expected = [
            before.topk(NAME, k=300, layers=1, neurons=unit, special=special).table
            for unit in (0, 31, 32, 39)
            for special in (False, True)
        ]
        quantiles = before.examples(NAME, unit=(0, 39), kind="quantile", k=5).to_json()["rows"]
    copy_columns(path, NAME)
    with Store(path) as after:
        assert after.reader.column_copies
        found = [
            after.topk(NAME, k=300, layers=1, neurons=unit, special=special).table
            for unit in (0, 31, 32, 39)
            for special in (False, True)
        ]
        assert all(one.equals(other) for one, other in zip(found, expected, strict=True))
        assert (
            after.examples(NAME, unit=(0, 39), kind="quantile", k=5).to_json()["rows"] == quantiles
        )


@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_step_it_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = build(tmp_path / "whole")
    copy_columns(whole, NAME)
    path = build(tmp_path / "store")
    steps = iter(range(100))
    publish = LocalBlobs.publish

    def dying(self: LocalBlobs, key: str, parts: Any) -> bool:
        if "columns-" in key and next(steps) == step:
            raise SystemExit
        return publish(self, key, parts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "publish", dying)
        with pytest.raises(SystemExit):
            copy_columns(path, NAME)
    with Store(path) as partial:
        assert not partial.reader.column_copies
        assert len(partial.topk(NAME, k=600, layers=0, neurons=5)) == 600
    assert verify_store(path).ok
    copy_columns(path, NAME)
    wanted, found = files(whole), files(path)
    assert {name: data for name, data in found.items() if "columns-" in name} == {
        name: data for name, data in wanted.items() if "columns-" in name
    }
    assert verify_store(path).ok


def test_a_flipped_byte_is_named_and_never_read(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    copy_columns(path, NAME)
    shard = next((path / "arrays" / NAME).glob("forward@columns-*/c.0.1.0"))
    data = bytearray(shard.read_bytes())
    data[39 * 512 * 2 + 5] ^= 1
    shard.write_bytes(bytes(data))
    report = verify_store(path)
    assert [one.path for one in report.findings] == [str(shard.relative_to(path))]
    with Store(path) as store, pytest.raises(StoreDamaged, match="fails its checksum"):
        store.examples(NAME, unit=(0, 39), kind="random", k=2)


def test_an_appended_store_is_completed_by_another_run(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    copy_columns(path, NAME)
    append_plan(path, [100] * 6)
    more = np.concatenate([values(), values(1, 600)], axis=1)
    commit_segments(path, {NAME: more})
    with Store(path) as store:
        # It lacks the new rows, so it is not read.
        assert not store.reader.column_copies
        expected = store.topk(NAME, k=400, layers=1, neurons=7).table
    assert copy_columns(path, NAME).written > 0
    with Store(path) as store:
        assert store.reader.column_copies
        assert store.topk(NAME, k=400, layers=1, neurons=7).table.equals(expected)
    assert verify_store(path).ok


def ingest_again(path: Path, segment: int, seed: int) -> None:
    """Repair: a segment's record and files go, and other values come."""
    reader = StoreReader(path)
    base = reader.sets["base"]
    reader.blobs.delete(commit_path("base", segment))
    for key in segment_files(base, segment):
        reader.blobs.delete(key)
    commit_segments(path, {NAME: values(seed)}, [segment])
    reader.close()


@pytest.mark.parametrize("dies", [False, True])
def test_a_copy_of_bytes_that_are_gone_is_not_read_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    path = build(tmp_path / "store")
    copy_columns(path, NAME)
    ingest_again(path, 1, seed=8)
    reader = StoreReader(path)
    assert not reader.column_copies
    expected = reader.arrays[PLACE].reader.window(1, 0, 0, 512)
    assert (
        expected.tobytes()
        != StoreReader(build(tmp_path / "other"))
        .arrays[PLACE]
        .reader.window(1, 0, 0, 512)
        .tobytes()
    )
    reader.close()
    if dies:
        # A kill while the old files go: the record, which goes last, is still there.
        delete, lives = LocalBlobs.delete, iter((True, False))

        def dying(self: LocalBlobs, key: str) -> None:
            if "columns-" in key and not next(lives):
                raise SystemExit
            delete(self, key)

        monkeypatch.setattr(LocalBlobs, "delete", dying)
        with pytest.raises(SystemExit):
            copy_columns(path, NAME)
        monkeypatch.undo()
        assert not StoreReader(path).column_copies
    assert copy_columns(path, NAME).written == 1
    copy = StoreReader(path).column_copies[PLACE]
    assert copy.reader.window(1, 0, 0, 512).tobytes() == expected.tobytes()
    assert verify_store(path).ok


def store_as_float32(path: Path) -> None:
    """A set ``wide`` that replaces the array by one of float32."""
    reader = StoreReader(path)
    array = reader.arrays[PLACE]
    spec = replace(array.spec, dtype=StoredDtype.FLOAT32, variant="wide")
    record = SetRecord("wide", (spec,), {}, replaces=(array.spec.key,))
    reader.blobs.publish(record.path, [record.encode()])
    publish_metadata(reader.blobs, record, reader.planned_segments)
    for number in array.segments:
        buffer = SegmentBuffer(spec, array.rows_of(number))
        for layer in range(LAYERS):
            buffer.put(layer, 0, array.reader.window(number, layer, 0, 512).astype(np.float32))
        segment, plan = reader.segment(number), reader.plan_of(number)
        publish_segment(reader.blobs, record, plan.hash, segment, {spec.key: buffer})
    reader.close()


def test_a_copy_of_an_array_that_another_set_replaces_is_not_read(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    copy_columns(path, NAME)
    store_as_float32(path)
    reader = StoreReader(path)
    assert reader.arrays[PLACE].spec.key == f"{NAME}/forward@wide"
    assert not reader.column_copies
    reader.close()
    copy_columns(path, NAME)
    copy = StoreReader(path).column_copies[PLACE]
    assert copy.spec.copy_of == f"{NAME}/forward@wide"
    assert copy.spec.dtype == "float32"
    assert verify_store(path).ok


def test_what_cannot_be_copied_says_why(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    with pytest.raises(Unavailable, match="not stored"):
        copy_columns(path, "attn_query")
    with pytest.raises(Unavailable, match="not stored"):
        copy_columns(path, NAME, pass_type="backward")
    with pytest.raises(InvalidInput, match="forward or backward"):
        copy_columns(path, NAME, pass_type="sideways")
    with pytest.raises(InvalidInput, match="nowhere"):
        copy_columns(path, "nowhere")


def test_a_file_of_something_else_is_not_taken_for_a_copy(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    other = build_store(
        tmp_path / "other", {NAME: values(9)}, LENGTHS, dtype="float16", segment_rows=512
    )
    copy_columns(other, NAME)
    shard = next((other / "arrays" / NAME).glob("forward@columns-*/c.0.0.0"))
    target = path / shard.relative_to(other)
    target.parent.mkdir(parents=True)
    shutil.copy(shard, target)
    with pytest.raises(StoreDamaged, match="no copy of"):
        copy_columns(path, NAME)


def test_steps_cover_every_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills above reach past the last file of the first segments."""
    path = build(tmp_path / "store")
    published: list[str] = []
    publish = LocalBlobs.publish

    def noting(self: LocalBlobs, key: str, parts: Any) -> bool:
        published.append(key)
        return publish(self, key, parts)

    monkeypatch.setattr(column_copies, "compact", lambda reader: None)
    monkeypatch.setattr(LocalBlobs, "publish", noting)
    copy_columns(path, NAME)
    assert len([key for key in published if "columns-" in key]) > 12
