"""Publishing, parts, compaction and snapshots: every table against the values themselves."""

import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import zarr
from pyarrow import parquet
from store_builder import append_plan, build_store, commit_segments, stored_rows, to_stored

from actstore.store.blobs import LocalBlobs
from actstore.store.commits import CommitRecord, lock_segment, read_commits
from actstore.store.errors import ErrorKind, StoreDamaged, WriteFailed
from actstore.store.index_file import array_coverage, index_paths, newest_index_file
from actstore.store.layout import StoredDtype
from actstore.store.model.pieces import vocabulary_pieces
from actstore.store.model.readout import read_readout
from actstore.store.parts import encode_part, part_path
from actstore.store.publishing import publish_segment, token_id_path
from actstore.store.reader import StoreReader
from actstore.store.records import decode_record, encode_record
from actstore.store.sections import BLOCK, SectionFile
from actstore.store.shards import SegmentBuffer
from actstore.store.snapshot import SCHEMA, compact, newest_snapshot, open_snapshot
from actstore.store.tables import LISTED_ENTRIES
from actstore.store.verification import verify_store
from actstore.store.vocabulary import ActivationLocationType

LENGTHS = [100, 37, 5, 120, 90, 128, 61] * 4
TOKENS = sum(LENGTHS)
NEURONS = 9
TABLES = (
    "documents", "sequences", "tokens", "vocabulary", "layers", "neurons", "heads",
    "top_activations", "statistics", "segments",
)  # fmt: skip


def some_values() -> dict[str, npt.NDArray[np.float64]]:
    rng = np.random.default_rng(8)
    mlp = rng.normal(size=(2, TOKENS, NEURONS))
    mlp[:, :, 1] = -np.abs(mlp[:, :, 1])
    mlp[:, :, 2] = np.nan
    mlp[:, ::7, 3] = np.nan
    mlp[:, :, 4] = 0.25
    mlp[0, 17, 5] = np.inf
    return {
        "mlp_post_act": mlp,
        "resid_post_mlp": rng.normal(size=(2, TOKENS, 8)),
        "attn_value": rng.normal(size=(2, TOKENS, 2, 4)),
        "mlp_post_act/backward": rng.normal(size=(2, TOKENS, NEURONS)),
    }


COLUMNS = [{"label": "ab"[n % 2], "score": n / 4} for n in range(len(LENGTHS))]


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    """What is durable is tested elsewhere; waiting for the disk is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "store"
    build_store(path, some_values(), LENGTHS, special_token_ids=[1, 30], columns=COLUMNS)
    compact(StoreReader(path))
    return path


@pytest.fixture(scope="module")
def connection(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    snapshot = open_snapshot(StoreReader(root))
    assert snapshot.place == "store"
    yield snapshot.connection
    snapshot.connection.close()


def rows_of(connection: duckdb.DuckDBPyConnection, table: str) -> pa.Table:
    return connection.cursor().sql(f"SELECT * FROM {table}").to_arrow_table()


def contents(root: Path) -> dict[str, pa.Table]:
    """Every table of a store's snapshot."""
    connection = open_snapshot(StoreReader(root)).connection
    try:
        return {table: rows_of(connection, table) for table in TABLES}
    finally:
        connection.close()


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# The tables


def test_tokens_sequences_and_segments(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    reader = StoreReader(root)
    pieces = {piece.token_id: piece for piece in vocabulary_pieces(root)}
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    corpus_row = stored_rows(root)
    tokens = rows_of(connection, "tokens").to_pylist()
    assert [row["token"] for row in tokens] == sorted(corpus_row.tolist())
    by_token = {row["token"]: row for row in tokens}
    for number, length in enumerate(LENGTHS):
        first = int(corpus_row[starts[number]])
        segment = reader.segment(first // reader.segment_rows)
        for position in range(length):
            row = by_token[first + position]
            token_id = int(segment.token_ids[first + position - segment.first_row])
            assert row == {
                "token": first + position,
                "sequence": number,
                "position": position,
                "token_id": token_id,
                "text": pieces[token_id].text,
                "piece": pieces[token_id].piece,
                "special": position == 0 or token_id in (1, 30),
                "document": number,
            }
    sequences = rows_of(connection, "sequences").to_pylist()
    assert sequences == [
        {
            "sequence": number,
            "document": number,
            "first_token": int(corpus_row[starts[number]]),
            "length": length,
            "segment": int(corpus_row[starts[number]]) // 512,
        }
        for number, length in enumerate(LENGTHS)
    ]
    filled = {s: sum(row["length"] for row in sequences if row["segment"] == s) for s in range(99)}
    assert rows_of(connection, "segments").to_pylist() == [
        {"segment": s, "plan": 0, "first_token": 512 * s, "rows": filled[s], "committed": True}
        for s in reader.segments
    ]


def test_documents_and_vocabulary(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    assert rows_of(connection, "documents").to_pylist() == [
        {"document": n, "source": f"doc-{n}.txt", "n_tokens": length, **COLUMNS[n]}
        for n, length in enumerate(LENGTHS)
    ]
    assert rows_of(connection, "vocabulary").to_pylist() == [
        {"token_id": p.token_id, "piece": p.piece, "text": p.text, "special": p.special}
        for p in vocabulary_pieces(root)
    ]
    assert rows_of(connection, "layers").to_pylist() == [{"layer": 0}, {"layer": 1}]


def ordinary(root: Path, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Stored values ``(layer, token, unit)`` of the ordinary rows, and the rows."""
    reader = StoreReader(root)
    rows = stored_rows(root)
    special = np.concatenate([reader.segment(s).special for s in reader.segments])
    all_rows = np.concatenate(
        [512 * s + np.arange(reader.commits["base"][s].rows) for s in reader.segments]
    )
    order = np.argsort(rows)
    values = np.asarray(some_values()[name])
    stored = StoredDtype.FLOAT16.to_float32(to_stored(values, StoredDtype.FLOAT16))[:, order]
    assert all_rows.tolist() == rows[order].tolist()
    flat = stored.reshape(*stored.shape[:2], -1)
    return flat[:, ~special], all_rows[~special]


def moments(column: npt.NDArray[Any]) -> list[float | None]:
    """Mean, variance, skewness and kurtosis in float64, None where undefined."""
    values = column[~np.isnan(column)].astype(np.float64)
    if not len(values) or not np.isfinite(values).all():
        return [None] * 4
    centred = values - values.mean()
    spread = (centred**2).mean()
    if spread == 0:
        return [values.mean(), 0.0, None, None]
    return [
        values.mean(), spread, (centred**3).mean() / spread**1.5, (centred**4).mean() / spread**2
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mlp_post_act", "attn_value", "mlp_post_act/backward"])
def test_statistics(connection: duckdb.DuckDBPyConnection, root: Path, name: str) -> None:
    location, _, pass_type = name.partition("/")
    values, _ = ordinary(root, name)
    found = connection.cursor().execute(
        "SELECT layer, unit, count, positive, nan, max, min, mean, variance, skewness, kurtosis"
        " FROM statistics WHERE location = ? AND pass = ?",
        [location, pass_type or "forward"],
    )
    rows = found.fetchall()
    assert [row[:2] for row in rows] == [
        (layer, unit) for layer in range(2) for unit in range(values.shape[2])
    ]
    for layer, unit, count, positive, nan, most, least, *shape in rows:
        column = values[layer, :, unit]
        kept = column[~np.isnan(column)]
        assert (count, positive, nan) == (len(kept), (kept > 0).sum(), np.isnan(column).sum())
        ends = (float(kept.max()), float(kept.min())) if len(kept) else (None, None)
        assert (most, least) == ends
        for value, expected in zip(shape, moments(column), strict=True):
            if np.isinf(kept).any():
                continue
            assert (value is None) == (expected is None)
            assert value is None or value == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("tail", ["top", "low"])
@pytest.mark.parametrize("name", ["mlp_post_act", "attn_value", "mlp_post_act/backward"])
def test_top_activations(
    connection: duckdb.DuckDBPyConnection, root: Path, name: str, tail: str
) -> None:
    location, _, pass_type = name.partition("/")
    values, rows = ordinary(root, name)
    for layer in range(2):
        for unit in range(values.shape[2]):
            found = connection.cursor().execute(
                "SELECT rank, token, value FROM top_activations WHERE location = ? AND pass = ?"
                " AND layer = ? AND unit = ? AND tail = ?",
                [location, pass_type or "forward", layer, unit, tail],
            )
            column = values[layer, :, unit]
            kept = np.flatnonzero(~np.isnan(column))
            sign = -1 if tail == "top" else 1
            order = kept[np.lexsort((kept, sign * column[kept]))]
            listed = found.fetchall()
            assert min(8, len(order)) <= len(listed) <= LISTED_ENTRIES
            assert listed == [
                (n + 1, int(rows[place]), float(column[place]))
                for n, place in enumerate(order[: len(listed)])
            ]


def test_neurons_and_heads(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    readout = read_readout(root)
    texts = [piece.text for piece in vocabulary_pieces(root)]
    values, _ = ordinary(root, "mlp_post_act")
    neurons = rows_of(connection, "neurons").to_pylist()
    assert [(row["layer"], row["neuron"]) for row in neurons] == [
        (layer, neuron) for layer in range(2) for neuron in range(NEURONS)
    ]
    for row in neurons:
        at = row["layer"], row["neuron"]
        for name in ("write_norm", "read_norm", "bias"):
            assert row[name] == readout[name][at]
        for name in ("promoted", "suppressed"):
            assert row[name] == [texts[number] for number in readout[f"{name}_token"][at]]
        column = values[at[0], :, at[1]]
        kept = column[~np.isnan(column)]
        assert row["count"] == len(kept)
        assert row["firing_rate"] == ((kept > 0).sum() / len(kept) if len(kept) else None)
        assert row["dead"] == (not (kept > 0).any() if len(kept) else None)
        assert row["max"] == (float(kept.max()) if len(kept) else None)
    assert [row["dead"] for row in neurons[:3]] == [False, True, None]
    assert rows_of(connection, "heads").to_pylist() == [
        {
            "layer": layer,
            "head": head,
            "write_norm": readout["head_write_norm"][layer, head],
            "value_output_norm": readout["head_value_output_norm"][layer, head],
        }
        for layer in range(2)
        for head in range(2)
    ]


def test_context_stays_in_its_sequence(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    first = int(stored_rows(root)[LENGTHS[0]])
    found = connection.cursor().sql(f"SELECT token, focus FROM context({first + 2}, 5, 3)")
    assert found.fetchall() == [(first + n, n == 2) for n in range(6)]
    named = connection.cursor().sql(
        f"SELECT token FROM context(token := {first + 36}, before := 1, after := 9)"
    )
    assert named.fetchall() == [(first + 35,), (first + 36,)]


def test_plans_with_other_columns_share_one_documents_table(tmp_path: Path) -> None:
    more = {"mlp_post_act": np.random.default_rng(1).normal(size=(1, 240, 5))}
    path = build_store(
        tmp_path / "s",
        more,
        [100, 60],
        columns=[{"label": 1, "mixed": 2, "only": "x"}, {"label": 2, "mixed": 3, "only": None}],
    )
    append_plan(
        path,
        [50, 30],
        columns=[{"Label": 2.5, "mixed": "t", "new": True}, {"Label": 1.0, "mixed": "u"}],
    )
    assert len(contents(path)["documents"]) == 2
    commit_segments(path, more)
    documents = contents(path)["documents"].to_pylist()
    assert [row["document"] for row in documents] == [0, 1, 2, 3]
    assert [row["label"] for row in documents] == [1.0, 2.0, 2.5, 1.0]
    assert [row["mixed"] for row in documents] == ["2", "3", "t", "u"]
    assert [row["only"] for row in documents] == ["x", None, None, None]
    assert [row["new"] for row in documents] == [None, None, True, None]
    assert [row["plan"] for row in contents(path)["segments"].to_pylist()] == [0, 1]


# Which snapshot is opened


def test_partly_committed_store_shows_what_is_committed(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 2])
    tables = contents(path)
    assert set(tables["tokens"]["token"].to_numpy() // 512) == {0, 2}
    assert set(tables["sequences"]["segment"].to_pylist()) == {0, 2}
    segments = tables["segments"].to_pylist()
    assert [row["committed"] for row in segments[:4]] == [True, False, True, False]
    documents = tables["documents"]["document"].to_pylist()
    assert documents == tables["sequences"]["document"].to_pylist()


def test_compaction_is_idempotent_and_covers_everything(root: Path) -> None:
    before = files_of(root)
    result = compact(StoreReader(root))
    assert result.removed == ()
    assert result.snapshot == f"catalog/{result.coverage}.duckdb"
    assert len(result.indexes) == 3
    assert files_of(root) == before
    report = verify_store(root)
    assert report.ok, report.findings
    assert report.temporary == []


def test_two_builds_of_a_coverage_are_equal_row_by_row(root: Path, tmp_path: Path) -> None:
    other = build_store(
        tmp_path / "s",
        some_values(),
        LENGTHS,
        special_token_ids=[1, 30],
        columns=COLUMNS,
        commit=[3, 0],
    )
    compact(StoreReader(other))
    commit_segments(other, some_values(), [1, 4])
    compact(StoreReader(other))
    commit_segments(other, some_values())
    in_memory = contents(other)
    compact(StoreReader(other))
    compacted = contents(other)
    assert sorted(files_of(other)) == sorted(files_of(root))
    for table, rows in contents(root).items():
        assert rows.equals(in_memory[table]), table
        assert rows.equals(compacted[table]), table


def test_superseded_files_go_and_open_ones_stay_readable(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    first = compact(StoreReader(path))
    early = StoreReader(path)
    held = open_snapshot(early)
    commit_segments(path, some_values())
    second = compact(StoreReader(path))
    assert set(second.removed) == {
        *first.indexes,
        f"catalog/{first.coverage}.duckdb",
        f"catalog/{first.coverage}.json",
    }
    count = held.connection.cursor().sql("SELECT count(*) FROM tokens").fetchall()[0][0]
    assert count == sum(record.rows for record in early.commits["base"].values())
    # What the early reader opens now covers what it saw, and no more.
    again = open_snapshot(early)
    assert again.place == "memory"
    assert again.connection.sql("SELECT count(*) FROM tokens").fetchall() == [(count,)]
    held.connection.close()
    again.connection.close()


def test_a_compaction_killed_while_it_removes_leaves_a_sound_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    compact(StoreReader(path))
    commit_segments(path, some_values())
    delete = LocalBlobs.delete

    def delete_and_die(blobs: LocalBlobs, key: str) -> None:
        delete(blobs, key)
        if key.startswith("catalog/"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "delete", delete_and_die)
        with pytest.raises(KeyboardInterrupt):
            compact(StoreReader(path))
    report = verify_store(path)
    assert report.ok, report.findings
    compact(StoreReader(path))
    assert verify_store(path).temporary == []


def test_older_snapshot_is_found_but_not_used_alone(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    assert newest_snapshot(StoreReader(path)) is None
    compact(StoreReader(path))
    commit_segments(path, some_values(), [2])
    found = newest_snapshot(StoreReader(path))
    assert found is not None
    assert found[0].segments("base") == [0, 1]
    opened = open_snapshot(StoreReader(path))
    assert opened.place == "memory"
    assert opened.coverage.segments("base") == [0, 1, 2]
    opened.connection.close()


def test_empty_store_compacts_to_nothing_and_answers(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[])
    result = compact(StoreReader(path))
    assert (result.snapshot, result.indexes) == (None, ())
    tables = contents(path)
    assert tables["tokens"].num_rows == tables["documents"].num_rows == 0
    assert tables["vocabulary"].num_rows == 48
    assert tables["neurons"]["count"].to_pylist() == [0] * (2 * NEURONS)


def test_missing_snapshot_is_made_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("actstore.store.snapshot.MEMORY_ROWS", 0)
    before = files_of(path)
    reader = StoreReader(path)
    opened = open_snapshot(reader)
    assert opened.place == "cache"
    folder = cache / "actstore" / f"{reader.manifest.id}-{reader.plans[0].hash[:12]}"
    assert opened.path == folder / f"{opened.coverage.hash}-{SCHEMA}.duckdb"
    tables = {table: rows_of(opened.connection, table) for table in TABLES}
    opened.connection.close()
    made = opened.path.stat().st_mtime_ns
    again = open_snapshot(StoreReader(path))
    assert again.path == opened.path
    assert opened.path.stat().st_mtime_ns == made
    again.connection.close()
    # A damaged copy in the cache is made again, and not trusted.
    data = bytearray(opened.path.read_bytes())
    data[20_000] ^= 1
    opened.path.write_bytes(data)
    healed = open_snapshot(StoreReader(path))
    assert {t: rows_of(healed.connection, t) for t in TABLES} == tables
    healed.connection.close()
    assert files_of(path) == before
    # A wider one replaces it there.
    commit_segments(path, some_values(), [2])
    wider = open_snapshot(StoreReader(path))
    assert wider.place == "cache"
    assert {f.suffix for f in opened.path.parent.iterdir()} == {".duckdb", ".json"}
    assert not opened.path.exists()
    wider.connection.close()


def test_stores_of_one_model_do_not_evict_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("actstore.store.snapshot.MEMORY_ROWS", 0)
    one = build_store(tmp_path / "one", some_values(), LENGTHS, commit=[0])
    other = build_store(tmp_path / "other", some_values(), LENGTHS[::-1], commit=[1])
    # A copy of a store goes its own way.
    copied = Path(shutil.copytree(one, tmp_path / "copied"))
    commit_segments(one, some_values(), [1])
    commit_segments(copied, some_values(), [2])
    readers = [StoreReader(path) for path in (one, other, copied)]
    assert readers[0].manifest.id == readers[1].manifest.id
    assert readers[0].plans[0].hash != readers[1].plans[0].hash
    paths = []
    for reader in readers:
        opened = open_snapshot(reader)
        opened.connection.close()
        paths.append(opened.path)
    assert all(path is not None and path.exists() for path in paths)
    assert len({path.parent for path in paths if path is not None}) == 2


def vanishing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make :meth:`LocalBlobs.exists` see ``path`` once more than it is there."""
    exists = LocalBlobs.exists

    def see(blobs: LocalBlobs, key: str) -> bool:
        found = exists(blobs, key)
        if blobs.path(key) == path:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(LocalBlobs, "exists", see)


@pytest.mark.parametrize("suffix", [".duckdb", ".json"])
def test_reader_that_loses_to_compaction_makes_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    (file,) = (path / "catalog").glob(f"*{suffix}")
    reader = StoreReader(path)
    read = LocalBlobs.read

    def remove_and_read(blobs: LocalBlobs, key: str) -> bytes:
        if suffix == ".json" and blobs.path(key) == file:
            file.unlink()
        return read(blobs, key)

    monkeypatch.setattr(LocalBlobs, "read", remove_and_read)
    if suffix == ".duckdb":
        vanishing(file, monkeypatch)
    opened = open_snapshot(reader)
    assert opened.place == "memory"
    assert opened.connection.sql("SELECT count(*) FROM tokens").fetchall() == [(TOKENS,)]
    opened.connection.close()
    assert not file.exists()


def test_reader_that_loses_just_before_connecting_makes_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    reader = StoreReader(path)
    connect = duckdb.connect

    def remove_and_connect(name: str, **choices: Any) -> duckdb.DuckDBPyConnection:
        if name != ":memory:":
            Path(name).unlink()
        return connect(name, **choices)

    monkeypatch.setattr(duckdb, "connect", remove_and_connect)
    opened = open_snapshot(reader)
    assert opened.place == "memory"
    opened.connection.close()


def test_index_that_compaction_removes_meanwhile_is_passed_over(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    spec = StoreReader(path).array(ActivationLocationType.MLP_POST_ACT).spec
    (name,) = index_paths(path, spec)
    (path / name).write_bytes(b"half of a file that is being removed")
    opened = SectionFile.__init__

    def open_and_remove(file: SectionFile, where: Path, key: str) -> None:
        try:
            opened(file, where, key)
        finally:
            where.unlink()

    committed = array_coverage(
        StoreReader(path), StoreReader(path).array(ActivationLocationType.MLP_POST_ACT)
    )
    with pytest.raises(StoreDamaged):
        newest_index_file(path, spec, committed)
    monkeypatch.setattr(SectionFile, "__init__", open_and_remove)
    assert newest_index_file(path, spec, committed) is None


def test_snapshot_of_another_schema_is_passed_over_and_made_anew(
    root: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    (file,) = (path / "catalog").glob("*.json")
    fields = decode_record(file.read_bytes(), file.name)
    assert fields.pop("schema") == SCHEMA
    for others in ({}, {"schema": SCHEMA + 1}):
        file.write_bytes(encode_record({**fields, **others}))
        assert newest_snapshot(StoreReader(path)) is None
        opened = open_snapshot(StoreReader(path))
        assert opened.place == "memory"
        opened.connection.close()
        compact(StoreReader(path))
        assert decode_record(file.read_bytes(), file.name)["schema"] == SCHEMA
        assert newest_snapshot(StoreReader(path)) is not None
    assert verify_store(path).ok


def test_verify_finds_two_plans_of_one_number(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0])
    other = Path(shutil.copytree(path, tmp_path / "other"))
    append_plan(path, [50, 60])
    append_plan(other, [50, 60], seed=2)
    assert verify_store(path).ok
    (appended,) = (other / "plan").glob("0001-*")
    shutil.copytree(appended, path / "plan" / appended.name)
    (finding,) = verify_store(path).findings
    assert (finding.path, finding.problem) == ("plan", "damaged")
    assert "does not follow" in finding.detail


def test_opening_writes_nothing_to_the_store(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = build_store(tmp_path / "s", some_values(), LENGTHS)
    before = {path: path.stat().st_mtime_ns for path in [*bare.rglob("*"), *root.rglob("*")]}
    # A cache that cannot be written: a file stands where its folder would be.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("actstore.store.snapshot.MEMORY_ROWS", 0)
    for path, place in ((bare, "memory"), (root, "store")):
        opened = open_snapshot(StoreReader(path))
        assert opened.place == place
        query = "SELECT text, count(*) FROM tokens GROUP BY 1 ORDER BY 2 DESC, 1"
        assert opened.connection.sql(query).fetchall()
        opened.connection.close()
    after = {path: path.stat().st_mtime_ns for path in [*bare.rglob("*"), *root.rglob("*")]}
    assert after == before


def test_unwritable_store_is_said_to_be_so(root: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    (path / "locks").rmdir()
    (path / "locks").write_text("a file where a folder should be")
    with pytest.raises(WriteFailed, match="Cannot write"):
        compact(StoreReader(path))


def test_compaction_waits_for_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.store.snapshot._LOCK_SECONDS", 0.3)
    before = files_of(root)
    started = time.monotonic()
    with lock_segment(root, "compaction", 0):
        assert compact(StoreReader(root)).removed == ()
    assert time.monotonic() - started >= 0.3
    assert files_of(root) == before


# Damage


@pytest.mark.parametrize("suffix", [".duckdb", ".json"])
def test_flipped_byte_of_the_snapshot_is_found_and_compaction_heals_it(
    root: Path, tmp_path: Path, suffix: str
) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    (file,) = (path / "catalog").glob(f"*{suffix}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
    with pytest.raises(StoreDamaged, match=file.name):
        open_snapshot(StoreReader(path))
    assert [finding.path for finding in verify_store(path).findings] == [f"catalog/{file.name}"]
    compact(StoreReader(path))
    assert contents(path)["tokens"].num_rows == TOKENS
    assert verify_store(path).ok


def test_flipped_byte_of_an_index_is_healed_by_compaction(root: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    good = files_of(path)
    file = next((path / "zones").rglob("index-*.sections"))
    data = bytearray(file.read_bytes())
    data[4097] ^= 8
    file.write_bytes(data)
    compact(StoreReader(path))
    assert files_of(path) == good


def test_flipped_byte_of_a_part_or_zone_file_stops_the_snapshot(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", {"mlp_post_act": some_values()["mlp_post_act"]}, LENGTHS)
    zones = "zones/mlp_post_act/forward/000002.sections"
    # The index is published before the parts are read, so the zone file comes first.
    for name in (zones, part_path(1)):
        good = (path / name).read_bytes()
        data = bytearray(good)
        # In every block but the footer's: lists and statistics are read, page maxima are not.
        for place in range(5, len(data) - BLOCK, BLOCK) or [1000]:
            data[place] ^= 2
        (path / name).write_bytes(data)
        with pytest.raises(StoreDamaged, match=name):
            open_snapshot(StoreReader(path))
        with pytest.raises(StoreDamaged, match=name):
            compact(StoreReader(path))
        (path / name).write_bytes(good)
        assert not list((path / "catalog").glob("*.partial-*"))


def test_database_without_its_record_is_adopted(root: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    (record,) = (path / "catalog").glob("*.json")
    kept = record.read_bytes()
    record.unlink()
    compact(StoreReader(path))
    assert record.read_bytes() == kept


def test_left_over_database_of_another_coverage_is_removed(root: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(root, tmp_path / "s"))
    (path / "catalog" / "0123456789abcdef.duckdb").write_bytes(b"left over")
    result = compact(StoreReader(path))
    assert result.removed == ("catalog/0123456789abcdef.duckdb",)
    assert verify_store(path).ok


# Publishing


def test_parts_are_plain_parquet_with_the_same_bytes_every_time(root: Path, tmp_path: Path) -> None:
    reader = StoreReader(root)
    segment = reader.segment(1)
    data = (root / part_path(1)).read_bytes()
    assert data == encode_part(segment) == encode_part(segment)
    table = parquet.read_table(pa.BufferReader(data))
    assert table.column_names == [
        "token", "sequence", "position", "token_id", "special", "document"
    ]  # fmt: skip
    assert table.schema.metadata is None
    assert table["token_id"].to_pylist() == segment.token_ids.tolist()
    assert table["position"].to_pylist() == segment.positions.tolist()
    again = build_store(
        tmp_path / "s", some_values(), LENGTHS, special_token_ids=[1, 30], columns=COLUMNS
    )
    mine, theirs = files_of(root), files_of(again)
    assert {name: mine[name] for name in theirs} == theirs


def test_token_ids_are_an_ordinary_zarr_array(root: Path) -> None:
    reader = StoreReader(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(root / "arrays", mode="r")
        token_ids = np.asarray(group["token_id"])
        assert {name for name, _ in group.members()} == {
            "token_id", "mlp_post_act", "resid_post_mlp", "attn_value"
        }  # fmt: skip
    assert token_ids.dtype == np.int32
    for number in reader.segments:
        segment = reader.segment(number)
        window = token_ids[segment.first_row : segment.first_row + 512]
        assert window[: segment.n_rows].tolist() == segment.token_ids.tolist()
        assert set(window[segment.n_rows :].tolist()) <= {-1}


def buffers_of(reader: StoreReader, number: int, seed: int) -> dict[str, SegmentBuffer]:
    """Buffers with values of another run."""
    rng = np.random.default_rng(seed)
    segment = reader.segment(number)
    buffers = {}
    for spec in reader.sets["base"].arrays:
        buffer = SegmentBuffer(spec, segment.n_rows)
        for layer in range(spec.layer_count):
            values = rng.normal(size=(segment.n_rows, *spec.unit_shape))
            buffer.put(layer, 0, values.astype(np.float16))
        buffers[spec.key] = buffer
    return buffers


def publish_again(path: Path, number: int, seed: int) -> CommitRecord:
    reader = StoreReader(path)
    return publish_segment(
        LocalBlobs(path),
        reader.sets["base"],
        reader.plans[0].hash,
        reader.segment(number),
        buffers_of(reader, number, seed),
    )


def test_zombie_writer_changes_nothing(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    before = files_of(path)
    record = publish_again(path, 1, seed=77)
    assert record == read_commits(LocalBlobs(path), "base")[1]
    assert files_of(path) == before


@pytest.mark.parametrize("kept", ["arrays", "zones", "catalog"])
def test_resumed_segment_describes_the_bytes_that_were_there(tmp_path: Path, kept: str) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    whole = files_of(path)
    mlp = StoreReader(path).array(ActivationLocationType.MLP_POST_ACT).spec
    # What a killed writer leaves: files of one kind, without a record.
    (path / "commits/base/000001.json").unlink()
    for name in whole:
        of_segment = name in (part_path(1), token_id_path(1)) or "000001" in name
        of_segment |= any(name.endswith(end) for end in ("c.0.1.0", "c.0.1.0.0"))
        keeps_shards = kept == "zones" and name.startswith("arrays")
        if of_segment and not name.startswith(kept) and not keeps_shards:
            (path / name).unlink(missing_ok=True)
    publish_again(path, 1, seed=77)
    report = verify_store(path)
    assert report.ok, report.findings
    reader = StoreReader(path)
    found = reader.array(ActivationLocationType.MLP_POST_ACT).reader.window(1, 0, 0, 512)
    if kept == "catalog":
        assert files_of(path)[mlp.shard_path(0, 1)] != whole[mlp.shard_path(0, 1)]
    else:
        assert files_of(path) == whole
    assert len(found) == reader.segment(1).n_rows


def test_zone_file_of_other_shards_is_refused(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    (path / "commits/base/000001.json").unlink()
    spec = StoreReader(path).array(ActivationLocationType.MLP_POST_ACT).spec
    (path / spec.shard_path(0, 1)).unlink()
    with pytest.raises(StoreDamaged, match="does not describe its shards") as caught:
        publish_again(path, 1, seed=77)
    assert caught.value.kind is ErrorKind.CHECKSUM_MISMATCH


def test_shard_of_another_length_is_refused(tmp_path: Path) -> None:
    path = build_store(tmp_path / "s", some_values(), LENGTHS, commit=[0, 1])
    (path / "commits/base/000001.json").unlink()
    spec = StoreReader(path).array(ActivationLocationType.MLP_POST_ACT).spec
    file = path / spec.shard_path(0, 1)
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(StoreDamaged, match="not a shard of"):
        publish_again(path, 1, seed=77)
    assert 1 not in read_commits(LocalBlobs(path), "base")
