"""An open store as the searches see it: rows, units, coefficients, windows of values.

:class:`~actstore.query.session.Store` adds what people ask.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from actstore.query.derived import UNIT_ARGUMENTS, DerivedScalar, scalar
from actstore.query.derived.backward import in_pass
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN, evaluate, layers_of
from actstore.query.latent_sets import StoredLatents, dense_window, latent_columns
from actstore.query.rows import RowMap, Rows
from actstore.query.sources import Sources
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.index import UnitIndex, open_unit_index
from actstore.store.latent_reader import LatentArray
from actstore.store.reader import DescribedUnits, StoreReader
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.query.sql import Sql

__all__ = ["MAX_RESULT_BYTES", "OpenStore"]

MAX_RESULT_BYTES = 2 * 2**30
"""Greatest tensor that one call returns unless the store was opened with another limit."""

_ROW_LABEL_BYTES = 24


class OpenStore:
    """The committed segments of a store at the moment of opening, and nothing else.

    Args:
        path: the store's directory.
        objective: whose gradients are read, of several; the base set's by default.
        max_result_bytes: greatest tensor that one call may return.

    Attributes:
        reader: the store's arrays, plans and records.
        row_map: its rows.
        sources: where values come from.
        kept_latents: the latents of autoencoders that it keeps.

    Raises:
        NotAStore: the path holds no store, or one of a newer format.
        StoreDamaged: a record fails its checksum.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        objective: str | None = None,
        max_result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        self.path = Path(path)
        self.max_result_bytes = max_result_bytes
        self.reader = StoreReader(self.path, objective=objective)
        self.row_map = RowMap(self.reader, max_result_bytes // _ROW_LABEL_BYTES)
        self.sources = Sources(self.reader)
        self._indexes: dict[str, UnitIndex] = {}
        self._own_scalars: dict[str, DerivedScalar] = {}
        self.kept_latents = StoredLatents(self.reader, self.sources)

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
                # One read, however many rows.
                return total - self.unit_index(array).ordinary_rows
        return sum(int(self.reader.segment(s).special.sum()) for s in self.reader.segments)

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.sources.n_layers

    def scalar(self, name: str | DerivedScalar, pass_type: str = "forward") -> DerivedScalar:
        """A scalar by its name, this store's own projections included; a declaration as it is.

        Args:
            name: its name or declaration.
            pass_type: ``backward`` for the gradient of the store's objective.

        Raises:
            InvalidInput: no such scalar or pass, the name holds a layer, or the scalar has no
                backward value.
        """
        return in_pass(scalar(name, self._own_scalars), pass_type)

    def layers_of(self, declared: DerivedScalar) -> tuple[int, ...]:
        """Layers at which a scalar may exist, ascending; 0 alone outside the blocks.

        Raises:
            InvalidInput: it is of latents, and the store has no such autoencoders, or several.
        """
        layers = tuple(range(self.layer_count(declared)))
        known = declared.layers
        if known is None and declared.latents is not None and not declared.only_node_layer:
            found = layers_of(declared, self.n_layers, self.config_of(declared))
            known = tuple(layer for layer in found if layer is not None)
        return layers if known is None else tuple(layer for layer in layers if layer in known)

    @property
    def own_scalars(self) -> Mapping[str, DerivedScalar]:
        """This store's own projections, by name."""
        return MappingProxyType(self._own_scalars)

    @property
    def statements(self) -> "Sql":
        """SQL over this store; see :class:`actstore.query.sql.Sql`."""
        return self._sql

    @cached_property
    def _sql(self) -> "Sql":
        from actstore.query.sql import Sql

        return Sql(self.reader, self)

    def rows_where(self, where: str) -> npt.NDArray[np.int64]:
        """Ascending global rows that a SQL predicate allows; see :meth:`Sql.rows_where`."""
        return self._sql.rows_where(where)

    def units_where(
        self, units: str, table: str = "neurons", sets: Sequence[str] = ()
    ) -> list[tuple[int, int]]:
        """(layer, unit) pairs that a SQL predicate allows; see :meth:`Sql.units_where`."""
        return self._sql.units_where(units, table, sets)

    def coefficients(self, declared: DerivedScalar, layer: int) -> npt.NDArray[np.float64]:
        """The factor between raw and derived value per unit, float64 ``(unit,)``."""
        return self.sources.coefficients(declared, layer if declared.has_layers else None)

    def layer_count(self, declared: DerivedScalar) -> int:
        """Layers of a scalar; 1 outside the blocks."""
        return self.n_layers if declared.has_layers else 1

    def unit_shape(self, declared: DerivedScalar) -> tuple[int, ...]:
        """Lengths of the axes of a ranking.

        An attended axis has the store's context, that of latents its widest layer's.

        Raises:
            InvalidInput: it is of latents, and the store has no such autoencoders, or several.
        """
        latents = latent_columns(declared, self.config_of(declared))
        return self.sources.unit_shape(declared.ranked_axes, latents=latents)

    def config_of(self, declared: DerivedScalar) -> DstConfig:
        """The store's own autoencoders, for a scalar that speaks of some.

        Raises:
            InvalidInput: several sets have such autoencoders of one layer, or of two locations.
        """
        return self.kept_latents.config_for(declared, PLAIN)

    def latent_set_names(self, declared: DerivedScalar) -> tuple[str, ...]:
        """The sets of latents that a scalar speaks of; none of one that is not of latents."""
        config = self.config_of(declared)
        if declared.latents is None or config.autoencoders is None:
            return ()
        found = self.kept_latents.matching(config.family(declared.latents))
        return tuple(sorted({array.record.name for array in found.values()}))

    def latent_arrays(self, declared: DerivedScalar) -> dict[int, LatentArray]:
        """Layer -> kept values of a scalar of the store's own autoencoders; empty if none are."""
        return self.kept_latents.arrays_of(declared, self.config_of(declared))

    def derive_window(
        self, declared: DerivedScalar, sequence: int, layer: int
    ) -> npt.NDArray[np.float32]:
        """Canonical values of one sequence for ranking.

        Returns:
            float32 ``(token, unit)``, all unit axes together as :meth:`unit_shape` has
            them. Pairs whose attended token lies ahead or nowhere are NaN: they are none; so
            are latents that a narrower layer lacks.

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
        kept = self.latent_arrays(declared).get(layer)
        if kept is not None and place.segment in kept.segments:
            stored = dense_window(kept, place.first_token, np.arange(place.length))
            value = torch.from_numpy(stored)
        else:
            values = self.sources.sequence(place)
            value = evaluate(
                declared,
                values,
                layer if declared.has_layers else None,
                config=self.config_of(declared),
            )
            value = value.to(torch.float32)
        if Dimension.LATENT in declared.axes:
            missing = self.unit_shape(declared)[-1] - value.shape[-1]
            value = torch.nn.functional.pad(value, (0, missing), value=torch.nan)
        if Dimension.ATTENDED in declared.ranked_axes:
            value = _padded(value, place.length, self.unit_shape(declared), declared.is_flattened)
        array: npt.NDArray[np.float32] = value.reshape(len(value), -1).numpy()
        return array

    def source_of(self, declared: DerivedScalar) -> str:
        """Where a scalar's values come from, for people."""
        return self.sources.describe_scalar(declared)

    def unit_index(self, array: DescribedUnits) -> UnitIndex:
        """The lists and zone maps of a stored array, or of an index, opened once."""
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

    def row_texts(self, rows: Rows) -> list[str]:
        """The decoded piece at each row; see :meth:`texts`."""
        return self.texts(self.row_map.token_ids(rows))

    def texts(self, token_ids: Iterable[int]) -> list[str]:
        """Decoded pieces; ``<id>`` for a token that the tokenizer does not have."""
        wanted = [int(token_id) for token_id in token_ids]
        return [
            f"<{token_id}>" if text is None else text
            for token_id, text in zip(wanted, self.row_map.texts(wanted), strict=True)
        ]


def _padded(value: "Tensor", length: int, shape: tuple[int, ...], is_flattened: bool) -> "Tensor":
    """Pairs ``(token, attended, …)`` of a whole context; NaN where there is none."""
    import torch

    padded = torch.full((length, *shape), torch.nan)
    first, second = torch.tril_indices(length, length)
    padded[first, second] = value if is_flattened else value[first, second]
    return padded
