"""What a text does in the model: the strongest nodes, what they write and read, and why.

A fresh pass answers here, not the store; the numbers come from the same code.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.service.encoding import tensor_fields
from actstore.query.service.models import NodeModel, PromptRequest
from actstore.query.service.problems import HttpKind, ServiceError
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.nodes import NodeIndex
from actstore.store.vocabulary import NodeType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Turns", "answer_prompt"]

Texts = Callable[[Sequence[int]], list[str]]

_WAITING = 4
"""Texts that may wait for the model; each holds a thread that others could use."""

_WAIT_SECONDS = 60.0
_WRITES = ("mlp_write_norm", "attn_write_norm")
_ATTRIBUTIONS = ("mlp_act_times_grad", "attn_act_times_grad")
_VECTORS = ("token_write", "token_read")


class Turns:
    """One text at a time runs through the model; few may wait.

    Args:
        waiting: how many.
    """

    def __init__(self, waiting: int = _WAITING) -> None:
        self._model = threading.Lock()
        self._places = threading.BoundedSemaphore(waiting + 1)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have the model to oneself.

        Raises:
            ServiceError: too many wait already, or it took too long; ``busy``.
        """
        if not self._places.acquire(blocking=False):
            raise _busy()
        try:
            if not self._model.acquire(timeout=_WAIT_SECONDS):
                raise _busy()
            try:
                yield
            finally:
                self._model.release()
        finally:
            self._places.release()


def _busy() -> ServiceError:
    detail = "The model is at work for others. Try again in a moment."
    return ServiceError(HttpKind.BUSY, detail, {"Retry-After": "5"})


def answer_prompt(
    run: Callable[[str], Any], asked: PromptRequest, texts: Texts, max_values: int
) -> dict[str, Any]:
    """Run a text and say what is asked of it.

    Args:
        run: runs a text, as :class:`actstore.Prompt` does.
        asked: the text and the questions.
        texts: decoded pieces of token ids.
        max_values: numbers of one tensor at most, where whole tensors are asked for.

    Returns:
        The members of :class:`~actstore.query.service.models.PromptModel`.

    Raises:
        InvalidInput: the text is too long for the model, or an unknown scalar, layer or node.
    """
    prompt = run(asked.text)
    token_ids = list(prompt.token_ids)
    tokens = list(prompt.tokens) or texts(token_ids)
    notes: list[str] = []
    top: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    names = asked.scalars
    if names is None:
        names = [*_WRITES, *(_ATTRIBUTIONS if prompt.objective_value is not None else ())]
    for name in dict.fromkeys(names):
        try:
            found: LabelledTensor = prompt.derive(name, layers=asked.layers)
        except Unavailable as error:
            notes.append(f"{name}: {error}")
            continue
        top.append({"scalar": found.name, "rows": _top_nodes(found, asked.top, tokens)})
        if asked.values:
            tensors[found.name] = _tensor(found, max_values)
    attribution: list[dict[str, Any]] = []
    if asked.target is not None:
        parts = prompt.cache().direct_logit_attribution(asked.target, asked.against)
        rows = [{k: v for k, v in row.items() if k != "sequence"} for row in parts.rows()]
        attribution = sorted(rows, key=lambda row: -abs(row["value"]))[: asked.top]
    vectors = [
        entry
        for node in asked.nodes
        for entry in _vectors(prompt, node, asked.tokens, texts, notes)
    ]
    return {
        "token_ids": token_ids,
        "tokens": tokens,
        "objective_value": prompt.objective_value,
        "top": top,
        "tensors": tensors,
        "attribution": attribution,
        "vectors": vectors,
        "notes": notes,
    }


def _top_nodes(found: LabelledTensor, count: int, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """The nodes whose values are largest in magnitude; NaN, which is none, left out."""
    values: npt.NDArray[np.float64] = np.asarray(found.numpy(), np.float64)
    flat = values.reshape(-1)
    size = np.where(np.isnan(flat), -1.0, np.abs(flat))
    order = np.argsort(-size, kind="stable")[: count + 1]
    chosen = [int(place) for place in order if size[place] >= 0][:count]
    rows = []
    for place in chosen:
        row: dict[str, Any] = {}
        for name, index in zip(found.dims, np.unravel_index(place, values.shape), strict=True):
            number = int(index)
            if name == "layer":
                row["layer"] = number if found.layers is None else found.layers[number]
            elif name == "pair":
                assert found.attended is not None
                row["token"] = int(found.rows.position[number])
                row["attended"] = int(found.attended[number])
            elif name != "singleton":
                row[name] = number
        row["text"] = tokens[row["token"]]
        row["value"] = float(flat[place])
        rows.append(row)
    return rows


def _tensor(found: LabelledTensor, max_values: int) -> dict[str, Any]:
    values = found.numpy()
    if values.size > max_values:
        raise InvalidInput(
            f"{found.name} here is {values.size:,} values; JSON holds {max_values:,} at most. "
            "Ask for fewer layers.",
            kind=ErrorKind.TOO_LARGE,
        )
    labels = {name: place.tolist() for name, place in found.coordinates.items() if name != "layer"}
    return {**tensor_fields(found), **labels, "values": values.tolist()}


def _vectors(
    prompt: Any, node: NodeModel, count: int, texts: Texts, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """What a node writes to and reads from the vocabulary's space, as far as it does."""
    index = NodeIndex(_node_type(node.type), tuple(node.indices), node.layer)
    for name in _VECTORS:
        try:
            vector: Tensor = prompt.postprocess(name, index)
        except (InvalidInput, Unavailable) as error:
            # Some kinds of nodes write and do not read; that is no mistake of who asks.
            notes.append(f"{name}: {error}")
            continue
        order = vector.argsort(descending=True, stable=True)
        yield {
            "node": node.model_dump(),
            "kind": name,
            "promoted": _scores(vector, order[:count].tolist(), texts),
            "suppressed": _scores(vector, order.flip(0)[:count].tolist(), texts),
        }


def _scores(vector: "Tensor", ids: list[int], texts: Texts) -> list[dict[str, Any]]:
    return [
        {"token_id": token_id, "text": text, "value": float(vector[token_id])}
        for token_id, text in zip(ids, texts(ids), strict=True)
    ]


def _node_type(name: str) -> NodeType:
    try:
        return NodeType(name)
    except ValueError:
        raise InvalidInput(
            f"{name!r} is no type of node; use {', '.join(NodeType)}.",
            kind=ErrorKind.INVALID_ARGUMENT,
        ) from None
