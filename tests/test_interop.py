"""A store is ordinary Zarr, Parquet and DuckDB, and a folder that can be moved.

Nothing here reads an array through actstore but to compare with it.
"""

import builtins
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
import zarr
from pyarrow import parquet
from tiny_ingest import file_bytes, fresh_copy, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.query.session import Store
from actstore.store.layout import StoredDtype
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.verification import verify_store

LOCATIONS = ("full", "attn_qk_probs")
DTYPE = "float16,mlp_post_act=float32,resid_post_attn=bfloat16"


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    """What is durable is tested elsewhere; waiting for the disk is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All locations in all three dtypes; the last segment is not full."""
    path = tmp_path_factory.mktemp("interop") / "store"
    return fresh_copy(path, locations=LOCATIONS, dtype=DTYPE, limit_tokens=1300)


@pytest.fixture(scope="module")
def reader(root: Path) -> Iterator[StoreReader]:
    opened = StoreReader(root)
    yield opened
    opened.close()


def whole(array: StoredArray) -> npt.NDArray[Any]:
    """An array as its metadata describes it, fill values where no row is filled."""
    spec = array.spec
    rows = spec.segment_rows
    shape = (spec.layer_count, len(array.segments) * rows, spec.columns)
    values = np.full(shape, spec.dtype.fill, spec.dtype.storage)
    for segment in array.segments:
        for layer in range(spec.layer_count):
            window = array.reader.window(segment, layer, 0, rows)
            values[layer, segment * rows : segment * rows + len(window)] = window
    values = values.reshape(*shape[:2], *spec.unit_shape)
    return values if spec.layers is not None else values[0]


def require_bits(found: npt.NDArray[Any], expected: npt.NDArray[Any], what: str) -> None:
    """Equal to the last bit, NaN like any other value."""
    assert found.dtype == expected.dtype, what
    bits = f"<u{expected.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(found).view(bits), expected.view(bits), err_msg=what
    )


def test_store_has_what_the_tests_mean_to_open(reader: StoreReader) -> None:
    assert {array.spec.dtype for array in reader.arrays.values()} == set(StoredDtype)
    assert len(reader.arrays) == 15
    filled = [reader.commits["base"][segment].rows for segment in reader.segments]
    assert min(filled) < reader.segment_rows, "Some rows are filled by no sequence."


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_zarr_python_reads_the_same_values(root: Path, reader: StoreReader, mode: str) -> None:
    group = zarr.open_group(root / "arrays", mode=mode)  # type: ignore[arg-type]
    names = {
        name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)
    }
    assert names == {array.spec.key for array in reader.arrays.values()} | {"token_id"}
    for array in reader.arrays.values():
        opened = group[array.spec.key]
        assert isinstance(opened, zarr.Array)
        require_bits(np.asarray(opened[:]), whole(array), array.spec.key)
        assert opened.attrs["logical_dtype"] == array.spec.dtype
        assert opened.metadata.dimension_names == dimension_names(array)  # type: ignore[union-attr]


def dimension_names(array: StoredArray) -> tuple[str, ...]:
    layer = ("layer",) if array.spec.layers is not None else ()
    # The heads of keys and values are called heads on disk.
    axes = (str(axis).removeprefix("kv_") for axis in array.spec.location.axes)
    return (*layer, "token", *axes)


def test_zarr_python_reads_slices_across_shards_chunks_and_edges(
    root: Path, reader: StoreReader
) -> None:
    rng = np.random.default_rng(0)
    for array in reader.arrays.values():
        expected = whole(array)
        opened = zarr.open_array(root / "arrays" / array.spec.key, mode="r")
        for _ in range(5):
            bounds = [np.sort(rng.integers(0, size + 1, 2)).tolist() for size in expected.shape]
            place = tuple(slice(low, high) for low, high in bounds)
            require_bits(np.asarray(opened[place]), expected[place].copy(), f"{place}")


def test_zarr_consolidates_and_reads_through_that(
    root: Path, reader: StoreReader, tmp_path: Path
) -> None:
    copied = shutil.copytree(root / "arrays", tmp_path / "arrays")
    with pytest.warns(UserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(copied)
    group = zarr.open_consolidated(copied)
    for array in reader.arrays.values():
        opened = group[array.spec.key]
        assert isinstance(opened, zarr.Array)
        require_bits(np.asarray(opened[:]), whole(array), array.spec.key)


def test_rows_that_no_sequence_fills_are_nan(root: Path, reader: StoreReader) -> None:
    token_ids = np.asarray(zarr.open_array(root / "arrays" / "token_id", mode="r")[:])
    filled = np.zeros(len(token_ids), bool)
    for number in reader.segments:
        segment = reader.segment(number)
        rows = slice(segment.first_row, segment.first_row + segment.n_rows)
        np.testing.assert_array_equal(token_ids[rows], segment.token_ids)
        filled[rows] = True
    assert not filled.all()
    assert (token_ids[~filled] == -1).all()
    for array in reader.arrays.values():
        stored = np.asarray(zarr.open_array(root / "arrays" / array.spec.key, mode="r")[:])
        values = array.spec.dtype.to_float32(stored)
        by_row = np.moveaxis(values, 0 if array.spec.layers is None else 1, 0)
        assert np.isnan(by_row[~filled]).all(), f"{array.spec.key} has numbers where nothing is."
        assert not np.isnan(by_row[filled].reshape(filled.sum(), -1)[:, 0]).any()


def test_xarray_opens_every_array_with_its_dimensions(root: Path, reader: StoreReader) -> None:
    for array in reader.arrays.values():
        location = array.spec.location.label
        for dataset in (
            xr.open_zarr(root / "arrays", group=location, consolidated=False, chunks=None),
            xr.open_dataset(
                root / "arrays", engine="zarr", group=location, consolidated=False, chunks=None
            ),
        ):
            with dataset:
                variable = dataset["forward"]
                assert variable.dims == dimension_names(array)
                require_bits(variable.to_numpy(), whole(array), array.spec.key)
                if array.spec.dtype is not StoredDtype.BFLOAT16:
                    filled = reader.commits["base"][0].rows
                    assert np.isnan(variable.isel(token=filled).to_numpy()).all()


def test_xarray_opens_all_of_it_as_a_tree(root: Path, reader: StoreReader) -> None:
    with xr.open_datatree(root / "arrays", engine="zarr", consolidated=False, chunks=None) as tree:
        found = {
            f"{node.name}/{name}" for node in tree.children.values() for name in node.data_vars
        }
        assert found == {array.spec.key for array in reader.arrays.values()}
        assert tree["token_id"].dims == ("token",)
        # One dimension, one length: what stands beside each other belongs together.
        assert tree["mlp_post_act/forward"].sizes["token"] == tree["token_id"].sizes["token"]


def test_parquet_parts_and_documents_open_alone(root: Path, reader: StoreReader) -> None:
    for number in reader.segments:
        part = parquet.read_table(root / f"catalog/parts/{number:06d}.parquet")
        segment = reader.segment(number)
        assert part.column("token_id").to_pylist() == segment.token_ids.tolist()
        assert part.column("position").to_pylist() == segment.positions.tolist()
    (documents,) = root.glob("plan/*/documents.parquet")
    assert "source" in parquet.read_table(documents).column_names


def test_transformers_opens_the_stored_model(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    assert model.config.n_layer == 2
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    text = "The pilot read them twice"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


# A store elsewhere


QUESTIONS: dict[str, Callable[[Store], Any]] = {
    "top": lambda store: store.topk("mlp_write_norm", k=30).rows(),
    "scan": lambda store: store.topk("resid_post_mlp", k=5).rows(),
    "raw": lambda store: store.raw("attn_qk_probs", sequences=[2]).numpy().tobytes(),
    "derived": lambda store: store.derive("mlp_write_norm", sequences=[5]).numpy().tobytes(),
    "sql": lambda store: store.sql("FROM tokens ORDER BY ALL").fetchall(),
    "units": lambda store: store.sql("FROM neurons ORDER BY ALL").fetchall(),
    "examples": lambda store: store.examples("mlp_post_act", (1, 2), k=3).to_json(),
}


def answers(path: Path) -> dict[str, str]:
    with actstore.open(path) as store:
        return {name: repr(question(store)) for name, question in QUESTIONS.items()}


def test_copied_and_moved_stores_verify_and_answer_the_same(root: Path, tmp_path: Path) -> None:
    expected = answers(root)
    copied = shutil.copytree(root, tmp_path / "a copy" / "Kopie-ü")
    assert verify_store(copied).ok
    assert answers(copied) == expected
    moved = copied.rename(tmp_path / "moved")
    assert verify_store(moved).ok
    assert answers(moved) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert answers(Path("moved")) == expected
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert answers(link) == expected


def test_store_holds_no_absolute_path(root: Path) -> None:
    needles = [str(root).encode(), str(Path.home()).encode() + b"/", str(Path.cwd()).encode()]
    leaks = [key for key, data in file_bytes(root).items() for n in needles if n in data]
    leaks += [
        path.name
        for path in root.glob("catalog/*")
        if path.is_file()
        for n in needles
        if n in path.read_bytes()
    ]
    assert not leaks


def test_reading_writes_nothing_to_the_store(root: Path, tmp_path: Path) -> None:
    """No open for writing, no new name, no change of a file: every call is watched."""
    store = shutil.copytree(root, tmp_path / "store")
    attempts: list[str] = []
    real_open, real_os_open = builtins.open, os.open

    def note(path: object, how: str) -> None:
        if isinstance(path, str | bytes | os.PathLike) and str(store) in os.fsdecode(path):
            attempts.append(f"{how} {os.fsdecode(path)}")

    def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            note(file, mode)
        return real_open(file, mode, *args, **options)

    def watched_os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            note(path, "os.open")
        return real_os_open(path, flags, *args, **options)

    before = states(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", watched_open)
        patch.setattr(os, "open", watched_os_open)
        for name in ("mkdir", "link", "rename", "replace", "unlink", "rmdir", "utime", "truncate"):
            real = getattr(os, name)

            def watched(path: Any, *args: Any, real: Any = real, name: str = name, **o: Any) -> Any:
                note(path, name)
                return real(path, *args, **o)

            patch.setattr(os, name, watched)
        assert answers(store) == answers(root)
        assert verify_store(store).ok
        with actstore.open(store) as opened:
            opened.info()
            assert opened.locations
    assert not attempts, f"Reading tried to write: {attempts}"
    assert states(store) == before


def states(store: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of every file and folder."""
    return {
        str(path): (status.st_ino, status.st_size, status.st_mtime_ns)
        for path in [store, *sorted(store.rglob("*"))]
        for status in [path.stat()]
    }


READ_ONLY_SCRIPT = """
import pathlib, sys
import actstore
store = pathlib.Path(sys.argv[1])
try:
    (store / "probe").touch()
except OSError:
    pass
else:
    sys.exit("The store is writable here, so this proves nothing.")
with actstore.open(store) as opened:
    print(opened.topk("mlp_post_act", k=30).rows())
    print(opened.sql("FROM tokens ORDER BY ALL").fetchall())
    assert opened.verify().ok
"""


def test_store_on_a_read_only_file_system_is_read(root: Path, tmp_path: Path) -> None:
    """Bound read-only where root or a user namespace may; else its folders lose their bits."""
    place = tmp_path / "read-only"
    place.mkdir()
    program = [sys.executable, "-W", "error", "-c", READ_ONLY_SCRIPT]
    bind = 'mount --bind -o ro "$1" "$2" && shift && exec "${@:2}" "$1"'
    refusals = []
    for prefix in (("unshare", "-m"), ("unshare", "-r", "-m")):
        allowed = (
            shutil.which("unshare")
            and not subprocess.run(
                [*prefix, "sh", "-c", 'mount --bind -o ro "$1" "$2"', "sh", str(root), str(place)],
                check=False,
                capture_output=True,
            ).returncode
        )
        if allowed:
            command = [*prefix, "bash", "-c", bind, "bash", str(root), str(place), *program]
            break
        refusals.append(" ".join(prefix))
    else:
        shutil.copytree(root, place, dirs_exist_ok=True)
        for folder in [place, *place.rglob("*")]:
            folder.chmod(folder.stat().st_mode & ~0o222)
        command = [*program, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for folder in [place, *place.rglob("*")]:
        folder.chmod(0o755)
    assert done.returncode == 0, f"{done.stderr} (not allowed: {refusals})"
    with actstore.open(root) as store:
        expected = [
            repr(store.topk("mlp_post_act", k=30).rows()),
            repr(store.sql("FROM tokens ORDER BY ALL").fetchall()),
        ]
    assert done.stdout.splitlines() == expected
