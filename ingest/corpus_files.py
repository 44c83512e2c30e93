"""Files of a corpus: which there are, what they are called, how each kind is read.

A name is the path below the folder that all files of the corpus share, so no absolute
path gets into a store and a corpus that was moved keeps its names.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from actstore.ingest.documents import TOKEN_COLUMN, Document, RecordFields, invalid_corpus
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["find_files", "names_files", "read_files"]

PARQUET_ROWS = 128
"""Rows of a Parquet file in memory at once."""

_BOM = b"\xef\xbb\xbf"
_LONGEST_PATH = 4096


def names_files(item: str) -> bool:
    """Whether a string is, or was surely meant to be, a path or a glob."""
    if len(item) > _LONGEST_PATH or not item.isprintable() or not item:
        return False
    if os.path.exists(item) or (glob.has_magic(item) and _matches(item)):
        return True
    plain = not any(map(str.isspace, item))
    suffix = os.path.splitext(item)[1]
    return plain and ("/" in item or (glob.has_magic(item) and len(item) > 1) or suffix in _KNOWN)


def find_files(patterns: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths and globs name, absolute, each once, in the order given.

    A folder stands for all regular files below it, a glob for the files (not folders) that
    it matches, both sorted.

    Raises:
        InvalidInput: one of them names no file.
    """
    found: dict[Path, None] = {}
    for item in patterns:
        pattern = os.fspath(item)
        text = os.path.expanduser(pattern)
        if os.path.isdir(text):
            files = sorted(path for path in Path(text).rglob("*") if path.is_file())
        elif os.path.isfile(text):
            files = [Path(text)]
        else:
            files = _matches(text)
        if not files:
            shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}…"
            raise InvalidInput(
                f"No file matches {shown!r}. Check the path; a text itself is given in an "
                "iterator: iter([text]).",
                kind=ErrorKind.EMPTY_CORPUS,
            )
        found.update(dict.fromkeys(Path(os.path.abspath(path)) for path in files))
    return list(found)


def read_files(files: Sequence[Path], fields: RecordFields) -> Iterator[Document]:
    """The documents of files, one file after the other, none held in memory as a whole.

    ``.jsonl``, ``.ndjson`` and ``.json`` have one object a line, ``.parquet`` one document
    a row; any other file is one document.

    Raises:
        InvalidInput: a file cannot be read, is not UTF-8, or lacks the text column.
    """
    shared = os.path.commonpath([path.parent for path in files])
    for path in files:
        # A file name may be no valid text; what names a document in a store must be.
        name = os.fsencode(path.relative_to(shared).as_posix()).decode(errors="replace")
        read = _READERS.get(path.suffix.lower(), _read_text)
        try:
            yield from read(path, name, fields)
        except (OSError, pa.ArrowException) as error:
            raise invalid_corpus(f"Cannot read {name}: {error}") from error


def _matches(pattern: str) -> list[Path]:
    return sorted(Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def _read_text(path: Path, name: str, fields: RecordFields) -> Iterator[Document]:
    data = path.read_bytes()
    yield Document(_decode(data, name, 0), None, name)


def _read_lines(path: Path, name: str, fields: RecordFields) -> Iterator[Document]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{name}:{number}"
            text = _decode(line, name, offset)
            offset += len(line)
            if text.isspace() or not text:
                continue
            try:
                record: Any = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise invalid_corpus(
                    f"{place} is not JSON: {error}. The file must have one object a line."
                ) from error
            if not isinstance(record, dict):
                raise invalid_corpus(
                    f"{place} holds a {type(record).__name__}; the file must have one object a line."
                )
            yield fields.document(record, place)


def _read_parquet(path: Path, name: str, fields: RecordFields) -> Iterator[Document]:
    # A buffered reader without read-ahead holds pages, not row groups.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        names: list[str] = file.schema_arrow.names
        fields.require_content(names, name)
        missing = [column for column in fields.columns or () if column not in names]
        if missing:
            raise invalid_corpus(
                f"{name} has no column {missing[0]!r}. Its columns: {', '.join(names)}."
            )
        kept = {*fields.kept(names), fields.text_column, TOKEN_COLUMN}
        wanted = [column for column in names if column in kept]
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=wanted, use_threads=False):
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise invalid_corpus(
                    f"{name} is not UTF-8 in rows {number + 1} to {number + len(batch)}: {error}"
                ) from error
            for record in records:
                number += 1
                yield fields.document(record, f"{name}:{number}")


def _decode(data: bytes, name: str, offset: int) -> str:
    # A byte-order mark says how a file is encoded and is no part of its text.
    if offset == 0 and data.startswith(_BOM):
        data, offset = data[len(_BOM) :], len(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid_corpus(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start}. Convert the file, or leave it out."
        ) from error


_READERS: dict[str, Callable[[Path, str, RecordFields], Iterator[Document]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_lines,
    ".parquet": _read_parquet,
}
_KNOWN = {*_READERS, ".txt", ".text", ".md", ".py"}
