"""Corpora: every accepted form gives its documents, every bad one says what is wrong."""

import datetime
import json
import tracemalloc
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actstore.ingest import tokenization
from actstore.ingest.corpus import Document, open_corpus
from actstore.ingest.tokenization import resolve_bos, special_token_ids, tokenize
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.plan import PlanConfig
from actstore.store.planning import build_plan


def texts(corpus: Any, **options: Any) -> list[str | None]:
    return [document.text for document in open_corpus(corpus, **options)]


def columns(corpus: Any, **options: Any) -> list[dict[str, Any]]:
    return [dict(document.columns) for document in open_corpus(corpus, **options)]


def refused(corpus: Any, **options: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        list(open_corpus(corpus, **options))
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    (root / "b.txt").write_bytes("zwei\r\n\u00fc".encode())
    (root / "a.txt").write_text("one", encoding="utf-8")
    (root / "deep" / "c").write_text("three", encoding="utf-8")
    return root


# --- Files -----------------------------------------------------------------------------------


def test_a_folder_is_all_its_files_sorted(folder: Path) -> None:
    documents = list(open_corpus(folder))
    assert [one.source for one in documents] == ["a.txt", "b.txt", "deep/c"]
    assert [one.text for one in documents] == ["one", "zwei\r\nü", "three"]
    assert texts(str(folder)) == texts([folder]) == texts(folder)


def test_globs_files_and_lists_name_the_same_documents(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts(f"{folder}/*.txt") == ["one", "zwei\r\nü"]
    assert texts(f"{folder}/**/*") == ["one", "zwei\r\nü", "three"]
    assert texts([folder / "deep" / "*", folder / "a.txt"]) == ["three", "one"]
    assert texts([f"{folder}/a.txt", f"{folder}/*.txt"]) == ["one", "zwei\r\nü"]
    monkeypatch.chdir(folder)
    assert texts("b.txt") == texts(["./b.txt"]) == ["zwei\r\nü"]
    assert texts(["a.txt", folder / "a.txt"]) == ["one"]


def test_sources_are_never_absolute_and_survive_a_move(folder: Path, tmp_path: Path) -> None:
    before = [one.source for one in open_corpus([folder / "deep", folder / "a.txt"])]
    moved = folder.rename(tmp_path / "elsewhere")
    after = [one.source for one in open_corpus([moved / "deep", moved / "a.txt"])]
    assert before == after == ["deep/c", "a.txt"]


def test_a_list_of_prose_is_texts_and_a_mistyped_path_is_not(folder: Path) -> None:
    prose = ["Is it?", "a/b testing is [nice]", "two\nlines.txt", ""]
    assert texts(prose) == prose
    assert refused([f"{folder}/a.txt", f"{folder}/missing.txt"]).kind is ErrorKind.EMPTY_CORPUS
    assert refused(["corups/*.txt"]).kind is ErrorKind.EMPTY_CORPUS
    assert texts(iter(["corups/*.txt"])) == ["corups/*.txt"]


@pytest.mark.parametrize("pattern", ["missing", "*.none", "missing/*.txt", "A whole text. " * 20])
def test_no_file_is_an_empty_corpus(folder: Path, pattern: str) -> None:
    error = refused(f"{folder}/{pattern}")
    assert error.kind is ErrorKind.EMPTY_CORPUS
    assert "No file matches" in str(error)
    assert len(str(error)) < 300


def test_a_folder_without_files_is_an_empty_corpus(tmp_path: Path) -> None:
    assert refused(tmp_path).kind is ErrorKind.EMPTY_CORPUS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "there"}\n')
    assert texts(tmp_path) == ["hello", "there"]


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("x", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    error = refused(tmp_path)
    assert error.kind is ErrorKind.INVALID_CORPUS
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 3" in str(error)
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbf\xe9")
    assert "offset 3" in str(refused(tmp_path))


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    corpus = open_corpus(folder)
    (folder / "b.txt").unlink()
    with pytest.raises(InvalidInput, match=r"Cannot read b\.txt"):
        list(corpus)


# --- JSON lines --------------------------------------------------------------------------------


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_json_lines_are_documents_with_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(
        '{"text": "one", "n": 1, "r": 1.0, "f": true}\n\n{"text": null}\n{"token_ids": [3, 4]}',
        encoding="utf-8",
    )
    documents = list(open_corpus(path))
    assert [one.source for one in documents] == [f"a{suffix}:1", f"a{suffix}:3", f"a{suffix}:4"]
    assert [one.text for one in documents] == ["one", "", None]
    assert documents[2].token_ids is not None
    assert documents[2].token_ids.tolist() == [3, 4]
    kept = documents[0].columns
    assert kept == {"n": 1, "r": 1.0, "f": True}
    assert [type(value) for value in kept.values()] == [int, float, bool]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "x"', "a.jsonl:2 is not JSON"),
        (b"[1, 2]", "a.jsonl:2 holds a list"),
        (b'"text"', "a.jsonl:2 holds a str"),
        (b'{"text": "\xff"}', "a.jsonl is not UTF-8: byte 0xff at offset 25"),
        (
            b'{"body": "x", "label": 1}',
            "a.jsonl:2 has no column 'text'. Its columns: 'body', 'label'",
        ),
        (b"{}", "Its columns: none"),
        (b'{"text": 5}', "a.jsonl:2 has a int as 'text'"),
        (b'{"text": "x", "token_ids": [1]}', "both 'text' and 'token_ids'"),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        (b'{"token_ids": [1.5]}', "flat list of whole numbers"),
        (b'{"token_ids": [[1], [2]]}', "flat list of whole numbers"),
        (b'{"token_ids": "12"}', "flat list of whole numbers"),
        (b"[" * 100_000, "a.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    error = refused(path)
    assert error.kind is ErrorKind.INVALID_CORPUS
    assert said in str(error)


def test_the_text_column_and_the_kept_columns_are_chosen(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "x", "text": "y", "label": 1, "more": 2})
    assert texts(path, text_column="body") == ["x"]
    assert columns(path, text_column="body") == [{"text": "y", "label": 1, "more": 2}]
    assert columns(path, columns=["label"]) == [{"label": 1}]
    assert columns(path, columns="label") == [{"label": 1}]
    assert columns(path, columns=[]) == [{}]
    assert columns(path, columns=["more", "text", "absent"]) == [{"more": 2, "text": "y"}]
    both = write_lines(tmp_path / "b.jsonl", {"text": "x", "token_ids": [1]}, {"token_ids": None})
    assert texts(both, text_column="token_ids") == [None, None]


def test_columns_named_like_ours_get_an_underscore(tmp_path: Path) -> None:
    record = {"text": "x", "source": "web", "Document": 4, "n_tokens": None}
    path = write_lines(tmp_path / "a.jsonl", record)
    assert columns(path) == [{"source_": "web", "Document_": 4, "n_tokens_": None}]
    write_lines(path, {"text": "x", "source": "web", "source_": "w"})
    assert "'source' and 'source_'" in str(refused(path))


# --- Parquet -----------------------------------------------------------------------------------


def test_parquet_rows_are_documents_with_columns(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4)
    table = pa.table(
        {
            "text": pa.array(["one", None, "three"]).dictionary_encode(),
            "n": pa.array([1, None, 3], pa.int32()),
            "r": pa.array([1.0, 0.5, None], pa.float32()),
            "tags": [["a", "b"], [], None],
            "when": [when, None, None],
            "a.b": ["x", "y", "z"],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    documents = list(open_corpus(tmp_path / "a.parquet"))
    assert [one.text for one in documents] == ["one", "", "three"]
    assert [one.source for one in documents] == [f"a.parquet:{row}" for row in (1, 2, 3)]
    assert documents[0].columns == {
        "n": 1,
        "r": 1.0,
        "tags": '["a", "b"]',
        "when": "2026-01-02T03:04:00",
        "a.b": "x",
    }
    assert documents[2].columns["tags"] is None
    assert columns(tmp_path / "a.parquet", columns=["n"]) == [{"n": 1}, {"n": None}, {"n": 3}]


def test_parquet_of_token_ids(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"token_ids": [[1, 2], [], None]}), tmp_path / "a.parquet")
    ids = [one.token_ids for one in open_corpus(tmp_path / "a.parquet")]
    assert [one.tolist() for one in ids if one is not None] == [[1, 2], [], []]


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    assert "a.parquet has no column 'text'. Its columns: 'body', 'n'" in str(refused(path))
    said = str(refused(path, text_column="body", columns=["lable"]))
    assert "no column 'lable'. Its columns: body, n" in said
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    parquet.write_table(pa.table({"text": invalid}), path)
    assert "a.parquet is not UTF-8 in rows 1 to 1" in str(refused(path))
    path.write_bytes(b"no parquet")
    assert "Cannot read a.parquet" in str(refused(path))


def test_kinds_of_files_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    write_lines(tmp_path / "b.jsonl", {"text": "two"})
    parquet.write_table(pa.table({"text": ["three"]}), tmp_path / "c.parquet")
    assert texts(tmp_path) == ["one", "two", "three"]


# --- Objects in memory ---------------------------------------------------------------------------


class Dataset:
    """Shaped like ``datasets.Dataset``: iterating gives dicts, again and again."""

    column_names = ("text", "label")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"text": "one", "label": np.int64(3)}
        yield {"text": "two", "label": np.float32(0.5)}


def test_records_in_memory() -> None:
    corpus = open_corpus(Dataset())
    for _ in range(2):
        documents = list(corpus)
        assert [one.source for one in documents] == ["memory:0", "memory:1"]
        assert [one.columns for one in documents] == [{"label": 3}, {"label": 0.5}]
    assert type(next(iter(corpus)).columns["label"]) is int


@pytest.mark.parametrize(
    "corpus",
    [
        [[1, 2], [3]],
        [(1, 2), np.array([3], np.uint16)],
        (np.array([1, 2]), torch.tensor([3])),
        iter([[1, 2], range(3, 4)]),
        ({"token_ids": ids} for ids in ([1, 2], [3])),
    ],
)
def test_token_ids_in_memory(corpus: Any) -> None:
    ids = [one.token_ids for one in open_corpus(corpus)]
    assert [one.tolist() for one in ids if one is not None] == [[1, 2], [3]]
    assert all(one is not None and one.dtype == np.int64 for one in ids)


def test_rows_of_a_matrix_are_documents() -> None:
    ids = [one.token_ids for one in open_corpus(torch.arange(6).reshape(2, 3))]
    assert [one.tolist() for one in ids if one is not None] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        (["a text", [1, 2]], "Document 1 of the corpus is a list of token ids, the first is text"),
        ([{"text": "a"}, "b c"], "Document 1 of the corpus is text, the first is a record"),
        ([1, 2, 3], "Document 0 of the corpus is a int"),
        ([None], "Document 0 of the corpus is a NoneType"),
        ([[1, "a"]], "memory:0"),
        ([[1, [2]]], "memory:0"),
        ([[True, False]], "type bool"),
        ([[2**63]], "memory:0"),
        ([{1: "a", "text": "b"}], "a column named 1"),
        ({"train": ["a"], "test": ["b"]}, "one split"),
        (b"bytes", "cannot be a bytes"),
        (7, "cannot be a int"),
        ([{"text": "a", "x": {(1, 2): 3}}], "Column 'x' of memory:0 cannot be kept"),
        ([{"text": "a", "x": "\udc80"}], "half a surrogate pair"),
        (["fine text", "\ud800 x"], "memory:1 has half a surrogate pair at character 0"),
    ],
)
def test_a_bad_object_is_named(corpus: Any, said: str) -> None:
    error = refused(corpus)
    assert error.kind is ErrorKind.INVALID_CORPUS
    assert said in str(error)


def test_tables_are_not_taken_for_their_column_names() -> None:
    class Frame(list[str]):
        def iterrows(self) -> None: ...

    assert "records" in str(refused(Frame(["text", "a label"])))


@pytest.mark.parametrize("corpus", [[], ()])
def test_an_empty_list_is_an_empty_corpus(corpus: Any) -> None:
    assert refused(corpus).kind is ErrorKind.EMPTY_CORPUS


def test_an_iterator_is_read_once_and_says_so() -> None:
    corpus = open_corpus(text for text in ["a", "b"])
    assert len(list(corpus)) == 2
    with pytest.raises(InvalidInput, match="read already"):
        list(corpus)


def test_values_that_are_no_scalars_become_json_text() -> None:
    values = {
        "list": [1, {"a": None}],
        "array": np.array([1.5, 2.0]),
        "date": datetime.date(2026, 1, 2),
        "dates": [datetime.date(2026, 1, 2)],
        "decimal": Decimal("1.50"),
        "bytes": b"\x01\xff",
        "nan": float("nan"),
        "flag": np.bool_(True),
        "wide": 2**80,
    }
    (kept,) = columns([{"text": "x", **values}])
    assert np.isnan(kept.pop("nan"))
    assert kept == {
        "list": '[1, {"a": null}]',
        "array": "[1.5, 2.0]",
        "date": "2026-01-02",
        "dates": '["2026-01-02"]',
        "decimal": "1.50",
        "bytes": "01ff",
        "flag": True,
        "wide": 2**80,
    }
    assert kept["flag"] is True


def test_a_document_has_a_text_or_ids() -> None:
    for text, ids in [(None, None), ("a", np.array([1]))]:
        with pytest.raises(InvalidInput):
            Document(text, ids, "x")


def test_documents_are_read_when_asked_for() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "a text"

    stream = iter(open_corpus(endless()))
    assert [next(stream).text for _ in range(3)] == ["a text"] * 3
    assert taken == 3


def test_files_are_streamed(tmp_path: Path) -> None:
    text = "word " * 2000
    write_lines(tmp_path / "a.jsonl", *({"text": text} for _ in range(400)))
    rows = pa.table({"text": [text + str(row) for row in range(4000)]})
    parquet.write_table(rows, tmp_path / "b.parquet", compression="none", use_dictionary=False)
    del rows
    for name, limit in [("a.jsonl", 2**20), ("b.parquet", 25 * 2**20)]:
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        arrow = 0
        for _ in open_corpus(tmp_path / name):
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1] + arrow
        tracemalloc.stop()
        assert peak < limit < (tmp_path / name).stat().st_size


# --- Tokenising ------------------------------------------------------------------------------------


def wrapped(tokenizer: FastTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast
    found: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, **options)
    return found


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: the bytes' stand-ins, then <s>, </s> and a pad token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE(dict(zip(letters, range(256), strict=True)), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(4)
    return wrapped(
        tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=8,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_texts_are_tokenised_whole_and_in_order(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 40)
    corpus = ["a long text " * 9, "", "ü", "plain", "x" * 50, "last one"] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(tokenize(open_corpus(corpus), tokenizer, vocabulary_size=259))
    assert [one.source for one in found] == [f"memory:{n}" for n in range(len(corpus))]
    assert [tokenizer.decode(one.token_ids) for one in found] == corpus
    assert all(one.token_ids.dtype == np.int32 for one in found)


@settings(max_examples=50, deadline=None)
@given(batches=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=12))
def test_batching_changes_nothing(batches: list[str]) -> None:
    tokenizer = _SHARED
    found = [
        one.token_ids.tolist()
        for one in tokenize(open_corpus(iter(batches)), tokenizer, vocabulary_size=259)
    ]
    alone = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in batches]
    assert found == alone


_SHARED = byte_tokenizer()


def test_a_special_token_in_a_text_is_that_token(tokenizer: PreTrainedTokenizerFast) -> None:
    (found,) = tokenize(open_corpus(["<s>a </s>"]), tokenizer, vocabulary_size=259)
    assert found.token_ids[[0, -1]].tolist() == [256, 257]


def test_ids_outside_the_vocabulary_are_named() -> None:
    for bad in (300, -1, 2**40):
        with pytest.raises(InvalidInput) as caught:
            list(tokenize(open_corpus([[1, 2], [5, bad, 7]]), None, vocabulary_size=300))
        assert caught.value.kind is ErrorKind.TOKEN_OUT_OF_VOCABULARY
        message = str(caught.value)
        assert f"'memory:1' has token id {bad} at position 1" in message
        assert "300 tokens" in message
    fine = list(tokenize(open_corpus([[0, 299]]), None, vocabulary_size=300))
    assert fine[0].token_ids.tolist() == [0, 299]


def test_a_tokenizer_of_another_model_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidInput, match="tokenizer that belongs to the model"):
        list(tokenize(open_corpus(["some text"]), tokenizer, vocabulary_size=20))


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidInput, match="without a tokenizer") as caught:
        list(tokenize(open_corpus(["some text"]), None, vocabulary_size=20))
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_the_bos_policy_is_decided(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = wrapped(FastTokenizer(models.BPE()))
    assert resolve_bos("auto", tokenizer) == ("document", 256)
    assert resolve_bos("sequence", tokenizer) == ("sequence", 256)
    assert resolve_bos("none", tokenizer) == ("none", None)
    assert resolve_bos("auto", bare) == resolve_bos("auto", None) == ("none", None)
    for policy, owner in [("document", bare), ("sequence", None), ("always", tokenizer)]:
        with pytest.raises(InvalidInput) as caught:
            resolve_bos(policy, owner)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_special_tokens_are_those_the_model_knows(tokenizer: PreTrainedTokenizerFast) -> None:
    assert special_token_ids(tokenizer, 259) == (256, 257, 258)
    assert special_token_ids(tokenizer, 257) == (256,)
    assert special_token_ids(None, 257) == ()


def test_the_tokenizer_runs_a_batch_ahead_at_most(tokenizer: PreTrainedTokenizerFast) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "abc"

    stream = tokenize(open_corpus(endless()), tokenizer, vocabulary_size=259)
    next(stream)
    assert taken <= tokenization.BATCH_DOCUMENTS


# --- From a corpus to a plan -------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [None, 5])
def test_a_ragged_corpus_maps_every_row_to_its_own_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, shuffle: int | None
) -> None:
    rng = np.random.default_rng(0)
    words = ["alpha", "bé", "c", " ", "\n", "delta-delta"]
    corpus = [
        {"text": "".join(rng.choice(words, rng.integers(0, 40))), "source": f"s{number}"}
        for number in range(60)
    ]
    bos, bos_token_id = resolve_bos("auto", tokenizer)
    config = PlanConfig(
        context=32,
        vocabulary_size=259,
        segment_rows=512,
        batch_tokens=128,
        bos=bos,
        bos_token_id=bos_token_id,
        special_token_ids=special_token_ids(tokenizer, 259),
        shuffle=shuffle,
    )
    documents = tokenize(open_corpus(corpus), tokenizer, vocabulary_size=259)
    made = build_plan(LocalBlobs(tmp_path), config, documents, [], append=False).created
    assert made is not None
    kept = [record for record in corpus if record["text"]]
    table = made.documents()
    assert table["source_"].to_pylist() == [record["source"] for record in kept]
    pieces = []
    for number in range(made.n_segments):
        segment = made.segment(number)
        assert segment.special[segment.positions == 0].all()
        pieces += [
            (
                int(segment.document[index]),
                int(segment.start[index]),
                segment.sequence_token_ids(index),
            )
            for index in range(segment.n_sequences)
        ]
    joined = {number: list[int]() for number in range(len(kept))}
    for number, start, ids in sorted(pieces, key=lambda piece: piece[:2]):
        assert start == len(joined[number])
        joined[number] += ids.tolist()
    for number, record in enumerate(kept):
        assert joined[number][0] == bos_token_id
        assert tokenizer.decode(joined[number][1:]) == record["text"]


def test_a_corpus_of_empty_documents_is_an_empty_corpus(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    config = PlanConfig(context=8, vocabulary_size=259, segment_rows=512, batch_tokens=64)
    documents = tokenize(open_corpus(tmp_path), tokenizer, vocabulary_size=259)
    with pytest.raises(InvalidInput, match="1 documents are empty") as caught:
        build_plan(LocalBlobs(tmp_path / "store"), config, documents, [], append=False)
    assert caught.value.kind is ErrorKind.EMPTY_CORPUS
