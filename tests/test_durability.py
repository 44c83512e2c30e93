"""Nothing is lost: ingests that are killed, starved, paused and raced end as undisturbed ones.

Every test compares with a store that nothing happened to: all files byte for byte, the
snapshot row by row. The ingests run in processes of their own (``ingest_server``).
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingest_server import Incident, IngestServer, Moment, Outcome, wait_for
from tiny_ingest import CORPUS, differences, file_bytes, snapshot_rows

import actstore
from actstore.store.blobs import TEMPORARY_MARK, LocalBlobs
from actstore.store.errors import ErrorKind, NotAStore, StoreDamaged, Unavailable
from actstore.store.reader import StoreReader
from actstore.store.shards import SegmentBuffer
from actstore.store.verification import verify_store
from actstore.store.vocabulary import ActivationLocationType
from actstore.store.zones import describe_segment

KILLS = 20
SEED = 20240711
DISK_BYTES = 64 * 2**20
MOMENTS: tuple[Moment, ...] = ("before", "written", "linked")


@dataclass(frozen=True)
class Undisturbed:
    """The store that nothing happened to.

    Attributes:
        path: the store.
        files: its bytes, by path inside.
        rows: its snapshot.
        seconds: what its ingest took.
    """

    path: Path
    files: dict[str, bytes]
    rows: dict[str, list[str]]
    seconds: float


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IngestServer]:
    with IngestServer(tmp_path_factory.mktemp("server"), own_mounts()) as running:
        yield running


def own_mounts() -> tuple[str, ...]:
    """The command that gives a program mounts of its own; empty where nothing may."""
    for prefix in (("unshare", "-m"), ("unshare", "-r", "-m")):
        if (
            shutil.which("unshare")
            and not subprocess.run([*prefix, "true"], check=False).returncode
        ):
            return prefix
    return ()


@pytest.fixture(scope="module")
def undisturbed(server: IngestServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    found = run_undisturbed(server, tmp_path_factory.mktemp("undisturbed") / "store", sync=True)
    assert StoreReader(found.path).segments == [0, 1, 2, 3]
    return found


def run_undisturbed(server: IngestServer, path: Path, **choices: Any) -> Undisturbed:
    started = time.monotonic()
    outcome = server.run(path, **choices)
    seconds = time.monotonic() - started
    require_success(outcome)
    assert outcome.report["missing"] == 0
    return Undisturbed(path, file_bytes(path), snapshot_rows(path), seconds)


def require_equal(store: Path, expected: Undisturbed, what: str) -> None:
    """Fail unless a finished store equals the undisturbed one."""
    different = differences(file_bytes(store), expected.files)
    assert not different, f"After {what} these files differ: {different}"
    rows = snapshot_rows(store)
    assert rows.keys() == expected.rows.keys()
    tables = [name for name in rows if rows[name] != expected.rows[name]]
    assert not tables, f"After {what} these tables of the snapshot differ: {tables}"
    report = verify_store(store)
    assert report.ok, f"After {what} verify found {report.findings}"
    assert not report.temporary, f"After {what} there is left: {report.temporary}"


def require_sound(store: Path, what: str) -> None:
    """Fail unless a store that was stopped in the middle is sound as far as it goes."""
    try:
        report = verify_store(store)
    except NotAStore:
        return
    assert report.ok, f"After {what} verify found {report.findings}"


def require_success(outcome: Outcome) -> None:
    assert outcome.status == 0, f"{outcome.error}: {outcome.message}"


# Kills


def test_kills_at_random_moments_change_nothing(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    kills = stores = 0
    while kills < KILLS:
        store = tmp_path / f"store-{stores}"
        stores += 1
        delays = []
        while True:
            delays.append(rng.uniform(0, undisturbed.seconds))
            pid = server.start(store, sync=True)
            time.sleep(delays[-1])
            os.kill(pid, signal.SIGKILL)
            outcome = server.wait(pid)
            if not outcome.was_killed:
                require_success(outcome)
                break
            kills += 1
            require_sound(store, f"kills after {delays} s")
        require_equal(store, undisturbed, f"kills after {delays} s")


def kill_at_every_step(
    server: IngestServer, store: Path, moments: tuple[Moment, ...], **choices: Any
) -> int:
    """Run until an ingest ends, each run killed as it publishes one file more; count kills."""
    kills = 0
    while True:
        moment = moments[kills % len(moments)]
        outcome = server.run(store, incidents=(Incident("kill", moment),), **choices)
        if not outcome.was_killed:
            require_success(outcome)
            return kills
        kills += 1
        require_sound(store, f"a kill when file {kills // len(moments)} was {moment}")


def test_a_kill_at_every_step_of_publishing_changes_nothing(
    server: IngestServer, tmp_path: Path
) -> None:
    choices = {"settings": {"limit_tokens": 900}, "compact_every": 1}
    expected = run_undisturbed(server, tmp_path / "undisturbed", **choices)
    assert StoreReader(expected.path).segments == [0, 1]
    store = tmp_path / "store"
    kills = kill_at_every_step(server, store, MOMENTS, **choices)
    assert kills >= len(MOMENTS) * len(expected.files)
    require_equal(store, expected, f"{kills} kills")


@pytest.mark.parametrize(
    "addition",
    [
        pytest.param({"limit_tokens": 600}, id="more-of-the-corpus"),
        pytest.param(
            {"limit_tokens": 450, "set_name": "more", "locations": ("attn_query", "mlp_pre_act")},
            id="more-locations",
        ),
        pytest.param(
            {
                "limit_tokens": 450,
                "set_name": "again",
                "locations": ("mlp_post_act",),
                "dtype": "float32",
            },
            id="another-dtype",
        ),
    ],
)
def test_a_kill_at_every_step_of_an_addition_changes_nothing(
    server: IngestServer, tmp_path: Path, addition: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    require_success(server.run(base, settings={"limit_tokens": 450}))
    whole = shutil.copytree(base, tmp_path / "undisturbed")
    expected = run_undisturbed(server, whole, settings=addition)
    kills = kill_at_every_step(server, base, ("written", "linked"), settings=addition)
    assert kills >= 10, "The test means to kill while an addition is published."
    require_equal(base, expected, f"{kills} kills")


def test_finished_ingest_run_again_changes_nothing(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = shutil.copytree(undisturbed.path, tmp_path / "store")
    before = file_states(store)
    outcome = server.run(store)
    require_success(outcome)
    assert outcome.report["written"] == 0
    assert file_states(store) == before


def test_files_of_dead_writers_are_swept_and_those_of_live_ones_are_not(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    killed = server.run(store, incidents=(Incident("kill", "written", "zones/*", 4),))
    assert killed.was_killed
    assert [path for path in store.rglob(f"*{TEMPORARY_MARK}*") if path.is_file()]

    gate = tmp_path / "gate"
    pausing = Incident("pause", "written", "arrays/mlp_post_act/*/c*", 2, str(gate))
    pid = server.start(store, incidents=(pausing,))
    wait_for(Path(f"{gate}.reached"))
    left = [path.name for path in store.rglob(f"*{TEMPORARY_MARK}*")]
    assert len(left) == 1, f"The dead writer's files should be gone, the live one's not: {left}"
    assert f"-{pid}-" in left[0]

    require_success(server.run(store))
    assert (store / verify_store(store).temporary[0]).name == left[0]
    gate.touch()
    require_success(server.wait(pid))
    require_equal(store, undisturbed, "a dead writer and a slow one")


def test_publishing_syncs_the_file_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would show and a kill does not: the order of the calls."""
    calls: list[str] = []

    def name(descriptor: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return "temporary" if TEMPORARY_MARK in path.name else path.name

    def watch(function: str, note: Callable[..., str]) -> None:
        real = getattr(os, function)

        def watched(*args: Any, **options: Any) -> Any:
            calls.append(note(*args))
            return real(*args, **options)

        monkeypatch.setattr(os, function, watched)

    watch("fsync", lambda descriptor: f"sync {name(descriptor)}")
    watch("link", lambda source, target: f"link {Path(target).name}")
    watch("rename", lambda source, target: f"rename {Path(target).name}")
    root = tmp_path / "root"
    blobs = LocalBlobs(root)
    (root / "folder").mkdir(parents=True)
    assert blobs.publish("folder/file", [b"one", b"two"])
    assert calls == ["sync temporary", "link file", "sync folder"]
    assert not blobs.publish("folder/file", [b"other"])
    assert blobs.read("folder/file") == b"onetwo"
    calls.clear()
    blobs.replace("folder/file", b"three")
    assert calls == ["sync temporary", "rename file", "sync folder"]
    assert [path.name for path in (root / "folder").iterdir()] == ["file"]
    calls.clear()
    assert blobs.publish("new/deep/file", [b"four"])
    assert calls == ["sync root", "sync new", "sync temporary", "link file", "sync deep"]


# Writers that meet


FileState = tuple[int, int, bytes]


def file_states(store: Path) -> dict[str, FileState]:
    """Inode, time of change and bytes of every published file."""
    found = {}
    for path in store.rglob("*"):
        key = path.relative_to(store).as_posix()
        if path.is_file() and not key.startswith("locks/") and TEMPORARY_MARK not in key:
            status = path.stat()
            found[key] = status.st_ino, status.st_mtime_ns, path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("segment", "moment", "perturb"),
    [
        pytest.param(0, "before", True, id="first-segment-not-written-other-values"),
        pytest.param(0, "written", False, id="first-segment-written-same-values"),
        pytest.param(2, "before", False, id="middle-segment-not-written-same-values"),
        pytest.param(2, "written", True, id="middle-segment-written-other-values"),
        pytest.param(3, "written", True, id="last-segment-written-other-values"),
    ],
)
def test_zombie_that_comes_back_changes_nothing(
    server: IngestServer,
    undisturbed: Undisturbed,
    tmp_path: Path,
    segment: int,
    moment: Moment,
    perturb: bool,
) -> None:
    """A writer stops with a captured segment; another run commits everything; it goes on.

    Locks are granted to both: the zombie's is lost when its machine was cut off.
    """
    store, gate = tmp_path / "store", tmp_path / "gate"
    first = f"arrays/resid_post_embedding/forward/c.{segment}.0"
    pausing = Incident("pause", moment, first, 1, str(gate))
    choices: dict[str, Any] = {"lockless": True, "perturb": perturb}
    if segment == 0 or not perturb:
        zombie = server.start(store, incidents=(pausing,), **choices)
    else:
        # Its own earlier segments would be published with its own values.
        earlier = Incident("kill", "before", first)
        assert server.run(store, incidents=(earlier,)).was_killed
        zombie = server.start(store, incidents=(pausing,), **choices)
    wait_for(Path(f"{gate}.reached"))
    require_success(server.run(store, lockless=True))
    finished = file_states(store)

    gate.touch()
    require_success(server.wait(zombie))
    found = file_states(store)
    assert found.keys() == finished.keys()
    changed = [key for key in finished if found[key] != finished[key]]
    assert not changed, f"The zombie changed {changed}"
    require_equal(store, undisturbed, "a zombie's return")


@pytest.mark.parametrize("published", [1, 2, 4])
def test_writer_with_other_values_describes_what_is_on_disk(
    server: IngestServer, tmp_path: Path, published: int
) -> None:
    """Shards of a killed writer stay; its successor computed something else."""
    store = tmp_path / "store"
    kill = Incident("kill", "linked", "arrays/*/forward/c.*", published)
    assert server.run(store, incidents=(kill,)).was_killed
    shards = {
        path: path.read_bytes()
        for path in store.glob("arrays/*/forward/c.*")
        if TEMPORARY_MARK not in path.name
    }
    assert len(shards) == published
    require_success(server.run(store, perturb=True))

    assert all(path.read_bytes() == data for path, data in shards.items())
    report = verify_store(store)
    assert report.ok, report.findings
    reader = StoreReader(store)
    for array in reader.arrays.values():
        for number in array.segments:
            segment = reader.segment(number)
            buffer = SegmentBuffer(array.spec, segment.n_rows)
            for layer in range(array.spec.layer_count):
                buffer.put(layer, 0, array.reader.window(number, layer, 0, segment.n_rows))
            expected = describe_segment(buffer, segment.special)
            for name, section in expected.items():
                np.testing.assert_array_equal(
                    array.zones(number).read(name),
                    section,
                    err_msg=f"{name} of {array.spec.zone_path(number)} is not of its shards",
                )
    reader.close()


def test_two_workers_finish_one_store(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    for attempt in range(2):
        store = tmp_path / f"store-{attempt}"
        pids = [server.start(store, settings={"worker": (number, 2)}) for number in range(2)]
        for pid in pids:
            require_success(server.wait(pid))
        report = verify_store(store)
        assert report.ok, report.findings
        different = differences(
            file_bytes(store, compacted=False),
            {key: data for key, data in undisturbed.files.items() if "/index-" not in key},
        )
        assert not different, f"Two workers wrote other files: {different}"
        # The last word on derived files is that of a run that sees everything.
        require_success(server.run(store))
        require_equal(store, undisturbed, "two workers")


def test_worker_that_dies_leaves_its_share_to_the_other(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    kill = Incident("kill", "written", "commits/base/0*", 2)
    dying = server.start(store, settings={"worker": (1, 2)}, incidents=(kill,))
    assert server.wait(dying).was_killed
    require_success(server.run(store, settings={"worker": (0, 2)}))
    require_equal(store, undisturbed, "the death of a worker")


def test_worker_without_its_share_starts_at_it(server: IngestServer, tmp_path: Path) -> None:
    store = tmp_path / "store"
    kill = Incident("kill", "linked", "commits/base/0*", 1)
    assert server.run(store, settings={"worker": (1, 2)}, incidents=(kill,)).was_killed
    assert StoreReader(store).segments == [2]


def test_locks_share_the_work_and_their_absence_repeats_it(
    server: IngestServer, tmp_path: Path
) -> None:
    """A second run leaves the segment alone that the first one has in hand."""
    store, gate = tmp_path / "store", tmp_path / "gate"
    pausing = Incident("pause", "before", "arrays/*/forward/c.1.0", 1, str(gate))
    first = server.start(store, incidents=(pausing,))
    wait_for(Path(f"{gate}.reached"))
    second = server.run(store)
    require_success(second)
    assert 1 not in StoreReader(store).segments
    assert second.report["missing"] > 0
    gate.touch()
    require_success(server.wait(first))
    assert StoreReader(store).segments == [0, 1, 2, 3]


# Readers meanwhile


def test_reader_sees_committed_segments_and_nothing_else(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store, gate = tmp_path / "store", tmp_path / "gate"
    pausing = Incident("pause", "before", "commits/base/000002.json", 1, str(gate))
    pid = server.start(store, incidents=(pausing,))
    wait_for(Path(f"{gate}.reached"))

    early = StoreReader(store)
    array = early.array(ActivationLocationType.MLP_POST_ACT)
    shard = store / array.spec.shard_path(0, 2)
    assert shard.is_file(), "The test means to look at a segment that is whole and not committed."
    assert early.segments == [0, 1]
    assert array.segments == [0, 1]
    assert early.planned_segments == 4
    assert len(array.reader.window(1, 0, 0, 512)) == early.commits["base"][1].rows
    reads: list[Callable[[], object]] = [
        lambda: array.reader.window(2, 0, 0, 512),
        lambda: array.reader.rows(0, np.array([2 * 512])),
        lambda: array.reader.cells(2, 0, np.array([0]), 3),
    ]
    for read in reads:
        with pytest.raises(Unavailable, match=r"Segment 2 .* is not committed") as caught:
            read()
        assert caught.value.kind is ErrorKind.NOT_STORED
    assert verify_store(store).ok

    gate.touch()
    require_success(server.wait(pid))
    assert early.segments == [0, 1], "A reader keeps to what it saw when it was opened."
    with pytest.raises(Unavailable):
        array.reader.window(2, 0, 0, 512)
    assert StoreReader(store).segments == [0, 1, 2, 3]
    require_equal(store, undisturbed, "a reader's look")


def test_rows_that_are_not_filled_are_an_error_and_not_numbers(undisturbed: Undisturbed) -> None:
    reader = StoreReader(undisturbed.path)
    array = reader.array(ActivationLocationType.MLP_POST_ACT)
    last = array.segments[-1]
    filled = array.rows_of(last)
    assert filled < 512
    assert len(array.reader.window(last, 0, 0, 512)) == filled
    with pytest.raises(StoreDamaged, match="is not filled"):
        array.reader.rows(0, np.array([last * 512 + filled]))


# Disks that fail

STOPS = [
    pytest.param("plan/*/plan.sections", 1, id="plan"),
    pytest.param("model/model.safetensors", 1, id="model"),
    pytest.param("store.json", 1, id="manifest"),
    pytest.param("arrays/mlp_post_act/*/c.*", 1, id="first-shard"),
    pytest.param("arrays/resid_post_mlp/*/c.*", 4, id="later-shard"),
    pytest.param("zones/*/000003.sections", 2, id="zones"),
    pytest.param("catalog/parts/000001.parquet", 1, id="part"),
    pytest.param("commits/base/000002.json", 1, id="commit"),
    pytest.param("zones/*/index-*", 1, id="index"),
    pytest.param("catalog/*.json", 1, id="snapshot-record"),
    pytest.param("selfcheck/*", 1, id="self-check"),
]


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few megabytes, mounted where the server alone sees it.

    Attributes:
        server: runs ingests that see it at ``place``.
        place: where the server sees it.
        view: where this process sees it.
    """

    server: IngestServer
    place: Path
    view: Path


@pytest.fixture(scope="module")
def small_disk(server: IngestServer, tmp_path_factory: pytest.TempPathFactory) -> SmallDisk:
    """A tmpfs, mounted as root where that is allowed, else in a user namespace."""
    place = tmp_path_factory.mktemp("small-disk")
    refusal = server.mount(place, f"size={DISK_BYTES}")
    if refusal is not None:
        pytest.fail(
            "A full disk cannot be tested here, since neither root nor a user namespace may "
            f"mount a tmpfs; run the tests where one of them may. {refusal}"
        )
    return SmallDisk(server, place, Path(f"/proc/{server.pid}/root{place}"))


@pytest.fixture
def empty_disk(small_disk: SmallDisk) -> Iterator[SmallDisk]:
    yield small_disk
    shutil.rmtree(small_disk.view / "store", ignore_errors=True)
    (small_disk.view / "filler").unlink(missing_ok=True)


def require_stop(outcome: Outcome, kind: ErrorKind) -> None:
    """Fail unless an ingest ended as one that the disk stopped."""
    assert outcome.status == 1, f"{outcome.status}, {outcome.error}: {outcome.message}"
    assert outcome.error == "WriteFailed"
    assert outcome.kind == kind, outcome.message
    assert "What is committed is intact" in outcome.message
    assert "then run ingest again" in outcome.message


@pytest.mark.parametrize(("files", "number"), STOPS)
def test_full_disk_stops_the_ingest_and_it_resumes(
    empty_disk: SmallDisk, undisturbed: Undisturbed, tmp_path: Path, files: str, number: int
) -> None:
    place = empty_disk.place / "store"
    fill = Incident("fill", "before", files, number, str(empty_disk.place / "filler"))
    outcome = empty_disk.server.run(place, incidents=(fill,))
    require_stop(outcome, ErrorKind.DISK_FULL)
    assert "the disk is full; make room" in outcome.message
    require_sound(empty_disk.view / "store", f"a disk that was full at {files}")

    (empty_disk.view / "filler").unlink()
    require_success(empty_disk.server.run(place))
    # DuckDB follows links, and the view is one.
    store = shutil.copytree(empty_disk.view / "store", tmp_path / "store")
    require_equal(store, undisturbed, f"a disk that was full at {files}")


def test_ingest_into_a_full_disk_says_so_before_it_begins(empty_disk: SmallDisk) -> None:
    (empty_disk.view / "filler").write_bytes(bytes(DISK_BYTES - 2**19))
    outcome = empty_disk.server.run(empty_disk.place / "store")
    assert (outcome.status, outcome.kind) == (1, ErrorKind.TOO_LARGE), outcome.message
    assert "more than 80 % of the" in outcome.message
    assert "Make room" in outcome.message
    left = [path for path in (empty_disk.view / "store").rglob("*") if path.is_file()]
    assert not left, f"A refused ingest should leave nothing behind: {left}"
    (empty_disk.view / "filler").unlink()
    require_success(empty_disk.server.run(empty_disk.place / "store"))


@pytest.mark.parametrize(("files", "number"), STOPS[::2])
def test_write_error_stops_the_ingest_and_it_resumes(
    server: IngestServer, undisturbed: Undisturbed, tmp_path: Path, files: str, number: int
) -> None:
    """From the chosen file on, nothing longer than a few bytes can be written: EFBIG."""
    store = tmp_path / "store"
    limit = Incident("limit", "before", files, number)
    outcome = server.run(store, incidents=(limit,))
    require_stop(outcome, ErrorKind.WRITE_FAILED)
    require_sound(store, f"a write error at {files}")
    require_success(server.run(store))
    require_equal(store, undisturbed, f"a write error at {files}")


def test_read_only_disk_is_refused_for_writing_and_read(
    empty_disk: SmallDisk, undisturbed: Undisturbed
) -> None:
    server = empty_disk.server
    require_success(server.run(empty_disk.place / "store"))
    before = file_bytes(empty_disk.view / "store")
    assert server.mount(empty_disk.place, "remount,ro") is None
    try:
        outcome = server.run(empty_disk.place / "other")
        assert (outcome.status, outcome.error) == (1, "WriteFailed"), outcome.message
        assert outcome.kind == ErrorKind.READ_ONLY, outcome.message
        assert "choose another path" in outcome.message
        assert verify_store(empty_disk.view / "store").ok
        with (
            actstore.open(empty_disk.view / "store") as store,
            actstore.open(undisturbed.path) as s,
        ):
            assert store.topk("mlp_post_act", k=9).rows() == s.topk("mlp_post_act", k=9).rows()
    finally:
        assert server.mount(empty_disk.place, "remount,rw") is None
    assert file_bytes(empty_disk.view / "store") == before


# The command line


def command(out: Path) -> tuple[str, ...]:
    return ("ingest", "demo", str(CORPUS), "--out", str(out), "--limit-tokens", "600")


def test_command_line_ends_with_a_code_and_a_message_and_resumes(
    empty_disk: SmallDisk, server: IngestServer, tmp_path: Path
) -> None:
    on_disk = empty_disk.place / "store"
    full = Incident("fill", "before", "zones/*", 1, str(empty_disk.place / "filler"))
    limited = Incident("limit", "before", "arrays/mlp_post_act/forward/c.*")
    for out, view, incident, words in (
        (on_disk, empty_disk.view / "store", full, "the disk is full; make room"),
        (tmp_path / "store", tmp_path / "store", limited, "check the disk"),
    ):
        order: dict[str, Any] = {"arguments": command(out)}
        stopped = server.run(out, incidents=(incident,), **order)
        printed = " ".join(stopped.output.split())
        assert stopped.status == 1, printed
        assert f"{words}, then run ingest again" in printed
        assert "Traceback" not in printed
        require_sound(view, words)
        (empty_disk.view / "filler").unlink(missing_ok=True)
        resumed = server.run(out, **order)
        assert resumed.status == 0, resumed.output
        assert verify_store(view).ok
        again = server.run(out, **order)
        assert again.status == 0, again.output


def test_command_line_resumes_after_a_kill(server: IngestServer, tmp_path: Path) -> None:
    out = tmp_path / "store"
    kill = Incident("kill", "linked", "arrays/resid_post_mlp/forward/c.*")
    assert server.run(out, incidents=(kill,), arguments=command(out)).was_killed
    resumed = server.run(out, arguments=command(out))
    assert resumed.status == 0, resumed.output
    assert verify_store(out).ok
    with actstore.open(out) as store:
        assert store.info().is_complete
