"""Nothing is silently wrong: damage is found and named, and a query that meets it raises.

Every file of a small store is flipped, cut, removed and swapped in turn. Two things must
hold each time: ``verify`` names the file, and every question is answered exactly as before
or raises ``StoreDamaged``. A wrong number is the one thing that may not happen.
"""

import fnmatch
import hashlib
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_ingest import fresh_copy, ingest_corpus

import actstore
from actstore.query.session import Store
from actstore.store.errors import ErrorKind, NotAStore, StoreDamaged, Unavailable
from actstore.store.model.pieces import vocabulary_pieces
from actstore.store.model.readout import read_readout
from actstore.store.model.weights import open_model
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.sections import BLOCK, SectionFile
from actstore.store.snapshot import compact
from actstore.store.verification import VerifyReport, verify_store
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

SEED = 5
LOCATIONS = ("neurons", "resid_post_attn", "attn_query", "attn_qk_probs")
DERIVED_FILES = ("catalog/*.json", "catalog/*.duckdb", "zones/*/*/index-*")
COMMITS = ("commits/base/000000.json", "commits/base/000001.json")

Question = Callable[[Store], Any]


def _raw(name: str) -> Question:
    return lambda store: store.raw(name).values


def _table(name: str) -> Question:
    return lambda store: store.sql(f"FROM {name} ORDER BY ALL").fetchall()


QUESTIONS: dict[str, Question] = {
    **{
        f"raw {name}": _raw(name)
        for name in (
            "resid_post_embedding",
            "resid_post_attn",
            "resid_post_mlp",
            "mlp_post_act",
            "attn_query",
        )
    },
    "raw attn_qk_probs": lambda store: store.raw("attn_qk_probs").values,
    "rows": lambda store: store.gather("mlp_post_act", tokens=[700, 3, 515], columns=["source"]),
    "batches": lambda store: [
        values for values, _ in store.batches("resid_post_mlp", layer=1, size=400, shuffle=1)
    ],
    "derived": lambda store: store.derive("mlp_write_norm", sequences=[1, 25]).values,
    "top of all": lambda store: store.topk("mlp_post_act", k=20).rows(),
    "top of one": lambda store: store.topk("mlp_write_norm", k=5, layers=1, neurons=3).rows(),
    "deep top": lambda store: store.topk("mlp_post_act", k=400, neurons=5).rows(),
    "least": lambda store: store.topk("attn_query", k=4, largest=False, special=True).rows(),
    "deep top of heads": lambda store: store.topk("attn_query", k=300, heads=1, channels=2).rows(),
    "deep least": lambda store: store.topk("attn_query", k=300, heads=0, largest=False).rows(),
    "top where": lambda store: store.topk("mlp_post_act", k=9, where="position = 4").rows(),
    "top of a scan": lambda store: store.topk("resid_post_mlp", k=6).rows(),
    "examples": lambda store: store.examples("mlp_post_act", (1, 7), k=3).to_json(),
    "quantiles": lambda store: store.examples("mlp_post_act", (0, 2), kind="quantile").to_json(),
    "info": lambda store: store.info().to_json() | {"path": ""},
    "locations": lambda store: {name: repr(info) for name, info in store.locations.items()},
    **{
        f"sql {table}": _table(table)
        for table in ("documents", "sequences", "tokens", "vocabulary", "neurons", "statistics")
    },
    "vocabulary": lambda store: vocabulary_pieces(store.path),
    "weights": lambda store: all_weights(store.path),
    "readout": lambda store: read_readout(store.path),
}

SQL = [name for name in QUESTIONS if name.startswith("sql") or name == "top where"]
"""Answered from the snapshot alone."""

DAMAGED = "StoreDamaged"
DAMAGE_KINDS = (ErrorKind.CHECKSUM_MISMATCH, ErrorKind.MALFORMED_FILE, ErrorKind.MISSING_FILE)


def all_weights(path: Path) -> list[Any]:
    """Every weight that the model has."""
    model = open_model(path)
    found = []
    for weight in WeightLocationType:
        layers = range(model.dimensions.n_layers) if weight.has_layers else (None,)
        with suppress(Unavailable):
            found += [model.weight(weight, layer) for layer in layers]
    return found


def digest(value: Any) -> str:
    """What an answer is, to the last bit."""
    hasher = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            add(part.numpy())
        elif isinstance(part, np.ndarray):
            hasher.update(repr((part.dtype.str, part.shape)).encode())
            hasher.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, tuple | list):
            hasher.update(b"[")
            for member in part:
                add(member)
        elif hasattr(part, "to_pylist"):
            add(part.to_pylist())
        else:
            hasher.update(repr(part).encode())

    add(value)
    return hasher.hexdigest()


def answers(path: Path, names: Iterable[str] = QUESTIONS) -> dict[str, str]:
    """Some questions' answers, or ``DAMAGED`` where one raised that; other errors pass."""
    try:
        store = actstore.open(path)
    except StoreDamaged as error:
        _require_kind(error)
        return dict.fromkeys(names, DAMAGED)
    found: dict[str, str] = {}
    with store:
        for name in names:
            try:
                found[name] = digest(QUESTIONS[name](store))
            except StoreDamaged as error:
                _require_kind(error)
                found[name] = DAMAGED
    return found


def _require_kind(error: StoreDamaged) -> None:
    assert error.kind in DAMAGE_KINDS, f"{error} is of kind {error.kind}"


@dataclass(frozen=True)
class Sound:
    """A sound store, and what it answers.

    Attributes:
        path: the store; whoever changes it puts it back.
        answers: by question.
    """

    path: Path
    answers: dict[str, str]

    def files(self, pattern: str = "**/*") -> list[str]:
        """Every file below the store, by its path inside."""
        return sorted(
            path.relative_to(self.path).as_posix()
            for path in self.path.glob(pattern)
            if path.is_file() and "locks" not in path.parts
        )


@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("compacted")
    path = fresh_copy(folder / "store", locations=LOCATIONS, limit_tokens=900)
    return Sound(path, answers(path))


@pytest.fixture(scope="module")
def folded(compacted: Sound, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """The same store before compaction: readers fold zone maps and parts themselves."""
    path = shutil.copytree(compacted.path, tmp_path_factory.mktemp("folded") / "store")
    for pattern in DERIVED_FILES:
        for file in path.glob(pattern):
            file.unlink()
    return Sound(path, answers(path))


def asked_of(key: str) -> list[str]:
    """The questions that a file might have to do with."""
    away = SQL if key.startswith(("arrays/", "zones/")) else []
    return [name for name in QUESTIONS if name not in away]


@contextmanager
def flipped_everywhere(path: Path) -> Iterator[None]:
    """A file with a byte of every 64 changed: whichever part is read is damaged."""
    data = path.read_bytes()
    damaged = bytearray(data)
    for position in range(len(data) // 64, len(data), 64):
        damaged[position] ^= 1
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(data)


@contextmanager
def flipped(path: Path, position: int, bit: int) -> Iterator[None]:
    """A file with one bit of one byte changed."""
    with open(path, "r+b") as file:
        file.seek(position)
        before = file.read(1)[0]
        file.seek(position)
        file.write(bytes([before ^ (1 << bit)]))
    try:
        yield
    finally:
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(bytes([before]))


def positions(size: int, rng: random.Random) -> list[tuple[int, int]]:
    """First, middle, last and two random bytes of a file, each with a random bit."""
    chosen = {0, size // 2, size - 1, rng.randrange(size), rng.randrange(size)}
    return [(position, rng.randrange(8)) for position in sorted(chosen)]


def verify(path: Path) -> VerifyReport | None:
    """The report, or None where there is no store to report on."""
    try:
        return verify_store(path)
    except NotAStore:
        return None


def wrong(found: dict[str, str], sound: Sound) -> list[str]:
    """Questions that were answered, and otherwise than they should be."""
    return [name for name, answer in found.items() if answer not in (DAMAGED, sound.answers[name])]


def test_questions_are_answered_by_a_sound_store(compacted: Sound, folded: Sound) -> None:
    assert DAMAGED not in compacted.answers.values()
    assert compacted.answers == folded.answers
    report = verify_store(compacted.path)
    assert report.ok
    assert report.files == len(compacted.files())
    assert report.bytes == sum((compacted.path / key).stat().st_size for key in compacted.files())


def test_one_flipped_bit_is_found_by_verify_which_names_the_file(compacted: Sound) -> None:
    rng = random.Random(SEED)
    unseen = []
    for key in compacted.files():
        for position, bit in positions((compacted.path / key).stat().st_size, rng):
            with flipped(compacted.path / key, position, bit):
                report = verify(compacted.path)
            named = [finding.path for finding in report.findings] if report else []
            if key not in named:
                unseen.append(f"bit {bit} of byte {position} of {key}; verify named {named}")
    assert not unseen, "\n".join(["verify did not see or did not name:", *unseen])


def ask_of_damaged(
    sound: Sound, key: str, places: list[tuple[int, int]], names: Iterable[str] = QUESTIONS
) -> tuple[int, list[str]]:
    """Flip bits of one file; count the questions that raised, and list what went wrong."""
    raised, problems = 0, []
    for position, bit in places:
        with flipped(sound.path / key, position, bit):
            try:
                found = answers(sound.path, names)
            except Exception as error:  # noqa: BLE001 - any other error is a finding
                problems.append(f"byte {position} of {key}: {type(error).__name__}: {error}")
                continue
        raised += sum(answer == DAMAGED for answer in found.values())
        problems += [
            f"byte {position} of {key}: {name} has another answer" for name in wrong(found, sound)
        ]
    return raised, problems


def test_one_flipped_bit_gives_an_error_or_the_right_answer(compacted: Sound) -> None:
    rng = random.Random(SEED)
    problems, noticed = [], 0
    for key in compacted.files():
        size = (compacted.path / key).stat().st_size
        # The last part of a shard is Zarr's index, which our reader of dense arrays never needs.
        data = size // 2 if key.startswith("arrays/") else size
        place = rng.randrange(data), rng.randrange(8)
        raised, found = ask_of_damaged(compacted, key, [place], asked_of(key))
        problems += found
        noticed += bool(raised)
    assert not problems, "\n".join(problems)
    assert noticed > len(compacted.files()) // 4, "The test means to hit what questions read."


def test_one_flipped_bit_of_any_section_of_a_zone_file_is_noticed_by_queries(
    folded: Sound,
) -> None:
    # The others make the tables in memory each time, from what is not damaged here.
    names = [name for name in QUESTIONS if name.startswith(("raw", "top of", "deep", "least"))]
    problems, silent = [], []
    for key in folded.files("zones/*/*/*.sections"):
        data = (folded.path / key).read_bytes()
        file = SectionFile(folded.path / key, key)
        sections = {name: file.read(name) for name in file.names}
        file.close()
        for name, values in sections.items():
            start = data.find(values.tobytes())
            assert start % BLOCK == 0
            raised, found = ask_of_damaged(folded, key, [(start + values.nbytes // 2, 3)], names)
            problems += found
            if not raised:
                silent.append(f"{name} of {key}")
    assert not problems, "\n".join(problems)
    assert not silent, f"No question noticed damage to {silent}"


@pytest.mark.parametrize(
    ("file", "question"),
    [
        ("arrays/mlp_post_act/*/c.0.0.0", "raw mlp_post_act"),
        ("arrays/attn_qk_probs/*/c.0.0.0.0", "raw attn_qk_probs"),
        ("zones/mlp_post_act/*/index-*", "top of all"),
        ("catalog/*.duckdb", "sql tokens"),
        ("catalog/*.json", "sql tokens"),
        ("plan/*/plan.json", "info"),
        ("plan/*/plan.sections", "raw resid_post_mlp"),
        ("plan/*/documents.parquet", "rows"),
        ("commits/base/set.json", "info"),
        ("commits/base/000001.json", "info"),
        ("store.json", "info"),
        ("model/snapshot.json", "vocabulary"),
        ("model/config.json", "weights"),
        ("model/model.safetensors", "weights"),
        ("model/readout.sections", "derived"),
        ("model/tokenizer.json", "vocabulary"),
        ("selfcheck/*.json", "locations"),
    ],
)
def test_question_that_meets_damage_raises_and_names_the_file(
    compacted: Sound, file: str, question: str
) -> None:
    (path,) = compacted.path.glob(file)
    key = path.relative_to(compacted.path).as_posix()
    with (
        flipped_everywhere(path),
        pytest.raises(StoreDamaged) as caught,
        actstore.open(compacted.path) as store,
    ):
        QUESTIONS[question](store)
    assert key in str(caught.value)
    assert re.search("Run `actstore (verify|compact)`", str(caught.value))
    assert caught.value.exit_code == 3


# Shards, byte by byte


@pytest.mark.parametrize(
    "location",
    [
        ActivationLocationType.MLP_POST_ACT,
        ActivationLocationType.RESID_POST_MLP,
        ActivationLocationType.ATTN_QUERY,
        ActivationLocationType.ATTN_QK_PROBS,
    ],
    ids=str,
)
def test_value_on_a_flipped_bit_is_never_returned(
    compacted: Sound, location: ActivationLocationType
) -> None:
    """All three ways to read a shard raise for a damaged value, and find its neighbours."""
    rng = np.random.default_rng(SEED)
    sound = StoreReader(compacted.path).array(location)
    rows = sound.rows_of(0)
    layer = 1
    values = sound.reader.window(0, layer, 0, rows)
    path = compacted.path / sound.spec.shard_path(0, 0)
    size = path.stat().st_size
    affected = 0
    for position in rng.integers(size, size=25):
        with flipped(path, int(position), int(rng.integers(8))):
            array = StoreReader(compacted.path).array(location)
            bad = []
            for row in range(rows):
                try:
                    window = array.reader.window(0, layer, row, row + 1)
                except StoreDamaged:
                    bad.append(row)
                else:
                    np.testing.assert_array_equal(window[0], values[row])
            affected += bool(bad)
            for row in bad[:3]:
                with pytest.raises(StoreDamaged, match="no value of it was returned"):
                    array.reader.rows(layer, np.array([row]))
                columns = [
                    read_cell(array, layer, row, column) for column in range(values.shape[1])
                ]
                assert None in columns, "One of the row's cells is damaged."
                for column, cell in enumerate(columns):
                    assert cell is None or cell.tobytes() == values[row, column].tobytes()
    assert affected >= 3, "The test means to hit values."


def read_cell(array: StoredArray, layer: int, row: int, column: int) -> np.generic | None:
    """One value by way of its column; None where that raises."""
    try:
        cell: np.generic = array.reader.cells(0, layer, np.array([row]), column)[0]
    except StoreDamaged:
        return None
    return cell


# Files that are missing, cut, added, exchanged


def test_missing_file_is_found_by_verify_and_by_questions(compacted: Sound) -> None:
    unseen: list[str] = []
    problems: list[str] = []
    for key in compacted.files():
        path = compacted.path / key
        data = path.read_bytes()
        path.unlink()
        try:
            report = verify(compacted.path)
            found = answers_or_none(compacted.path, problems, key)
        finally:
            path.write_bytes(data)
        is_derived = any(fnmatch.fnmatch(key, pattern) for pattern in DERIVED_FILES)
        named = [finding.path for finding in report.findings] if report else [key]
        is_optional = is_derived or key.startswith("selfcheck/")
        if key not in named and not is_optional:
            unseen.append(f"{key}; verify named {named}")
        if is_derived:
            assert found is not None
            assert DAMAGED not in found.values()
        if found is not None:
            changed = set(wrong(found, compacted))
            # Without its replay a store does not know its error, and says so.
            changed -= {"info", "locations"} if key.startswith("selfcheck/") else set()
            problems += [f"without {key}: {name} changed" for name in changed]
    assert not problems, "\n".join(problems)
    assert not unseen, "\n".join(["verify did not see or did not name what was missing:", *unseen])


def answers_or_none(path: Path, problems: list[str], key: str) -> dict[str, str] | None:
    try:
        return answers(path, asked_of(key))
    except NotAStore:
        return None
    except Exception as error:  # noqa: BLE001 - any other error is a finding
        if key in COMMITS and isinstance(error, Unavailable):
            return None
        problems.append(f"without {key}: {type(error).__name__}: {error}")
        return None


def test_missing_commit_record_takes_its_segment_away_and_nothing_else(compacted: Sound) -> None:
    path = compacted.path / "commits/base/000001.json"
    data = path.read_bytes()
    path.unlink()
    try:
        with actstore.open(compacted.path) as store:
            info = store.info()
            assert (info.segments_committed, info.segments_planned) == (1, 2)
            ((count,),) = store.sql("SELECT count(*) FROM tokens").fetchall()
            assert count == store.n_tokens == store.reader.commits["base"][0].rows
            best = store.topk("mlp_post_act", k=50)
            assert max(best.column("token")) < 512
            assert (best.certificate.segments, best.certificate.segments_planned) == (1, 2)
            with pytest.raises(Unavailable, match="not committed"):
                store.raw("mlp_post_act", tokens=[512])
        (finding,) = verify_store(compacted.path).findings
        assert (finding.path, finding.problem) == ("commits/base/000001.json", "missing")
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("left", [0.0, 0.5, 1.0], ids=["empty", "half", "one-byte-less"])
def test_truncated_file_is_found_by_verify_and_by_questions(compacted: Sound, left: float) -> None:
    unseen: list[str] = []
    problems: list[str] = []
    for key in compacted.files():
        path = compacted.path / key
        data = path.read_bytes()
        path.write_bytes(data[: min(int(left * len(data)), len(data) - 1)])
        try:
            report = verify(compacted.path)
            found = answers_or_none(compacted.path, problems, key) if left == 0.5 else None
        finally:
            path.write_bytes(data)
        if report is None or key not in [finding.path for finding in report.findings]:
            unseen.append(key)
        if found is not None:
            problems += [f"{key} cut: {name} changed" for name in wrong(found, compacted)]
    assert not problems, "\n".join(problems)
    assert not unseen, f"verify did not see or did not name {unseen}"


@pytest.mark.parametrize(
    "key",
    [
        "notes.txt",
        "arrays/mlp_post_act/forward/c.0.7.0",
        "zones/mlp_post_act/forward/000007.sections",
        "catalog/parts/000007.parquet",
        "commits/base/readme.txt",
        "plan/notes",
        "model/adapter.safetensors",
        "arrays/other/forward/c.0.0",
    ],
)
def test_unknown_file_is_found_by_verify_and_changes_no_answer(compacted: Sound, key: str) -> None:
    path = compacted.path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"what is this")
    try:
        (finding,) = verify_store(compacted.path).findings
        assert (finding.path, finding.problem) == (key, "unknown")
        assert answers(compacted.path) == compacted.answers
    finally:
        path.unlink()
        if not any(path.parent.iterdir()):
            shutil.rmtree(path.parent)


SHARD = "arrays/{}/forward/c.0.{}.0"
ZONES = "zones/{}/forward/00000{}.sections"


@pytest.mark.parametrize("state", ["compacted", "folded"])
@pytest.mark.parametrize(
    "exchanged",
    [
        pytest.param([[SHARD.format("mlp_post_act", n) for n in (0, 1)]], id="shards"),
        pytest.param([[SHARD.format("attn_qk_probs", f"{n}.0") for n in (0, 1)]], id="pairs"),
        pytest.param([[ZONES.format("mlp_post_act", n) for n in (0, 1)]], id="zones"),
        pytest.param([[ZONES.format("resid_post_mlp", n) for n in (0, 1)]], id="checksums"),
        pytest.param(
            [[form.format("mlp_post_act", n) for n in (0, 1)] for form in (SHARD, ZONES)],
            id="shards-with-their-zones",
        ),
        pytest.param(
            [
                [form.format(name, 0) for name in ("resid_post_mlp", "resid_post_attn")]
                for form in (SHARD, ZONES)
            ],
            id="arrays-with-their-zones",
        ),
        pytest.param([[f"arrays/token_id/c.{n}" for n in (0, 1)]], id="token-ids"),
        pytest.param([[f"catalog/parts/00000{n}.parquet" for n in (0, 1)]], id="parts"),
        pytest.param([COMMITS], id="commits"),
    ],
)
def test_exchanged_files_are_found(
    state: str, exchanged: list[Iterable[str]], request: pytest.FixtureRequest
) -> None:
    """Files that are sound where they belong, and are not there."""
    sound: Sound = request.getfixturevalue(state)
    pairs = [tuple(pair) for pair in exchanged]
    before = {key: (sound.path / key).read_bytes() for pair in pairs for key in pair}
    try:
        for first, second in pairs:
            (sound.path / first).write_bytes(before[second])
            (sound.path / second).write_bytes(before[first])
        named = {finding.path for finding in verify_store(sound.path).findings}
        found = answers(sound.path)
    finally:
        for key, data in before.items():
            (sound.path / key).write_bytes(data)
    assert before.keys() <= named, f"verify named {named}"
    assert not wrong(found, sound)


@pytest.mark.parametrize("key", ["store.json", "plan/*/plan.json"])
def test_flipped_format_number_is_damage_and_not_a_newer_format(compacted: Sound, key: str) -> None:
    (path,) = compacted.path.glob(key)
    position = path.read_bytes().index(b'"format":1') + len('"format":')
    for bit in range(8):
        with flipped(path, position, bit), pytest.raises(StoreDamaged, match=path.name):
            actstore.open(compacted.path)


# Damage that compaction and ingest meet


@pytest.mark.parametrize("pattern", DERIVED_FILES)
def test_compaction_makes_damaged_derived_files_anew(
    compacted: Sound, tmp_path: Path, pattern: str
) -> None:
    store = shutil.copytree(compacted.path, tmp_path / "store")
    for path in store.glob(pattern):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    assert not verify_store(store).ok
    compact(StoreReader(store))
    assert verify_store(store).ok
    assert answers(store) == compacted.answers


def test_compaction_of_damaged_zone_maps_raises_and_publishes_nothing(
    folded: Sound, tmp_path: Path
) -> None:
    store = shutil.copytree(folded.path, tmp_path / "store")
    before = {path for path in store.rglob("*") if path.is_file()}
    zones = store / "zones/attn_query/forward/000001.sections"
    data = bytearray(zones.read_bytes())
    data[4 * BLOCK] ^= 1
    zones.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"attn_query/forward/000001\.sections fails"):
        compact(StoreReader(store))
    after = {path for path in store.rglob("*") if path.is_file()}
    assert not [path for path in after - before if "attn_query" in str(path)]
    assert not list(store.glob("catalog/*.duckdb"))


@pytest.mark.parametrize(
    "key", ["store.json", "commits/base/set.json", "commits/base/000000.json", "plan/*/plan.json"]
)
def test_ingest_refuses_to_continue_on_damaged_records(
    compacted: Sound, tmp_path: Path, key: str
) -> None:
    store = shutil.copytree(compacted.path, tmp_path / "store")
    (path,) = store.glob(key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    with pytest.raises(StoreDamaged):
        ingest_corpus(store, locations=LOCATIONS, limit_tokens=900)
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


def test_index_of_another_coverage_under_this_name_is_found(
    compacted: Sound, tmp_path: Path
) -> None:
    store = shutil.copytree(compacted.path, tmp_path / "store")
    (index,) = store.glob("zones/mlp_post_act/forward/index-*")
    (other,) = store.glob("zones/attn_query/forward/index-*")
    index.write_bytes(other.read_bytes())
    key = index.relative_to(store).as_posix()
    assert key in [finding.path for finding in verify_store(store).findings]
    with actstore.open(store) as opened, pytest.raises(StoreDamaged, match="index"):
        opened.topk("mlp_post_act", k=3)
