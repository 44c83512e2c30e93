"""Which bytes of a store a read takes: what was asked for, its checksums, and nothing else."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_builder import build_store

from actstore.store import tables
from actstore.store.column_copies import copy_columns
from actstore.store.commits import read_commits
from actstore.store.errors import StoreDamaged, Unavailable
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.vocabulary import ActivationLocationType, PassType

NAME = "mlp_post_act"
PLACE = (ActivationLocationType.MLP_POST_ACT, PassType.FORWARD)
LAYERS, NEURONS, ROWS = 2, 70, 9000

Range = tuple[str, int, int]
"""File inside the store, first byte, length."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments of 8192 rows, the second nearly empty, and a copy by column."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((LAYERS, ROWS, NEURONS)).astype(np.float16)
    made = build_store(
        tmp_path_factory.mktemp("reads") / "store",
        {NAME: values},
        [1000] * 9,
        segment_rows=8192,
    )
    copy_columns(made, NAME)
    return made


@contextmanager
def watched(root: Path) -> Iterator[tuple[list[Range], list[Range]]]:
    """What is read from files of a store, and what is announced."""
    read: list[Range] = []
    announced: list[Range] = []
    calls: dict[str, Callable[..., Any]] = {
        name: getattr(os, name) for name in ("pread", "preadv", "posix_fadvise")
    }

    def name(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        read.append((name(descriptor), offset, length))
        return bytes(calls["pread"](descriptor, length, offset))

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        read.append((name(descriptor), offset, sum(len(one) for one in buffers)))
        return int(calls["preadv"](descriptor, buffers, offset))

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        announced.append((name(descriptor), offset, length))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", pread)
        patch.setattr(os, "preadv", preadv)
        patch.setattr(os, "posix_fadvise", advise)
        yield read, announced


def covered(ranges: list[Range]) -> set[tuple[str, int]]:
    """The 64-byte pieces of the shards that ranges touch; all of ours begin and end at one."""
    assert all(start % 64 == 0 and length % 64 == 0 for _, start, length in shards(ranges))
    return {
        (name, piece)
        for name, start, length in shards(ranges)
        for piece in range(start // 64, (start + length) // 64)
    }


def shards(ranges: list[Range]) -> list[Range]:
    return [one for one in ranges if one[0].startswith("arrays/")]


def zones(ranges: list[Range]) -> list[Range]:
    return [one for one in ranges if one[0].startswith("zones/")]


def length(ranges: list[Range]) -> int:
    return sum(one[2] for one in ranges)


def both(reader: StoreReader) -> list[StoredArray]:
    return [reader.arrays[PLACE], reader.column_copies[PLACE]]


def test_a_page_costs_its_bytes_and_its_checksums(path: Path) -> None:
    reader = StoreReader(path)
    array, copy = both(reader)
    for one, units, page in ((array, 32, 512 * 32 * 2), (copy, 1, 4096)):
        with watched(path) as (read, _):
            values = one.reader.window(0, 1, 1024, 1536, [1])
        assert values.shape == (512, units)
        assert [entry[2] for entry in shards(read)] == [page]
        # The header and one block of checksums; whole chunks have 8 and 16 times a page.
        assert length(zones(read)) <= 40_000
        with watched(path) as (read, _):
            one.reader.window(0, 1, 1024, 1536, [1])
        assert length(read) == page
    reader.close()


def test_scattered_values_cost_a_block_each(path: Path) -> None:
    reader = StoreReader(path)
    array, copy = both(reader)
    offsets = np.array([3, 5, 700, 4100, 7900])
    expected = [array.reader.window(0, 0, int(row), int(row) + 1)[0, 33] for row in offsets]
    for one, blocks in ((array, 4), (copy, 3)):
        with watched(path) as (read, _):
            found = one.reader.cells(0, 0, offsets, 33)
        assert found.tolist() == expected
        assert length(shards(read)) == blocks * 4096
    reader.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    is_copy=st.booleans(),
    segment=st.integers(0, 1),
    layer=st.integers(0, LAYERS - 1),
    start=st.integers(0, 8191),
    count=st.integers(0, 8192),
    chunks=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_what_is_announced_is_what_is_read(
    path: Path,
    is_copy: bool,
    segment: int,
    layer: int,
    start: int,
    count: int,
    chunks: list[int],
) -> None:
    reader = StoreReader(path)
    one = both(reader)[is_copy]
    before = one.reader.window(segment, layer, start, start + count, chunks)
    with watched(path) as (read, announced):
        one.reader.prefetch(segment, layer, start, start + count, chunks)
        assert not read
    promised = list(announced)
    with watched(path) as (read, _):
        after = one.reader.window(segment, layer, start, start + count, chunks)
    assert before.tobytes() == after.tobytes()
    assert covered(promised) == covered(read)
    # In the file's order, with nothing twice and nothing left to join.
    assert all(a[1] + a[2] < b[1] for a, b in pairwise(promised))
    reader.close()


def test_chunks_that_adjoin_are_announced_together(path: Path) -> None:
    reader = StoreReader(path)
    array, _ = both(reader)
    with watched(path) as (_, announced):
        array.reader.prefetch(0, 0, 0, 4096, [2, 1, 1])
    assert [entry[2] for entry in announced] == [2 * 4096 * 32 * 2]
    reader.close()


def test_nothing_is_announced_of_what_is_not_there(path: Path) -> None:
    reader = StoreReader(path)
    with watched(path) as (_, announced):
        reader.arrays[PLACE].reader.prefetch(1, 0, 5000, 6000, [0])
        with pytest.raises(Unavailable):
            reader.arrays[PLACE].reader.prefetch(7, 0, 0, 512, [0])
    assert not announced
    reader.close()


def test_many_records_are_read_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((1, 512 * 9, 8), np.float16)
    path = build_store(tmp_path / "store", {NAME: values}, [128] * 36, segment_rows=512)
    reader = StoreReader(path)
    monkeypatch.setattr("actstore.store.commits._READ_AT_ONCE", 2)
    assert read_commits(reader.blobs, "base") == reader.commits["base"]
    assert reader.committed_rows == 512 * 9
    record = path / "commits/base/000007.json"
    data = bytearray(record.read_bytes())
    for place in range(len(data)):
        flipped: npt.NDArray[np.uint8] = np.frombuffer(bytes(data), np.uint8).copy()
        flipped[place] ^= 1 << (place % 8)
        record.write_bytes(flipped.tobytes())
        with pytest.raises(StoreDamaged, match="000007"):
            read_commits(reader.blobs, "base")
    reader.close()


def test_tables_are_the_same_however_many_rows_go_in_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = StoreReader(path)
    found = []
    for rows in (tables._INSERTED_ROWS, 8100, 1):
        monkeypatch.setattr(tables, "_INSERTED_ROWS", rows)
        with duckdb.connect(":memory:") as connection:
            tables.fill_tables(connection, reader)
            names = [name for (name,) in connection.sql("SHOW TABLES").fetchall()]
            found.append({name: connection.table(name).fetchall() for name in sorted(names)})
    assert len(found[0]["token_rows"]) == ROWS
    assert found[0] == found[1] == found[2]
    reader.close()
