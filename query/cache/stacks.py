"""Stacks of residual-stream parts: filled sequence by sequence, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from actstore.query.cache.anatomy import NormPlace
from actstore.query.cache.norm import Norm
from actstore.query.cache.row import Row
from actstore.query.cache.view import View
from actstore.query.cache.writes import Dense, Writes, put
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LayerNormChoice",
    "Part",
    "Reading",
    "Stack",
    "as_tensor",
    "directions_of",
    "invalid",
]


class LayerNormChoice(StrEnum):
    """How a norm is applied to a part of what it reads."""

    EXACT = "exact"  # centred, the sum's denominator, the gain: parts and the bias sum up
    CACHED_SCALE = "cached_scale"  # centred, the sum's denominator: upstream's, for folded gains
    RECOMPUTED = "recomputed"  # the norm itself, as if the part were all that it reads


@dataclass(frozen=True)
class Reading:
    """The norm through which parts are read.

    Attributes:
        place: which norm.
        layer: of which block; None for the final one.
        choice: how it is applied.
    """

    place: NormPlace
    layer: int | None
    choice: LayerNormChoice

    def norm(self, row: Row, at: "Tensor") -> Norm:
        """The norm for a row's positions."""
        norm = row.norm(self.place, self.layer)
        if self.choice is LayerNormChoice.RECOMPUTED:
            return norm
        gain = norm.gain if self.choice is LayerNormChoice.EXACT else None
        return replace(norm, scale=row.scale(self.place, self.layer)[at], gain=gain, bias=None)


Give = Callable[[Row, "Tensor"], Writes]
PostNorm = Callable[[Row, "Tensor"], Norm]


@dataclass(frozen=True)
class Part:
    """Some rows of a stack.

    Attributes:
        first: the first of them.
        labels: one per row.
        give: a sequence's values at some positions.
        order: layer at which the values are at hand; layers are passed once, upwards.
        post_norm: the norm that they pass on their way into the stream.
    """

    first: int
    labels: tuple[str, ...]
    give: Give
    order: int
    post_norm: PostNorm | None = None

    @property
    def end(self) -> int:
        """The row after the last of them."""
        return self.first + len(self.labels)


@dataclass
class Stack:
    """Parts in the order of the result's rows.

    Attributes:
        parts: what to stack.
        remainder_of: layer whose entering stream is stacked last, less all other parts; None
            for no such row.
        remainder: gives that stream; the real one when None.
    """

    parts: list[Part] = field(default_factory=list)
    remainder_of: int | None = None
    remainder: "Callable[[Row], Tensor] | None" = None

    def add(
        self, labels: Sequence[str], give: Give, order: int, post_norm: PostNorm | None = None
    ) -> None:
        """Append rows."""
        first = self.parts[-1].end if self.parts else 0
        self.parts.append(Part(first, tuple(labels), give, order, post_norm))

    def add_stream(self, label: str, give: "Callable[[Row], Tensor]", order: int) -> None:
        """Append one row of known channels, ``(token, channel)``."""
        self.add((label,), lambda row, at: Dense(give(row)[at][None]), order)

    @property
    def labels(self) -> list[str]:
        """One label per row of the result."""
        found = [label for part in self.parts for label in part.labels]
        return found if self.remainder_of is None else [*found, "remainder"]

    def fill(
        self,
        view: View,
        what: str,
        reading: Reading | None = None,
        onto: Any = None,
        onto_of: "Callable[[int], Tensor] | None" = None,
    ) -> "Tensor":
        """The stack's values.

        Args:
            view: rows and positions.
            what: the method's name, for messages.
            reading: the norm through which they are read.
            onto: directions ``(channel,)`` or ``(channel, direction)`` to project on.
            onto_of: one direction ``(channel,)`` per row of the view instead.

        Returns:
            ``(part, [batch], [position], channel)``; the last axis is ``direction`` or absent
            with a projection.
        """
        channels = view.batch.model.dimensions.d_model
        directions = None if onto is None else directions_of(onto, channels)
        width = 1 if onto_of else channels if directions is None else directions.shape[1]
        result = view.allocate((len(self.labels),), (width,), what)
        for place, row, at in view.each():
            norms = () if reading is None else (reading.norm(row, at),)
            if onto_of is not None:
                directions = directions_of(onto_of(place), channels)
            self._fill_row(result[:, place, : len(at)], row, at, norms, directions)
        finished = view.finished(result, 1)
        is_one = onto_of is not None or (onto is not None and as_tensor(onto, what).ndim == 1)
        return finished.squeeze(-1) if is_one else finished

    def _fill_row(
        self,
        target: "Tensor",
        row: Row,
        at: "Tensor",
        norms: tuple[Norm, ...],
        directions: "Tensor | None",
    ) -> None:
        written: Tensor | None = None
        for part in sorted(self.parts, key=lambda part: part.order):
            writes = part.give(row, at)
            post = None if part.post_norm is None else part.post_norm(row, at)
            passed = norms if post is None else (post, *norms)
            put(target[part.first : part.end], writes, passed, directions)
            if self.remainder_of is not None:
                total = writes.total() if post is None else post(writes.total())
                written = total if written is None else written + total
        if self.remainder_of is not None:
            stream = (
                row.residual(self.remainder_of) if self.remainder is None else self.remainder(row)
            )
            rest = stream[at] if written is None else stream[at] - written
            put(target[-1:], Dense(rest[None]), norms, directions)


def directions_of(onto: Any, channels: int) -> "Tensor":
    """Directions to project on, float64 ``(channel, direction)``.

    Raises:
        InvalidInput: they are not as wide as the stream.
    """
    import torch

    found = as_tensor(onto, "project_output_onto").to(torch.float64)
    if found.ndim not in (1, 2) or found.shape[0] != channels:
        raise invalid(
            f"project_output_onto has shape {tuple(found.shape)}; give one direction "
            f"({channels},) or several ({channels}, n)."
        )
    return found.reshape(channels, -1)


def as_tensor(given: Any, name: str) -> "Tensor":
    """An argument as a tensor on the CPU, without its graph.

    Raises:
        InvalidInput: it holds no numbers.
    """
    import torch

    try:
        return torch.as_tensor(given).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError):
        raise invalid(f"{name}: {given!r} holds no numbers. Give a tensor or a list.") from None


def invalid(message: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT) -> InvalidInput:
    """The error for an argument that cannot be used."""
    return InvalidInput(message, kind=kind)
