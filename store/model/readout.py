"""Coefficients and readable facts per neuron and head, computed once from the weights.

The products of activations and norms rest on these coefficients, so they are computed
in float64 from the weights as stored and kept: recomputing them elsewhere could differ
in the last bit.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.model.weights import FOLDER, ModelWeights
from actstore.store.sections import open_sections
from actstore.store.vocabulary import WeightLocationType

__all__ = ["READOUT_KEY", "TOKENS_KEPT", "compute_readout", "read_readout"]

READOUT_KEY = f"{FOLDER}/readout.sections"

TOKENS_KEPT = 10
"""Vocabulary tokens kept at either end of a neuron's effect on the logits."""

_NEURON_BLOCK = 1024
_VOCABULARY_BLOCK = 4096


def compute_readout(weights: ModelWeights) -> dict[str, npt.NDArray[Any]]:
    """Compute the coefficients of every neuron and head.

    The effect of a neuron on the logits is its output row times diag(g_final) W_U, less
    the mean over the vocabulary (spec/derived_scalars.md a.6: the final norm's bias and
    denominator are left out). Where the MLP's or attention's output passes a norm, its gain
    belongs to the output rows and its denominator is left out. Working memory is the unembedding in float32, one layer of
    weights and 100 MB.

    Args:
        weights: the model's weights.

    Returns:
        ``write_norm``, ``read_norm``, ``bias``: float64 (layer, neuron), the norms of
        the neuron's output row and input column, and its input bias.
        ``promoted_token``, ``suppressed_token``: int32 (layer, neuron, rank), the tokens
        with the greatest and least effect in float32, ties in order of token id; and
        ``promoted_score``, ``suppressed_score``: float32, these effects.
        ``head_write_norm``, ``head_value_output_norm``: float64 (layer, head), the
        Frobenius norms of W_O and of W_V W_O.
    """
    layers = range(weights.dimensions.n_layers)
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    unembedding = _Unembedding(weights)
    for layer in layers:
        for name, values in _layer_readout(weights, unembedding, layer).items():
            columns.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in columns.items()}


def read_readout(root: Path) -> dict[str, npt.NDArray[Any]]:
    """The readout of the store at ``root``, verified; arrays as ``compute_readout`` made them.

    Raises:
        StoreDamaged: the file is missing or fails a checksum.
    """
    sections = open_sections(root, READOUT_KEY)
    try:
        return {name: sections.read(name) for name in sections.names}
    finally:
        sections.close()


def _layer_readout(
    weights: ModelWeights, unembedding: "_Unembedding", layer: int
) -> dict[str, npt.NDArray[Any]]:
    w_out = _written(weights, layer, WeightLocationType.MLP_TO_RESIDUAL)
    w_in = weights.weight(WeightLocationType.MLP_TO_HIDDEN, layer)
    shared = weights.weight(WeightLocationType.ATTN_TO_VALUE, layer)
    w_output = _written(weights, layer, WeightLocationType.ATTN_TO_RESIDUAL)
    # A head of values for every query head that reads it.
    w_value = np.repeat(shared, len(w_output) // len(shared), axis=0)
    ends = [
        unembedding.ends(w_out[start : start + _NEURON_BLOCK])
        for start in range(0, len(w_out), _NEURON_BLOCK)
    ]
    return {
        "write_norm": np.sqrt(np.einsum("nd,nd->n", w_out, w_out)),
        "read_norm": np.sqrt(np.einsum("dn,dn->n", w_in, w_in)),
        "bias": weights.weight(WeightLocationType.MLP_HIDDEN_BIAS, layer),
        **{name: np.concatenate([end[name] for end in ends]) for name in ends[0]},
        "head_write_norm": np.sqrt(np.einsum("hcd,hcd->h", w_output, w_output)),
        "head_value_output_norm": np.array(
            [
                np.linalg.norm(value @ output)
                for value, output in zip(w_value, w_output, strict=True)
            ]
        ),
    }


def _written(weights: ModelWeights, layer: int, location: WeightLocationType) -> npt.NDArray[Any]:
    """Rows that are written to the stream, with the gain of the norm that they pass, if any."""
    rows = weights.weight(location, layer)
    if not weights.dimensions.has_post_norms:
        return rows
    return rows * weights.weight(_POST_GAINS[location], layer)


_POST_GAINS = {
    WeightLocationType.MLP_TO_RESIDUAL: WeightLocationType.LAYER_NORM_GAIN_POST_MLP,
    WeightLocationType.ATTN_TO_RESIDUAL: WeightLocationType.LAYER_NORM_GAIN_POST_ATTN,
}


class _Unembedding:
    """diag(g_final) W_U less its mean over the vocabulary, a block of tokens at a time."""

    def __init__(self, weights: ModelWeights) -> None:
        self._matrix = weights.weight(WeightLocationType.UNEMBEDDING, dtype="float32")
        self._gain = weights.weight(WeightLocationType.LAYER_NORM_GAIN_FINAL)[:, None]
        self._mean = self._matrix.mean(axis=1, dtype=np.float64, keepdims=True)

    def _blocks(self) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        for start in range(0, self._matrix.shape[1], _VOCABULARY_BLOCK):
            block = self._matrix[:, start : start + _VOCABULARY_BLOCK].astype(np.float64)
            block -= self._mean
            block *= self._gain
            yield start, block

    def ends(self, rows: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Tokens and effects at either end for output rows, (row, channel)."""
        promoted = suppressed = _Kept.empty(len(rows))
        for start, block in self._blocks():
            # Ranked as stored: a product's last bits depend on where its column stands.
            effects = (rows @ block).astype(np.float32)
            promoted = promoted.with_block(effects, start)
            np.negative(effects, out=effects)
            suppressed = suppressed.with_block(effects, start)
        return {
            "promoted_token": promoted.tokens,
            "promoted_score": promoted.effects,
            "suppressed_token": suppressed.tokens,
            "suppressed_score": -suppressed.effects,
        }


class _Kept:
    """The greatest effects so far of each row, ordered by effect, then token id."""

    def __init__(self, effects: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]) -> None:
        self.effects = effects
        self.tokens = tokens

    @classmethod
    def empty(cls, rows: int) -> "_Kept":
        return cls(np.empty((rows, 0), np.float32), np.empty((rows, 0), np.int32))

    def with_block(self, effects: npt.NDArray[np.float32], first_token: int) -> "_Kept":
        """Merge the effects of the tokens that follow all earlier ones, (row, token)."""
        rows, kept = self.effects.shape
        if kept < TOKENS_KEPT:
            columns = _greatest(effects)
            row = np.repeat(np.arange(rows), columns.shape[1])
            column = columns.reshape(-1)
        else:
            # Few enter once the list is full; one that equals the last loses to its token id.
            row, column = np.nonzero(effects > self.effects[:, -1:])
        where = np.concatenate([np.repeat(np.arange(rows), kept), row])
        effect = np.concatenate([self.effects.reshape(-1), effects[row, column]])
        token = np.concatenate([self.tokens.reshape(-1), (column + first_token).astype(np.int32)])
        order = np.lexsort((token, -effect, where))
        # Every row has equally many when the list is filling, and at least a full list after.
        ranks = np.arange(len(order)) - np.searchsorted(where[order], where[order])
        order = order[ranks < TOKENS_KEPT].reshape(rows, -1)
        return _Kept(effect[order], token[order])


def _greatest(effects: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Columns of the ``TOKENS_KEPT`` greatest values of each row, ascending by column."""
    count = effects.shape[1]
    if count <= TOKENS_KEPT:
        return np.broadcast_to(np.arange(count), effects.shape).copy()
    columns = np.argpartition(effects, count - TOKENS_KEPT, axis=1)[:, count - TOKENS_KEPT :]
    least = np.take_along_axis(effects, columns, axis=1).min(axis=1, keepdims=True)
    # A partition picks any of the values tied at the cut; the smallest token ids must win.
    for row in np.flatnonzero((effects >= least).sum(axis=1) > TOKENS_KEPT):
        columns[row] = np.argsort(-effects[row], kind="stable")[:TOKENS_KEPT]
    return np.sort(columns, axis=1)
