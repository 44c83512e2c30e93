"""What every side is asked, and the answers by brute force.

A question is data: a side reads its fields and answers by its own means. An answer is the
values alone, float32 descending, or one count; so ties do not matter.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.peer_corpus import Corpus

__all__ = ["QUESTIONS", "Answer", "Place", "Question", "brute_force", "draw_places"]

Answer = npt.NDArray[np.float32]

_CHECKED_ROWS = 1024


@dataclass(frozen=True)
class Question:
    """One shape of query.

    Attributes:
        name: as reported.
        over: whose values are ranked: one neuron's, a layer's, the store's, one token's; or
            ``count``, how many of one neuron's values are above a threshold.
        k: answers wanted.
        modulo: only documents whose number it divides; 10 is a tenth of them.
        distinct: at most one answer of each document.
        gradient: rank the activation times its gradient.
        slow: reads everything on some side, so it is repeated less often.
    """

    name: str
    over: Literal["neuron", "layer", "store", "token", "count"]
    k: int = 20
    modulo: int | None = None
    distinct: bool = False
    gradient: bool = False

    @property
    def slow(self) -> bool:
        """Whether every value is looked at by who has no index."""
        return self.over in ("layer", "store")


QUESTIONS = (
    Question("one neuron, top 20", "neuron"),
    Question("one neuron, top 500", "neuron", k=500),
    Question("one neuron, top 20 in 10 % of documents", "neuron", modulo=10),
    Question("one neuron, top 20 in 1 % of documents", "neuron", modulo=100),
    Question("one neuron, top 20 of distinct documents", "neuron", distinct=True),
    Question("one neuron, count above its 99.9 % quantile", "count"),
    Question("one token, top 20 neurons", "token"),
    Question("one layer, top 20", "layer"),
    Question("whole store, top 20", "store"),
    Question("act x grad of one neuron, top 20", "neuron", gradient=True),
    Question("act x grad of one layer, top 20", "layer", gradient=True),
)


@dataclass(frozen=True)
class Place:
    """Whom a repetition of a question asks about.

    Attributes:
        layer, neuron: the unit.
        token: an ordinary row.
        threshold: a value of that neuron with a thousandth of its others above.
    """

    layer: int
    neuron: int
    token: int
    threshold: float


def draw_places(corpus: Corpus, count: int, seed: int) -> list[Place]:
    """Random units and tokens, the same for every side."""
    rng = np.random.default_rng(seed)
    ordinary = np.flatnonzero(~corpus.special)
    values = corpus.values()
    places = []
    for _ in range(count):
        layer, neuron = int(rng.integers(corpus.layers)), int(rng.integers(corpus.neurons))
        column = values[layer, ordinary, neuron].astype(np.float32)
        rank = max(1, len(column) // 1000)
        threshold = float(np.partition(column, -rank - 1)[-rank - 1])
        places.append(Place(layer, neuron, int(rng.choice(ordinary)), threshold))
    return places


def brute_force(corpus: Corpus, question: Question, place: Place) -> Answer:
    """The answer from the values themselves, by sorting or counting all of them."""
    allowed = corpus.allowed(question.modulo)
    if question.over == "token":
        return _greatest(_product(corpus, question, place.layer, place.token, None), question.k)
    if question.over in ("layer", "store"):
        best = np.empty(0, np.float32)
        layers = range(corpus.layers) if question.over == "store" else (place.layer,)
        for layer in layers:
            for start in range(0, corpus.rows, _CHECKED_ROWS):
                rows = slice(start, start + _CHECKED_ROWS)
                block = _product(corpus, question, layer, rows, None)[allowed[rows]]
                best = _greatest(np.concatenate([best, block.reshape(-1)]), question.k)
        return best
    column = _product(corpus, question, place.layer, slice(None), place.neuron)
    if question.over == "count":
        return np.array([np.count_nonzero(column[allowed] > place.threshold)], np.float32)
    if question.distinct:
        groups = np.full(int(corpus.document.max()) + 1, -np.inf, np.float32)
        np.maximum.at(groups, corpus.document[allowed], column[allowed])
        return _greatest(groups[np.isfinite(groups)], question.k)
    return _greatest(column[allowed], question.k)


def _product(
    corpus: Corpus, question: Question, layer: int, rows: int | slice, neuron: int | None
) -> npt.NDArray[np.float32]:
    column = slice(None) if neuron is None else neuron
    values = corpus.values()[layer, rows, column].astype(np.float32)
    if question.gradient:
        # The product of two float16 is exact in float32, so all sides agree to the bit.
        values = values * corpus.gradient_values()[layer, rows, column].astype(np.float32)
    found: npt.NDArray[np.float32] = values
    return found


def _greatest(values: npt.NDArray[np.float32], k: int) -> Answer:
    if len(values) > k:
        values = np.partition(values, -k)[-k:]
    return np.sort(values)[::-1]
