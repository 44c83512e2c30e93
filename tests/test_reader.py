"""Reads of an open store: what they return, and how little of the zone files they need."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from store_builder import build_store

from actstore.store.reader import StoredArray, StoreReader
from actstore.store.sections import SectionFile
from actstore.store.vocabulary import ActivationLocationType

LAYERS, TOKENS, NEURONS = 2, 1500, 70


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, npt.NDArray[np.float16]]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((LAYERS, TOKENS, NEURONS)).astype(np.float16)
    path = tmp_path_factory.mktemp("reader") / "store"
    build_store(path, {"mlp_post_act": values}, [100] * 15, segment_rows=1024)
    return path, values


@pytest.fixture
def checksums_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Which checksums were read of which file, four of them at a time."""
    monkeypatch.setattr("actstore.store.reader._CHECKSUMS_AT_ONCE", 4)
    read: list[tuple[str, int, int]] = []
    whole = SectionFile.slice

    def watched(self: SectionFile, section: str, start: int, stop: int) -> npt.NDArray[Any]:
        if section == "checksums":
            read.append((self.name, start, stop))
        return whole(self, section, start, stop)

    monkeypatch.setattr(SectionFile, "slice", watched)
    return read


def open_array(path: Path) -> StoredArray:
    return StoreReader(path).array(ActivationLocationType.MLP_POST_ACT)


def test_a_window_reads_the_checksums_of_its_own_blocks(
    store: tuple[Path, npt.NDArray[np.float16]], checksums_read: list[tuple[str, int, int]]
) -> None:
    path, values = store
    array = open_array(path)
    column_chunks, in_chunk = array.spec.column_chunks, 1024 // array.spec.checksum_rows
    per_layer = column_chunks * in_chunk
    # Rows of one block in the last chunk of columns, in the second layer.
    found = array.reader.window(0, 1, 0, 10, [column_chunks - 1])
    width = array.spec.chunk_width
    first = (column_chunks - 1) * width
    np.testing.assert_array_equal(found[:, : NEURONS - first], values[1, :10, first:])
    wanted = per_layer + (column_chunks - 1) * in_chunk
    start = wanted - wanted % 4
    assert checksums_read == [(array.spec.zone_path(0), start, start + 4)]
    assert per_layer > 4
    # What was read once is not read again.
    array.reader.window(0, 1, 0, 10, [column_chunks - 1])
    assert len(checksums_read) == 1


def test_every_read_equals_the_values_whatever_was_read_before(
    store: tuple[Path, npt.NDArray[np.float16]], checksums_read: list[tuple[str, int, int]]
) -> None:
    path, values = store
    array = open_array(path)
    # Sequences of 100 rows fill ten to a segment; the rest of it stays empty.
    kept = [values[:, :1000], values[:, 1000:]]
    rng = np.random.default_rng(1)
    for _ in range(40):
        segment, layer = int(rng.integers(2)), int(rng.integers(LAYERS))
        part = kept[segment][layer]
        start, stop = sorted(rng.integers(0, len(part), 2).tolist())
        found = array.reader.window(segment, layer, start, stop)
        np.testing.assert_array_equal(found, part[start:stop])
        rows = np.sort(rng.integers(0, len(part), 5))
        column = int(rng.integers(NEURONS))
        cells = array.reader.cells(segment, layer, rows, column)
        np.testing.assert_array_equal(cells, part[rows, column])
    assert len(set(checksums_read)) == len(checksums_read)
