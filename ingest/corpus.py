"""What is ingested: files or objects in memory, as one stream of documents.

A corpus is never held in memory: a document is read when it is asked for.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from actstore.ingest.corpus_files import find_files, names_files, read_files
from actstore.ingest.documents import Document, RecordFields, as_token_ids, invalid_corpus
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["Corpus", "Document", "open_corpus"]


class Corpus:
    """A stream of documents; iterating reads it from its beginning.

    Args:
        description: what it is, for people.
        read: starts the stream.
        once: whether the stream can be read a single time only.
    """

    def __init__(
        self, description: str, read: Callable[[], Iterator[Document]], *, once: bool = False
    ) -> None:
        self.description = description
        self.once = once
        self._read = read
        self._was_read = False

    def __iter__(self) -> Iterator[Document]:
        """Read the corpus.

        Raises:
            InvalidInput: it is an iterator that was read before; or what a document of it
                is refused for, when the stream comes to it.
        """
        if self.once and self._was_read:
            raise invalid_corpus(
                "The corpus is an iterator and has been read already. Give a list, or an object "
                "that can be iterated again."
            )
        self._was_read = True
        return self._read()

    def __repr__(self) -> str:
        return f"Corpus({self.description})"


def open_corpus(
    corpus: Any, *, text_column: str = "text", columns: str | Sequence[str] | None = None
) -> Corpus:
    """Make a stream of documents of what a caller calls a corpus.

    * A string or a path names files: a file, a folder (all regular files below it) or a
      glob. ``.jsonl``, ``.ndjson`` and ``.json`` have one object a line, ``.parquet`` one
      document a row; any other file is one document in UTF-8.
    * A list names files if it holds paths, or strings that all name files.
    * Any other iterable holds texts, records (with ``text_column`` or ``token_ids``) or
      lists of token ids; ``datasets.Dataset`` is one of records. An iterator of strings
      always holds texts.

    Args:
        corpus: as above.
        text_column: the member of a record that holds its text.
        columns: members of a record to keep; None keeps all others. Values are text,
            numbers, bools or None; anything else is kept as JSON text.

    Raises:
        InvalidInput: the corpus is empty, or of no such form.
    """
    names = (columns,) if isinstance(columns, str) else columns
    fields = RecordFields(text_column, None if names is None else tuple(names))
    if isinstance(corpus, str | os.PathLike):
        return _file_corpus([corpus], fields)
    if isinstance(corpus, list | tuple):
        if not corpus:
            raise InvalidInput(
                "The corpus is an empty list. Give paths, texts, records or token ids.",
                kind=ErrorKind.EMPTY_CORPUS,
            )
        if all(isinstance(item, os.PathLike) for item in corpus) or all(
            isinstance(item, os.PathLike) or (isinstance(item, str) and names_files(item))
            for item in corpus
        ):
            return _file_corpus(corpus, fields)
    if isinstance(corpus, Mapping):
        raise invalid_corpus(
            f"The corpus is a {type(corpus).__name__} with {', '.join(map(repr, corpus))}. Give "
            "one split of it, or a list of records."
        )
    if hasattr(corpus, "iterrows") or hasattr(corpus, "iter_rows"):
        # Iterating such a table gives its columns, which would pass for documents.
        raise invalid_corpus(
            f"The corpus is a {type(corpus).__name__}. Give its rows as records: "
            '`frame.to_dict("records")` or `frame.to_dicts()`.'
        )
    if isinstance(corpus, bytes | bytearray) or not isinstance(corpus, Iterable):
        raise invalid_corpus(
            f"A corpus cannot be a {type(corpus).__name__}. Give paths, texts, records or lists of "
            "token ids."
        )
    return Corpus(
        f"documents of a {type(corpus).__name__}",
        lambda: _read_items(corpus, fields),
        once=iter(corpus) is corpus,
    )


def _file_corpus(patterns: Sequence[str | os.PathLike[str]], fields: RecordFields) -> Corpus:
    files = find_files(patterns)
    noun = "file" if len(files) == 1 else "files"
    return Corpus(f"{len(files)} {noun}", lambda: read_files(files, fields))


def _read_items(corpus: Iterable[Any], fields: RecordFields) -> Iterator[Document]:
    expected = None
    for number, item in enumerate(corpus):
        source = f"memory:{number}"
        form = _form(item)
        if form is None:
            raise invalid_corpus(
                f"Document {number} of the corpus is a {type(item).__name__}; documents are texts, "
                "records or lists of token ids."
            )
        expected = expected or form
        if form != expected:
            raise invalid_corpus(
                f"Document {number} of the corpus is {form}, the first is {expected}. All must be "
                "alike."
            )
        if form == "text":
            yield Document(str(item), None, source)
        elif form == "a record":
            yield fields.document(item, source)
        else:
            yield Document(None, as_token_ids(item, source), source)


def _form(item: Any) -> str | None:
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        return "a record"
    if isinstance(item, list | tuple | range | array | np.ndarray) or hasattr(item, "__array__"):
        return "a list of token ids"
    return None
