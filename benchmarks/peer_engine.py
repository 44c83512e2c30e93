"""Our side: each question is one small entry, by the direct call and over SQL.

Also what a question reads, so that the same reads can be issued again, all at once.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from actstore.query.results import Certificate, TopK
from actstore.query.session import Store
from actstore.query.thresholds import Counts
from benchmarks.peer_corpus import NAME, Corpus
from benchmarks.peer_questions import Answer, Place, Question
from benchmarks.peer_sides import Evict

__all__ = ["EngineSide", "Read", "ReadsAtOnce", "SqlSide", "folder_bytes", "traced_reads"]

GRADIENT_NAME = "mlp_act_times_grad"

Read = tuple[str, int, int]
"""A file, an offset and a length."""


class EngineSide:
    """actstore, by its calls.

    Attributes:
        store: the open store.
    """

    name = "actstore"

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.store = Store(corpus.store)

    def answers(self, question: Question) -> bool:
        """Whether it can be asked this."""
        if question.over == "store":
            return self.corpus.layers > 1
        return not question.gradient or self.corpus.gradients is not None

    def ask(self, question: Question, place: Place) -> Answer:
        """The answer."""
        if question.over == "count":
            return np.array([self.count(place).total], np.float32)
        return np.array(self.topk(question, place).column("value"), np.float32)

    def certificate(self, question: Question, place: Place) -> Certificate:
        """How the answer is found."""
        if question.over == "count":
            return self.count(place).certificate
        return self.topk(question, place).certificate

    def topk(self, question: Question, place: Place) -> TopK:
        """The ranking with its certificate."""
        name = GRADIENT_NAME if question.gradient else NAME
        options: dict[str, Any] = {"k": question.k}
        if question.over != "store":
            options["layers"] = place.layer
        if question.over == "neuron":
            options["neurons"] = place.neuron
        if question.over == "token":
            options |= {"per": "token", "tokens": [int(self.corpus.token[place.token])]}
        if question.modulo is not None:
            options["where"] = f"document % {question.modulo} = 0"
        if question.distinct:
            options["distinct"] = "document"
        return self.store.topk(name, **options)

    def count(self, place: Place) -> Counts:
        """How many values of a neuron are above its threshold."""
        layer, neuron = place.layer, place.neuron
        return self.store.count(NAME, layers=layer, neurons=neuron, above=place.threshold)

    def forget(self, evict: Evict) -> None:
        """A store opened anew, with none of its files in memory."""
        self.close()
        self.store = Store(self.corpus.store)
        evict([self.corpus.store])

    def release(self) -> None:
        """Nothing of it is in the way."""

    def close(self) -> None:
        """Release the open files."""
        self.store.close()


_SQL = {
    "neuron": "SELECT token, value FROM {name} WHERE layer = $layer AND neuron = $neuron "
    "AND NOT special ORDER BY value DESC LIMIT {k}",
    "layer": "SELECT token, neuron, value FROM {name} WHERE layer = $layer AND NOT special "
    "ORDER BY value DESC LIMIT {k}",
    "token": "SELECT neuron, value FROM {name} WHERE layer = $layer AND token = $token "
    "ORDER BY value DESC LIMIT {k}",
    "count": "SELECT count(*) AS value FROM {name} WHERE layer = $layer AND neuron = $neuron "
    "AND NOT special AND value > $threshold",
}


class SqlSide(EngineSide):
    """actstore, by SQL over its virtual tables."""

    name = "actstore, SQL"

    def answers(self, question: Question) -> bool:
        """Whether it can be asked this."""
        is_plain = question.modulo is None and not question.distinct
        return question.over in _SQL and is_plain and super().answers(question)

    def ask(self, question: Question, place: Place) -> Answer:
        """The answer."""
        name = GRADIENT_NAME if question.gradient else NAME
        query = _SQL[question.over].format(name=name, k=question.k)
        every = asdict(place) | {"token": int(self.corpus.token[place.token])}
        values = {key: value for key, value in every.items() if f"${key}" in query}
        return np.asarray(self.store.sql(query, values).fetchnumpy()["value"], np.float32)


@contextmanager
def traced_reads() -> Iterator[list[Read]]:
    """Every ``os.pread`` and ``os.preadv`` inside, in order; DuckDB's own are not seen."""
    found: list[Read] = []
    pread, preadv = os.pread, os.preadv

    def note(descriptor: int, length: int, offset: int) -> None:
        found.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, length))

    def noted_pread(descriptor: int, length: int, offset: int) -> bytes:
        note(descriptor, length, offset)
        return pread(descriptor, length, offset)

    def noted_preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        note(descriptor, sum(len(memoryview(one).cast("B")) for one in buffers), offset)
        return preadv(descriptor, buffers, offset, flags)

    with ExitStack() as stack:
        stack.enter_context(patch.object(os, "pread", noted_pread))
        stack.enter_context(patch.object(os, "preadv", noted_preadv))
        yield found


class ReadsAtOnce:
    """The reads of a query, issued again with nothing between them.

    Args:
        reads: what to read.
        corpus: whose files they are, to evict.
    """

    def __init__(self, reads: list[Read], corpus: Corpus) -> None:
        self._corpus = corpus
        self._descriptors = {
            path: os.open(path, os.O_RDONLY) for path in {read[0] for read in reads}
        }
        self._reads = [(self._descriptors[path], offset, size) for path, offset, size in reads]
        self.count = len(reads)
        self.bytes = sum(size for _, _, size in reads)

    def forget(self, evict: Evict) -> None:
        """None of the files in memory."""
        evict([self._corpus.store])

    def release(self) -> None:
        """Nothing of it is in the way."""

    def run(self) -> None:
        """Announce all, then read all."""
        for descriptor, offset, size in self._reads:
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        for descriptor, offset, size in self._reads:
            os.pread(descriptor, size, offset)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
