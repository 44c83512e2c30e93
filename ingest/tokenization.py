"""Texts to token ids, in batches, through the model's own tokenizer.

The tokenizer adds no special tokens: where a BOS goes is the plan's policy, the same
for text and for ids that the caller brings.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actstore.ingest.corpus import Document
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.plan_record import BosPolicy
from actstore.store.token_stream import TokenizedDocument

__all__ = ["Tokenizer", "resolve_bos", "special_token_ids", "tokenize"]

BATCH_DOCUMENTS = 256
"""Documents tokenised at once: enough for every core, few enough to stay lazy."""

BATCH_CHARACTERS = 2**20
"""Characters tokenised at once; a longer document is a batch of its own."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of ``transformers`` have it."""

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-sequence token, if there is one."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens."""
        ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenise a list of texts; ``input_ids`` holds a list of ids for each."""
        ...


def resolve_bos(policy: str, tokenizer: Tokenizer | None) -> tuple[BosPolicy, int | None]:
    """The BOS policy of a run, and the token it puts.

    Args:
        policy: ``document`` (before each document's first token), ``sequence`` (at the
            start of each sequence), ``none``, or ``auto``: ``document`` if the tokenizer
            has a BOS token, else ``none``.
        tokenizer: None where the corpus brings token ids.

    Raises:
        InvalidInput: no such policy, or one that needs a BOS token where there is none.

    >>> resolve_bos("auto", None)
    ('none', None)
    """
    token_id = None if tokenizer is None else tokenizer.bos_token_id
    if policy == "auto":
        return ("none", None) if token_id is None else ("document", token_id)
    if policy == "none":
        return "none", None
    if policy not in ("document", "sequence"):
        raise InvalidInput(
            f"Unknown BOS policy {policy!r}. Choose document, sequence, none or auto.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    if token_id is None:
        raise InvalidInput(
            f"bos={policy!r} needs a BOS token and the tokenizer has none. Use bos='none'.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return ("document" if policy == "document" else "sequence"), token_id


def special_token_ids(tokenizer: Tokenizer | None, vocabulary_size: int) -> tuple[int, ...]:
    """The tokenizer's special tokens that the model knows, sorted.

    A tokenizer may have more: padding, say, that was never given an embedding.
    """
    ids = [] if tokenizer is None else tokenizer.all_special_ids
    return tuple(sorted({token_id for token_id in ids if 0 <= token_id < vocabulary_size}))


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer | None, *, vocabulary_size: int
) -> Iterator[TokenizedDocument]:
    """Tokenise documents lazily, a batch ahead at most; token ids pass through.

    Nothing is truncated, whatever the tokenizer's own settings. A special token spelled
    out in a text becomes that token, as everywhere with this tokenizer.

    Args:
        documents: from :func:`actstore.ingest.corpus.open_corpus`.
        tokenizer: may be None if every document has token ids.
        vocabulary_size: rows of the model's embedding.

    Raises:
        InvalidInput: a token id is outside the vocabulary, or a text has no tokenizer.
    """
    for batch in _batches(documents):
        texts = [document.text for document in batch if document.text is not None]
        encoded = iter(_encode(texts, tokenizer) if texts else [])
        for document in batch:
            ids = next(encoded) if document.token_ids is None else document.token_ids
            _check_vocabulary(ids, document.source, vocabulary_size)
            yield TokenizedDocument(ids.astype(np.int32), document.source, document.columns)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "")
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Tokenizer | None) -> list[npt.NDArray[np.int64]]:
    if tokenizer is None:
        raise InvalidInput(
            "The corpus holds text and the model came without a tokenizer. Give one, or a corpus "
            "of token ids.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # No warning about texts longer than the model: they are split afterwards.
        verbose=False,
    )
    return [np.array(ids, np.int64) for ids in encoded["input_ids"]]


def _check_vocabulary(ids: npt.NDArray[np.int64], source: str, vocabulary_size: int) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= vocabulary_size))
    if len(outside):
        position = int(outside[0])
        raise InvalidInput(
            f"Document {source!r} has token id {ids[position]} at position {position}; the "
            f"vocabulary has {vocabulary_size} tokens, 0 to {vocabulary_size - 1}. Use the "
            "tokenizer that belongs to the model.",
            kind=ErrorKind.TOKEN_OUT_OF_VOCABULARY,
        )
