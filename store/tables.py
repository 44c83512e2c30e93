"""The tables of a snapshot, filled from records, plans, parts, weights and indexes.

Every table is inserted in the order of its first columns, so a look-up by them touches
few row groups. What a table holds follows from the commit records alone: two snapshots
of one coverage are equal row by row.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from crc32c import crc32c
from pyarrow import parquet

from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.histogram_tables import current_indexes, histogram_rows
from actstore.store.index import UnitIndex, open_unit_index
from actstore.store.keys import highest_key, key_values, lowest_key
from actstore.store.latent_reader import open_latent_sets
from actstore.store.latent_tables import latent_rows, top_latent_rows
from actstore.store.layout import StoredDtype
from actstore.store.model.pieces import vocabulary_pieces
from actstore.store.model.readout import READOUT_KEY, read_readout
from actstore.store.model.weights import ModelSnapshot, open_model
from actstore.store.parts import part_path
from actstore.store.publishing import BASE_SET
from actstore.store.reader import DescribedUnits, StoreReader
from actstore.store.unit_grid import UnitGrid
from actstore.store.unit_histograms import UnitHistograms
from actstore.store.unit_lists import TAILS
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["LISTED_ENTRIES", "fill_tables"]

LISTED_ENTRIES = 32
"""Proven entries per unit and tail in ``top_activations``; the index file has 128."""

_INSERTED_ROWS = 2**18
"""Rows that go into a table at once, about: some 10 MB."""

_NEURON_STATISTICS = ("count", "mean", "variance", "skewness", "kurtosis", "max", "min")

_DEFINITIONS = """
CREATE TABLE segments (
    segment INTEGER, plan INTEGER, first_token BIGINT, rows INTEGER, committed BOOLEAN
);
CREATE TABLE sequences (
    sequence BIGINT, document BIGINT, first_token BIGINT, length INTEGER, segment INTEGER
);
CREATE TABLE token_rows (
    token BIGINT, sequence BIGINT, position INTEGER, token_id INTEGER, special BOOLEAN,
    document BIGINT
);
CREATE TABLE vocabulary (token_id INTEGER, piece VARCHAR, text VARCHAR, special BOOLEAN);
CREATE TABLE layers (layer INTEGER);
CREATE TABLE neurons (
    layer INTEGER, neuron INTEGER,
    write_norm DOUBLE, read_norm DOUBLE, bias DOUBLE,
    max FLOAT, min FLOAT, mean DOUBLE, variance DOUBLE, skewness DOUBLE, kurtosis DOUBLE,
    firing_rate DOUBLE, dead BOOLEAN, count BIGINT,
    promoted VARCHAR[], suppressed VARCHAR[]
);
CREATE TABLE heads (layer INTEGER, head INTEGER, write_norm DOUBLE, value_output_norm DOUBLE);
CREATE TABLE latents (
    layer INTEGER, latent INTEGER, "set" VARCHAR, location VARCHAR,
    firing_rate DOUBLE, max FLOAT, min FLOAT, mean DOUBLE, variance DOUBLE, skewness DOUBLE,
    kurtosis DOUBLE, count BIGINT, active BIGINT, special_max FLOAT,
    decoder_norm DOUBLE, write_norm DOUBLE, dead BOOLEAN
);
CREATE TABLE top_latents (
    "set" VARCHAR, location VARCHAR, layer INTEGER, latent INTEGER, rank INTEGER, token BIGINT,
    value FLOAT
);
CREATE TABLE statistics (
    location VARCHAR, pass VARCHAR, layer INTEGER, unit INTEGER,
    count BIGINT, positive BIGINT, nan BIGINT,
    mean DOUBLE, variance DOUBLE, skewness DOUBLE, kurtosis DOUBLE,
    max FLOAT, min FLOAT, special_max FLOAT, special_min FLOAT
);
CREATE TABLE histograms (
    location VARCHAR, pass VARCHAR, layer INTEGER, unit INTEGER,
    bin INTEGER, low FLOAT, high FLOAT, count BIGINT
);
CREATE TABLE top_activations (
    location VARCHAR, pass VARCHAR, layer INTEGER, unit INTEGER, tail VARCHAR, rank INTEGER,
    token BIGINT, value FLOAT
);
CREATE VIEW tokens AS
    SELECT r.token, r.sequence, r.position, r.token_id, v.text, v.piece, r.special, r.document
    FROM token_rows r LEFT JOIN vocabulary v ON v.token_id = r.token_id;
-- A macro's parameter may not share a column's name, so the one with clear names wraps another.
CREATE MACRO context_rows(_row, _before, _after) AS TABLE
    SELECT t.*, t.token = _row AS focus
    FROM tokens t
    WHERE t.sequence = (SELECT r.sequence FROM token_rows r WHERE r.token = _row)
        AND t.token BETWEEN _row - _before AND _row + _after
    ORDER BY t.token;
CREATE MACRO context(token, before, after) AS TABLE FROM context_rows(token, before, after);
"""


def fill_tables(connection: duckdb.DuckDBPyConnection, reader: StoreReader) -> None:
    """Create and fill every table of a snapshot in an empty database.

    ``dead`` neurons were above zero at no ordinary row; ``firing_rate`` is the share of
    ordinary values above zero. Of latents, both speak of values that are not zero. NaN is
    never a value of these tables: it shows as NULL.

    Args:
        connection: of an empty database.
        reader: the store; what it sees as committed is what the tables hold.

    Raises:
        StoreDamaged: a file that the tables are made from fails its checksum.
    """
    connection.execute(_DEFINITIONS)
    _insert(connection, "segments", _segments(reader))
    _insert(connection, "sequences", _sequences(reader))
    _insert(connection, "token_rows", (read_part(reader, number) for number in reader.segments))
    _create_documents(connection, reader)
    vocabulary = _vocabulary(reader)
    _insert(connection, "vocabulary", [vocabulary])

    zoned = [array for array in reader.arrays.values() if array.spec.has_zones]
    indexes = {array.spec.key: open_unit_index(reader, array) for array in zoned}
    current = current_indexes(reader)
    described: list[DescribedUnits] = [*zoned, *(one for one in current if one.spec.has_zones)]
    for one in described[len(zoned) :]:
        indexes[one.spec.key] = open_unit_index(reader, one)
    _insert(connection, "statistics", _statistics(described, indexes))
    _insert(connection, "top_activations", _top_activations(described, indexes))
    for one in (one for one in current if one.spec.has_histogram):
        counted = UnitHistograms(reader, one)
        layers_of = range(one.spec.layer_count)
        _insert(connection, "histograms", (histogram_rows(counted, layer) for layer in layers_of))

    dimensions, readout = open_model(reader.root).dimensions, _readout(reader)
    layers = range(dimensions.n_layers)
    mlp = reader.arrays.get((ActivationLocationType.MLP_POST_ACT, PassType.FORWARD))
    activations = None if mlp is None else indexes[mlp.spec.key]
    texts = vocabulary["text"]
    _insert(connection, "layers", [{"layer": np.array(layers)}])
    _insert(
        connection,
        "neurons",
        (_neurons(activations, readout, texts, layer, dimensions.d_mlp) for layer in layers),
    )
    _insert(connection, "heads", (_heads(readout, layer, dimensions.n_heads) for layer in layers))
    for found in open_latent_sets(reader).values():
        _insert(connection, "latents", (latent_rows(found, layer) for layer in found.layers))
        listed = (top_latent_rows(found, layer, LISTED_ENTRIES) for layer in found.layers)
        _insert(connection, "top_latents", listed)


def read_part(reader: StoreReader, segment: int) -> pa.Table:
    """A committed segment's part, verified, with the columns of ``PART_SCHEMA``.

    Raises:
        StoreDamaged: it is missing, or not what the commit record names.
    """
    path = part_path(segment)
    files = reader.commits[BASE_SET][segment].files
    entry = next(entry for entry in files if entry.path == path)
    data = reader.blobs.read(path)
    if (len(data), crc32c(data)) != (entry.size, entry.crc32c):
        raise StoreDamaged(
            f"{path} fails its checksum {entry.crc32c:08x}. Run `actstore verify`.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    return parquet.read_table(pa.BufferReader(data), use_threads=False)


def _insert(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    batches: Iterable[pa.Table | Mapping[str, npt.NDArray[Any]]],
) -> None:
    """Append batches to a table; columns by name, those of the table alone."""
    for rows in _joined(batches):
        connection.register("incoming", rows)
        connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
        connection.unregister("incoming")


def _joined(batches: Iterable[pa.Table | Mapping[str, npt.NDArray[Any]]]) -> Iterator[pa.Table]:
    """Few large tables of many small ones: every insertion is a transaction of its own."""
    kept: list[pa.Table] = []
    count = 0
    for batch in batches:
        rows = batch if isinstance(batch, pa.Table) else pa.table(dict(batch))
        if kept and (rows.schema != kept[0].schema or count + rows.num_rows > _INSERTED_ROWS):
            yield pa.concat_tables(kept)
            kept, count = [], 0
        if rows.num_rows:
            kept.append(rows)
            count += rows.num_rows
    if kept:
        yield pa.concat_tables(kept)


def _segments(reader: StoreReader) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Segments of every plan that has a committed one."""
    committed = np.array(reader.segments, np.int64)
    for plan in reader.plans:
        numbers = plan.first_segment + np.arange(plan.n_segments)
        is_committed = np.isin(numbers, committed)
        if is_committed.any():
            columns = plan.sequences()
            rows = np.bincount(
                columns["segment"] - plan.first_segment,
                weights=columns["length"],
                minlength=plan.n_segments,
            )
            yield {
                "segment": numbers,
                "plan": np.full(len(numbers), plan.number),
                "first_token": numbers * reader.segment_rows,
                "rows": rows.astype(np.int64),
                "committed": is_committed,
            }


def _sequences(reader: StoreReader) -> Iterator[dict[str, npt.NDArray[Any]]]:
    names = ("sequence", "document", "first_token", "length", "segment")
    for plan in reader.plans:
        columns = plan.sequences()
        kept = np.isin(columns["segment"], reader.segments)
        yield {name: columns[name][kept] for name in names}


def _create_documents(connection: duckdb.DuckDBPyConnection, reader: StoreReader) -> None:
    """Documents with a committed sequence; plans may bring different columns of the caller's."""
    tables = _with_common_types([plan.documents() for plan in reader.plans])
    if tables:
        documents = pa.concat_tables(tables, promote_options="default")
    else:
        documents = pa.table({"document": pa.array([], pa.int64())})
    connection.register("incoming", documents)
    connection.execute(
        "CREATE TABLE documents AS SELECT * FROM incoming"
        " WHERE document IN (SELECT document FROM sequences) ORDER BY document"
    )
    connection.unregister("incoming")


def _with_common_types(tables: list[pa.Table]) -> list[pa.Table]:
    """The tables with one spelling and one type for every column that several have.

    SQL does not tell ``Label`` from ``label``. Whole and other numbers meet as floats,
    anything else that differs as text.
    """
    spellings: dict[str, str] = {}
    types: dict[str, pa.DataType] = {}
    renamed = []
    for table in tables:
        names = [spellings.setdefault(name.casefold(), name) for name in table.column_names]
        renamed.append(table.rename_columns(names))
        for name, found in zip(names, table.schema.types, strict=True):
            known = types.get(name, found)
            if pa.types.is_null(known) or known == found:
                types[name] = found
            elif not pa.types.is_null(found):
                numeric = all(
                    pa.types.is_integer(one) or pa.types.is_floating(one) for one in (known, found)
                )
                types[name] = pa.float64() if numeric else pa.string()
    return [
        pa.table(
            [table.column(name).cast(types[name]) for name in table.column_names],
            names=table.column_names,
        )
        for table in renamed
    ]


def _vocabulary(reader: StoreReader) -> dict[str, pa.Array]:
    """Every token id that a row may hold; one that the tokenizer lacks has no text."""
    pieces = {piece.token_id: piece for piece in vocabulary_pieces(reader.root)}
    sizes = [plan.config.vocabulary_size for plan in reader.plans]
    count = max([*sizes, *(number + 1 for number in pieces)], default=0)
    found = [pieces.get(number) for number in range(count)]
    special = {number for plan in reader.plans for number in plan.config.special_token_ids}
    return {
        "token_id": pa.array(range(count), pa.int32()),
        "piece": pa.array([one and one.piece for one in found], pa.string()),
        "text": pa.array([one and one.text for one in found], pa.string()),
        "special": pa.array([number in special for number in range(count)], pa.bool_()),
    }


def _statistics(
    arrays: Iterable[DescribedUnits], indexes: Mapping[str, UnitIndex]
) -> Iterator[dict[str, Any]]:
    for array in arrays:
        spec = array.spec
        for layer in range(spec.layer_count):
            columns = _unit_columns(indexes[spec.key], layer)
            yield _labels(spec, layer, spec.columns) | columns


def _unit_columns(index: UnitIndex, layer: int) -> dict[str, Any]:
    """Statistics and extremes of a layer's units, one array ``(unit,)`` per column."""
    statistics = index.statistics(layer)
    bounds = index.segment_bounds(layer)
    dtype = index.spec.dtype
    low, high = lowest_key(dtype), highest_key(dtype)
    return {
        "unit": np.arange(index.spec.columns),
        "count": statistics.count,
        "positive": statistics.positive,
        "nan": statistics.nan,
        "mean": _nullable(statistics.mean),
        "variance": _nullable(statistics.variance),
        "skewness": _nullable(statistics.skewness),
        "kurtosis": _nullable(statistics.kurtosis),
        "max": _extreme(bounds.maximum.max(axis=1, initial=low), low, dtype),
        "min": _extreme(bounds.minimum.min(axis=1, initial=high), high, dtype),
        "special_max": _extreme(bounds.special_maximum.max(axis=1, initial=low), low, dtype),
        "special_min": _extreme(bounds.special_minimum.min(axis=1, initial=high), high, dtype),
    }


def _extreme(keys: npt.NDArray[Any], absent: int, dtype: StoredDtype) -> pa.Array:
    missing = keys == absent
    return pa.array(key_values(np.where(missing, 0, keys), dtype), mask=missing)


def _nullable(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _top_activations(
    arrays: Iterable[DescribedUnits], indexes: Mapping[str, UnitIndex]
) -> Iterator[dict[str, Any]]:
    """The first proven entries of both tails, ordered by unit, tail and rank."""
    for array in arrays:
        spec = array.spec
        for layer in range(spec.layer_count):
            parts = []
            for number, tail in enumerate(TAILS):
                lists = indexes[spec.key].layer_lists(layer, tail)
                rank = np.arange(min(LISTED_ENTRIES, lists.keys.shape[1]))
                unit, place = np.nonzero(rank < lists.proven[:, None])
                values = key_values(lists.keys[unit, place], spec.dtype)
                tails = np.full(len(unit), number)
                parts.append((unit, tails, place, lists.rows[unit, place], values))
            unit, tails, place, token, value = map(np.concatenate, zip(*parts, strict=True))
            order = np.lexsort((place, tails, unit))
            yield _labels(spec, layer, len(order)) | {
                "unit": unit[order],
                "tail": pa.array(TAILS).take(pa.array(tails[order])),
                "rank": place[order] + 1,
                "token": token[order],
                "value": value[order],
            }


def _labels(spec: UnitGrid, layer: int, count: int) -> dict[str, Any]:
    return {
        "location": pa.repeat(spec.label, count),
        "pass": pa.repeat(spec.pass_type.value, count),
        "layer": np.full(count, layer),
    }


def _neurons(
    index: UnitIndex | None,
    readout: Mapping[str, npt.NDArray[Any]],
    texts: pa.Array,
    layer: int,
    count: int,
) -> dict[str, Any]:
    columns: dict[str, Any] = {"layer": np.full(count, layer), "neuron": np.arange(count)}
    if index is not None:
        units = _unit_columns(index, layer)
        seen, positive = units["count"], units["positive"]
        with np.errstate(invalid="ignore"):
            rate = positive / seen
        columns |= {"firing_rate": _nullable(rate)}
        columns |= {"dead": pa.array(positive == 0, mask=seen == 0)}
        columns |= {name: units[name] for name in _NEURON_STATISTICS}
    if readout:
        columns |= {name: readout[name][layer] for name in ("write_norm", "read_norm", "bias")}
        for name in ("promoted", "suppressed"):
            tokens = readout[f"{name}_token"][layer]
            offsets = np.arange(count + 1) * tokens.shape[1]
            chosen = texts.take(pa.array(tokens.reshape(-1)))
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), chosen)
    return columns


def _heads(readout: Mapping[str, npt.NDArray[Any]], layer: int, count: int) -> dict[str, Any]:
    columns: dict[str, Any] = {"layer": np.full(count, layer), "head": np.arange(count)}
    if readout:
        columns["write_norm"] = readout["head_write_norm"][layer]
        columns["value_output_norm"] = readout["head_value_output_norm"][layer]
    return columns


def _readout(reader: StoreReader) -> dict[str, npt.NDArray[Any]]:
    """The readout; empty where the store keeps none of the weights."""
    if READOUT_KEY not in ModelSnapshot.read(reader.root).files:
        return {}
    return read_readout(reader.root)
