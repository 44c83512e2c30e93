"""The writing thread: errors reach the caller, and no caller waits for a thread that stopped."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from store_builder import build_store

from actstore.ingest import writer as module
from actstore.ingest.writer import SegmentWriter
from actstore.store.blobs import LocalBlobs, write_failed
from actstore.store.commits import lock_segment
from actstore.store.errors import ErrorKind, WriteFailed
from actstore.store.plan import SegmentPlan
from actstore.store.plan_record import PlanConfig
from actstore.store.planning import build_plan
from actstore.store.reader import StoreReader
from actstore.store.spool import BUFFER_BYTES, Spool
from actstore.store.token_stream import TokenizedDocument

SECONDS = 10.0


class Publisher:
    """Stands in for ``publish_segment``: waits until it may go on, then does as told.

    Attributes:
        go: set to let it go on.
        calls: how often it was called.
        error: what it raises; None to raise nothing.
    """

    def __init__(self) -> None:
        self.go = Event()
        self.calls = 0
        self.error: OSError | None = None

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        assert self.go.wait(SECONDS)
        if self.error is not None:
            raise self.error


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Publisher:
    found = Publisher()
    monkeypatch.setattr(module, "publish_segment", found)
    return found


@pytest.fixture
def plan(tmp_path: Path) -> SegmentPlan:
    path = build_store(tmp_path / "store", {"mlp_post_act": np.zeros((1, 20, 4))}, [20])
    return StoreReader(path).segment(0)


@pytest.fixture
def writer(tmp_path: Path, plan: SegmentPlan) -> SegmentWriter:
    reader = StoreReader(tmp_path / "store")
    return SegmentWriter(reader.blobs, reader.sets["base"], [], lambda _: None)


def outcome(call: Callable[[], object]) -> BaseException | None:
    """What ``call`` raises; a call that never ends fails the test instead of stopping it."""
    found: list[BaseException | None] = []

    def attempt() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - returned to the test
            found.append(error)
        else:
            found.append(None)

    thread = Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert found, "The call did not return."
    return found[0]


def read_only(path: Path) -> WriteFailed:
    return write_failed(path, OSError(errno.EROFS, os.strerror(errno.EROFS)))


def test_waiting_caller_learns_of_a_failed_write(
    tmp_path: Path, writer: SegmentWriter, publisher: Publisher, plan: SegmentPlan
) -> None:
    publisher.error = read_only(tmp_path)
    done: list[int] = []
    for number in range(2):
        writer.submit("hash", writer.reserve(plan), partial(done.append, number))
    waiting: list[BaseException | None] = []
    thread = Thread(target=lambda: waiting.append(outcome(lambda: writer.reserve(plan))))
    thread.start()
    publisher.go.set()
    thread.join(SECONDS)
    assert waiting == [publisher.error]
    assert outcome(writer.close) is publisher.error
    assert done == [0, 1], "A dropped segment gives its lock back too."


def test_nothing_is_published_after_an_error(
    tmp_path: Path, writer: SegmentWriter, publisher: Publisher, plan: SegmentPlan
) -> None:
    publisher.error = read_only(tmp_path)
    done: list[int] = []
    assemblies = [writer.reserve(plan) for _ in range(2)]
    writer.submit("hash", assemblies[0], lambda: done.append(0))
    publisher.go.set()
    while writer._error is None:
        pass
    assert outcome(lambda: writer.submit("hash", assemblies[1], lambda: done.append(1)))
    # More often than there are places: a refused reservation must not keep one.
    for _ in range(4):
        assert outcome(lambda: writer.reserve(plan)) is publisher.error
    assert outcome(writer.close) is publisher.error
    assert publisher.calls == 1
    assert done == [0, 1]


def test_failing_done_is_an_error_and_frees_the_place(
    tmp_path: Path, writer: SegmentWriter, publisher: Publisher, plan: SegmentPlan
) -> None:
    publisher.go.set()
    failure = read_only(tmp_path)

    def done() -> None:
        raise failure

    assemblies = [writer.reserve(plan) for _ in range(2)]
    assert outcome(lambda: writer.submit("hash", assemblies[0], done)) in (None, failure)
    assert outcome(lambda: writer.reserve(plan)) is failure
    assert outcome(writer.close) is failure


def test_failed_write_is_named_rather_than_the_failing_done_after_it(
    tmp_path: Path, writer: SegmentWriter, publisher: Publisher, plan: SegmentPlan
) -> None:
    publisher.error = read_only(tmp_path)
    publisher.go.set()

    def done() -> None:
        raise RuntimeError

    assembly = writer.reserve(plan)
    assert outcome(lambda: writer.submit("hash", assembly, done)) in (None, publisher.error)
    assert outcome(writer.close) is publisher.error


def test_lock_is_released_where_its_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with lock_segment(tmp_path, "base", 0) as is_ours:
            assert is_ours
    with lock_segment(tmp_path, "base", 0) as is_ours:
        assert is_ours


# Directory entries


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are synced from here on, in order, by their names."""
    names: list[str] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            names.append(path.name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


def test_parents_of_new_directories_are_synced_once(tmp_path: Path, synced: list[str]) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    assert blobs.publish("a/b/one", [b"1"])
    assert synced == [tmp_path.name, "store", "a", "b"]
    synced.clear()
    assert blobs.publish("a/b/two", [b"2"])
    assert synced == ["b"]
    synced.clear()
    blobs.replace("a/c/three", b"3")
    assert synced == ["a", "c"]


def test_folder_of_a_spool_is_synced_into_its_parents(tmp_path: Path, synced: list[str]) -> None:
    spool = Spool(tmp_path / "store" / "plan")
    spool.write(bytes(BUFFER_BYTES))
    spool.close()
    assert synced == [tmp_path.name, "store"]


def test_store_that_a_lock_makes_is_synced_into_its_parent(
    tmp_path: Path, synced: list[str]
) -> None:
    config = PlanConfig(context=4, vocabulary_size=8, segment_rows=512, batch_tokens=8)
    documents = [TokenizedDocument(np.arange(4, dtype=np.int32), "text", {})]
    build_plan(LocalBlobs(tmp_path / "one"), config, documents, [], append=False)
    assert synced[:2] == [tmp_path.name, "one"]
    synced.clear()
    with lock_segment(tmp_path / "two", "base", 0):
        assert synced == [tmp_path.name, "two"]


def test_name_that_another_writer_linked_is_synced_too(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"theirs")
    assert not LocalBlobs(tmp_path).publish("a/one", [b"ours"])
    assert synced == ["a"]


def test_directory_that_cannot_be_made_is_a_failed_write(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(WriteFailed) as caught:
        LocalBlobs(tmp_path).publish("a/b/one", [b"1"])
    assert caught.value.kind is ErrorKind.WRITE_FAILED
