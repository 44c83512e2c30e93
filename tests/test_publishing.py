"""A segment is described while it is written: the same for any number of threads."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actstore.store import publishing, zones
from actstore.store.blobs import LocalBlobs
from actstore.store.commits import commit_path
from actstore.store.errors import StoreDamaged, WriteFailed
from actstore.store.layout import ArraySpec, StoredDtype
from actstore.store.manifest import SetRecord
from actstore.store.plan import SegmentPlan
from actstore.store.plan_record import PlanConfig
from actstore.store.planning import build_plan
from actstore.store.publishing import publish_segment
from actstore.store.sections import SectionFile
from actstore.store.shard_file import shard_parts
from actstore.store.shards import SegmentBuffer
from actstore.store.token_stream import TokenizedDocument
from actstore.store.vocabulary import ActivationLocationType as Location
from actstore.store.vocabulary import PassType
from actstore.store.zones import SegmentDescription, describe_segment

ROWS, LAYERS = 1024, 3
SPECS = tuple(
    ArraySpec(location, PassType.FORWARD, LAYERS, shape, StoredDtype.FLOAT16, ROWS)
    for location, shape in (
        (Location.RESID_POST_MLP, (24,)),
        (Location.MLP_POST_ACT, (70,)),
        (Location.ATTN_QUERY, (3, 16)),
    )
)
SET = SetRecord("base", SPECS, {spec.location.label: "raw" for spec in SPECS})
PLAN_HASH = "0" * 16


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SegmentPlan:
    config = PlanConfig(context=100, vocabulary_size=64, segment_rows=ROWS, batch_tokens=400)
    documents = (
        TokenizedDocument(np.arange(90, dtype=np.int32) % 64, str(number), {})
        for number in range(10)
    )
    folder = LocalBlobs(tmp_path_factory.mktemp("plan"))
    return build_plan(folder, config, documents, [], append=False).plans[0].segment(0)


def filled(plan: SegmentPlan, seed: int = 0) -> dict[str, SegmentBuffer]:
    rng = np.random.default_rng(seed)
    buffers = {spec.key: SegmentBuffer(spec, plan.n_rows) for spec in SPECS}
    for spec in SPECS:
        for layer in range(LAYERS):
            values = rng.standard_normal((plan.n_rows, spec.columns)).astype(np.float16)
            values[:, 3] = np.maximum(values[:, 3], 0)
            buffers[spec.key].put(layer, 0, values)
    return buffers


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def zones_of(root: Path, spec: ArraySpec) -> dict[str, npt.NDArray[Any]]:
    file = SectionFile(root / spec.zone_path(0), spec.zone_path(0))
    sections = {name: file.read(name) for name in file.names}
    file.close()
    return sections


def require_same(found: dict[str, npt.NDArray[Any]], expected: dict[str, npt.NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, section in expected.items():
        np.testing.assert_array_equal(found[name], section, err_msg=name)


@pytest.mark.parametrize("threads", [2, 5, None])
def test_files_are_the_same_for_any_number_of_threads(
    tmp_path: Path, plan: SegmentPlan, monkeypatch: pytest.MonkeyPatch, threads: int | None
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    publish_segment(LocalBlobs(one), SET, PLAN_HASH, plan, filled(plan), 1)
    # Smaller tiles too: a unit is described from its own column alone.
    monkeypatch.setattr(zones, "_TILE_VALUES", 1)
    publish_segment(LocalBlobs(other), SET, PLAN_HASH, plan, filled(plan), threads)
    assert digests(other) == digests(one)
    for spec in SPECS:
        expected = describe_segment(filled(plan)[spec.key], plan.special)
        require_same(zones_of(one, spec), expected)


def test_shard_that_was_there_is_what_is_described(tmp_path: Path, plan: SegmentPlan) -> None:
    spec = SPECS[1]
    theirs = filled(plan, seed=1)
    path = spec.shard_path(0, 0)
    parts = shard_parts(spec, 0, plan.n_rows, theirs[spec.key].shard(0))
    LocalBlobs(tmp_path).publish(path, parts)
    publish_segment(LocalBlobs(tmp_path), SET, PLAN_HASH, plan, filled(plan))
    require_same(zones_of(tmp_path, spec), describe_segment(theirs[spec.key], plan.special))
    for other in (SPECS[0], SPECS[2]):
        expected = describe_segment(filled(plan)[other.key], plan.special)
        require_same(zones_of(tmp_path, other), expected)


def test_shard_that_appears_while_ours_is_written_is_what_is_described(
    tmp_path: Path, plan: SegmentPlan
) -> None:
    """Our values were described by then, and must not be believed."""
    spec = SPECS[1]
    theirs = filled(plan, seed=1)

    class Overtaken(LocalBlobs):
        def publish(self, key: str, parts: Any) -> bool:
            if key == spec.shard_path(0, 0):
                rivals = shard_parts(spec, 0, plan.n_rows, theirs[spec.key].shard(0))
                assert super().publish(key, rivals)
            return super().publish(key, parts)

    record = publish_segment(Overtaken(tmp_path), SET, PLAN_HASH, plan, filled(plan))
    require_same(zones_of(tmp_path, spec), describe_segment(theirs[spec.key], plan.special))
    again = publish_segment(LocalBlobs(tmp_path), SET, PLAN_HASH, plan, filled(plan))
    assert again == record


def test_values_are_replaced_once_nothing_reads_them(
    plan: SegmentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, others = filled(plan)[SPECS[1].key], filled(plan, seed=1)[SPECS[1].key]
    before = buffer.chunks.copy()
    begun, go = Event(), Event()
    describe = zones._tile

    def wait(*arguments: Any) -> dict[str, npt.NDArray[Any]]:
        begun.set()
        assert go.wait(10)
        return describe(*arguments)

    monkeypatch.setattr(zones, "_tile", wait)
    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(1) as caller:
        description = SegmentDescription(buffer, plan.special, pool)
        assert begun.wait(10)
        replaced = caller.submit(description.replace, range(LAYERS), others.chunks)
        with pytest.raises(TimeoutError):
            replaced.result(0.1)
        np.testing.assert_array_equal(buffer.chunks, before)
        go.set()
        replaced.result(10)
        found = description.sections()
    require_same(found, describe_segment(others, plan.special))


def test_failed_write_leaves_no_thread_and_no_commit(
    tmp_path: Path, plan: SegmentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[ThreadPoolExecutor] = []

    class Watched(ThreadPoolExecutor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pools.append(self)

    monkeypatch.setattr(publishing, "ThreadPoolExecutor", Watched)
    (tmp_path / "arrays").write_bytes(b"")
    with pytest.raises(WriteFailed):
        publish_segment(LocalBlobs(tmp_path), SET, PLAN_HASH, plan, filled(plan))
    (pool,) = pools
    assert not any(thread.is_alive() for thread in pool._threads)
    assert not (tmp_path / commit_path("base", 0)).exists()


def test_zone_file_of_other_shards_is_refused(tmp_path: Path, plan: SegmentPlan) -> None:
    publish_segment(LocalBlobs(tmp_path), SET, PLAN_HASH, plan, filled(plan))
    for spec in SPECS:
        (tmp_path / spec.shard_path(0, 0)).unlink()
    with pytest.raises(StoreDamaged, match="does not describe its shards"):
        publish_segment(LocalBlobs(tmp_path), SET, PLAN_HASH, plan, filled(plan, seed=1))
