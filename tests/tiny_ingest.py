"""One small ingest that many tests share: model, tokenizer, corpus, settings, and its store.

Everything is fixed by seeds and by the files under ``tests/data/corpus``, so two runs give
the same bytes. :func:`file_bytes` and :func:`snapshot_rows` say what a store consists of.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import torch
from tiny_gpt2 import tiny_gpt2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.ingest.settings import IngestSettings

CORPUS = Path(__file__).parent / "data" / "corpus"
END = "<|end|>"
SEGMENT_ROWS = 512

_MERGES = (
    ("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "th"), ("Ġ", "a"),
    ("o", "n"), ("Ġth", "e"), ("r", "e"), ("o", "u"), ("Ġ", "w"), ("an", "d"), ("Ġ", "s"),
    ("e", "n"), ("i", "t"), ("Ġ", "t"), ("Ġ", "o"), ("i", "s"), ("Ġ", "and"),
)  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, twenty merges and one special token, id 0; pieces may split a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [END, *alphabet, *("".join(merge) for merge in _MERGES)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, list(_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token=END, eos_token=END
    )
    return tokenizer


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Two layers, 24 neurons each, context 32, over the vocabulary of :func:`tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    return load_model((tiny_gpt2(seed=seed, dtype=dtype, vocab_size=len(tokenizer)), tokenizer))


def tiny_settings(**choices: Any) -> IngestSettings:
    """Segments of 512 rows and small batches, so that a small corpus makes many of both."""
    return IngestSettings(**{"segment_rows": SEGMENT_ROWS, "batch_tokens": 256, **choices})


def ingest_corpus(out: Path, **choices: Any) -> Path:
    """Ingest the corpus of the tests into ``out``."""
    ingest(tiny_model(), Corpus(str(CORPUS)), out, tiny_settings(**choices))
    return out


@cache
def _original(**choices: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="actstore-tests-"))
    atexit.register(shutil.rmtree, folder)
    return ingest_corpus(folder / "store", **choices)


def fresh_copy(out: Path, **choices: Any) -> Path:
    """A complete store of the corpus at ``out``: ingested once per process, then copied."""
    shutil.copytree(_original(**choices), out)
    return out


def file_bytes(store: Path, *, compacted: bool = True) -> dict[str, bytes]:
    """Every file that must not depend on how a store came to be, by its path inside.

    The snapshot is left out, since it is equal row by row and not byte by byte, and so are
    locks and unpublished files, which are no part of a store.

    Args:
        store: the store.
        compacted: with the indexes that compaction makes.
    """
    found = {}
    for path in sorted(store.rglob("*")):
        key = path.relative_to(store).as_posix()
        folder, _, name = key.rpartition("/")
        left_out = folder in ("catalog", "locks") or ".partial-" in name
        if path.is_file() and not left_out and (compacted or not name.startswith("index-")):
            found[key] = path.read_bytes()
    return found


def snapshot_rows(store: Path) -> dict[str, list[str]]:
    """Every row of every table and view of a store's one snapshot, and its macros."""
    (path,) = (store / "catalog").glob("*.duckdb")
    with duckdb.connect(str(path), read_only=True) as connection:
        names = connection.execute(
            "SELECT table_name FROM duckdb_tables() UNION ALL "
            "SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
        ).fetchall()
        rows = {
            name: [
                repr(row)
                for row in connection.execute(f'SELECT * FROM "{name}" ORDER BY ALL').fetchall()
            ]
            for (name,) in names
        }
        macros = connection.execute(
            "SELECT function_name, parameters, macro_definition FROM duckdb_functions() "
            "WHERE NOT internal ORDER BY ALL"
        ).fetchall()
    return {**rows, "macros": [repr(macro) for macro in macros]}


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """What differs between two stores' files, for the message of a failing test.

    Further self-checks are no difference: a worker that ends before the others replays what
    is there by then.
    """
    lines = [f"{key}: missing" for key in sorted(expected.keys() - found.keys())]
    lines += [
        f"{key}: not in the other store"
        for key in sorted(found.keys() - expected.keys())
        if not key.startswith("selfcheck/")
    ]
    lines += [
        f"{key}: other bytes"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    return lines
