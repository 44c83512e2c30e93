"""The public face of an open store: everything that can be asked of it.

Opening reads records and plans alone. Torch is imported when a tensor is asked for, so
metadata, top-k over stored arrays and SQL cost no more than they need.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.batches import BatchReader
from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar, parse_scalar
from actstore.query.derived.evaluation import evaluate
from actstore.query.inventory import LocationInfo, StoreInfo, list_locations, summarise
from actstore.query.reading import TensorReader, choose_layers, torch_dtype
from actstore.query.rows import RowMap, Rows
from actstore.query.sources import Sources
from actstore.query.tensors import DerivedScalarStore, LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.index import UnitIndex, open_unit_index
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.vocabulary import PassType, parse_location

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation
    from torch import Tensor

    from actstore.query.examples import Examples
    from actstore.query.results import TopK
    from actstore.query.sql import Parameters, Sql
    from actstore.store.verification import VerifyReport

__all__ = ["Store"]

MAX_RESULT_BYTES = 2 * 2**30
"""Greatest tensor that one call returns unless the store was opened with another limit."""

_ROW_LABEL_BYTES = 24

Numbers = int | Iterable[int] | None


class Store:
    """An open store: the committed segments at the moment of opening, and nothing else.

    Args:
        path: the store's directory.
        max_result_bytes: greatest tensor that one call may return.

    Raises:
        NotAStore: the path holds no store, or one of a newer format.
        StoreDamaged: a record fails its checksum.
    """

    def __init__(self, path: str | Path, *, max_result_bytes: int = MAX_RESULT_BYTES) -> None:
        self.path = Path(path)
        self.max_result_bytes = max_result_bytes
        self.reader = StoreReader(self.path)
        self.row_map = RowMap(self.reader, max_result_bytes // _ROW_LABEL_BYTES)
        self.sources = Sources(self.reader)
        self._tensors = TensorReader(self.sources, self.row_map, max_result_bytes)
        self._indexes: dict[str, UnitIndex] = {}

    def close(self) -> None:
        """Release the open files and the snapshot."""
        if "_sql" in self.__dict__:
            self._sql.close()
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info()
        stored = [f"{name} {entry.dtype}" for name, entry in info.locations.items() if entry.dtype]
        return (
            f"<Store {str(self.path)!r}: {info.model}, {info.layers} layers; {info.tokens:,} tokens "
            f"in {info.sequences:,} sequences of {info.documents:,} documents; "
            f"{info.segments_committed} of {info.segments_planned} segments; "
            f"stored: {', '.join(stored)}>"
        )

    # What it holds

    @property
    def model_name(self) -> str:
        """The model's name as given at ingest."""
        return str(self.reader.manifest.model["name"])

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.sources.n_layers

    @property
    def n_sequences(self) -> int:
        """Sequences of all plans, committed or not."""
        return self.row_map.n_sequences

    @property
    def n_tokens(self) -> int:
        """Committed token rows."""
        return sum(record.rows for record in self.reader.commits.get("base", {}).values())

    def info(self) -> StoreInfo:
        """What the store holds, and what it does not hold yet."""
        return summarise(self.reader, self.row_map, self.sources)

    @cached_property
    def locations(self) -> Mapping[str, LocationInfo]:
        """Every location of the forward pass, and every stored gradient: where it comes from."""
        return MappingProxyType(list_locations(self.reader, self.sources))

    # Raw values

    def raw(
        self,
        location: str,
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        pass_type: str = "forward",
        dtype: str = "float32",
    ) -> LabelledTensor:
        """A location's values as the store holds or reconstructs them.

        Queries and keys come as the attention function received them; :meth:`derive` gives
        them with the specification's d_head^(-1/4).

        Args:
            location: its own or its TransformerLens name.
            sequences: whole sequences, in this order.
            tokens: global rows, in this order; instead of ``sequences``.
            layers: all by default.
            pass_type: ``forward`` or ``backward``.
            dtype: of the result. float32 holds every stored value exactly.

        Returns:
            ``(layer, token, *unit axes)``, without ``layer`` outside the blocks. An
            attended axis is as long as the longest sequence; where a shorter one ends,
            NaN follows.

        Raises:
            InvalidInput: an unknown location, layer or row, or a result above the limit.
            Unavailable: a row is not committed, or the location cannot be had.
        """
        found, named_layer = parse_location(location)
        of_pass = _pass_type(pass_type)
        chosen = self._layers(found.label, found.has_layers, named_layer, layers)
        return self._tensors.raw(found, of_pass, chosen, self._rows(sequences, tokens), dtype)

    def gather(
        self,
        location: str,
        *,
        layers: Numbers = None,
        tokens: Numbers = None,
        columns: Sequence[str] | None = None,
        dtype: str = "float32",
    ) -> tuple["Tensor", pa.Table]:
        """Any rows in any order, with what stands at them.

        Args:
            location: its own or its TransformerLens name.
            layers: all by default.
            tokens: global rows, repeats allowed; all committed ones by default.
            columns: columns of ``documents`` to join to the table.
            dtype: of the tensor.

        Returns:
            The tensor of :meth:`raw`, and a table with one row per token: ``token,
            sequence, position, token_id, text, special, document`` and ``columns``.

        Raises:
            InvalidInput: an unknown location, layer, row or column, or a result too large.
            Unavailable: a row is not committed, or the location cannot be had.
        """
        rows = self._rows(None, tokens)
        table = self.row_map.table(rows, columns)
        return self.raw(location, tokens=rows.token, layers=layers, dtype=dtype).values, table

    def batches(
        self,
        location: str,
        *,
        layer: int | None = None,
        size: int = 4096,
        shuffle: int | None = None,
        special: bool = False,
        dtype: str = "float32",
    ) -> Iterator[tuple["Tensor", npt.NDArray[np.int64]]]:
        """Every committed row once, in batches, for training on stored activations.

        With a seed, all pages of 512 rows (whole sequences of a reconstructed location) are
        permuted uniformly; a window of 256 MiB is filled with the next ones and its rows
        permuted uniformly. Rows of one page therefore stay within a window of each other. The
        order depends on the seed and on what is committed, not on the machine.

        Args:
            location: its own or its TransformerLens name.
            layer: the layer, for a location that has layers.
            size: rows of a batch; the last may be shorter.
            shuffle: seed of the order; None for ascending rows.
            special: let special rows (position 0, special tokens) come too.
            dtype: of the batches.

        Returns:
            An iterator of tensors ``(row, *unit axes)`` with their global rows.

        Raises:
            InvalidInput: an unknown location or layer, or a size below 1.
            Unavailable: the location cannot be had.
        """
        found, named_layer = parse_location(location)
        if size < 1:
            raise _invalid(f"size is {size}; a batch has at least 1 row.")
        if found.is_pair_shaped:
            raise _invalid(
                f"{found} has an axis over attended tokens, which differs from row to row. Take "
                "another location, or sequences by `raw`."
            )
        chosen = self._layers(found.label, found.has_layers, named_layer, layer)
        if len(chosen) != 1:
            raise _invalid(
                f"Batches of {found} are of one layer; name it with `layer`, "
                f"0 to {self.n_layers - 1}."
            )
        self.sources.require(found, PassType.FORWARD, chosen[0])
        reader = BatchReader(self.sources, self.row_map, found, chosen[0])
        return reader.batches(size, shuffle, special, torch_dtype(dtype))

    # Derived values

    @overload
    def derive(
        self,
        names: str,
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
    ) -> LabelledTensor: ...

    @overload
    def derive(
        self,
        names: list[str] | tuple[str, ...],
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
    ) -> DerivedScalarStore: ...

    def derive(
        self,
        names: str | list[str] | tuple[str, ...],
        *,
        sequences: Numbers = None,
        tokens: Numbers = None,
        layers: Numbers = None,
        dtype: str = "float32",
    ) -> LabelledTensor | DerivedScalarStore:
        """Derived scalars of whole sequences or of rows.

        Values are computed in float64 for one sequence and layer at a time and rounded once
        to float32, so they do not depend on what else was asked for.

        Args:
            names: a derived scalar, or several; a location's name is its raw scalar.
            sequences: whole sequences, in this order.
            tokens: global rows, in this order; instead of ``sequences``.
            layers: all by default; ignored by a scalar outside the blocks among several.
            dtype: ``float64`` for the unrounded values; narrower ones round the float32.

        Returns:
            A labelled tensor ``(layer, token, *unit axes)``, as :meth:`raw`; for several
            names a mapping of them.

        Raises:
            InvalidInput: an unknown scalar, layer or row, or a result above the limit.
            Unavailable: a row is not committed, or a source cannot be had.
        """
        rows = self._rows(sequences, tokens)
        if isinstance(names, str):
            return self._derive(names, rows, layers, dtype)
        found: dict[str, LabelledTensor] = {}
        for name in names:
            outside = not parse_scalar(name)[0].has_layers
            tensor = self._derive(name, rows, None if outside else layers, dtype)
            found[tensor.name] = tensor
        return DerivedScalarStore(found)

    def _derive(self, name: str, rows: Rows, layers: Numbers, dtype: str) -> LabelledTensor:
        declared, named_layer = parse_scalar(name)
        chosen = self._layers(declared.name, declared.has_layers, named_layer, layers)
        return self._tensors.derived(declared, chosen, rows, dtype)

    # Rankings, SQL, upkeep

    def topk(self, name: str, **options: Any) -> "TopK":
        """The k best values of a derived scalar, exactly; see :func:`actstore.query.topk.topk`."""
        from actstore.query.topk import topk

        return topk(self, name, **options)

    def examples(self, name: str, unit: tuple[int, ...], **options: Any) -> "Examples":
        """Contexts of one unit; see :func:`actstore.query.examples.examples`."""
        from actstore.query.examples import examples

        return examples(self, name, unit, **options)

    @cached_property
    def _sql(self) -> "Sql":
        from actstore.query.sql import Sql

        return Sql(self.reader)

    def sql(
        self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> "duckdb.DuckDBPyRelation":
        """One SELECT over the metadata tables; see :meth:`actstore.query.sql.Sql.relation`."""
        return self._sql.relation(query, params)

    def rows_where(self, where: str) -> npt.NDArray[np.int64]:
        """Ascending global rows that a SQL predicate allows; see :meth:`Sql.rows_where`."""
        return self._sql.rows_where(where)

    def units_where(self, units: str, table: str = "neurons") -> list[tuple[int, int]]:
        """(layer, unit) pairs that a SQL predicate allows; see :meth:`Sql.units_where`."""
        return self._sql.units_where(units, table)

    def verify(self) -> "VerifyReport":
        """Check every byte of the store; see :func:`actstore.store.verification.verify_store`."""
        from actstore.store.verification import verify_store

        return verify_store(self.path)

    @cached_property
    def _sql(self) -> "Sql":
        from actstore.query.sql import Sql

        return Sql(self.reader)

    def sql(self, query: str, parameters: "Parameters" = None) -> "DuckDBPyRelation":
        """The result of one SQL query over the metadata; see :class:`actstore.query.sql.Sql`."""
        return self._sql.relation(query, parameters)

    # What searches need

    def rows_where(self, where: str) -> npt.NDArray[np.int64]:
        """Ascending global rows that a SQL predicate allows; see :meth:`Sql.rows_where`."""
        return self._sql.rows_where(where)

    def units_where(self, units: str, table: str = "neurons") -> list[tuple[int, int]]:
        """(layer, unit) pairs that a SQL predicate allows; see :meth:`Sql.units_where`."""
        return self._sql.units_where(units, table)

    def coefficients(self, declared: DerivedScalar, layer: int) -> npt.NDArray[np.float64]:
        """The factor between raw and derived value per unit, float64 ``(unit,)``."""
        return self.sources.coefficients(declared, layer if declared.has_layers else None)

    def layer_count(self, declared: DerivedScalar) -> int:
        """Layers of a scalar; 1 outside the blocks."""
        return self.n_layers if declared.has_layers else 1

    def unit_shape(self, declared: DerivedScalar) -> tuple[int, ...]:
        """Lengths of a scalar's unit axes; an attended axis has the store's context."""
        return self.sources.unit_shape(declared.axes)

    def derive_window(
        self, declared: DerivedScalar, sequence: int, layer: int
    ) -> npt.NDArray[np.float32]:
        """Canonical values of one sequence for ranking.

        Returns:
            float32 ``(token, unit)``, all unit axes together as :meth:`unit_shape` has
            them. Pairs whose attended token lies ahead or nowhere are NaN: they are none.

        Raises:
            InvalidInput: the window is larger than one call may return.
        """
        import torch

        place = self.row_map.sequence(sequence)
        size = 4 * place.length * int(np.prod(self.unit_shape(declared)))
        if size > self.max_result_bytes:
            raise InvalidInput(
                f"{declared.name} of one sequence is {size:,} bytes, more than the limit of "
                f"{self.max_result_bytes:,}. Ask for rows of it with `derive(tokens=…)`, or open "
                "the store with a greater `max_result_bytes`.",
                kind=ErrorKind.TOO_LARGE,
            )
        values = self.sources.sequence(place)
        value = evaluate(declared, values, layer if declared.has_layers else None)
        value = value.to(torch.float32)
        if declared.is_pair_shaped:
            shape = self.unit_shape(declared)
            # The attended axis is the last one of every pair-shaped scalar.
            padded = torch.full((len(value), *shape), torch.nan)
            position = torch.arange(len(value))
            ahead = position[None, :] > position[:, None]
            ahead = ahead.reshape(len(value), *(1 for _ in shape[1:]), len(value))
            padded[..., : len(value)] = value.masked_fill(ahead, torch.nan)
            value = padded
        array: npt.NDArray[np.float32] = value.reshape(len(value), -1).numpy()
        return array

    def source_of(self, declared: DerivedScalar) -> str:
        """Where a scalar's values come from, for people."""
        return self.sources.describe_scalar(declared)

    def unit_index(self, array: StoredArray) -> UnitIndex:
        """The lists and zone maps of a stored array, opened once."""
        if array.spec.key not in self._indexes:
            self._indexes[array.spec.key] = open_unit_index(self.reader, array)
        return self._indexes[array.spec.key]

    def unit_restriction(self, declared: DerivedScalar, indices: Sequence[int]) -> dict[str, int]:
        """The arguments of ``topk`` that restrict it to one unit."""
        return {
            UNIT_ARGUMENTS[axis]: index
            for axis, index in zip(declared.axes, indices, strict=True)
            if axis in UNIT_ARGUMENTS
        }

    def row_groups(self, kind: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First rows and labels of sequences or documents; see :meth:`RowMap.groups`."""
        return self.row_map.groups(kind)

    def row_context(self, tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
        """``sequence``, ``position`` and ``text`` of global rows."""
        rows = self.row_map.of_tokens(tokens)
        texts = self.texts(self.row_map.token_ids(rows))
        return {"sequence": rows.sequence, "position": rows.position, "text": texts}

    def texts(self, token_ids: Iterable[int]) -> list[str]:
        """Decoded pieces; ``<id>`` for a token that the tokenizer does not have."""
        wanted = [int(token_id) for token_id in token_ids]
        return [
            f"<{token_id}>" if text is None else text
            for token_id, text in zip(wanted, self.row_map.texts(wanted), strict=True)
        ]

    # Arguments

    def _rows(self, sequences: Numbers, tokens: Numbers) -> Rows:
        if not self.reader.segments:
            raise Unavailable(
                f"{self.path} has no committed segment yet. Run the same `actstore ingest` again.",
                kind=ErrorKind.NOTHING_COMMITTED,
            )
        if sequences is not None and tokens is not None:
            raise _invalid("Both sequences and tokens are given; give one of them.")
        if sequences is not None:
            return self.row_map.of_sequences(sequences)
        return self.row_map.all() if tokens is None else self.row_map.of_tokens(tokens)

    def _layers(
        self, name: str, has_layers: bool, named: int | None, layers: Numbers
    ) -> Sequence[int | None]:
        return choose_layers(name, has_layers, self.n_layers, named, layers)


def _pass_type(name: str) -> PassType:
    try:
        return PassType(name)
    except ValueError:
        raise _invalid(f"pass_type is {name!r}; use {', '.join(PassType)}.") from None


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
