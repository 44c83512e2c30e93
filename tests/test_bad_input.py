"""Whatever is wrong with the input, the answer is a typed error that says what to do.

Each test asserts the error's type and kind, and that its message names the value that is
wrong and the next step; and that nothing was left behind or changed.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from tiny_gpt2 import tiny_gpt2
from tiny_ingest import CORPUS, fresh_copy, tiny_model, tiny_tokenizer

import actstore
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.ingest.settings import IngestSettings
from actstore.store import blobs as blobs_module
from actstore.store.errors import (
    ActstoreError,
    ErrorKind,
    IngestStopped,
    InvalidInput,
    NotAStore,
    StoreConflict,
    StoreDamaged,
    Unavailable,
    WriteFailed,
)
from actstore.store.manifest import FORMAT
from actstore.store.records import canonical_json, decode_record
from actstore.store.verification import verify_store

VOCABULARY = len(tiny_tokenizer())
SMALL: dict[str, Any] = {"segment_rows": 512, "batch_tokens": 256}
TEXTS = ["first we take the little boat, then the other", "then the other one", "and we row"]


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    """What is durable is tested elsewhere; waiting for the disk is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    loaded = tiny_model()
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound store that no test changes."""
    return fresh_copy(tmp_path_factory.mktemp("sound") / "store", limit_tokens=600)


def refusal(
    call: Callable[[], object], error: type[ActstoreError], kind: ErrorKind, *words: str
) -> str:
    """The message of the error that a call raises, which must be of this type and kind.

    Args:
        call: what to do.
        error: the exact type.
        kind: the stable code.
        words: what the message must say: the value, then the next step.
    """
    with pytest.raises(ActstoreError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert caught.value.kind is kind, message
    missing = [word for word in words if word not in message]
    assert not missing, f"The message does not say {missing}: {message}"
    return message


def require_nothing(path: Path) -> None:
    left = [file for file in path.rglob("*") if file.is_file()]
    assert not left, f"A refused ingest left {left}"


# The corpus


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        pytest.param([], ("empty list", "Give paths, texts"), id="empty-list"),
        pytest.param(iter(()), ("no document with a token", "Check the path"), id="iterator"),
        pytest.param(
            ["", ""], ("no document with a token", "2 documents are empty"), id="empty-texts"
        ),
        pytest.param([[], []], ("no document with a token", "2 documents"), id="empty-id-lists"),
        pytest.param(
            [{"text": ""}, {"text": None}], ("no document with a token", "column"), id="records"
        ),
    ],
)
def test_empty_corpus(
    model: tuple[Any, Any], tmp_path: Path, corpus: Any, words: tuple[str, ...]
) -> None:
    out = tmp_path / "store"
    refusal(
        lambda: actstore.ingest(model, corpus, out, **SMALL),
        InvalidInput,
        ErrorKind.EMPTY_CORPUS,
        *words,
    )
    require_nothing(tmp_path)


def test_corpus_of_empty_files(model: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    refusal(
        lambda: actstore.ingest(model, tmp_path / "texts", tmp_path / "store", **SMALL),
        InvalidInput,
        ErrorKind.EMPTY_CORPUS,
        "1 documents are empty",
        "Check the path",
    )
    require_nothing(tmp_path / "store")


def test_corpus_that_names_no_file(model: tuple[Any, Any], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "*.txt"
    with pytest.raises(InvalidInput) as caught:
        actstore.ingest(model, str(missing), tmp_path / "store", **SMALL)
    assert caught.value.kind in (ErrorKind.EMPTY_CORPUS, ErrorKind.INVALID_CORPUS)
    assert str(missing) in str(caught.value)
    require_nothing(tmp_path)


def test_empty_documents_are_dropped_and_counted(model: tuple[Any, Any], tmp_path: Path) -> None:
    """Each token ends as stored, dropped for a stated reason, or missing."""
    corpus = [TEXTS[0], "", TEXTS[1], "", "", TEXTS[2]]
    report = ingest(tiny_model(), Corpus(corpus), tmp_path / "store", IngestSettings(**SMALL))
    assert report.dropped == {"empty": 3}
    assert report.missing == 0
    with actstore.open(tmp_path / "store") as store:
        info = store.info()
        assert info.documents == 3
        assert dict(store.reader.plans[0].counts.dropped) == {"empty": 3}
        sources = store.sql("SELECT source FROM documents ORDER BY document").fetchall()
    # The names are of the corpus as it was given.
    assert [source for (source,) in sources] == ["memory:0", "memory:2", "memory:5"]


@pytest.mark.parametrize("bad", [VOCABULARY, -1, 2**31])
def test_token_id_outside_the_vocabulary(model: tuple[Any, Any], tmp_path: Path, bad: int) -> None:
    refusal(
        lambda: actstore.ingest(model, [[1, 2, 3], [4, bad, 5]], tmp_path / "store", **SMALL),
        InvalidInput,
        ErrorKind.TOKEN_OUT_OF_VOCABULARY,
        "'memory:1'",
        f"token id {bad} at position 1",
        f"0 to {VOCABULARY - 1}",
        "Use the tokenizer that belongs to the model",
    )
    require_nothing(tmp_path)


def test_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    small = tiny_gpt2(vocab_size=60), tiny_tokenizer()
    refusal(
        lambda: actstore.ingest(small, ["zebra"], tmp_path / "store", **SMALL),
        InvalidInput,
        ErrorKind.TOKEN_OUT_OF_VOCABULARY,
        "vocabulary has 60 tokens",
        "Use the tokenizer",
    )
    require_nothing(tmp_path)


def test_texts_without_a_tokenizer(tmp_path: Path) -> None:
    refusal(
        lambda: actstore.ingest((tiny_gpt2(), None), TEXTS, tmp_path / "store", **SMALL),
        InvalidInput,
        ErrorKind.INVALID_ARGUMENT,
        "without a tokenizer",
        "Give one",
    )
    require_nothing(tmp_path)


# The model


def test_value_that_is_no_number_stops_before_the_commit(tmp_path: Path) -> None:
    broken = tiny_gpt2(vocab_size=VOCABULARY)
    positions = broken.get_parameter("transformer.wpe.weight")
    with torch.no_grad():
        positions[20, 3] = torch.nan
    refusal(
        lambda: actstore.ingest((broken, tiny_tokenizer()), TEXTS, tmp_path / "store", **SMALL),
        IngestStopped,
        ErrorKind.NUMERIC_OVERFLOW,
        "resid_post_embedding has the value nan at token 20, column 3",
        "Segment 0 was not committed",
        "look at the model",
    )
    with actstore.open(tmp_path / "store") as store:
        assert store.reader.segments == []
    assert verify_store(tmp_path / "store").ok


# The path


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "foreign"])
def test_path_that_is_not_a_store(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.write_text("not a folder")
    elif kind != "missing":
        path.mkdir()
    if kind == "foreign":
        (path / "results.csv").write_text("a,b\n")
    for call in (lambda: actstore.open(path), lambda: verify_store(path)):
        message = refusal(
            call, NotAStore, ErrorKind.NOT_A_STORE, str(path), "Make one with `actstore ingest"
        )
        assert "is not a store" in message
    assert kind != "missing" or not path.exists(), "Looking must not make anything."


def test_ingest_into_a_folder_of_something_else(model: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("a,b\n")
    refusal(
        lambda: actstore.ingest(model, TEXTS, tmp_path, **SMALL),
        InvalidInput,
        ErrorKind.NOT_A_STORE,
        "results.csv",
        "Choose another",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_store_of_a_newer_format(root: Path, model: tuple[Any, Any], tmp_path: Path) -> None:
    """Its record may be laid out in any way: only the number is looked for."""
    store = shutil.copytree(root, tmp_path / "store")
    record = {"format": FORMAT + 1, "engine": {"name": "later", "layout": [1, 2]}}
    (store / "store.json").write_bytes(canonical_json(record))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for call in (
        lambda: actstore.open(store),
        lambda: verify_store(store),
        lambda: actstore.ingest(model, str(CORPUS), store, limit_tokens=600, **SMALL),
    ):
        refusal(
            call,
            NotAStore,
            ErrorKind.NEWER_FORMAT,
            f"format {FORMAT + 1}",
            f"up to {FORMAT}",
            "Upgrade actstore",
        )
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_plan_of_a_newer_format(root: Path, tmp_path: Path) -> None:
    store = shutil.copytree(root, tmp_path / "store")
    (plan,) = store.glob("plan/*/plan.json")
    fields = decode_record(plan.read_bytes(), "plan.json")
    plan.write_bytes(canonical_json({**fields, "format": 7, "tree": {}}))
    refusal(
        lambda: actstore.open(store),
        NotAStore,
        ErrorKind.NEWER_FORMAT,
        "format 7",
        "Upgrade actstore",
    )


def test_store_of_another_model(root: Path, tmp_path: Path) -> None:
    store = shutil.copytree(root, tmp_path / "store")
    other = tiny_gpt2(seed=1, vocab_size=VOCABULARY), tiny_tokenizer()
    refusal(
        lambda: actstore.ingest(other, str(CORPUS), store, limit_tokens=600, **SMALL),
        StoreConflict,
        ErrorKind.CONFIG_CONFLICT,
        "model.fingerprint",
        "Ingest into another path",
    )
    assert verify_store(store).ok


def test_other_locations_than_the_store_has(
    root: Path, model: tuple[Any, Any], tmp_path: Path
) -> None:
    store = shutil.copytree(root, tmp_path / "store")
    refusal(
        lambda: actstore.ingest(
            model, str(CORPUS), store, limit_tokens=600, locations="minimal", **SMALL
        ),
        StoreConflict,
        ErrorKind.CONFIG_CONFLICT,
        "this run asks for resid_post_embedding, resid_post_mlp",
        "ingest into another path",
    )


def test_place_where_another_model_had_begun(tmp_path: Path, model: tuple[Any, Any]) -> None:
    """A run that died before ``store.json`` may have left another model's files."""
    other = tiny_gpt2(seed=1, vocab_size=VOCABULARY), model[1]
    out = tmp_path / "store"
    real = blobs_module.LocalBlobs.publish

    def die(self: Any, key: str, parts: Any) -> bool:
        if key == "store.json":
            raise KeyboardInterrupt
        return real(self, key, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blobs_module.LocalBlobs, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            actstore.ingest(other, TEXTS, out, **SMALL)
    assert (out / "model" / "model.safetensors").is_file()
    refusal(
        lambda: actstore.ingest(model, TEXTS, out, **SMALL),
        StoreConflict,
        ErrorKind.CONFIG_CONFLICT,
        "model/model.safetensors",
        "another model",
        "ingest into another path",
    )
    assert not (out / "store.json").exists()
    # The run that had begun goes on as if nothing had happened.
    actstore.ingest(other, TEXTS, out, **SMALL).close()
    assert verify_store(out).ok


# The disk


def test_read_only_target(model: tuple[Any, Any], tmp_path: Path) -> None:
    """The system's answer for a read-only file system, also where tests run as root."""
    out = tmp_path / "store"

    def refuse(path: Path, parts: Any) -> NoReturn:
        raise OSError(30, "Read-only file system", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blobs_module, "_write_synced", refuse)
        refusal(
            lambda: actstore.ingest(model, TEXTS, out, **SMALL),
            WriteFailed,
            ErrorKind.READ_ONLY,
            str(out),
            "Read-only file system",
            "choose another path",
        )
    require_nothing(tmp_path)


def test_target_below_a_file(model: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((WriteFailed, InvalidInput, NotAStore)) as caught:
        actstore.ingest(model, TEXTS, tmp_path / "file" / "store", **SMALL)
    assert str(tmp_path / "file") in str(caught.value)


def test_too_little_disk(
    model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is kept; a disk that fills up on the way is in test_durability."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    refusal(
        lambda: actstore.ingest(model, TEXTS, tmp_path / "store", **SMALL),
        IngestStopped,
        ErrorKind.TOO_LARGE,
        "more than 80 % of the 100,000 free",
        "Make room",
        "--limit-tokens",
    )
    require_nothing(tmp_path)


def test_more_than_max_bytes(model: tuple[Any, Any], tmp_path: Path) -> None:
    message = refusal(
        lambda: actstore.ingest(model, TEXTS, tmp_path / "store", max_bytes=20_000, **SMALL),
        IngestStopped,
        ErrorKind.TOO_LARGE,
        "max_bytes=20,000",
        "larger --max-bytes",
    )
    planned = int(message.split("would write ")[1].split(" bytes")[0].replace(",", ""))
    assert planned > 20_000
    require_nothing(tmp_path)
    actstore.ingest(model, TEXTS, tmp_path / "store", max_bytes=planned, **SMALL).close()


def test_refusal_leaves_a_store_that_was_there(
    root: Path, model: tuple[Any, Any], tmp_path: Path
) -> None:
    store = shutil.copytree(root, tmp_path / "store")
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    refusal(
        lambda: actstore.ingest(model, str(CORPUS), store, max_bytes=10, **SMALL),
        IngestStopped,
        ErrorKind.TOO_LARGE,
        "max_bytes=10",
    )
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


# Questions


@pytest.mark.parametrize(
    ("question", "kind", "words"),
    [
        pytest.param(
            lambda store: store.raw("resid_post_mlp", layers=[7]),
            ErrorKind.UNKNOWN_LAYER,
            ("no layer 7", "0 to 1"),
            id="raw",
        ),
        pytest.param(
            lambda store: store.topk("mlp_post_act", layers=-1),
            ErrorKind.UNKNOWN_LAYER,
            ("-1", "0 to 1"),
            id="topk",
        ),
        pytest.param(
            lambda store: store.derive("mlp_write_norm", layers=2, sequences=[0]),
            ErrorKind.UNKNOWN_LAYER,
            ("no layer 2", "0 to 1"),
            id="derive",
        ),
        pytest.param(
            lambda store: store.examples("mlp_post_act", (2, 0)),
            ErrorKind.UNKNOWN_LAYER,
            ("2", "0 to 1"),
            id="examples",
        ),
        pytest.param(
            lambda store: store.raw("resid_post_embedding", layers=0),
            ErrorKind.UNKNOWN_LAYER,
            ("belongs to no layer", "leave out"),
            id="layer-of-none",
        ),
        pytest.param(
            lambda store: store.topk("mlp_post_act", neurons=24),
            ErrorKind.UNKNOWN_UNIT,
            ("24", "0 to 23"),
            id="neuron",
        ),
        pytest.param(
            lambda store: store.raw("mlp_post_act", tokens=[10**9]),
            ErrorKind.UNKNOWN_ROW,
            ("1000000000",),
            id="row",
        ),
        pytest.param(
            lambda store: store.raw("mlp_activations"),
            ErrorKind.UNKNOWN_LOCATION,
            ("mlp_activations", "mlp_post_act"),
            id="location",
        ),
        pytest.param(
            lambda store: store.topk("mlp_writenorm"),
            ErrorKind.UNKNOWN_SCALAR,
            ("mlp_writenorm", "mlp_write_norm"),
            id="scalar",
        ),
        pytest.param(
            lambda store: store.sql("SELECT nothing FROM tokens"),
            ErrorKind.INVALID_SQL,
            ("nothing",),
            id="sql",
        ),
    ],
)
def test_question_about_what_is_not_there(
    root: Path,
    question: Callable[[Any], object],
    kind: ErrorKind,
    words: tuple[str, ...],
) -> None:
    with actstore.open(root) as store:
        refusal(lambda: question(store), InvalidInput, kind, *words)


def test_store_without_a_committed_segment(root: Path, tmp_path: Path) -> None:
    store = shutil.copytree(root, tmp_path / "store")
    for path in store.glob("commits/base/0*.json"):
        path.unlink()
    with actstore.open(store) as opened:
        assert opened.info().segments_committed == 0
        refusal(
            lambda: opened.raw("mlp_post_act"),
            Unavailable,
            ErrorKind.NOTHING_COMMITTED,
            str(store),
            "Run the same `actstore ingest` again",
        )


def test_manifest_of_nonsense_is_damage_and_not_a_traceback(root: Path, tmp_path: Path) -> None:
    store = shutil.copytree(root, tmp_path / "store")
    for nonsense in (b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"crc32c":1}', b"1" * 5000):
        (store / "store.json").write_bytes(nonsense)
        with pytest.raises(StoreDamaged, match=r"^store\.json .*Run `actstore verify`") as caught:
            actstore.open(store)
        assert caught.value.kind in (ErrorKind.MALFORMED_FILE, ErrorKind.CHECKSUM_MISMATCH)
        assert "store.json" in [finding.path for finding in verify_store(store).findings]
