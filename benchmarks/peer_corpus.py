"""The same activations as every side reads them: our store, a raw file, Parquet rows.

The raw file is float16 ``(layer, row, neuron)`` in C order, what ``np.memmap`` and a torch
loader read. Parquet holds one row per value, ``layer, neuron, sequence, position, value``,
as published activation databases do (feature, sequence, token, strength). Its rows are sorted
by neuron, one row group a neuron up to 131,072 rows and 64 neurons a file, so that a filter on
the neuron skips all others; special rows are left out, so that no query needs to join for them.
The choice is the kindest found: a list per token makes every question about a neuron read
everything, and one file of all row groups takes half as long again to plan. The same rows in
DuckDB's own format are one file, sorted alike.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.query.session import Store
from actstore.store.vocabulary import ActivationLocationType as Location
from benchmarks.stores import build_store, write_activations, write_gradients

__all__ = [
    "PARQUET",
    "Corpus",
    "corpus_of_store",
    "synthetic_corpus",
    "write_parquet",
    "write_table",
]

NAME = "mlp_post_act"
PARQUET = {"activations": "activations-*.parquet", "sequences": "sequences.parquet"}
"""Table -> its files."""

_ROW_GROUP = 2**17
_COLUMNS_AT_ONCE = 32
_FILE_NEURONS = 64
_COPIED_ROWS = 4096


@dataclass(frozen=True)
class Corpus:
    """One corpus in all its forms.

    Attributes:
        store: our store.
        raw: float16 file ``(layer, row, neuron)``.
        gradients: the same of the gradients, if the corpus has them.
        shape: layers, rows, neurons.
        token: the store's global row of every row; segments need not be full, so some are skipped.
        sequence, position, document: of every row.
        special: rows that no ranking answers with, ``(row,)``.
        parquet: folder of the Parquet files, where they were written.
    """

    store: Path
    raw: Path
    gradients: Path | None
    shape: tuple[int, int, int]
    token: npt.NDArray[np.int64]
    sequence: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    special: npt.NDArray[np.bool_]
    parquet: Path

    @property
    def table(self) -> Path:
        """Of DuckDB's own rows."""
        return self.parquet.with_suffix(".duckdb")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Number of token rows."""
        return self.shape[1]

    @property
    def neurons(self) -> int:
        """Neurons of a layer."""
        return self.shape[2]

    @property
    def raw_bytes(self) -> int:
        """Of the activations alone."""
        return 2 * self.layers * self.rows * self.neurons

    def values(self) -> np.memmap[Any, np.dtype[np.float16]]:
        """The activations, mapped."""
        return np.memmap(self.raw, np.float16, "r", shape=self.shape)

    def gradient_values(self) -> np.memmap[Any, np.dtype[np.float16]]:
        """The gradients, mapped."""
        assert self.gradients is not None
        return np.memmap(self.gradients, np.float16, "r", shape=self.shape)

    def allowed(self, modulo: int | None = None) -> npt.NDArray[np.bool_]:
        """Rows that may answer: ordinary ones, of every document or of one in ``modulo``."""
        ordinary = ~self.special
        return ordinary if modulo is None else ordinary & (self.document % modulo == 0)


def synthetic_corpus(
    folder: Path,
    rows: int,
    neurons: int,
    context: int,
    segment_rows: int,
    seed: int,
    *,
    grad: bool,
    costs: dict[str, Any],
) -> Corpus:
    """Write synthetic activations and the store of them; documents of one sequence each.

    Args:
        folder: where all of it goes.
        rows: tokens; a multiple of ``context``.
        neurons: of the one layer.
        context: tokens of every document.
        segment_rows: of the store.
        seed: of the values.
        grad: also make gradients.
        costs: gets what making the store took.
    """
    raw, gradients = folder / "raw.f16", folder / "gradients.f16" if grad else None
    write_activations(raw, rows, neurons, seed)
    shape = (1, rows, neurons)
    values = {NAME: np.memmap(raw, np.float16, "r", shape=shape)}
    if gradients is not None:
        write_gradients(gradients, rows, neurons, seed + 1)
        values[f"{NAME}/backward"] = np.memmap(gradients, np.float16, "r", shape=shape)
    started = time.perf_counter()
    store = build_store(
        folder / "store", values, [context] * (rows // context), segment_rows=segment_rows
    )
    took = 1e6 * (time.perf_counter() - started) / rows / len(values)
    costs["planned, written and described, µs per token and array"] = took
    sequence, position = np.divmod(np.arange(rows, dtype=np.int32), np.int32(context))
    return Corpus(
        store,
        raw,
        gradients,
        shape,
        np.arange(rows),
        sequence,
        position,
        sequence,
        position == 0,
        folder / "parquet",
    )


def corpus_of_store(path: Path, folder: Path) -> Corpus:
    """Write out the activations of a store that is there already, committed as a whole."""
    folder.mkdir(exist_ok=True)
    raw = folder / "raw.f16"
    with Store(path) as store:
        array = store.reader.array(Location.MLP_POST_ACT)
        layers = array.spec.layer_count
        with open(raw, "xb", buffering=0) as file:
            for layer in range(layers):
                for segment in array.segments:
                    for start in range(0, array.rows_of(segment), _COPIED_ROWS):
                        window = array.reader.window(segment, layer, start, start + _COPIED_ROWS)
                        file.write(np.ascontiguousarray(window).reshape(-1).view(np.uint8).data)
        tokens = store.sql(
            "SELECT token, sequence, position, document, special FROM tokens ORDER BY token"
        ).fetchnumpy()
        columns = {name: np.asarray(column) for name, column in tokens.items()}
        return Corpus(
            path,
            raw,
            None,
            (layers, store.n_tokens, array.spec.columns),
            columns["token"].astype(np.int64),
            columns["sequence"].astype(np.int32),
            columns["position"].astype(np.int32),
            columns["document"].astype(np.int32),
            columns["special"].astype(bool),
            folder / "parquet",
        )


def write_parquet(corpus: Corpus) -> int:
    """Write ``activations-*.parquet`` and ``sequences.parquet``; returns their bytes."""
    corpus.parquet.mkdir()
    distinct, first = np.unique(corpus.sequence, return_index=True)
    pq.write_table(
        pa.table({"sequence": distinct, "document": corpus.document[first]}),
        corpus.parquet / "sequences.parquet",
    )
    fields = [("layer", pa.int8()), ("neuron", pa.int16())]
    fields += [("sequence", pa.int32()), ("position", pa.int16()), ("value", pa.float32())]
    fields += [("grad", pa.float32())] if corpus.gradients is not None else []
    schema = pa.schema(fields)
    for layer in range(corpus.layers):
        for start in range(0, corpus.neurons, _FILE_NEURONS):
            target = corpus.parquet / f"activations-{layer:02}-{start:05}.parquet"
            stop = min(start + _FILE_NEURONS, corpus.neurons)
            # Faster to scan than float16 as it is, and hardly larger, thanks to the dictionary.
            with pq.ParquetWriter(target, schema, compression="zstd") as writer:
                for table in _tables(corpus, schema, layer, range(start, stop)):
                    writer.write_table(table, row_group_size=_ROW_GROUP)
    return sum(file.stat().st_size for file in corpus.parquet.iterdir())


def write_table(corpus: Corpus) -> int:
    """Load the Parquet rows into DuckDB's own format; returns its bytes."""
    with duckdb.connect(str(corpus.table)) as connection:
        for name, files in PARQUET.items():
            path = str(corpus.parquet / files).replace("'", "''")
            connection.execute(f"CREATE TABLE {name} AS SELECT * FROM read_parquet('{path}')")
    return corpus.table.stat().st_size


def _tables(corpus: Corpus, schema: pa.Schema, layer: int, neurons: range) -> Iterator[pa.Table]:
    """The rows of one neuron after the other."""
    ordinary = np.flatnonzero(~corpus.special)
    places = [
        pa.array(corpus.sequence[ordinary], pa.int32()),
        pa.array(corpus.position[ordinary].astype(np.int16), pa.int16()),
    ]
    arrays = [corpus.values()]
    if corpus.gradients is not None:
        arrays.append(corpus.gradient_values())
    for start in range(neurons.start, neurons.stop, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, neurons.stop)
        blocks = [
            np.ascontiguousarray(array[layer, :, start:stop].T)[:, ordinary].astype(np.float32)
            for array in arrays
        ]
        for neuron in range(start, stop):
            constants = [
                pa.array(np.full(len(ordinary), layer, np.int8)),
                pa.array(np.full(len(ordinary), neuron, np.int16)),
            ]
            values = [pa.array(block[neuron - start]) for block in blocks]
            yield pa.table([*constants, *places, *values], schema=schema)
