"""Postprocessors: what nodes write to the residual stream and read from it, as vectors.

Five of them, each one declaration, each for any number of nodes of one sequence at a time::

    residual_write          (node, channel)     the vector that a node adds
    token_write             (node, vocabulary)  the same in the vocabulary's space
    residual_read           (node, channel)     the direction that a node reads
    token_read              (node, vocabulary)  what each token's embedding has along it
    token_pair_attribution  (node, attended)    where an attention latent's value comes from

Formulas: derived_scalars.md (e). Values are float64. Nothing here is ever changed by a call.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN, RawValues
from actstore.query.postprocess_nodes import NodeRule, RowsOf, groups_of, side_of
from actstore.query.postprocess_reads import READS
from actstore.query.postprocess_writes import PAIR_ATTRIBUTIONS, WRITES
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.nodes import NodeIndex
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_BYTES", "POSTPROCESSORS", "Postprocessor", "postprocess", "postprocessor"]

_L = ActivationLocationType
_W = WeightLocationType

MAX_BYTES = 2 << 30
"""The largest answer given at once, in bytes."""

_BLOCK_BYTES = 64 << 20  # of what is in the making, besides the sequence's own values


@dataclass(frozen=True)
class Postprocessor:
    """A named vector of each node.

    Attributes:
        name: lower-case name.
        meaning: one line for people, with the formula.
        axis: what the vector runs over.
        rules: the kinds of nodes that have one, and how it is made.
        project: from the rules' rows to the vector's space; None where they are in it.
    """

    name: str
    meaning: str
    axis: Dimension
    rules: tuple[NodeRule, ...]
    project: Callable[[RawValues], RowsOf] | None = None

    @property
    def node_types(self) -> tuple[NodeType, ...]:
        """The kinds of nodes that have such a vector, each once."""
        return tuple(dict.fromkeys(rule.node_type for rule in self.rules))

    def rule(self, node: NodeIndex) -> NodeRule:
        """How a node's vector is made.

        Raises:
            InvalidInput: nodes of this kind have none.
        """
        side = side_of(node)
        for rule in self.rules:
            if (rule.node_type, rule.side) == (node.node_type, side):
                return rule
        raise InvalidInput(
            f"{self.name} is not defined for {_described(node)}. {self._advice(node)}",
            kind=ErrorKind.INVALID_ARGUMENT,
        )

    def _advice(self, node: NodeIndex) -> str:
        sides = [
            rule.side.name
            for rule in self.rules
            if rule.node_type is node.node_type and rule.side is not None
        ]
        if side_of(node) is _L.ATTN_VALUE and sides:
            return (
                "A value is a vector and has no one activation to read. Use the side "
                f"{' or '.join(sides)}, or the scalar attn_value_in_edge_attribution."
            )
        if sides:
            return (
                "Say which of its two tokens reads: AttnSubNodeIndex(…, "
                f"q_k_or_v={' or '.join(sides)})."
            )
        if node.node_type in self.node_types:
            return "A head writes as a whole: pass a NodeIndex without a side."
        return f"Use nodes of the types {', '.join(self.node_types)}."

    def __str__(self) -> str:
        return self.name


def _described(node: NodeIndex) -> str:
    side = side_of(node)
    if side is not None:
        return f"the {side} of a head"
    return (
        "a whole head" if node.node_type is NodeType.ATTENTION_HEAD else f"{node.node_type} nodes"
    )


def _to_vocabulary(values: RawValues) -> RowsOf:
    gain = values.weight(_W.LAYER_NORM_GAIN_FINAL, None)
    unembedding = values.weight(_W.UNEMBEDDING, None)

    def project(rows: "Tensor") -> "Tensor":
        logits = (rows * gain) @ unembedding
        return logits.sub_(logits.mean(-1, keepdim=True))

    return project


def _from_vocabulary(values: RawValues) -> RowsOf:
    embedding = values.weight(_W.EMBEDDING, None) * values.dimensions.embedding_scale
    return lambda rows: rows @ embedding.T


_DECLARED = (
    Postprocessor(
        "residual_write",
        "the vector that a node adds to the residual stream at its token, without biases",
        Dimension.CHANNEL,
        WRITES,
    ),
    Postprocessor(
        "token_write",
        "residual_write @ (diag(final norm's gain) W_U), less its mean over the vocabulary; "
        "the final norm's scale and bias do not enter",
        Dimension.VOCABULARY,
        WRITES,
        _to_vocabulary,
    ),
    Postprocessor(
        "residual_read",
        "gradient of a node's value before its non-linearity at the residual stream just before "
        "it, at its token; the norm's denominator is a constant",
        Dimension.CHANNEL,
        READS,
    ),
    Postprocessor(
        "token_read",
        "W_E @ residual_read: what each vocabulary token's embedding has along the direction "
        "that a node reads; without positions and norm",
        Dimension.VOCABULARY,
        READS,
        _from_vocabulary,
    ),
    Postprocessor(
        "token_pair_attribution",
        "what each attended token contributes to an active latent of attention's output, summed "
        "over heads",
        Dimension.ATTENDED,
        PAIR_ATTRIBUTIONS,
    ),
)

POSTPROCESSORS: Mapping[str, Postprocessor] = MappingProxyType(
    {declared.name: declared for declared in _DECLARED}
)
"""Name -> declaration."""


def postprocessor(name: str) -> Postprocessor:
    """The postprocessor ``name``.

    Raises:
        InvalidInput: no such postprocessor.

    >>> postprocessor("token_write").axis
    <Dimension.VOCABULARY: 'vocabulary'>
    """
    found = POSTPROCESSORS.get(name.strip().lower())
    if found is None:
        close = difflib.get_close_matches(name, POSTPROCESSORS)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise InvalidInput(
            f"Unknown postprocessor {name!r}.{hint} Known ones: {', '.join(POSTPROCESSORS)}.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return found


def postprocess(
    name: str | Postprocessor,
    nodes: NodeIndex | Sequence[NodeIndex],
    values: RawValues,
    config: DstConfig = PLAIN,
    *,
    max_bytes: int = MAX_BYTES,
) -> "Tensor":
    """A vector of each node.

    Nodes of one kind and layer are computed together, in blocks of bounded memory; a row
    does not depend on what else is asked for.

    Args:
        name: the postprocessor, one of :data:`POSTPROCESSORS`.
        nodes: one node or several, of any kinds and layers that the postprocessor knows.
        values: raw values of their sequence, of a pass or from a store.
        config: the autoencoders, for latents; nothing else of it is read.
        max_bytes: a larger answer is refused before it is computed.

    Returns:
        float64 ``(node, channel)``, ``(node, vocabulary)`` or ``(node, attended)`` in the order
        of the nodes; without the first axis for a node that stands alone.

    Raises:
        InvalidInput: an unknown postprocessor; no node; a node of a kind that it does not know,
            of the backward pass, that does not name a place on every axis, or lies outside the
            model or the sequence; an inactive latent, or an autoencoder that it is not
            defined for; too large an answer.
        Unavailable: there is no such autoencoder, or a raw value cannot be had.
    """
    import torch

    declared = postprocessor(name) if isinstance(name, str) else name
    asked = [nodes] if isinstance(nodes, NodeIndex) else list(nodes)
    if not asked:
        raise InvalidInput(
            f"{declared.name} of no nodes. Name at least one.", kind=ErrorKind.INVALID_ARGUMENT
        )
    groups = groups_of(declared.name, asked, declared.rule, values, config)
    result: Tensor | None = None
    # In a caller's inference mode nothing could be differentiated.
    with torch.inference_mode(False), torch.no_grad():
        project = None if declared.project is None else declared.project(values)
        for group, rule in groups:
            prepared = rule.prepare(group)
            places = group.places(prepared.n_tokens)
            width = _width(declared.axis, values.dimensions, prepared.n_tokens)
            if result is None:
                _refuse_large(declared.name, len(asked), width, max_bytes)
                result = torch.empty(len(asked), width, dtype=torch.float64)
            step = max(1, _BLOCK_BYTES // (8 * max(prepared.width, width)))
            own = torch.tensor([row for row, _ in group.nodes])
            for start in range(0, len(places), step):
                rows = prepared.rows(places[start : start + step])
                result[own[start : start + step]] = rows if project is None else project(rows)
    assert result is not None
    return result[0] if isinstance(nodes, NodeIndex) else result


def _width(axis: Dimension, sizes: ModelDimensions, n_tokens: int) -> int:
    return n_tokens if axis is Dimension.ATTENDED else sizes.size(axis)


def _refuse_large(name: str, count: int, width: int, max_bytes: int) -> None:
    needed = 8 * count * width
    if needed > max_bytes:
        most = max_bytes // (8 * width)
        raise InvalidInput(
            f"{name} of {count} nodes takes {needed} bytes, above max_bytes={max_bytes}. Ask for "
            f"{most} nodes at a time, or raise max_bytes.",
            kind=ErrorKind.TOO_LARGE,
        )
