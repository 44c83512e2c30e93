"""What a neuron does to each token's logit, as a lazily read table.

The effect is the neuron's output row times diag(g_final) W_U, less the mean over the vocabulary:
what the store's ``promoted`` and ``suppressed`` tokens of ``neurons`` are ranked by. The sum over
channels is made alike for every pair, so an effect does not hang on what else is asked.
"""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.duckdb_source import Offered
from actstore.query.scalar_tables import Budget
from actstore.query.sql_predicates import Predicate
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput
from actstore.store.model.pieces import vocabulary_pieces
from actstore.store.model.weights import open_model
from actstore.store.vocabulary import WeightLocationType

__all__ = ["EFFECTS_TABLE", "PROMOTION_MACROS", "Effects", "EffectsTable"]

EFFECTS_TABLE = "neuron_effects"
_COLUMNS = ("effect", "rank")
PROMOTION_MACROS = {
    name: f"""
        CREATE OR REPLACE TEMP MACRO {name}(_layer, _neuron, _text) AS (
            SELECT arg_min(e.{column}, e.token_id) FROM {EFFECTS_TABLE} AS e
            WHERE e.layer = _layer AND e.neuron = _neuron AND e.text = _text
        )
    """
    for name, column in zip(("promotes", "promotes_rank"), _COLUMNS, strict=True)
}
"""Macro -> its definition: the effect of a neuron on the token with a text, and its rank."""

_SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("neuron", pa.int32()),
        ("token_id", pa.int32()),
        ("text", pa.string()),
        ("effect", pa.float32()),
        ("rank", pa.int32()),
    ]
)
_MOST_EFFECTS = 20_000_000
_BLOCK_PRODUCTS = 4_000_000


class Effects:
    """Effects of neurons on logits, from the weights that a store keeps.

    Args:
        root: the store's directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rows: tuple[int, npt.NDArray[np.float64]] | None = None

    @cached_property
    def _model(self) -> Any:
        return open_model(self._root)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, neurons and tokens of the vocabulary."""
        dimensions = self._model.dimensions
        return dimensions.n_layers, dimensions.d_mlp, self._unembedding.shape[1]

    @cached_property
    def texts(self) -> npt.NDArray[np.object_]:
        """The text of each token, ``(token_id,)``; None where there is none."""
        found = np.full(self.shape[2], None, object)
        for piece in vocabulary_pieces(self._root):
            if piece.token_id < len(found):
                found[piece.token_id] = piece.text
        return found

    @cached_property
    def _unembedding(self) -> npt.NDArray[np.float32]:
        """``(channel, token_id)``, as stored."""
        matrix: npt.NDArray[np.float32] = self._model.weight(
            WeightLocationType.UNEMBEDDING, dtype="float32"
        )
        return matrix

    @cached_property
    def _gain(self) -> npt.NDArray[np.float64]:
        gain: npt.NDArray[np.float64] = self._model.weight(WeightLocationType.LAYER_NORM_GAIN_FINAL)
        return gain

    @cached_property
    def _mean(self) -> npt.NDArray[np.float64]:
        mean: npt.NDArray[np.float64] = self._unembedding.mean(axis=1, dtype=np.float64)
        return mean

    def _written(self, layer: int) -> npt.NDArray[np.float64]:
        """A layer's output rows ``(neuron, channel)``; the last layer's are kept."""
        kept = self._rows
        if kept is None or kept[0] != layer:
            rows = self._model.weight(WeightLocationType.MLP_TO_RESIDUAL, layer)
            if self._model.dimensions.has_post_norms:
                rows = rows * self._model.weight(WeightLocationType.LAYER_NORM_GAIN_POST_MLP, layer)
            # Several threads may ask; each goes on with what it read itself.
            self._rows = kept = layer, rows
        return kept[1]

    def of(
        self, layer: int, neurons: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Blocks of neurons with their effects, float32 ``(neuron, token)``."""
        rows = self._written(layer)
        width = max(1, _BLOCK_PRODUCTS // len(self._gain))
        height = max(1, width // max(1, len(tokens)))
        for start in range(0, len(neurons), height):
            block = neurons[start : start + height]
            found = np.empty((len(block), len(tokens)), np.float32)
            for left in range(0, len(tokens), width):
                columns = slice(left, left + width)
                part = self._unembedding[:, tokens[columns]].astype(np.float64).T - self._mean
                direction = np.ascontiguousarray(part * self._gain)
                found[:, columns] = (rows[block][:, None] * direction).sum(axis=2)
            yield block, found


class EffectsTable:
    """Every neuron's effect on every token's logit; ``rank`` 1 is the most promoted token.

    Tokens of equal effect rank in order of their id.

    Args:
        effects: the effects.
        budget: what may be looked at.
    """

    def __init__(self, effects: Effects, budget: Budget) -> None:
        self._effects = effects
        self._budget = budget

    @property
    def schema(self) -> pa.Schema:
        """The table's columns."""
        return _SCHEMA

    def count(self) -> int | None:
        """The number of pairs."""
        layers, neurons, tokens = self._effects.shape
        return layers * neurons * tokens

    def accepts(self, predicate: Predicate) -> bool:
        """Whether :meth:`batches` leaves out every row where a predicate is not true."""
        return predicate.columns in ({"layer"}, {"neuron"}, {"token_id"}, {"text"})

    def batches(
        self, columns: Sequence[str], predicates: Sequence[Predicate], offered: Offered | None
    ) -> Iterator[pa.RecordBatch]:
        """The pairs that pass; see :class:`~actstore.query.duckdb_source.LazyTable`.

        Raises:
            InvalidInput: there are too many.
        """
        try:
            yield from self._found(columns, predicates)
        except ActstoreError as error:
            self._budget.error = error
            raise

    def _found(
        self, columns: Sequence[str], predicates: Sequence[Predicate]
    ) -> Iterator[pa.RecordBatch]:
        sizes = self._effects.shape
        layers, neurons = (
            self._chosen(name, np.arange(size), predicates)
            for name, size in zip(("layer", "neuron"), sizes[:2], strict=True)
        )
        tokens = self._chosen("token_id", np.arange(sizes[2]), predicates)
        tokens = tokens[_holds("text", self._effects.texts[tokens], predicates)]
        every = np.arange(sizes[2]) if "rank" in columns else tokens
        looked = len(layers) * len(neurons) * len(every) if len(tokens) else 0
        most = min(_MOST_EFFECTS, self._budget.max_cells)
        if looked > most:
            raise InvalidInput(
                f"{EFFECTS_TABLE} would have to be computed for {looked:,} pairs of neurons and "
                f"tokens, more than {most:,}. Give one neuron, or one text, as constants; a rank "
                "looks at the whole vocabulary for each neuron.",
                kind=ErrorKind.TOO_LARGE,
            )
        if not looked:
            return
        self._budget.cells += looked
        seconds = self._budget.seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        place = np.searchsorted(every, tokens)
        for layer in layers.tolist():
            for block, effects in self._effects.of(layer, neurons, every):
                if deadline is not None and time.monotonic() > deadline:
                    raise InvalidInput(
                        f"Computing {EFFECTS_TABLE} took longer than it may. Give fewer neurons "
                        "or texts, as constants.",
                        kind=ErrorKind.SQL_TIMEOUT,
                    )
                arrays: dict[str, npt.NDArray[Any]] = {
                    "layer": np.full(len(block) * len(tokens), layer),
                    "neuron": np.repeat(block, len(tokens)),
                    "token_id": np.tile(tokens, len(block)),
                    "effect": effects[:, place].reshape(-1),
                }
                if "text" in columns:
                    arrays["text"] = np.tile(self._effects.texts[tokens], len(block))
                if "rank" in columns:
                    arrays["rank"] = _ranks(effects)[:, place].reshape(-1)
                yield pa.RecordBatch.from_arrays(
                    [pa.array(arrays[name], _SCHEMA.field(name).type) for name in columns],
                    schema=pa.schema([_SCHEMA.field(name) for name in columns]),
                )

    def _chosen(
        self, name: str, values: npt.NDArray[np.int64], predicates: Sequence[Predicate]
    ) -> npt.NDArray[np.int64]:
        return values[_holds(name, values, predicates)]


def _holds(
    name: str, values: npt.NDArray[Any], predicates: Sequence[Predicate]
) -> npt.NDArray[np.bool_]:
    found = (one.holds({name: values}) for one in predicates if one.columns == {name})
    return reduce(np.logical_and, found, np.ones(len(values), bool))


def _ranks(effects: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """1 for the greatest effect of each row, ties in order; ``(neuron, token)``."""
    order = np.argsort(-effects, axis=1, kind="stable")
    ranks = np.empty(effects.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(1, effects.shape[1] + 1)[None], axis=1)
    return ranks
