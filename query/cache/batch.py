"""The sequences that a cache speaks of: of a store, or of fresh passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actstore.query.cache.anatomy import Anatomy
from actstore.query.cache.row import Row
from actstore.query.pass_values import PassValues
from actstore.query.rows import RowMap
from actstore.query.sources import Sources
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.recipes import WeightName
from actstore.store.model.weights import ModelWeights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch", "PassBatch", "StoredBatch"]


class Batch(Protocol):
    """Sequences of one model, and their values."""

    @property
    def model(self) -> ModelWeights:
        """The model that ran."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        ...

    @property
    def names(self) -> tuple[int, ...]:
        """Number of each sequence."""
        ...

    @property
    def max_bytes(self) -> int | None:
        """Greatest tensor that one call may return; None for no limit."""
        ...

    def row(self, place: int) -> Row:
        """The activations of one sequence."""
        ...

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64."""
        ...

    def texts(self, token_ids: Sequence[int]) -> list[str | None]:
        """The decoded piece of each token id; None for one without."""
        ...


class StoredBatch:
    """Committed sequences of an open store; each is read when a call comes to it.

    Args:
        sources: where values come from.
        row_map: the store's rows.
        sequences: global numbers, in this order, repeats allowed.
        max_bytes: greatest tensor that one call may return.

    Raises:
        InvalidInput: not a whole number, or there is no such sequence.
        Unavailable: its segment is not committed.
    """

    def __init__(
        self, sources: Sources, row_map: RowMap, sequences: Sequence[int], max_bytes: int
    ) -> None:
        self._sources = sources
        self._row_map = row_map
        for number in sequences:
            if isinstance(number, bool) or not hasattr(number, "__index__"):
                raise InvalidInput(
                    f"A sequence is {number!r}; give whole numbers.",
                    kind=ErrorKind.INVALID_ARGUMENT,
                )
        self._places = [row_map.sequence(int(number)) for number in sequences]
        self.max_bytes: int | None = max_bytes

    @property
    def model(self) -> ModelWeights:
        """The model that the store keeps."""
        return self._sources.model

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(place.length for place in self._places)

    @property
    def names(self) -> tuple[int, ...]:
        """Global numbers."""
        return tuple(place.sequence for place in self._places)

    @cached_property
    def _anatomy(self) -> Anatomy:
        return Anatomy.of(self.model)

    def row(self, place: int) -> Row:
        """The activations of one sequence."""
        rows = self._places[place]

        def token_ids() -> "Tensor":
            import torch

            plan = self._sources.reader.segment(rows.segment)
            start = rows.first_token - plan.first_row
            ids = plan.token_ids[start : start + rows.length]
            return torch.from_numpy(ids.astype(np.int64))

        return Row(self._sources.sequence(rows), token_ids, self._anatomy)

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64."""
        return self._sources.weight(name, layer)

    def texts(self, token_ids: Sequence[int]) -> list[str | None]:
        """The decoded piece of each token id; None for one without."""
        return self._row_map.texts(token_ids)


@dataclass(frozen=True, eq=False)
class PassBatch:
    """Prompts that ran through one model.

    Attributes:
        passes: the recorded values of each.
        token_ids: its tokens.
        model: the model that ran.
        tokenizer: gives the texts of tokens; None when there is none.
        max_bytes: greatest tensor that one call may return; None for no limit.
    """

    passes: tuple[PassValues, ...]
    token_ids: tuple[tuple[int, ...], ...]
    model: ModelWeights
    tokenizer: Any = None
    max_bytes: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(map(len, self.token_ids))

    @property
    def names(self) -> tuple[int, ...]:
        """The prompts by number."""
        return tuple(range(len(self.passes)))

    @cached_property
    def _anatomy(self) -> Anatomy:
        return Anatomy.of(self.model)

    def row(self, place: int) -> Row:
        """The activations of one prompt."""

        def token_ids() -> "Tensor":
            import torch

            return torch.tensor(self.token_ids[place], dtype=torch.int64)

        return Row(self.passes[place], token_ids, self._anatomy)

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64."""
        return self.passes[0].weight(name, layer)

    def texts(self, token_ids: Sequence[int]) -> list[str | None]:
        """The decoded piece of each token id; None for one without."""
        if self.tokenizer is None:
            return [None for _ in token_ids]
        return [str(self.tokenizer.decode([token_id])) for token_id in token_ids]
