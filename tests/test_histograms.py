"""Histograms equal brute force over the same bins, add up, and bracket every quantile."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged
from actstore.store.histogram_sections import (
    LayerHistograms,
    describe_histograms,
    pack_histograms,
    read_histograms,
    unpack_histograms,
)
from actstore.store.histograms import (
    BINS,
    EDGES,
    GREATEST,
    LEAST,
    Histogram,
    bins_of,
    count_values,
)
from actstore.store.index_spec import IndexSpec
from actstore.store.layout import StoredDtype
from actstore.store.sections import SectionFile, encode_sections
from actstore.store.unit_buffer import UnitBuffer
from actstore.store.vocabulary import PassType

# Any bits at all, and numbers that lie on the edges or next to them.
BITS = st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32).item())
NEAR = st.sampled_from(
    np.concatenate(
        [EDGES, np.nextafter(EDGES, np.float32(np.inf)), np.nextafter(EDGES, np.float32(-np.inf))]
    ).tolist()
)
USUAL = st.floats(-8, 8, width=32)
HOSTILE = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 65504.0])
NUMBERS = USUAL | NEAR | HOSTILE | BITS
# Most of one bin.
CLOSE = st.floats(1, 1.25, width=32)
CROWDED = st.lists(CLOSE | CLOSE | HOSTILE, max_size=12).map(
    lambda found: np.array(found, np.float32)
)
SAMPLES = st.lists(NUMBERS, max_size=60).map(lambda found: np.array(found, np.float32))


def ranked(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.sort(values[~np.isnan(values)])


def assert_same(one: Histogram, other: Histogram) -> None:
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.nan == other.nan
    np.testing.assert_equal((one.minimum, one.maximum), (other.minimum, other.maximum))


# The bins


def test_the_bins_are_those_that_stores_hold() -> None:
    # A store keeps counts by place: another set of edges would be another format.
    assert BINS == 253
    assert len(EDGES) == 254
    assert np.all(np.diff(EDGES) > 0)
    np.testing.assert_array_equal(EDGES[:127], -EDGES[:126:-1][:127] * np.r_[np.ones(126), 0])
    assert EDGES[128] == np.float32(2.0**-38)
    positive = EDGES[128:-1]
    assert {2.0**-38, 2.0**-22 * 1.5, 0.25, 0.3125, 0.375, 0.4375, 256.0, 65536.0} <= set(
        positive.tolist()
    )


def test_one_bin_holds_zero_alone() -> None:
    zero = bins_of(np.array([0.0, -0.0], np.float32))
    assert set(zero.tolist()) == {126}
    assert bins_of(np.array([1e-45, -1e-45], np.float32)).tolist() == [127, 125]
    assert (LEAST[126], GREATEST[126]) == (0, 0)


@given(SAMPLES)
def test_counts_are_those_of_numpy_over_the_same_edges(values: npt.NDArray[np.float32]) -> None:
    kept = values[~np.isnan(values)]
    # NumPy's last bin holds its upper edge, as ours does.
    expected, _ = np.histogram(kept.astype(np.float64), EDGES.astype(np.float64))
    counts = count_values(values)
    np.testing.assert_array_equal(counts[:BINS], expected)
    assert counts[BINS] == len(values) - len(kept)
    number = bins_of(kept)
    assert np.all(LEAST[number] <= kept)
    assert np.all(kept <= GREATEST[number])


# What follows from one


@given(SAMPLES | CROWDED, st.floats(0, 1))
def test_the_bracket_of_a_quantile_holds_the_value_of_its_rank(
    values: npt.NDArray[np.float32], share: float
) -> None:
    found = Histogram.of_values(values).quantile(share)
    kept = ranked(values)
    if not len(kept):
        assert math.isnan(found.estimate)
        return
    rank = min(max(math.ceil(round(share * len(kept), 6)), 1), len(kept))
    assert found.low <= kept[rank - 1] <= found.high
    assert found.low <= found.estimate <= found.high
    number = bins_of(kept[rank - 1 : rank])[0]
    assert max(LEAST[number], kept[0]) <= found.low
    assert found.high <= min(GREATEST[number], kept[-1])


def test_the_ends_the_median_of_zeros_and_a_round_share_are_exact() -> None:
    found = Histogram.of_values(np.array([-3.3, 0, 0, 0, 7.7], np.float32))
    assert found.quantile(0).estimate == np.float32(-3.3)
    assert found.quantile(0.5).is_exact
    assert found.quantile(0.5).estimate == 0
    assert found.quantile(1).estimate == np.float32(7.7)
    # 0.07 * 100 is 7.000000000000001.
    steps = Histogram.of_values(np.arange(1, 101, dtype=np.float32))
    assert steps.quantile(0.07).low == 7


@given(SAMPLES | CROWDED, NUMBERS | CLOSE)
def test_the_bracket_of_a_share_holds_it(values: npt.NDArray[np.float32], limit: float) -> None:
    found = Histogram.of_values(values)
    if math.isnan(limit):
        with pytest.raises(InvalidInput, match="NaN"):
            found.share_above(limit)
        return
    kept = ranked(values)
    share = found.share_above(limit)
    if not len(kept):
        assert math.isnan(share.estimate)
        return
    truth = np.count_nonzero(kept.astype(np.float64) > limit) / len(kept)
    assert share.low <= truth <= share.high
    assert share.low <= share.estimate <= share.high
    if limit in (*GREATEST.tolist(), kept[0], kept[-1]) and limit not in (kept[0],):
        assert share.is_exact


def test_a_share_above_a_number_between_two_floats() -> None:
    found = Histogram.of_values(np.array([1.1, 2.0], np.float32))
    # As float32, 1.1 is a little more than 1.1.
    assert found.share_above(1.1).low <= 1 <= found.share_above(1.1).high
    assert found.share_above(1e300).high == 0
    assert found.share_above(-1e300).low == 1


def test_a_bin_that_lies_above_a_number_may_count_in_whole() -> None:
    share = Histogram.of_values(np.array([-5, 3.3, 3.4, 9], np.float32)).share_above(3.2)
    assert (share.low, share.high) == (0.25, 0.75)
    share = Histogram.of_values(np.array([3.1, 3.3, 3.4], np.float32)).share_above(3.2)
    assert (share.low, share.high) == (1 / 3, 2 / 3)


@given(SAMPLES, st.integers(1, 40))
def test_display_bins_hold_every_value(values: npt.NDArray[np.float32], bins: int) -> None:
    found = Histogram.of_values(values)
    shown = found.rebinned(bins)
    assert len(shown.counts) == bins
    assert shown.is_estimated
    assert np.all(np.diff(shown.edges) > 0)
    assert np.all(shown.counts >= -1e-9)
    assert shown.counts.sum() == pytest.approx(found.total)
    json.dumps(shown.to_json(), allow_nan=False)


def test_display_bins_are_near_the_truth() -> None:
    values = np.random.default_rng(1).normal(size=20_000).astype(np.float32)
    shown = Histogram.of_values(values).rebinned(20)
    truth, _ = np.histogram(values, shown.edges)
    assert np.abs(shown.counts - truth).max() < 0.02 * len(values)


@given(SAMPLES)
def test_json_has_no_number_that_json_lacks(values: npt.NDArray[np.float32]) -> None:
    found = Histogram.of_values(values, nan=3).to_json()
    json.dumps(found, allow_nan=False)
    assert sum(one["count"] for one in found["bins"]) == found["total"]
    assert found["nan"] == 3 + np.count_nonzero(np.isnan(values))


def test_what_cannot_be_asked_is_refused() -> None:
    found = Histogram.of_values(np.zeros(3, np.float32))
    for share in (1.5, -0.1, math.nan):
        with pytest.raises(InvalidInput, match="share from 0 to 1") as caught:
            found.quantile(share)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(InvalidInput, match="bins is 0"):
        found.rebinned(0)
    with pytest.raises(InvalidInput, match="253"):
        Histogram(np.zeros(5, np.int64), 0, 0.0, 0.0)


@given(SAMPLES, st.integers(0, 60))
def test_histograms_of_parts_add_up_to_the_whole(values: npt.NDArray[np.float32], cut: int) -> None:
    parts = Histogram.of_values(values[:cut]) + Histogram.of_values(values[cut:])
    assert_same(parts, Histogram.of_values(values))


# Of many units


def a_spec(columns: int, layers: int | None = None, rows: int = 1024) -> IndexSpec:
    return IndexSpec("x", PassType.FORWARD, layers, (columns,), rows, "s", ("histogram",), "f", ())


def described(
    path: Path, values: npt.NDArray[np.float32], special: npt.NDArray[np.bool_], rows: int = 1024
) -> SectionFile:
    """The file of a segment of values ``(layer, row, unit)``."""
    layers, filled, columns = values.shape
    buffer = UnitBuffer(a_spec(columns, layers, rows), filled)
    for layer in range(layers):
        buffer.put(layer, 0, values[layer])
    path.write_bytes(b"".join(encode_sections(describe_histograms(buffer, special))))
    return SectionFile(path, path.name)


def hostile_units(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (2, rows, columns), dtype=np.uint64).astype(np.uint32)
    values = rng.normal(size=(2, rows, columns)).astype(np.float32)
    values[:, :, 1] = bits[:, :, 1].view(np.float32)
    values[:, :, 2] = np.nan
    values[:, :, 3] = -0.0
    values[:, :, 4] = rng.choice(EDGES, (2, rows))
    values[:, :, 5] = np.where(rng.random((2, rows)) < 0.1, np.nan, values[:, :, 5])
    values[:, :, 6] = 0.3
    values[:, :, 7] = np.where(rng.random((2, rows)) < 0.5, np.inf, -np.inf)
    values[:, :, 8] *= 1e-42
    return values


@pytest.mark.parametrize(("rows", "columns"), [(700, 9), (1024, 40), (3, 33), (600, 1030)])
def test_a_segments_file_gives_every_units_histogram(
    tmp_path: Path, rows: int, columns: int
) -> None:
    values = hostile_units(rows, columns)
    special = np.random.default_rng(3).random(rows) < 0.1
    file = described(tmp_path / "x", values, special)
    for layer in range(2):
        whole = read_histograms(file, layer, columns)
        assert len(whole) == columns
        for unit in {*range(min(columns, 12)), columns - 1}:
            truth = Histogram.of_values(values[layer, ~special, unit])
            assert_same(whole[unit], truth)
            assert_same(read_histograms(file, layer, columns, unit)[0], truth)


@pytest.mark.parametrize("dtype", list(StoredDtype))
def test_every_way_of_storing_shares_the_bins(dtype: StoredDtype) -> None:
    from actstore.store.histogram_sections import count_units

    codes = np.arange(2**16, dtype=np.uint16).reshape(1, 1, 2048, 32)
    if dtype is StoredDtype.FLOAT16:
        stored: npt.NDArray[Any] = codes.view(np.float16)
    elif dtype is StoredDtype.BFLOAT16:
        stored = codes
    else:
        stored = (
            np.random.default_rng(0)
            .permutation(np.arange(2**16, dtype=np.uint32) * 65537)
            .reshape(codes.shape)
            .view(np.float32)
        )
    left_out = np.arange(0, 2048, 7)
    found = count_units(stored, dtype, left_out)
    values = np.delete(dtype.to_float32(stored)[0, 0], left_out, axis=0)
    for unit in range(32):
        assert_same(found[unit], Histogram.of_values(values[:, unit]))


def test_no_ordinary_row_is_no_value(tmp_path: Path) -> None:
    file = described(tmp_path / "x", hostile_units(5, 9), np.ones(5, bool))
    found = read_histograms(file, 0, 9)
    assert not found.counts.any()
    assert found[0].total == 0
    assert math.isnan(found[0].minimum)
    assert math.isnan(found[0].quantile(0.5).estimate)


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 900), max_size=4), seed=st.integers(0, 99))
def test_segments_add_up_to_the_whole_whatever_the_split(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    values = hostile_units(900, 9, seed)
    special = np.random.default_rng(seed).random(900) < 0.1
    edges = [0, *sorted(cuts), 900]
    total = LayerHistograms.empty(9)
    for number, (start, stop) in enumerate(pairwise(edges)):
        if stop > start:
            file = described(folder / str(number), values[:, start:stop], special[start:stop])
            total = total + read_histograms(file, 1, 9)
    whole = read_histograms(described(folder / "whole", values, special), 1, 9)
    np.testing.assert_array_equal(total.counts, whole.counts)
    np.testing.assert_array_equal(total.extremes, whole.extremes)


@given(
    counts=hnp.arrays(
        np.int64,
        st.tuples(st.integers(0, 4), st.just(BINS + 1)),
        elements=st.sampled_from([0, 0, 0, 1, 127, 128, 2**14, 2**21 - 1, 2**40, 2**62]),
    )
)
def test_records_give_back_what_was_packed(counts: npt.NDArray[np.int64]) -> None:
    extremes = np.tile(np.array([-1.5, np.inf], np.float32), (len(counts), 1))
    records = pack_histograms(LayerHistograms(counts, extremes))
    found = unpack_histograms(records)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.extremes, extremes)
    for unit in range(len(counts)):
        one = unpack_histograms(records[unit : unit + 1])
        np.testing.assert_array_equal(one.counts[0], counts[unit])


def test_quantiles_of_a_layer_are_those_of_its_units(tmp_path: Path) -> None:
    found = read_histograms(
        described(tmp_path / "x", hostile_units(700, 9), np.zeros(700, bool)), 0, 9
    )
    for share in (0, 0.01, 0.5, 0.999, 1):
        estimate, low, high = found.quantile(share)
        for unit in range(9):
            one = found[unit].quantile(share)
            np.testing.assert_equal(
                (estimate[unit], low[unit], high[unit]), (one.estimate, one.low, one.high)
            )


def test_a_histogram_of_a_segment_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 8192, 1024)).astype(np.float32)
    # Most of a gated activation lies just below zero.
    values = np.where(values > 1.2, values - 1.2, 0.05 * values)
    file = described(tmp_path / "x", values, np.zeros(8192, bool), 8192)
    kept = sum(math.prod(file.shape(name)) for name in ("histogram", "histogram_range"))
    assert kept / values.size < 0.006 * 2


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    described(tmp_path / "x", hostile_units(700, 9), np.zeros(700, bool))
    data = bytearray((tmp_path / "x").read_bytes())
    data[100] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(StoreDamaged):
        read_histograms(SectionFile(tmp_path / "x", "x"), 0, 9)
