"""Statistics and histograms of a store equal brute force over its values, in Python and in SQL."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from store_builder import append_plan, build_store, commit_segments

from actstore.query.index_building import build_indexes
from actstore.query.session import Store
from actstore.query.statistics import (
    Statistics,
    statistics,
    stored_histograms,
    unit_histogram,
    unit_summary,
)
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.histograms import GREATEST, LEAST, Histogram
from actstore.store.snapshot import compact
from actstore.store.unit_histograms import UnitHistograms

Floats = npt.NDArray[np.float32]

LENGTHS = [100, 37, 5, 120, 90, 128, 61] * 3
SPECIAL = (7,)


def hostile_values(tokens: int, units: int, seed: int = 5) -> Floats:
    """Units that are dense, tied, constant, negative, missing in part or wholly."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, tokens, units))
    values[:, :, 1] = np.round(values[:, :, 1])
    values[:, :, 2] = 0.5
    values[:, :, 3] = -np.abs(values[:, :, 3]) - 1
    values[:, :, 4] = np.where(rng.random((2, tokens)) < 0.3, np.nan, values[:, :, 4])
    values[:, :, 5] = np.nan
    values[:, :, 6] = np.where(np.arange(tokens) == tokens // 2, 3.0, -0.0)
    values[:, :, 7] *= 1e-6
    return values.astype(np.float32)


def build(path: Path, **options: Any) -> Path:
    tokens = sum(LENGTHS)
    values = {
        "mlp_post_act": hostile_values(tokens, 16),
        "resid_post_mlp": hostile_values(tokens, 8, 6),
    }
    return build_store(path, values, LENGTHS, special_token_ids=SPECIAL, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build(tmp_path_factory.mktemp("statistics") / "store")
    build_indexes(path, ["mlp_post_act", "mlp_write_norm", "resid_post_mlp"])
    return path


@pytest.fixture(scope="module")
def store(path: Path) -> Store:
    return Store(path)


def values_of(store: Store, name: str) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Canonical values ``(layer, row, unit)`` and which rows are special."""
    found = store.derive(name)
    values: Floats = found.numpy()
    return values, store.row_map.special(found.rows)


def assert_row_true(row: dict[str, Any], values: Floats, special: npt.NDArray[np.bool_]) -> None:
    """A row of statistics is that of a unit's values ``(row,)``."""
    ordinary = values[~special]
    kept = ordinary[~np.isnan(ordinary)].astype(np.float64)
    assert row["nan"] == len(ordinary) - len(kept)
    assert row["count"] == len(kept)
    beside = values[special & ~np.isnan(values)]
    for name, seen in (("", kept), ("special_", beside)):
        assert row[f"{name}max"] == (seen.max() if len(seen) else None)
        assert row[f"{name}min"] == (seen.min() if len(seen) else None)
    if not len(kept):
        assert row["mean"] is row["positive_share"] is row["variance"] is None
        return
    assert row["positive_share"] == pytest.approx(np.mean(kept > 0))
    assert row["mean"] == pytest.approx(kept.mean(), rel=1e-5, abs=1e-7)
    assert row["variance"] == pytest.approx(kept.var(), rel=1e-4, abs=1e-12)
    assert row["std"] == pytest.approx(kept.std(), rel=1e-4, abs=1e-7)
    if kept.std() > 0:
        scaled = (kept - kept.mean()) / kept.std()
        assert row["skewness"] == pytest.approx((scaled**3).mean(), rel=1e-3, abs=1e-4)
        assert row["kurtosis"] == pytest.approx((scaled**4).mean(), rel=1e-3)
    else:
        assert row["skewness"] is row["kurtosis"] is None


def assert_quantiles_true(row: dict[str, Any], found: Statistics, values: Floats) -> None:
    kept = np.sort(values[~np.isnan(values)])
    for share in found.quantiles:
        name = f"q{100 * share:.10g}".replace(".", "_")
        if not len(kept):
            assert row[name] is None
            continue
        truth = kept[max(math.ceil(round(share * len(kept), 6)), 1) - 1]
        assert row[f"{name}_low"] <= truth <= row[f"{name}_high"]
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


@pytest.mark.parametrize("name", ["mlp_post_act", "mlp_write_norm", "resid_post_mlp"])
def test_statistics_are_those_of_the_values(store: Store, name: str) -> None:
    found = statistics(store, name)
    values, special = values_of(store, name)
    layers, _, units = values.shape
    assert len(found) == layers * units
    axis = "channel" if name == "resid_post_mlp" else "neuron"
    for place, row in enumerate(found):
        layer, unit = divmod(place, units)
        assert (row["layer"], row[axis]) == (layer, unit)
        assert_row_true(row, values[layer, :, unit], special)
        assert_quantiles_true(row, found, values[layer, ~special, unit])
    json.dumps(found.to_json(), allow_nan=False)


def test_what_the_numbers_come_from_is_named(store: Store) -> None:
    assert statistics(store, "mlp_write_norm").source == "zone map of mlp_post_act/forward"
    assert statistics(store, "resid_post_mlp").source.startswith("index resid_post_mlp/forward@")
    assert "mlp_post_act, 32 units" in repr(statistics(store, "mlp_post_act"))


def test_a_negative_factor_turns_a_unit_over(store: Store) -> None:
    declared = store.scalar("mlp_post_act")
    truth = statistics(store, declared)
    # The store's scalars have no such factor, a projection of a neuron has.
    original = store.coefficients

    def turned(*arguments: Any) -> npt.NDArray[np.float64]:
        return -2 * original(*arguments)

    store.__dict__["coefficients"] = turned
    try:
        found = statistics(store, declared, quantiles=())
    finally:
        del store.__dict__["coefficients"]
    for row, other in zip(found, truth, strict=True):
        assert row["positive_share"] is None
        for name, as_name, factor in (
            ("min", "max", -2), ("max", "min", -2), ("mean", "mean", -2),
            ("variance", "variance", 4), ("skewness", "skewness", -1),
            ("kurtosis", "kurtosis", 1), ("special_max", "special_min", -2),
        ):  # fmt: skip
            expected = None if other[as_name] is None else other[as_name] * factor
            assert row[name] == pytest.approx(expected)


def test_layers_and_units_are_chosen(store: Store) -> None:
    found = statistics(store, "mlp_post_act", layers=1, neurons=[3, 0], quantiles=[0.5])
    assert found.column("neuron") == [0, 3]
    assert found.column("layer") == [1, 1]
    assert found.to_arrow().schema.names[-3:] == ["q50", "q50_low", "q50_high"]
    whole = statistics(store, "mlp_post_act")
    assert found[1]["mean"] == whole[16 + 3]["mean"]
    pairs = statistics(store, "mlp_post_act", units=[(0, 2), (1, 5)])
    assert list(zip(pairs.column("layer"), pairs.column("neuron"), strict=True)) == [(0, 2), (1, 5)]
    assert len(statistics(store, "mlp_post_act", units="neuron < 0")) == 0


def test_what_cannot_be_had_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInput, match="nodes"):
        statistics(store, "mlp_post_act", nodes=3)
    with pytest.raises(InvalidInput, match="0 to 1"):
        statistics(store, "mlp_post_act", layers=2)
    with pytest.raises(Unavailable, match="actstore index") as caught:
        statistics(store, "resid_post_embedding")
    assert caught.value.kind is ErrorKind.NOT_STORED
    for unit in ((0,), (0, 16), (2, 0), "ab", (0, 1.5), 3):
        with pytest.raises(InvalidInput, match="layer below 2, neuron below 16"):
            unit_histogram(store, "mlp_post_act", unit)  # type: ignore[arg-type]


def test_a_units_summary_is_its_row(store: Store) -> None:
    row = statistics(store, "mlp_post_act", layers=1, neurons=1)[0]
    found = unit_summary(store, store.scalar("mlp_post_act"), 1, 1)
    assert found is not None
    for name in ("count", "nan", "positive_share", "mean", "std", "min", "special_max"):
        assert getattr(found, name) == row[name]
    assert found.quantiles[0.99].low == row["q99_low"]
    json.dumps(found.to_json(), allow_nan=False)
    assert unit_summary(store, store.scalar("resid_post_embedding"), 0, 0) is None


# Histograms


def assert_same(one: Histogram, other: Histogram) -> None:
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_equal(
        (one.nan, one.minimum, one.maximum), (other.nan, other.minimum, other.maximum)
    )


@pytest.mark.parametrize("name", ["mlp_post_act", "mlp_write_norm", "resid_post_mlp"])
def test_kept_histograms_are_those_of_the_values(store: Store, name: str) -> None:
    histograms = stored_histograms(store, store.scalar(name))
    assert histograms is not None
    values, special = values_of(store, name)
    for layer in range(2):
        whole = histograms.layer(layer)
        for unit in range(values.shape[2]):
            truth = Histogram.of_values(values[layer, ~special, unit])
            assert_same(histograms.of(layer, unit), truth)
            assert_same(whole[unit], truth)
            assert_same(unit_histogram(store, name, (layer, unit)), truth)


def test_a_histogram_that_is_not_kept_is_counted(tmp_path: Path, store: Store) -> None:
    bare = Store(build(tmp_path / "store"))
    assert stored_histograms(bare, bare.scalar("mlp_post_act")) is None
    assert not statistics(bare, "mlp_post_act").quantiles
    for unit in (0, 4, 5):
        assert_same(
            unit_histogram(bare, "mlp_post_act", (1, unit)),
            unit_histogram(store, "mlp_post_act", (1, unit)),
        )


def test_segments_that_no_compacted_file_covers_count_too(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "store", commit=[0, 1])
    build_indexes(whole, ["mlp_post_act"])
    merged = Store(whole)
    first = [unit_histogram(merged, "mlp_post_act", (1, unit)) for unit in range(16)]
    merged.close()
    tokens = sum(LENGTHS)
    values = {
        "mlp_post_act": hostile_values(tokens, 16),
        "resid_post_mlp": hostile_values(tokens, 8, 6),
    }
    commit_segments(whole, values)
    # Built, and not compacted: the older file has the first two segments alone.
    with monkeypatch.context() as patch:
        patch.setattr("actstore.query.index_building.compact", lambda _: None)
        build_indexes(whole, ["mlp_post_act"])
    truth = Store(path)
    for number in range(2):
        after = Store(whole)
        histograms = stored_histograms(after, after.scalar("mlp_post_act"))
        assert histograms is not None
        for unit in range(16):
            expected = unit_histogram(truth, "mlp_post_act", (1, unit))
            assert_same(histograms.of(1, unit), expected)
            assert_same(histograms.layer(1)[unit], expected)
        assert any(one.total < histograms.of(1, n).total for n, one in enumerate(first))
        after.close()
        if not number:
            with Store(whole) as again:
                compact(again.reader)


def test_the_histogram_table_is_the_histograms(store: Store) -> None:
    rows = store.sql(
        "SELECT location, pass, layer, unit, bin, low, high, count FROM histograms"
    ).fetchall()
    assert {row[0] for row in rows} == {"mlp_post_act", "mlp_write_norm", "resid_post_mlp"}
    for name in ("mlp_post_act", "mlp_write_norm"):
        for layer in range(2):
            for unit in range(16):
                truth = unit_histogram(store, name, (layer, unit))
                found = [row[4:] for row in rows if row[:4] == (name, "forward", layer, unit)]
                places = np.flatnonzero(truth.counts)
                assert [row[0] for row in found] == places.tolist()
                assert [row[3] for row in found] == truth.counts[places].tolist()
                for number, low, high, _ in found:
                    assert LEAST[number] <= low <= high <= GREATEST[number]
                    assert truth.minimum <= low <= high <= truth.maximum


def test_statistics_of_an_indexed_scalar_are_in_sql(store: Store) -> None:
    found = statistics(store, "resid_post_mlp")
    rows = store.sql(
        "SELECT layer, unit, count, positive, nan, mean, max, special_min FROM statistics"
        " WHERE location = 'resid_post_mlp' ORDER BY ALL"
    ).fetchall()
    assert len(rows) == len(found)
    for row, other in zip(rows, found, strict=True):
        assert row[:3] == (other["layer"], other["channel"], other["count"])
        assert row[4:] == (other["nan"], other["mean"], other["max"], other["special_min"])


def test_one_units_histogram_is_one_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(path)
    (index,) = [one for one in store.reader.indexes.values() if one.spec.label == "mlp_post_act"]
    histograms = UnitHistograms(store.reader, index)
    blocks = []
    from actstore.store.sections import SectionFile

    original = SectionFile._blocks

    def counted(self: SectionFile, first: int, last: int) -> bytes:
        blocks.append((first, last))
        return original(self, first, last)

    monkeypatch.setattr(SectionFile, "_blocks", counted)
    histograms.of(1, 3)
    assert len(blocks) == 1
    assert blocks[0][1] - blocks[0][0] <= 2


def test_a_store_that_grows_keeps_its_histograms(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    build_indexes(path, ["mlp_post_act"])
    before = unit_histogram(Store(path), "mlp_post_act", (0, 0))
    more = [64] * 8
    tokens = sum(LENGTHS)
    values = {
        name: np.concatenate(
            [hostile_values(tokens, units, seed), np.ones((2, sum(more), units), np.float32)], 1
        )
        for name, units, seed in (("mlp_post_act", 16, 5), ("resid_post_mlp", 8, 6))
    }
    append_plan(path, more)
    commit_segments(path, values)
    # The index covers less than the store now, so it is not used.
    partly = Store(path)
    assert stored_histograms(partly, partly.scalar("mlp_post_act")) is None
    counted = unit_histogram(partly, "mlp_post_act", (0, 0))
    build_indexes(path, ["mlp_post_act"])
    assert_same(unit_histogram(Store(path), "mlp_post_act", (0, 0)), counted)
    assert counted.total > before.total
