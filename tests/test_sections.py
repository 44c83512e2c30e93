from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_builder import build_store

from actstore.query.session import Store
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ActstoreError, StoreDamaged
from actstore.store.reader import StoreReader
from actstore.store.records import decode_record, encode_record
from actstore.store.sections import BLOCK, SectionFile, encode_sections
from actstore.store.selfcheck import SelfCheck, publish_selfcheck
from actstore.store.snapshot import compact
from actstore.store.verification import verify_store


def write(path: Path, **arrays: np.ndarray) -> Path:
    path.write_bytes(b"".join(bytes(part) for part in encode_sections(arrays, {"note": "x"})))
    return path


def test_slices_equal_the_array(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2**31, (7, 33, 65), dtype=np.int64)
    small = np.arange(3, dtype=np.uint16)
    file = SectionFile(write(tmp_path / "a", table=table, empty=table[:0], small=small), "a")
    assert file.attributes == {"note": "x"}
    assert sorted(file.names) == ["empty", "small", "table"]
    np.testing.assert_array_equal(file.read("table"), table)
    np.testing.assert_array_equal(file.row("table", 3), table[3])
    np.testing.assert_array_equal(file.row("table", 6, 32), table[6, 32])
    np.testing.assert_array_equal(file.slice("table", 1000, 5000), table.reshape(-1)[1000:5000])
    np.testing.assert_array_equal(file.read("small"), small)
    assert file.read("empty").shape == (0, 33, 65)
    assert file.verify() == (tmp_path / "a").stat().st_size


@given(
    places=st.lists(st.integers(0, 20_000 - 1), max_size=60),
    near=st.lists(st.integers(0, 2000), max_size=60),
)
def test_elements_at_any_places_equal_the_array(
    tmp_path_factory: pytest.TempPathFactory, places: list[int], near: list[int]
) -> None:
    before = np.arange(700, dtype=np.uint8)
    values = np.arange(20_000, dtype=np.int64)[::-1].copy()
    file = SectionFile(
        write(tmp_path_factory.mktemp("take") / "a", before=before, values=values), "a"
    )
    wanted = np.array([*places, *near], np.int64)
    np.testing.assert_array_equal(file.take("values", wanted), values[wanted])
    inside = wanted % 700
    np.testing.assert_array_equal(file.take("before", inside), before[inside])


@pytest.mark.parametrize("blocks", [1, 3, 4000])
def test_files_with_any_length_of_checksums_open(tmp_path: Path, blocks: int) -> None:
    # The end that is read at once holds all checksums, some of them, or the trailer alone.
    values = np.arange(blocks * BLOCK, dtype=np.uint8)
    file = SectionFile(write(tmp_path / "a", values=values), "a")
    assert file.verify() == (tmp_path / "a").stat().st_size
    np.testing.assert_array_equal(file.read("values"), values)


@given(st.data())
def test_every_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(
        tmp_path_factory.mktemp("flip") / "a", one=np.arange(1500, dtype="<i4"), two=np.ones(3)
    )
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(StoreDamaged):
        SectionFile(path, "a").verify()


def test_a_read_checks_the_blocks_it_touches_and_only_those(tmp_path: Path) -> None:
    values = np.arange(4 * BLOCK, dtype=np.uint8)
    path = write(tmp_path / "a", values=values)
    content = bytearray(path.read_bytes())
    content[2 * BLOCK + 5] ^= 1
    path.write_bytes(content)
    file = SectionFile(path, "a")
    np.testing.assert_array_equal(file.slice("values", 0, 2 * BLOCK), values[: 2 * BLOCK])
    around = np.array([4 * BLOCK - 1, 3 * BLOCK, 0, 2 * BLOCK - 1])
    np.testing.assert_array_equal(file.take("values", around), values[around])
    with pytest.raises(StoreDamaged, match="block 2"):
        file.take("values", np.append(around, 3 * BLOCK - 1))
    with pytest.raises(StoreDamaged, match="block 2"):
        file.slice("values", 2 * BLOCK - 1, 2 * BLOCK + 1)


@pytest.mark.parametrize("keep", [0, 5, BLOCK, BLOCK + 10])
def test_a_truncated_file_is_damaged(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a", values=np.arange(5000))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreDamaged):
        SectionFile(path, "a")


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="b is missing"):
        SectionFile(tmp_path / "b", "b")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "crc32c"), json_values, max_size=4))
def test_records_round_trip_and_no_bit_is_free(fields: dict[str, object]) -> None:
    data = encode_record(fields)
    assert decode_record(data, "r") == fields
    for place in range(0, len(data), max(1, len(data) // 16)):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(StoreDamaged):
            decode_record(bytes(flipped), "r")


def test_publishing_keeps_what_is_there(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    assert blobs.publish("a/b", [b"one", memoryview(b"two")])
    assert not blobs.publish("a/b", [b"three"])
    assert blobs.read("a/b") == b"onetwo"
    assert list(blobs.listing()) == ["a/b"]


def test_sweeping_leaves_live_and_foreign_writers_alone(tmp_path: Path) -> None:
    from actstore.store.blobs import writer_id

    blobs = LocalBlobs(tmp_path)
    machine, _ = writer_id().split("-")
    # The kernel never hands out this process number.
    names = {
        "dead": f"x.partial-{machine}-99999999-u",
        "live": f"x.partial-{writer_id()}-u",
        "foreign": "x.partial-00000000-99999999-u",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"")
    assert blobs.sweep() == [names["dead"]]
    assert set(blobs.listing()) == {names["live"], names["foreign"]}


def test_every_substituted_byte_of_a_record_is_damage() -> None:
    """Long runs of digits: a digit turned into an exponent parses as infinity."""
    data = encode_record({"hash": "9" * 24, "number": 10**22 + 7, "small": 0.25, "list": [1234567]})
    decode_record(data, "r")
    for place in range(len(data)):
        for byte in range(256):
            if byte == data[place]:
                continue
            changed = data[:place] + bytes([byte]) + data[place + 1 :]
            with pytest.raises(StoreDamaged):
                decode_record(changed, "r")


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1234E678901,"crc32c":"00000000"}\n',
        b'{"a":"\\ud800","crc32c":"00000000"}\n',
        b"[" * 100_000,
        b'["crc32c"]\n',
        b"3\n",
        b"\xff\xfe",
    ],
)
def test_bytes_that_are_no_record_are_damage(data: bytes) -> None:
    with pytest.raises(StoreDamaged):
        decode_record(data, "r")


def test_record_in_the_place_of_any_other_is_damage(tmp_path: Path) -> None:
    """A sound file under another's name: a finding of verify, and an error made for it."""
    path = build_store(tmp_path / "store", {"mlp_post_act": np.ones((1, 20, 4))}, [20])
    blobs = LocalBlobs(path)
    key = "mlp_post_act/forward"
    publish_selfcheck(blobs, SelfCheck((0,), {key: "float16"}, {key: 0.25}))
    compact(StoreReader(path))
    assert verify_store(path).ok
    records = {
        name: blobs.read(name)
        for name in blobs.listing()
        if name.endswith((".json", ".sections")) and "/model/" not in name
    }
    places = [
        *(name for name in records if not name.endswith("zarr.json")),
        "catalog/x.json",
        "selfcheck/x.json",
        "commits/base/000099.json",
        "commits/x/set.json",
        "plan/0001-000000000000/plan.json",
        "zones/mlp_post_act/forward/index-0123456789abcdef.sections",
    ]
    for place in places:
        for name, data in records.items():
            if name == place:
                continue
            blobs.replace(place, data)
            report = verify_store(path)
            assert not report.ok, (name, place)
            assert place in {found.path for found in report.findings}, (name, place)
            try:
                with Store(path) as store:
                    assert store.locations
            except ActstoreError:
                pass
            if place in records:
                blobs.replace(place, records[place])
            else:
                blobs.delete(place)
    assert verify_store(path).ok
