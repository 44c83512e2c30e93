"""What a neuron does to a token's logit, as functions of SQL.

The effect is the neuron's output row times diag(g_final) W_U, less the mean over the vocabulary:
what the store's ``promoted`` and ``suppressed`` tokens of ``neurons`` are ranked by. The sum over
channels is made alike for every neuron, so an effect does not hang on what else is asked.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from duckdb.func import PythonUDFType

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.pieces import vocabulary_pieces
from actstore.store.model.weights import open_model
from actstore.store.vocabulary import WeightLocationType

__all__ = ["PROMOTION_FUNCTIONS", "Promotion"]

PROMOTION_FUNCTIONS = ("promotes", "promotes_rank")

_BLOCK = 1024


_MOST_EFFECTS = 20_000_000
"""Effects that one call may compute to rank one: some hundred neurons of a large vocabulary."""


class Promotion:
    """Effects of neurons on logits, from the weights that a store keeps.

    A database keeps its functions, so this keeps no open store, which would keep the database.

    Args:
        root: the store's directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rows: tuple[int, npt.NDArray[np.float64]] | None = None

    def register(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Make the functions known to the database of a connection, unless they are.

        ``promotes(layer, neuron, text)`` is the effect on the token with that text, FLOAT;
        ``promotes_rank(layer, neuron, text)`` its rank among the vocabulary, 1 for the most
        promoted, ties in order of token id.
        """
        known = connection.execute(
            "SELECT count(*) FROM duckdb_functions() WHERE function_name = ?",
            [PROMOTION_FUNCTIONS[0]],
        ).fetchall()
        if known[0][0]:
            return
        for name, function, result in (
            ("promotes", self._effects, "float"),
            ("promotes_rank", self._ranks, "integer"),
        ):
            connection.create_function(
                name, function, ["integer", "integer", "varchar"], result, type=PythonUDFType.ARROW
            )

    @cached_property
    def _model(self) -> Any:
        return open_model(self._root)

    @cached_property
    def _unembedding(self) -> npt.NDArray[np.float32]:
        """``(channel, vocabulary)``, as stored."""
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

    @cached_property
    def _token_ids(self) -> dict[str, int]:
        """Text -> the first token that it is."""
        ids: dict[str, int] = {}
        for piece in vocabulary_pieces(self._root):
            ids.setdefault(piece.text, piece.token_id)
        return ids

    def _written(self, layer: int) -> npt.NDArray[np.float64]:
        """A layer's output rows ``(neuron, channel)``; the last layer's are kept."""
        kept = self._rows
        if kept is None or kept[0] != layer:
            rows = self._model.weight(WeightLocationType.MLP_TO_RESIDUAL, layer)
            if self._model.dimensions.has_post_norms:
                rows = rows * self._model.weight(WeightLocationType.LAYER_NORM_GAIN_POST_MLP, layer)
            # Several threads may call; each goes on with what it read itself.
            self._rows = kept = layer, rows
        return kept[1]

    def _direction(self, columns: slice | int) -> npt.NDArray[np.float64]:
        """What raises some tokens' logits, ``(vocabulary, channel)`` or ``(channel,)``."""
        part = self._unembedding[:, columns].astype(np.float64).T - self._mean
        found: npt.NDArray[np.float64] = np.ascontiguousarray(part * self._gain)
        return found

    def _effects(self, layer: pa.Array, neuron: pa.Array, text: pa.Array) -> pa.Array:
        layers, neurons, ids = self._checked(layer, neuron, text)
        found = np.empty(len(layers), np.float32)
        for token_id in np.unique(ids).tolist():
            direction = self._direction(token_id)
            for number in np.unique(layers).tolist():
                inside = np.flatnonzero((ids == token_id) & (layers == number))
                for start in range(0, len(inside), _BLOCK):
                    part = inside[start : start + _BLOCK]
                    found[part] = (self._written(number)[neurons[part]] * direction).sum(axis=1)
        return pa.array(found, pa.float32())

    def _ranks(self, layer: pa.Array, neuron: pa.Array, text: pa.Array) -> pa.Array:
        layers, neurons, ids = self._checked(layer, neuron, text)
        effects = np.empty(self._unembedding.shape[1], np.float32)
        if len(np.unique(layers * self._model.dimensions.d_mlp + neurons)) * len(effects) > (
            _MOST_EFFECTS
        ):
            raise InvalidInput(
                f"promotes_rank looks at all {len(effects):,} tokens for each neuron. Ask it for "
                "fewer neurons: choose them in a subquery by `promotes`, with LIMIT.",
                kind=ErrorKind.TOO_LARGE,
            )
        ranks = np.empty(len(layers), np.int32)
        order = np.lexsort((neurons, layers))
        before: tuple[int, int] | None = None
        for place in order.tolist():
            asked = int(layers[place]), int(neurons[place])
            if asked != before:
                row = self._written(asked[0])[asked[1]]
                for start in range(0, len(effects), _BLOCK):
                    columns = slice(start, start + _BLOCK)
                    effects[columns] = (self._direction(columns) * row).sum(axis=1)
                before = asked
            own = effects[ids[place]]
            ahead = (effects > own).sum() + (effects[: ids[place]] == own).sum()
            ranks[place] = 1 + int(ahead)
        return pa.array(ranks, pa.int32())

    def _checked(
        self, layer: pa.Array, neuron: pa.Array, text: pa.Array
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Layers, neurons and token ids, each ``(row,)``.

        Raises:
            InvalidInput: one that the model does not have.
        """
        sizes = self._model.dimensions.n_layers, self._model.dimensions.d_mlp
        numbers = []
        for values, size, what in ((layer, sizes[0], "layer"), (neuron, sizes[1], "neuron")):
            found = values.to_numpy(zero_copy_only=False).astype(np.int64)
            outside = found[(found < 0) | (found >= size)]
            if len(outside):
                raise InvalidInput(
                    f"There is no {what} {outside[0]}; the model has 0 to {size - 1}.",
                    kind=ErrorKind.UNKNOWN_UNIT if what == "neuron" else ErrorKind.UNKNOWN_LAYER,
                )
            numbers.append(found)
        wanted = text.to_pylist()
        unknown = next((one for one in wanted if one not in self._token_ids), None)
        if unknown is not None:
            raise InvalidInput(
                f"No token of the vocabulary has the text {unknown!r}. A word's first token mostly "
                "begins with a space; look in the table `vocabulary`.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        ids = np.array([self._token_ids[one] for one in wanted], np.int64)
        return numbers[0], numbers[1], ids
