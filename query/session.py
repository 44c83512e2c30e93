"""The public face of an open store: everything that can be asked of it.

Opening reads records and plans alone. Torch is imported when a tensor is asked for, so
metadata, top-k over stored arrays and SQL cost no more than they need.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.batches import BatchReader
from actstore.query.derived import parse_scalar
from actstore.query.inventory import LocationInfo, StoreInfo, list_locations, summarise
from actstore.query.opening import OpenStore
from actstore.query.reading import TensorReader, choose_layers, torch_dtype
from actstore.query.rows import Rows
from actstore.query.tensors import DerivedScalarStore, LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import PassType, parse_location

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation
    from torch import Tensor

    from actstore.query.examples import Examples
    from actstore.query.results import TopK
    from actstore.query.sql import Parameters
    from actstore.store.verification import VerifyReport

__all__ = ["Store"]

Numbers = int | Iterable[int] | None


class Store(OpenStore):
    """An open store: the committed segments at the moment of opening, and nothing else.

    Args:
        path: the store's directory.
        max_result_bytes: greatest tensor that one call may return.

    Raises:
        NotAStore: the path holds no store, or one of a newer format.
        StoreDamaged: a record fails its checksum.
    """

    @cached_property
    def _tensors(self) -> TensorReader:
        return TensorReader(self.sources, self.row_map, self.max_result_bytes)

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
        permuted uniformly; a window of 256 MiB is filled with the next ones, its rows are
        permuted uniformly, and what is left of it, less than a batch, joins the next. So rows
        of one page come within one window, but for those left. The order depends on the seed
        and on what is committed, not on the machine.

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

    def verify(self) -> "VerifyReport":
        """Check every byte of the store; see :func:`actstore.store.verification.verify_store`."""
        from actstore.store.verification import verify_store

        return verify_store(self.path)

    def sql(self, query: str, parameters: "Parameters" = None) -> "DuckDBPyRelation":
        """The result of one SQL query over the metadata; see :class:`actstore.query.sql.Sql`."""
        return self._sql.relation(query, parameters)

    # Arguments

    def _rows(self, sequences: Numbers, tokens: Numbers) -> Rows:
        self.require_committed()
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
