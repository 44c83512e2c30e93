"""Layout, shards and zones of one array, against numpy and zarr-python."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.store.blobs import LocalBlobs
from actstore.store.errors import InvalidInput, StoreDamaged
from actstore.store.keys import infinity_key, key_values, ordered_keys
from actstore.store.layout import ArraySpec, StoredDtype, array_metadata
from actstore.store.location_names import parse_location, parse_locations
from actstore.store.shard_file import parse_shard, shard_parts
from actstore.store.shards import Descriptors, SegmentBuffer, ShardReader
from actstore.store.statistics import UnitStatistics, merge_moments
from actstore.store.vocabulary import ActivationLocationType as Location
from actstore.store.vocabulary import PassType
from actstore.store.zones import EMPTY_ROW, LIST_LENGTH, describe_segment

SHAPES = [
    (Location.MLP_POST_ACT, 3, (70,)),
    (Location.RESID_POST_MLP, 3, (33,)),
    (Location.ATTN_QUERY, 2, (4, 8)),
    (Location.RESID_POST_EMBEDDING, None, (33,)),
    (Location.MLP_INPUT_LAYER_NORM_SCALE, 3, (1,)),
    (Location.LOGITS, None, (50,)),
    (Location.ATTN_QK_PROBS, 3, (2, 48)),
]


def spec_of(
    location: Location = Location.MLP_POST_ACT,
    layers: int | None = 2,
    shape: tuple[int, ...] = (40,),
    dtype: StoredDtype = StoredDtype.FLOAT16,
    rows: int = 1024,
) -> ArraySpec:
    return ArraySpec(location, PassType.FORWARD, layers, shape, dtype, rows)


def filled(spec: ArraySpec, values: npt.NDArray[np.generic], step: int = 37) -> SegmentBuffer:
    """A buffer of ``values (layer, row, column)``, put in pieces."""
    buffer = SegmentBuffer(spec, values.shape[1])
    for layer in range(spec.layer_count):
        for start in range(0, values.shape[1], step):
            buffer.put(layer, start, values[layer, start : start + step])
    return buffer


@pytest.mark.parametrize(("location", "layers", "shape"), SHAPES)
@pytest.mark.parametrize("dtype", list(StoredDtype))
def test_zarr_reads_what_was_written_and_so_do_we(
    tmp_path: Path,
    location: Location,
    layers: int | None,
    shape: tuple[int, ...],
    dtype: StoredDtype,
) -> None:
    spec = spec_of(location, layers, shape, dtype)
    blobs = LocalBlobs(tmp_path)
    blobs.publish(f"arrays/{spec.key}/zarr.json", [array_metadata(spec, 2)])
    rng = np.random.default_rng(0)
    lengths = {0: 700, 1: 1024}
    truth = {}
    checksums = {}
    for segment, rows in lengths.items():
        raw = rng.standard_normal((spec.layer_count, rows, spec.columns)).astype(np.float32)
        values = (raw.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else raw
        truth[segment] = values.astype(spec.dtype.storage)
        buffer = filled(spec, truth[segment])
        for shard in range(spec.shards):
            path = spec.shard_path(shard, segment)
            blobs.publish(path, shard_parts(spec, shard, rows, buffer.shard(shard)))
            size = blobs.path(path).stat().st_size
            assert size == spec.shard_bytes(shard, rows) or spec.is_compressed
            parsed = parse_shard(spec, shard, rows, blobs.read(path), path)
            np.testing.assert_array_equal(parsed, buffer.shard(shard))
        checksums[segment] = describe_segment(buffer, np.zeros(rows, bool))["checksums"]

    opened = zarr.open_array(blobs.path(f"arrays/{spec.key}"), mode="r")
    read = np.asarray(opened[:]).reshape(spec.layer_count, 2048, spec.columns)
    for segment, rows in lengths.items():
        start = segment * 1024
        np.testing.assert_array_equal(read[:, start : start + rows], truth[segment])
        assert np.isnan(dtype.to_float32(read[:, start + rows : start + 1024])).all()

    reader = ShardReader(
        spec, Descriptors(tmp_path), lengths.__getitem__, lambda s, layer: checksums[s][layer]
    )
    last = spec.layer_count - 1
    np.testing.assert_array_equal(reader.window(0, last, 100, 900), truth[0][last, 100:])
    rows_wanted = np.concatenate([rng.integers(0, 700, 40), 1024 + rng.integers(0, 1024, 40)])
    rng.shuffle(rows_wanted)
    expected = np.stack([truth[row // 1024][last, row % 1024] for row in rows_wanted])
    np.testing.assert_array_equal(reader.rows(last, rows_wanted), expected)
    offsets = np.unique(rng.integers(0, 1024, 30))
    column = spec.columns - 1
    np.testing.assert_array_equal(reader.cells(1, 0, offsets, column), truth[1][0, offsets, column])


def test_a_flipped_byte_raises_in_every_kind_of_read(tmp_path: Path) -> None:
    spec = spec_of()
    blobs = LocalBlobs(tmp_path)
    buffer = filled(spec, np.ones((2, 600, 40), np.float16))
    path = spec.shard_path(0, 0)
    blobs.publish(path, shard_parts(spec, 0, 600, buffer.shard(0)))
    checksums = describe_segment(buffer, np.zeros(600, bool))["checksums"]
    content = bytearray(blobs.read(path))
    content[7] ^= 1
    blobs.path(path).write_bytes(content)
    reader = ShardReader(
        spec, Descriptors(tmp_path), lambda _: 600, lambda _, layer: checksums[layer]
    )
    with pytest.raises(StoreDamaged, match="byte 0"):
        reader.window(0, 0, 0, 3)
    with pytest.raises(StoreDamaged, match="byte 0"):
        reader.rows(0, np.array([1]))
    with pytest.raises(StoreDamaged, match="byte 0"):
        reader.cells(0, 0, np.array([2]), 0)
    # Blocks that the flip does not touch are sound.
    np.testing.assert_array_equal(reader.window(0, 1, 0, 3), np.ones((3, 40)))


def test_wide_arrays_are_split_into_shards_of_layers() -> None:
    spec = spec_of(layers=48, shape=(4096,), rows=16384)
    assert spec.layers_per_shard == 2
    assert spec.shard_layers(23) == range(46, 48)
    assert spec.shard_path(23, 5).endswith("mlp_post_act/forward/c.23.5.0")
    assert spec.checksum_rows * spec.chunk_width * 2 == 4096


@pytest.mark.parametrize("rows", [0, 100, 131072])
def test_segment_rows_are_checked(rows: int) -> None:
    with pytest.raises(InvalidInput, match="segment_rows"):
        spec_of(rows=rows)


special_floats = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 6e-8, -6e-8, 65504.0]


@given(st.lists(st.floats(width=16, allow_nan=False) | st.sampled_from(special_floats), min_size=2))
def test_keys_order_as_values_do(values: list[float]) -> None:
    array = np.array(values, np.float16)
    keys = ordered_keys(array, StoredDtype.FLOAT16).astype(int)
    for a, key_a in zip(array, keys, strict=True):
        for b, key_b in zip(array, keys, strict=True):
            assert (a < b) == (key_a < key_b)
            assert (a == b) == (key_a == key_b)
    np.testing.assert_array_equal(key_values(keys, StoredDtype.FLOAT16), array.astype(np.float32))


@pytest.mark.parametrize("dtype", [StoredDtype.FLOAT16, StoredDtype.FLOAT32])
def test_nan_keys_lie_beyond_infinity(dtype: StoredDtype) -> None:
    nans = np.array([np.nan, -np.nan], dtype.storage)
    keys = ordered_keys(nans, dtype).astype(int)
    limit = infinity_key(dtype)
    assert ((keys > limit) | (keys < -limit - 1)).all()
    assert int(ordered_keys(np.array([np.inf], dtype.storage), dtype)[0]) == limit


def brute_list(
    values: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], largest: bool
) -> list[tuple[float, int]]:
    kept = [(float(v), int(r)) for v, r in zip(values, rows, strict=True) if not np.isnan(v)]
    kept.sort(key=lambda item: (-item[0] if largest else item[0], item[1]))
    return kept[:LIST_LENGTH]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_zones_lists_and_counts_equal_brute_force(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    rows = data.draw(st.sampled_from([1, 5, 511, 512, 513, 1024]))
    spec = spec_of(
        layers=1,
        shape=(6,),
        dtype=data.draw(st.sampled_from([StoredDtype.FLOAT16, StoredDtype.FLOAT32])),
    )
    values = rng.standard_normal((1, rows, 6)).astype(spec.dtype.storage)
    values[0, :, 1] = data.draw(st.sampled_from([0.0, -2.0]))
    values[0, :, 2] = -np.abs(values[0, :, 2])
    values[0, :, 3] = rng.integers(-1, 2, rows)
    values[0, rng.random(rows) < 0.3, 4] = data.draw(
        st.sampled_from([np.nan, np.inf, -np.inf, -0.0])
    )
    special = rng.random(rows) < data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    zones = describe_segment(filled(spec, values), special)
    for unit in range(6):
        column = values[0, :, unit].astype(np.float32)
        ordinary = np.flatnonzero(~special)
        for tail, largest in (("top", True), ("low", False)):
            expected = brute_list(column[ordinary], ordinary, largest)
            got_rows = zones[f"{tail}_row"][0, unit]
            got = key_values(zones[f"{tail}_key"][0, unit], spec.dtype)
            found = [
                (float(v), int(r)) for v, r in zip(got, got_rows, strict=True) if r != EMPTY_ROW
            ]
            assert found == expected
        for page in range(spec.pages):
            inside = ordinary[(ordinary >= page * 512) & (ordinary < page * 512 + 512)]
            kept = column[inside][~np.isnan(column[inside])]
            high, low = zones["page_max"][0, unit, page], zones["page_min"][0, unit, page]
            if len(kept):
                assert key_values(np.array([high]), spec.dtype)[0] == kept.max()
                assert key_values(np.array([low]), spec.dtype)[0] == kept.min()
            else:
                assert high < low
        kept = column[ordinary]
        nan = np.isnan(kept)
        assert zones["counts"][0, unit].tolist() == [
            int((~nan).sum()),
            int((kept[~nan] > 0).sum()),
            int(nan.sum()),
        ]
        apart = column[special][~np.isnan(column[special])]
        if len(apart):
            bounds = key_values(zones["segment"][0, unit, 2:], spec.dtype)
            assert bounds.tolist() == [apart.max(), apart.min()]


@pytest.mark.parametrize("dtype", list(StoredDtype))
@pytest.mark.parametrize(
    ("location", "shape"), [(Location.MLP_POST_ACT, (40,)), (Location.ATTN_QUERY, (2, 96))]
)
def test_zones_over_many_blocks_equal_brute_force(
    location: Location, shape: tuple[int, ...], dtype: StoredDtype
) -> None:
    """Several row chunks, blocks, pages and tied groups, the last ones partly filled."""
    rng = np.random.default_rng(3)
    rows, spec = 5000, spec_of(location, 1, shape, dtype, 8192)
    numbers = rng.standard_normal((rows, spec.columns)).astype(np.float32)
    numbers[:, 1] = np.round(numbers[:, 1])
    numbers[:, 2] = np.maximum(numbers[:, 2], 0)
    numbers[rng.random(rows) < 0.01, 4] = np.nan
    stored = (
        (numbers.view(np.uint32) >> 16).astype(np.uint16)
        if dtype is StoredDtype.BFLOAT16
        else numbers.astype(dtype.storage)
    )
    special = rng.random(rows) < 0.05
    zones = {
        name: section[0]
        for name, section in describe_segment(filled(spec, stored[None], 999), special).items()
    }
    values = dtype.to_float32(stored)
    ordinary = np.flatnonzero(~special)
    for unit in range(spec.columns):
        column = values[ordinary, unit]
        for tail, sign in (("top", -1), ("low", 1)):
            # NaN sorts behind all numbers, and a stable sort keeps the order of rows.
            order = np.argsort(sign * column, kind="stable")[:LIST_LENGTH]
            assert zones[f"{tail}_row"][unit].tolist() == ordinary[order].tolist()
            found = key_values(zones[f"{tail}_key"][unit], dtype)
            np.testing.assert_array_equal(found, column[order])
        for page in range(-(-rows // 512)):
            inside = column[ordinary // 512 == page]
            bounds = np.array([zones["page_max"][unit, page], zones["page_min"][unit, page]])
            expected = [np.nanmax(inside), np.nanmin(inside)]
            assert key_values(bounds, dtype).tolist() == expected
        kept = column[~np.isnan(column)].astype(np.float64)
        counts = [len(kept), int((kept > 0).sum()), len(column) - len(kept)]
        assert zones["counts"][unit].tolist() == counts
        centred = kept - kept.mean()
        powers = [float((centred**power).sum()) for power in (2, 3, 4)]
        assert zones["moments"][unit, 0] == pytest.approx(kept.mean(), rel=1e-12, abs=1e-15)
        # The third power's terms cancel: its error is relative to their magnitudes.
        scale = [powers[0], float((np.abs(centred) ** 3).sum()), powers[2]]
        assert (np.abs(zones["moments"][unit, 1:] - powers) <= 1e-6 * np.array(scale)).all()
    assert (zones["page_max"][:, -(-rows // 512) :] < zones["page_min"][:, -(-rows // 512) :]).all()


def test_moments_merge_to_those_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    spec = spec_of(layers=1, shape=(32,), dtype=StoredDtype.FLOAT32)
    values = (rng.gamma(0.5, 3, (1, 2000, 32)) + 100).astype(np.float32)
    total, count = np.zeros((32, 4)), np.zeros(32)
    counts = np.zeros((32, 3))
    for part in (values[:, :900], values[:, 900:1000], values[:, 1000:]):
        zones = describe_segment(filled(spec, part), np.zeros(part.shape[1], bool))
        part_count = zones["counts"][0, :, 0].astype(float)
        total, count = merge_moments(total, count, zones["moments"][0], part_count)
        counts += zones["counts"][0]
    got = UnitStatistics.from_moments(total, counts)
    x = values[0].astype(np.float64)
    centred = x - x.mean(0)
    m2, m3, m4 = (centred**2).mean(0), (centred**3).mean(0), (centred**4).mean(0)
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.variance, m2, rtol=1e-6)
    np.testing.assert_allclose(got.skewness, m3 / m2**1.5, rtol=1e-5)
    np.testing.assert_allclose(got.kurtosis, m4 / m2**2, rtol=1e-5)
    assert (got.count == 2000).all()


@pytest.mark.parametrize(
    ("name", "location", "layer"),
    [
        ("mlp_post", Location.MLP_POST_ACT, None),
        ("blocks.3.hook_resid_post", Location.RESID_POST_MLP, 3),
        ("blocks.0.hook_resid_pre", Location.RESID_POST_EMBEDDING, None),
        ("blocks.4.hook_resid_pre", Location.RESID_POST_MLP, 3),
        ("blocks.2.attn.hook_pattern", Location.ATTN_QK_PROBS, 2),
        ("blocks.1.mlp.hook_pre", Location.MLP_PRE_ACT, 1),
        ("blocks.1.ln2.hook_scale", Location.MLP_INPUT_LAYER_NORM_SCALE, 1),
        ("ln_final.hook_scale", Location.RESID_FINAL_LAYER_NORM_SCALE, None),
        ("z", Location.ATTN_WEIGHTED_SUM_OF_VALUES, None),
        ("ATTN_QUERY", Location.ATTN_QUERY, None),
    ],
)
def test_transformer_lens_names_are_accepted(
    name: str, location: Location, layer: int | None
) -> None:
    assert parse_location(name) == (location, layer)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"resid_post_mlp.*neurons"):
        parse_locations("neurons,nonsense")
