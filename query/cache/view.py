"""Which rows and positions of a batch, and the tensors that are filled from them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.cache.anatomy import Anatomy
from actstore.query.cache.batch import Batch
from actstore.query.cache.selections import pick
from actstore.query.reading import torch_dtype
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from actstore.query.cache.row import Row

__all__ = ["View"]


@dataclass(frozen=True, eq=False)
class View:
    """Rows and positions of a batch, and the form of what is made from them.

    Attributes:
        batch: the sequences.
        rows: which of them, in this order.
        positions: per row, int64 positions.
        has_batch_dim: whether results have a batch axis.
        has_position_dim: whether results have a position axis.
        dtype: of results.
        device: of results.
        width_of_none: length of the position axis where no row is left.
    """

    batch: Batch
    rows: tuple[int, ...]
    positions: tuple[npt.NDArray[np.int64], ...]
    has_batch_dim: bool = True
    has_position_dim: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    width_of_none: int = 0

    @classmethod
    def whole(cls, batch: Batch, dtype: str = "float32", device: str = "cpu") -> "View":
        """All of a batch."""
        torch_dtype(dtype)
        positions = tuple(np.arange(length) for length in batch.lengths)
        return cls(batch, tuple(range(len(positions))), positions, dtype=dtype, device=device)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model consists of."""
        return Anatomy.of(self.batch.model)

    @property
    def width(self) -> int:
        """Positions of the longest row."""
        return max(map(len, self.positions), default=self.width_of_none)

    @property
    def longest(self) -> int:
        """Tokens of the longest row's whole sequence."""
        return max((self.batch.lengths[row] for row in self.rows), default=0)

    @property
    def leading(self) -> tuple[int, ...]:
        """Lengths of the batch and position axes that results have."""
        rows = (len(self.rows),) if self.has_batch_dim else ()
        return (*rows, self.width) if self.has_position_dim else rows

    def at_rows(self, given: Any) -> "View":
        """Some of the rows.

        Raises:
            InvalidInput: not a slice, a row that is not there, or no batch axis.
        """
        if not self.has_batch_dim:
            if given is None:
                return self
            raise InvalidInput(
                "This cache has no batch axis to slice. Slice the cache that it was made from.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        picks = pick(given, len(self.rows), "row of the batch")
        return replace(
            self,
            rows=tuple(self.rows[place] for place in picks.indices),
            positions=tuple(self.positions[place] for place in picks.indices),
            has_batch_dim=not picks.drops_axis,
            width_of_none=self.width,
        )

    def at_positions(self, given: Any) -> "View":
        """Some of each row's positions, counted in its own tokens.

        Raises:
            InvalidInput: not a slice, a position that a row does not have, or no position axis.
        """
        if given is None:
            return self
        if not self.has_position_dim:
            raise InvalidInput(
                f"pos_slice is {given!r}, and this cache has no position axis. Leave it out.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        picks = [pick(given, len(own), "position") for own in self.positions]
        return replace(
            self,
            positions=tuple(
                own[one.indices] for own, one in zip(self.positions, picks, strict=True)
            ),
            has_position_dim=not any(one.drops_axis for one in picks),
        )

    def each(self) -> "Iterator[tuple[int, Row, Tensor]]":
        """Every row's place in results, its activations and its positions."""
        import torch

        for place, (row, positions) in enumerate(zip(self.rows, self.positions, strict=True)):
            yield place, self.batch.row(row), torch.from_numpy(positions)

    def mask(self) -> "Tensor":
        """Where results have a token, bool ``leading``."""
        import torch

        found = torch.zeros((len(self.rows), self.width), dtype=torch.bool)
        for place, positions in enumerate(self.positions):
            found[place, : len(positions)] = True
        return self.trimmed(found, 0).to(self.device)

    def allocate(self, before: tuple[int, ...], after: tuple[int, ...], what: str) -> "Tensor":
        """A tensor ``(*before, row, position, *after)`` to be filled, NaN where no token is.

        Raises:
            InvalidInput: greater than one call may return.
        """
        import torch

        shape = (*before, len(self.rows), self.width, *after)
        dtype = torch_dtype(self.dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self.batch.max_bytes is not None and size > self.batch.max_bytes:
            raise InvalidInput(
                f"{what} is {size:,} bytes of shape {shape}, more than the limit of "
                f"{self.batch.max_bytes:,}. Ask for fewer rows or positions (pos_slice), project "
                "with project_output_onto, or open the store with a greater `max_result_bytes`.",
                kind=ErrorKind.TOO_LARGE,
            )
        return torch.full(shape, torch.nan, dtype=dtype)

    def trimmed(self, filled: "Tensor", first: int) -> "Tensor":
        """A result with the axes that this view has.

        Args:
            filled: ``(*, row, position, *)``.
            first: where its row axis stands.
        """
        if not self.has_position_dim:
            # No row at all leaves no position either.
            filled = filled.select(first + 1, 0) if self.rows else filled.flatten(first, first + 1)
        return filled if self.has_batch_dim else filled.squeeze(first)

    def finished(self, filled: "Tensor", first: int) -> "Tensor":
        """A filled result with this view's axes, on its device."""
        return self.trimmed(filled, first).to(self.device)
