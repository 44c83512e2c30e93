"""Merged lists, bounds and statistics equal brute force over the values; damage is found."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import build_store, commit_segments, stored_rows, to_stored

from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.index import UnitIndex, open_unit_index
from actstore.store.index_file import index_paths, publish_index
from actstore.store.index_fold import list_depth
from actstore.store.keys import key_values, ordered_keys
from actstore.store.layout import StoredDtype
from actstore.store.reader import StoreReader
from actstore.store.unit_lists import LIST_DEPTH, TAILS, ListMerger, Tail, join_lists
from actstore.store.vocabulary import ActivationLocationType
from actstore.store.zones import LIST_LENGTH

MLP = ActivationLocationType.MLP_POST_ACT
LENGTHS = [100, 37, 5, 120, 90, 128, 61] * 7


def hostile_values(tokens: int, layers: int = 2) -> npt.NDArray[np.float32]:
    """Units that are dense, tied, constant, negative, clipped, NaN, infinite or nearly so."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(layers, tokens, 11))
    values[:, :, 1] = np.round(values[:, :, 1])
    values[:, :, 2] = 0.5
    values[:, :, 3] = -np.abs(values[:, :, 3]) - 1
    values[:, :, 4] = np.maximum(values[:, :, 4], 0)
    values[:, :, 5] = np.where(rng.random((layers, tokens)) < 0.3, np.nan, values[:, :, 5])
    values[:, :, 6] = np.where(rng.random((layers, tokens)) < 0.1, np.inf, -np.inf)
    values[:, :, 7] = np.nan
    values[:, :, 8] = np.where(np.arange(tokens) == tokens // 2, 3.0, -0.0)
    values[:, :, 9] = np.where(np.arange(tokens) < 12, 7.0, np.nan)
    values[:, :200, 10] += 50
    return values.astype(np.float32)


class Truth:
    """Values by global row, and what brute force says about them."""

    def __init__(self, root: Path, values: npt.NDArray[Any], dtype: StoredDtype) -> None:
        reader = StoreReader(root)
        size = reader.segment_rows
        rows = stored_rows(root)
        kept = np.isin(rows // size, reader.segments)
        self.rows = rows[kept]
        order = np.argsort(self.rows)
        self.rows = self.rows[order]
        self.values = dtype.to_float32(to_stored(values[:, kept][:, order], dtype))
        special = np.concatenate([reader.segment(s).special for s in reader.segments])
        self.special = special
        self.segment_of = self.rows // size

    def ranked(self, layer: int, unit: int, tail: Tail) -> tuple[Any, Any]:
        """Values and rows of every ordinary value in rank order."""
        values = self.values[layer, :, unit]
        usable = ~self.special & ~np.isnan(values)
        values, rows = values[usable] + np.float32(0), self.rows[usable]
        order = np.lexsort((rows, values if tail == "low" else -values))
        return values[order], rows[order]


def assert_index_true(index: UnitIndex, truth: Truth, dtype: StoredDtype) -> None:
    """Every list, bound and statistic of an index equals brute force."""
    layers, _, units = truth.values.shape
    for layer in range(layers):
        for tail in TAILS:
            lists = index.layer_lists(layer, tail)
            values = key_values(lists.keys, dtype)
            for unit in range(units):
                expected, rows = truth.ranked(layer, unit, tail)
                proven = int(lists.proven[unit])
                assert values[unit, :proven].tolist() == expected[:proven].tolist()
                assert lists.rows[unit, :proven].tolist() == rows[:proven].tolist()
                assert bool(lists.complete[unit]) == (proven == len(expected))
                # At least a segment's list is proven where there is one.
                assert proven >= min(8, len(expected))
                beyond = lists.rows[unit, proven:]
                beyond = beyond[beyond >= 0]
                assert set(beyond.tolist()) <= set(rows[proven:].tolist())
                one = index.layer_lists(layer, tail, np.array([unit]))
                assert one.rows[0].tolist() == lists.rows[unit].tolist()
                assert one.keys[0].tolist() == lists.keys[unit].tolist()
        bounds = index.segment_bounds(layer)
        assert bounds.segments == sorted(set(truth.segment_of.tolist()))
        for number, segment in enumerate(bounds.segments):
            for special, most, least in (
                (False, bounds.maximum, bounds.minimum),
                (True, bounds.special_maximum, bounds.special_minimum),
            ):
                chosen = (truth.segment_of == segment) & (truth.special == special)
                for unit in range(units):
                    column = truth.values[layer, chosen, unit]
                    column = column[~np.isnan(column)]
                    if not len(column):
                        assert most[unit, number] < least[unit, number]
                        continue
                    ends = key_values(np.array([most[unit, number], least[unit, number]]), dtype)
                    assert ends.tolist() == [column.max() + 0.0, column.min() + 0.0]
        statistics = index.statistics(layer)
        for unit in range(units):
            column = truth.values[layer, ~truth.special, unit].astype(np.float64)
            values_only = column[~np.isnan(column)]
            assert statistics.nan[unit] == len(column) - len(values_only)
            assert statistics.count[unit] == len(values_only)
            assert statistics.positive[unit] == (values_only > 0).sum()
            if len(values_only) and np.isfinite(values_only).all():
                np.testing.assert_allclose(statistics.mean[unit], values_only.mean(), atol=1e-6)
                np.testing.assert_allclose(
                    statistics.variance[unit], values_only.var(), rtol=1e-4, atol=1e-9
                )


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    """What is durable is tested elsewhere; waiting for the disk is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", params=[StoredDtype.FLOAT16, StoredDtype.FLOAT32])
def hostile(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Truth, StoredDtype]:
    dtype = request.param
    root = tmp_path_factory.mktemp("hostile") / "store"
    values = hostile_values(sum(LENGTHS))
    build_store(root, {"mlp_post_act": values}, LENGTHS, dtype=dtype, special_token_ids=[3, 11])
    return root, Truth(root, values, dtype), dtype


def test_fold_of_zone_files_equals_brute_force(hostile: tuple[Path, Truth, StoredDtype]) -> None:
    root, truth, dtype = hostile
    reader = StoreReader(root)
    assert_index_true(open_unit_index(reader, reader.array(MLP)), truth, dtype)


def test_compacted_file_equals_brute_force(hostile: tuple[Path, Truth, StoredDtype]) -> None:
    root, truth, dtype = hostile
    reader = StoreReader(root)
    path = publish_index(reader, reader.array(MLP))
    assert [path] == index_paths(root, reader.array(MLP).spec)
    for segment in reader.segments:
        (root / reader.array(MLP).spec.zone_path(segment)).rename(root / f"hidden-{segment}")
    try:
        index = open_unit_index(StoreReader(root), reader.array(MLP))
        assert_index_true(index, truth, dtype)
    finally:
        for segment in reader.segments:
            hidden = root / f"hidden-{segment}"
            hidden.rename(root / reader.array(MLP).spec.zone_path(segment))


@pytest.mark.parametrize("first", [[0, 1, 2], [0], [4, 1], [7]])
def test_file_and_fold_together_equal_brute_force(tmp_path: Path, first: list[int]) -> None:
    values = hostile_values(sum(LENGTHS))
    given_values = {"mlp_post_act": values}
    root = build_store(tmp_path / "s", given_values, LENGTHS, commit=first, special_token_ids=[3])
    reader = StoreReader(root)
    publish_index(reader, reader.array(MLP))
    commit_segments(root, given_values)
    reader = StoreReader(root)
    index = open_unit_index(reader, reader.array(MLP))
    assert_index_true(index, Truth(root, values, StoredDtype.FLOAT16), StoredDtype.FLOAT16)


@pytest.mark.parametrize(
    ("first", "times"),
    [([0, 1, 2], 1), ([2, 5], 1), (list(range(10)), 2)],
    ids=["beginning", "scattered", "lists cut shorter before"],
)
def test_index_is_the_same_whatever_was_compacted_before(
    tmp_path: Path, first: list[int], times: int
) -> None:
    lengths = LENGTHS * times
    given_values = {"mlp_post_act": hostile_values(sum(lengths))}
    whole = build_store(tmp_path / "whole", given_values, lengths)
    steps = build_store(tmp_path / "steps", given_values, lengths, commit=first)
    reader = StoreReader(steps)
    publish_index(reader, reader.array(MLP))
    commit_segments(steps, given_values)
    written = []
    for root in (whole, steps):
        reader = StoreReader(root)
        path = publish_index(reader, reader.array(MLP))
        assert path is not None
        written.append((path, (root / path).read_bytes()))
    assert written[0] == written[1]


@given(segments=st.integers(1, 400))
def test_lists_have_what_segments_give_and_no_more_than_pays(segments: int) -> None:
    depth = list_depth(segments)
    assert depth == LIST_LENGTH * segments if segments <= 4 else 32 <= depth <= LIST_DEPTH
    assert depth <= list_depth(segments + 1)
    # With float16 and 512 rows a page: records, bounds and moments beside zone files of 0.86 %.
    index = 6 + 2 * depth * (4 + 2) + 4 * segments * 2 + 7 * 8
    raw = segments * 16384 * 2
    assert segments < 16 or index <= 0.0014 * raw


def read_everything(reader: StoreReader) -> None:
    index = open_unit_index(reader, reader.array(MLP))
    index.layer_lists(0, "top")
    index.segment_bounds(0)
    index.statistics(0)


def test_every_flipped_bit_of_the_index_is_found(tmp_path: Path) -> None:
    values = hostile_values(sum(LENGTHS), layers=1)
    root = build_store(tmp_path / "s", {"mlp_post_act": values}, LENGTHS)
    reader = StoreReader(root)
    path = publish_index(reader, reader.array(MLP))
    assert path is not None
    good = (root / path).read_bytes()
    used = 0
    for place in range(5, len(good), 997):
        bad = bytearray(good)
        bad[place] ^= 4
        (root / path).write_bytes(bad)
        with pytest.raises(StoreDamaged):
            read_everything(reader)
        used += 1
    assert used > 20


def test_index_of_another_array_is_refused(tmp_path: Path) -> None:
    values = hostile_values(sum(LENGTHS), layers=1)
    both = {"mlp_post_act": values, "mlp_pre_act": values}
    root = build_store(tmp_path / "s", both, LENGTHS)
    reader = StoreReader(root)
    path = publish_index(reader, reader.array(MLP))
    assert path is not None
    copied = root / path.replace("post", "pre")
    copied.write_bytes((root / path).read_bytes())
    with pytest.raises(StoreDamaged) as caught:
        open_unit_index(reader, reader.array(ActivationLocationType.MLP_PRE_ACT))
    assert caught.value.kind is ErrorKind.MALFORMED_FILE


def test_no_committed_segment_gives_an_empty_index(tmp_path: Path) -> None:
    root = build_store(
        tmp_path / "s", {"mlp_post_act": hostile_values(sum(LENGTHS))}, LENGTHS, commit=[]
    )
    reader = StoreReader(root)
    assert publish_index(reader, reader.array(MLP)) is None
    index = open_unit_index(reader, reader.array(MLP))
    lists = index.layer_lists(0, "top")
    assert lists.complete.all()
    assert not lists.proven.any()
    assert index.segment_bounds(0).maximum.shape == (11, 0)
    assert index.statistics(0).count.tolist() == [0] * 11


small_values = st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.5, np.inf]), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(small_values, min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 7))
def test_proven_entries_are_true(segments: list[list[float]], depth: int, first_group: int) -> None:
    dtype = StoredDtype.FLOAT16
    flat = np.array([v for values in segments for v in values], np.float16)
    rows = np.concatenate(
        [100 * n + np.arange(len(values)) for n, values in enumerate(segments)]
    ).astype(np.int64)
    for tail in TAILS:
        sign = -1 if tail == "top" else 1
        order = np.lexsort((rows, sign * flat))
        merger = ListMerger(1, dtype, tail, depth)
        halves = [ListMerger(1, dtype, tail, LIST_DEPTH) for _ in range(2)]
        for number, values in enumerate(segments):
            keys = ordered_keys(np.array(values, np.float16), dtype)
            best = np.lexsort((np.arange(len(keys)), sign * keys.astype(np.int64)))[:8]
            worst = np.iinfo(np.int16).min if tail == "top" else np.iinfo(np.int16).max
            list_keys = np.full((1, 1, 8), worst, np.int16)
            list_rows = np.full((1, 1, 8), 65535, np.int64)
            list_keys[0, 0, : len(best)] = keys[best]
            list_rows[0, 0, : len(best)] = 100 * number + best
            has_more = np.array([[len(values) > 8]])
            merger.add(list_keys, list_rows, has_more)
            halves[(first_group >> number) & 1].add(list_keys, list_rows, has_more)
        joined = join_lists([half.lists for half in halves], dtype, tail)
        for lists, limit in ((merger.lists, depth), (joined, LIST_DEPTH)):
            proven = int(lists.proven[0])
            assert lists.rows[0, :proven].tolist() == rows[order][:proven].tolist()
            assert bool(lists.complete[0]) == (len(flat) <= limit and proven == len(flat))
            present = int((lists.rows[0] >= 0).sum())
            seen = sum(min(len(values), 8) for values in segments)
            assert present == min(limit, seen)
            if all(len(values) <= 8 for values in segments):
                assert proven == min(limit, len(flat))
            assert proven >= min(8, limit, len(flat))
