"""An open store as the searches see it: rows, units, coefficients, windows of values.

:class:`~actstore.query.session.Store` adds what people ask.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar
from actstore.query.derived.evaluation import evaluate
from actstore.query.rows import RowMap
from actstore.query.sources import Sources
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.index import UnitIndex, open_unit_index
from actstore.store.reader import StoredArray, StoreReader

if TYPE_CHECKING:
    from actstore.query.sql import Sql

__all__ = ["MAX_RESULT_BYTES", "OpenStore"]

MAX_RESULT_BYTES = 2 * 2**30
"""Greatest tensor that one call returns unless the store was opened with another limit."""

_ROW_LABEL_BYTES = 24


class OpenStore:
    """The committed segments of a store at the moment of opening, and nothing else.

    Args:
        path: the store's directory.
        max_result_bytes: greatest tensor that one call may return.

    Attributes:
        reader: the store's arrays, plans and records.
        row_map: its rows.
        sources: where values come from.

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

    def require_committed(self) -> None:
        """Refuse to answer from nothing.

        Raises:
            Unavailable: no segment is committed yet.
        """
        if not self.reader.segments:
            raise Unavailable(
                f"{self.path} has no committed segment yet. Run the same `actstore ingest` again.",
                kind=ErrorKind.NOTHING_COMMITTED,
            )

    @cached_property
    def special_count(self) -> int:
        """Special rows of the committed segments."""
        total = sum(record.rows for record in self.reader.commits["base"].values())
        for array in self.reader.arrays.values():
            if array.spec.has_zones and array.segments == self.reader.segments:
                # Every ordinary row is a value or a NaN of any unit; one read, however many rows.
                statistics = self.unit_index(array).statistics(0)
                return total - int(statistics.count[0]) - int(statistics.nan[0])
        return sum(int(self.reader.segment(s).special.sum()) for s in self.reader.segments)

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.sources.n_layers

    @cached_property
    def _sql(self) -> "Sql":
        from actstore.query.sql import Sql

        return Sql(self.reader)

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
