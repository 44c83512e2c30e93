"""The peers: memmap + numpy, a torch streaming scan, zarr-python, DuckDB over Parquet.

Each is written as somebody who knows the library would write it for these questions. They
are handed the rows that a filter allows; only DuckDB joins for them, as it would have to.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import duckdb
import numpy as np
import numpy.typing as npt
import torch
import zarr

from benchmarks.peer_corpus import NAME, PARQUET, Corpus
from benchmarks.peer_questions import Answer, Place, Question

__all__ = ["DuckDbSide", "DuckDbTableSide", "MemmapSide", "Side", "TorchSide", "ZarrSide"]

Evict = Callable[[Iterable[Path]], None]

_BLOCK_CELLS = 2**22


class Side(Protocol):
    """Somebody who answers questions.

    Attributes:
        name: as reported.
    """

    name: str

    def answers(self, question: Question) -> bool:
        """Whether it can be asked this."""

    def ask(self, question: Question, place: Place) -> Answer:
        """The answer."""

    def forget(self, evict: Evict) -> None:
        """Open anew, with none of its files in memory."""

    def release(self) -> None:
        """Give up what would keep its files in memory."""

    def close(self) -> None:
        """Release what is open."""


class _ArraySide:
    """A side that gets columns, rows and blocks of an array and ranks them with numpy."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._allowed = {modulo: corpus.allowed(modulo) for modulo in (None, 10, 100)}

    def answers(self, question: Question) -> bool:
        if question.over == "store":
            return self.corpus.layers > 1
        return not question.gradient or self.corpus.gradients is not None

    def release(self) -> None:
        """Nothing of it is in the way."""

    def column(self, layer: int, neuron: int, gradient: bool) -> npt.NDArray[Any]:
        """All values of one neuron."""
        raise NotImplementedError

    def rows(self, layer: int, start: int, stop: int, gradient: bool) -> npt.NDArray[Any]:
        """Some rows of a layer, ``(row, neuron)``."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """Rows of a block that suits the side."""
        return max(1, _BLOCK_CELLS // self.corpus.neurons)

    def ask(self, question: Question, place: Place) -> Answer:
        layer, gradient = place.layer, question.gradient
        if question.over == "token":
            return _best(self._float32(layer, place.token, place.token + 1, gradient), question.k)
        if question.over == "layer":
            return self._scan((layer,), question)
        if question.over == "store":
            return self._scan(range(self.corpus.layers), question)
        values = self.column(layer, place.neuron, False).astype(np.float32)
        if gradient:
            values *= self.column(layer, place.neuron, True)
        allowed = self._allowed[question.modulo]
        if question.over == "count":
            above = np.count_nonzero((values > place.threshold) & allowed)
            return np.array([above], np.float32)
        values[~allowed] = -np.inf
        if question.distinct:
            starts = np.flatnonzero(np.diff(self.corpus.document, prepend=-1))
            values = np.maximum.reduceat(values, starts)
        return _best(values, question.k)

    def _scan(self, layers: Iterable[int], question: Question) -> Answer:
        best = np.empty(0, np.float32)
        special = self.corpus.special
        for layer in layers:
            for start in range(0, self.corpus.rows, self.step):
                stop = min(start + self.step, self.corpus.rows)
                values = self._float32(layer, start, stop, question.gradient)
                values[special[start:stop]] = -np.inf
                # Looking for what beats the worst so far is several times faster than sorting.
                flat = values[values > best[-1]] if len(best) == question.k else values.reshape(-1)
                best = _best(np.concatenate([best, flat]), question.k)
        return best

    def _float32(
        self, layer: int, start: int, stop: int, gradient: bool
    ) -> npt.NDArray[np.float32]:
        values = self.rows(layer, start, stop, False).astype(np.float32)
        if gradient:
            values *= self.rows(layer, start, stop, True)
        return values


class MemmapSide(_ArraySide):
    """The raw file, mapped.

    Args:
        corpus: whose file.
        repeats: also answer what takes as long as another question does.
    """

    name = "memmap + numpy"

    def __init__(self, corpus: Corpus, *, repeats: bool = True) -> None:
        super().__init__(corpus)
        self._repeats = repeats
        self._arrays: list[Any] = []

    def answers(self, question: Question) -> bool:
        is_repeat = question.k > 20 or question.modulo == 100
        return super().answers(question) and (self._repeats or not is_repeat)

    def column(self, layer: int, neuron: int, gradient: bool) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self._mapped(gradient)[layer, :, neuron]
        return found

    def rows(self, layer: int, start: int, stop: int, gradient: bool) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self._mapped(gradient)[layer, start:stop]
        return found

    def forget(self, evict: Evict) -> None:
        self.release()
        evict([self.corpus.raw, *([self.corpus.gradients] if self.corpus.gradients else [])])
        self._mapped(False)

    def release(self) -> None:
        # Mapped pages cannot be evicted, not even when another side reads the file.
        self._arrays = []

    def close(self) -> None:
        self.release()

    def _mapped(self, gradient: bool) -> Any:
        if not self._arrays:
            self._arrays = [self.corpus.values()]
            if self.corpus.gradients is not None:
                self._arrays.append(self.corpus.gradient_values())
        return self._arrays[gradient]


class ZarrSide(_ArraySide):
    """zarr-python on our own arrays, which are ordinary Zarr."""

    name = "zarr-python"

    def __init__(self, corpus: Corpus) -> None:
        super().__init__(corpus)
        self._open()

    @property
    def step(self) -> int:
        """A chunk's rows: less would read each chunk several times."""
        return 4096

    def column(self, layer: int, neuron: int, gradient: bool) -> npt.NDArray[Any]:
        tokens = self.corpus.token
        whole = np.asarray(self._arrays[gradient][layer, : tokens[-1] + 1, neuron])
        return whole if len(whole) == len(tokens) else whole[tokens]

    def rows(self, layer: int, start: int, stop: int, gradient: bool) -> npt.NDArray[Any]:
        tokens = self.corpus.token[start:stop]
        whole = np.asarray(self._arrays[gradient][layer, tokens[0] : tokens[-1] + 1])
        return whole if len(whole) == len(tokens) else whole[tokens - tokens[0]]

    def forget(self, evict: Evict) -> None:
        self._open()
        evict([self.corpus.store])

    def close(self) -> None:
        self._arrays: list[Any] = []

    def _open(self) -> None:
        passes = ["forward", *(["backward"] if self.corpus.gradients is not None else [])]
        folder = self.corpus.store / "arrays" / NAME
        self._arrays = [zarr.open_array(folder / one, mode="r") for one in passes]


class TorchSide:
    """A torch loop over the raw file that streams every byte of the layers concerned."""

    name = "torch streaming"

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._allowed = {
            modulo: torch.from_numpy(corpus.allowed(modulo)) for modulo in (None, 10, 100)
        }
        self._document = torch.from_numpy(corpus.document.astype(np.int64))
        self._step = max(1, 4 * _BLOCK_CELLS // corpus.neurons)

    def answers(self, question: Question) -> bool:
        if question.over == "store":
            return self.corpus.layers > 1
        return not question.gradient or self.corpus.gradients is not None

    def ask(self, question: Question, place: Place) -> Answer:
        if question.over == "token":
            one = self._stream(question, place.layer, place.token, place.token + 1, slice(None))
            (_, row), *_ = one
            found: Answer = row[0].topk(question.k).values.numpy()
            return found
        layers = range(self.corpus.layers) if question.over == "store" else (place.layer,)
        kept: list[torch.Tensor] = []
        columns = slice(None) if question.over in ("layer", "store") else place.neuron
        for layer in layers:
            for rows, part in self._stream(question, layer, 0, self.corpus.rows, columns):
                allowed = self._allowed[question.modulo][rows]
                if question.over == "count":
                    kept.append(((part > place.threshold) & allowed).sum()[None])
                    continue
                part[~allowed] = -torch.inf
                flat = part.reshape(-1)
                if question.distinct:
                    flat, _ = self._by_document(flat, rows)
                kept.append(flat if question.distinct else flat.topk(min(question.k, len(flat)))[0])
        joined = torch.cat(kept)
        if question.over == "count":
            answer: Answer = joined.sum()[None].float().numpy()
            return answer
        if question.distinct:
            return self._join_documents(joined, question.k)
        best: Answer = joined.topk(question.k).values.numpy()
        return best

    def forget(self, evict: Evict) -> None:
        evict([self.corpus.raw, *([self.corpus.gradients] if self.corpus.gradients else [])])

    def release(self) -> None:
        """Nothing is kept open."""

    def close(self) -> None:
        """Nothing is kept open."""

    def _by_document(self, values: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The greatest value of every document of the corpus; minus infinity where none."""
        count = int(self._document[-1]) + 1
        groups = torch.full((count,), -torch.inf)
        groups.scatter_reduce_(0, self._document[rows], values, "amax")
        return groups, self._document[rows]

    def _join_documents(self, joined: torch.Tensor, k: int) -> Answer:
        count = int(self._document[-1]) + 1
        best = joined.reshape(-1, count).amax(0)
        found: Answer = best[torch.isfinite(best)].sort(descending=True).values[:k].numpy()
        return found

    def _stream(
        self, question: Question, layer: int, start: int, stop: int, columns: int | slice
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        width = self.corpus.neurons
        files = [self.corpus.raw]
        if question.gradient and self.corpus.gradients is not None:
            files.append(self.corpus.gradients)
        for first in range(start, stop, self._step):
            last = min(first + self._step, stop)
            values = None
            for file in files:
                data = np.fromfile(
                    file,
                    np.float16,
                    (last - first) * width,
                    offset=2 * (layer * self.corpus.rows + first) * width,
                )
                part = torch.from_numpy(data).reshape(-1, width)[:, columns].float()
                values = part if values is None else values.mul_(part)
            assert values is not None
            yield slice(first, last), values


class DuckDbSide:
    """DuckDB over Parquet rows, one row per value, sorted by neuron."""

    name = "DuckDB over Parquet"

    def __init__(self, corpus: Corpus, threads: int | None = None) -> None:
        self.corpus = corpus
        self._threads = threads
        self._open()

    def answers(self, question: Question) -> bool:
        if question.over == "store":
            return self.corpus.layers > 1
        return not question.gradient or self.corpus.gradients is not None

    def ask(self, question: Question, place: Place) -> Answer:
        value = "value * grad AS value" if question.gradient else "value"
        rows, where = "activations", ["layer = $layer"]
        names = {"layer": place.layer}
        if question.over == "store":
            where, names = ["true"], {}
        elif question.over == "token":
            where += ["sequence = $sequence", "position = $position"]
            names["sequence"] = int(self.corpus.sequence[place.token])
            names["position"] = int(self.corpus.position[place.token])
        elif question.over != "layer":
            where.append("neuron = $neuron")
            names["neuron"] = place.neuron
        if question.modulo is not None or question.distinct:
            rows += " JOIN sequences USING (sequence)"
        if question.modulo is not None:
            where.append(f"document % {question.modulo} = 0")
        condition = " AND ".join(where)
        if question.over == "count":
            query = f"SELECT count(*) AS value FROM {rows} WHERE {condition} AND value > $limit"
            found = self._connection.execute(query, {**names, "limit": place.threshold})
        elif question.distinct:
            query = f"SELECT max(value) AS value FROM {rows} WHERE {condition} GROUP BY document"
            query += f" ORDER BY value DESC LIMIT {question.k}"
            found = self._connection.execute(query, names)
        else:
            query = f"SELECT {value} FROM {rows} WHERE {condition} ORDER BY 1 DESC"
            found = self._connection.execute(f"{query} LIMIT {question.k}", names)
        return np.asarray(found.fetchnumpy()["value"], np.float32)

    def forget(self, evict: Evict) -> None:
        self.close()
        self._open()
        evict([self.corpus.parquet])

    def release(self) -> None:
        """Nothing of it is in the way."""

    def close(self) -> None:
        self._connection.close()

    def _open(self) -> None:
        self._connection = duckdb.connect()
        if self._threads is not None:
            self._connection.execute(f"SET threads={self._threads}")
        # Thousands of row groups: parsing the footer again would be most of a short query.
        self._connection.execute("SET parquet_metadata_cache=true")
        for name, files in PARQUET.items():
            path = str(self.corpus.parquet / files).replace("'", "''")
            self._connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{path}')")


class DuckDbTableSide(DuckDbSide):
    """The same rows in a DuckDB file of their own, sorted alike."""

    name = "DuckDB's own file"

    def forget(self, evict: Evict) -> None:
        self.close()
        self._open()
        evict([self.corpus.table])

    def _open(self) -> None:
        self._connection = duckdb.connect(str(self.corpus.table), read_only=True)
        if self._threads is not None:
            self._connection.execute(f"SET threads={self._threads}")


def _best(values: npt.NDArray[np.float32], k: int) -> Answer:
    flat = values.reshape(-1)
    if len(flat) > k:
        flat = np.partition(flat, -k)[-k:]
    found = np.sort(flat)[::-1]
    return found[np.isfinite(found)]
