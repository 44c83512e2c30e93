"""A corpus on its way into a plan: token streams, cut into sequences and digested.

The corpus is read once. Its token ids and documents wait in spools on disk, about 24
bytes a sequence stay in memory.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actstore.store.document_table import DocumentRows, Scalar
from actstore.store.plan_record import PlanConfig
from actstore.store.spool import Spool

__all__ = ["TokenStream", "TokenizedDocument", "split_document"]

REPORT_SEQUENCES = 4096
"""A stream lets its reader look in this often."""


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as the planner takes it.

    Attributes:
        token_ids: int32 ``(token,)``, without a BOS that the policy adds; a BOS that is
            there already is not doubled.
        source: where it came from.
        columns: the caller's own values.
    """

    token_ids: npt.NDArray[np.int32]
    source: str
    columns: Mapping[str, Scalar]


def split_document(
    token_ids: npt.NDArray[np.int32], config: PlanConfig
) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Split a document's stream at the context length.

    The stream is the document's tokens; after the policy ``document`` it begins with a
    BOS, after ``sequence`` it has none and every sequence begins with one of its own.
    Either way a BOS that the document begins with counts as the policy's.

    Args:
        token_ids: the document's tokens, int32 ``(token,)``.
        config: context, stride and policy.

    Yields:
        The offset in the stream of a sequence's first token of the document, and the
        sequence's token ids, int32 ``(length,)``. Nothing for an empty document.
    """
    yield from _sequences(_document_stream(token_ids, config), config)


class TokenStream:
    """A corpus being read: ids and documents on disk, a few numbers per sequence here.

    Args:
        folder: where the spools may lie.
        config: how documents are cut, and the limit.
        marks: numbers of sequences after which the digest is kept.

    Attributes:
        ids: int32 token ids of all sequences, back to back.
        rows: the documents that have a sequence.
        lengths: tokens of each sequence.
        starts: offset of each sequence in its document's stream.
        documents: number of each sequence's document among ``rows``.
        rolling: first 8 bytes of the digest after each sequence, little-endian.
        digests: sequences -> digest in hex, at the marks that were reached.
        tokens: tokens of all sequences.
        dropped: documents that have no token of their own.
        limited: whether the limit ended the reading.
    """

    def __init__(self, folder: Path, config: PlanConfig, marks: set[int]) -> None:
        self._config = config
        self._marks = marks
        self._hash = hashlib.sha256()
        self.ids = Spool(folder)
        self.rows = DocumentRows(folder)
        self.lengths, self.starts = array("i"), array("i")
        self.documents, self.rolling = array("q"), array("Q")
        self.digests: dict[int, str] = {}
        self.tokens = 0
        self.dropped = 0
        self.limited = False

    @property
    def sequences(self) -> int:
        """Sequences so far."""
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """Sha256, in hex, of the documents' columns and the sequences' ids so far."""
        return self._hash.hexdigest()

    def consume(self, documents: Iterable[TokenizedDocument]) -> Iterator[None]:
        """Read the corpus up to its end or the limit; yields every few thousand sequences."""
        limit = self._config.limit_tokens
        for document in documents:
            stream = _document_stream(document.token_ids, self._config)
            self.dropped += not len(stream)
            for start, ids in _sequences(stream, self._config):
                if self.tokens and limit is not None and self.tokens + len(ids) > limit:
                    self.limited = True
                    return
                if start == 0:
                    self._begin(document, len(stream))
                self._add(start, ids)
                if self.sequences % REPORT_SEQUENCES == 0:
                    yield
            if limit is not None and self.tokens >= limit:
                self.limited = True
                return

    def close(self) -> None:
        """Release the disk space."""
        self.ids.close()
        self.rows.close()

    def _begin(self, document: TokenizedDocument, count: int) -> None:
        self.rows.add(document.source, count, document.columns)
        # Not the source: a corpus that was moved is the same corpus.
        columns = json.dumps(dict(document.columns), sort_keys=True).encode()
        self._hash.update(b"D" + _int64(count) + _int64(len(columns)) + columns)

    def _add(self, start: int, ids: npt.NDArray[np.int32]) -> None:
        data = ids.astype("<i4", copy=False).tobytes()
        self._hash.update(b"S" + _int64(start) + _int64(len(ids)) + data)
        self.ids.write(data)
        self.lengths.append(len(ids))
        self.starts.append(start)
        self.documents.append(self.rows.count - 1)
        self.rolling.append(int.from_bytes(self._hash.copy().digest()[:8], "little"))
        self.tokens += len(ids)
        if self.sequences in self._marks:
            self.digests[self.sequences] = self.digest


def _document_stream(token_ids: npt.NDArray[np.int32], config: PlanConfig) -> npt.NDArray[np.int32]:
    if config.bos_token_id is None:
        return token_ids
    body = token_ids[int(len(token_ids) > 0 and token_ids[0] == config.bos_token_id) :]
    if config.bos == "sequence" or not len(body):
        return body
    return np.concatenate([np.array([config.bos_token_id], np.int32), body])


def _sequences(
    stream: npt.NDArray[np.int32], config: PlanConfig
) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    bos = np.array([config.bos_token_id], np.int32) if config.bos == "sequence" else None
    start = 0
    while len(stream):
        piece = stream[start : start + config.window]
        yield start, piece if bos is None else np.concatenate([bos, piece])
        if start + config.window >= len(stream):
            return
        start += config.stride


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little")
