"""What a person may choose about an ingest, validated before anything is read."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from actstore.ingest.objectives import Objective, parse_objective
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.layout import PAGE_ROWS, StoredDtype
from actstore.store.location_names import parse_location, parse_locations
from actstore.store.publishing import BASE_SET
from actstore.store.vocabulary import ActivationLocationType

__all__ = ["DEFAULT_GRADIENTS", "IngestSettings", "Progress", "segment_rows_for"]

Progress = Callable[[str, int, int], None]
"""Called with a phase (``plan``, ``forward``, ``compact``), tokens done and tokens in all."""

_SET_NAME = re.compile("[a-z0-9][a-z0-9_-]*")
RETENTIONS = ("raw", "index", "none")

_L = ActivationLocationType
DEFAULT_GRADIENTS = (
    _L.RESID_POST_EMBEDDING,
    _L.ATTN_WEIGHTED_SUM_OF_VALUES,
    _L.RESID_POST_ATTN,
    _L.MLP_POST_ACT,
    _L.RESID_POST_MLP,
)
"""Where gradients are kept unless others are named: all others follow from these on read.

What attention and the MLP add has the gradient of the residual stream after it; scores,
patterns, queries, keys and values have theirs from that of the weighted values; neurons
before their activation function, and the norms' scales, from the places beside them.
"""


@dataclass(frozen=True)
class IngestSettings:
    """The choices of an ingest; every field has the default that most people want.

    Attributes:
        locations: presets and location names, or ``none``; None for ``neurons``, and for none
            in a further set with an objective, which is there for its gradients.
        keep: location -> ``raw`` (values kept) or ``none``.
        objective: what the backward pass differentiates, or its name; None for no backward
            pass.
        gradients: presets and names of the locations whose gradients are kept, always as
            float32; :data:`DEFAULT_GRADIENTS` by default.
        context: longest sequence; the model's own length by default.
        stride: tokens between the starts of a document's sequences; ``context`` by default.
        bos: ``auto``, ``document``, ``sequence`` or ``none``.
        dtype: ``auto`` or a dtype for all locations, with ``location=dtype`` exceptions;
            gradients are float32 whatever it says.
        segment_rows: S; chosen from the device and the memory budget by default.
        batch_tokens: padded tokens of one forward pass.
        limit_tokens: plan no sequence that would pass this many tokens.
        shuffle: seed of a permutation of the sequences; None keeps the corpus' order.
        max_bytes: refuse to write more than this.
        memory_budget: bytes that two segments of the chosen locations may take.
        append: the corpus is a further one for a store that has others.
        set_name: ``base``, or a further set of locations for a store that has its base. A
            location that the store has already is stored anew, and replaces the old array.
            Gradients never replace others: sets of several objectives stand beside each other.
        worker: (number, workers): this process starts at its share of the segments.
    """

    locations: str | tuple[str, ...] | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    objective: Objective | str | None = None
    gradients: str | tuple[str, ...] | None = None
    context: int | None = None
    stride: int | None = None
    bos: str = "auto"
    dtype: str = "auto"
    segment_rows: int | None = None
    batch_tokens: int | None = None
    limit_tokens: int | None = None
    shuffle: int | None = None
    max_bytes: int | None = None
    memory_budget: int = 4 * 2**30
    append: bool = False
    set_name: str = "base"
    worker: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        gradients = self.chosen_gradients
        if not self.chosen and not gradients:
            raise _invalid("keep leaves no location to store.")
        _ = self.dtype_rules
        for name in ("context", "stride", "batch_tokens", "limit_tokens", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _invalid(f"{name} is {value}; it must be at least 1.")
        if self.segment_rows is not None and (
            self.segment_rows < PAGE_ROWS or self.segment_rows % PAGE_ROWS
        ):
            raise _invalid(
                f"segment_rows is {self.segment_rows}; it must be a multiple of {PAGE_ROWS}."
            )
        if self.bos not in ("auto", "document", "sequence", "none"):
            raise _invalid(f"bos is {self.bos!r}; use auto, document, sequence or none.")
        if not _SET_NAME.fullmatch(self.set_name):
            raise _invalid(
                f"set_name is {self.set_name!r}; use lower-case letters, digits, '-' and '_'."
            )
        number, workers = self.worker
        if not 0 <= number < workers:
            raise _invalid(f"worker is {number} of {workers}; count from 0 to {workers - 1}.")

    @property
    def chosen(self) -> tuple[ActivationLocationType, ...]:
        """The locations whose values are kept, in the order of the enumeration."""
        names = self.locations
        if names is None:
            gradients_alone = self.objective is not None and self.set_name != BASE_SET
            names = "none" if gradients_alone else "neurons"
        chosen = set() if names == "none" else set(parse_locations(names))
        for name, retention in self.keep.items():
            location = parse_location(name)[0]
            if retention not in RETENTIONS:
                raise _invalid(f"keep[{name!r}] is {retention!r}; use {', '.join(RETENTIONS)}.")
            if retention == "index":
                raise _invalid(
                    f"keep[{name!r}] is 'index': keeping an index without values is not written "
                    "by this version; use 'raw' or 'none'."
                )
            (chosen.add if retention == "raw" else chosen.discard)(location)
        return tuple(location for location in ActivationLocationType if location in chosen)

    def for_model(self, present: Collection[ActivationLocationType]) -> Self:
        """These settings with presets and defaults as far as a model has their locations.

        Args:
            present: the locations that the model has.
        """
        names, gradients = self.locations, self.gradients
        if names is not None and names != "none":
            names = tuple(place.label for place in parse_locations(names, present))
        if gradients is not None:
            gradients = tuple(place.label for place in parse_locations(gradients, present))
        elif self.objective is not None:
            gradients = tuple(place.label for place in DEFAULT_GRADIENTS if place in present)
        return replace(self, locations=names, gradients=gradients)

    @property
    def chosen_objective(self) -> Objective | None:
        """What the backward pass differentiates; None where there is none."""
        named = self.objective
        return parse_objective(named) if isinstance(named, str) else named

    @property
    def chosen_gradients(self) -> tuple[ActivationLocationType, ...]:
        """The locations whose gradients are kept, in the order of the enumeration."""
        if self.chosen_objective is None:
            if self.gradients is not None:
                raise _invalid(
                    f"gradients is {self.gradients!r}, and there is no objective to differentiate. "
                    "Name one: objective='next_token_log_prob'."
                )
            return ()
        if self.gradients is None:
            return DEFAULT_GRADIENTS
        chosen = parse_locations(self.gradients)
        pairs = [location.label for location in chosen if location.is_pair_shaped]
        if pairs:
            raise _invalid(
                f"gradients names {', '.join(pairs)}: gradients of attended pairs are not stored. "
                f"They follow from that of {_L.ATTN_WEIGHTED_SUM_OF_VALUES}."
            )
        return chosen

    @property
    def dtype_rules(self) -> tuple[str, dict[ActivationLocationType, StoredDtype]]:
        """The rule for all locations (``auto`` or a dtype) and the exceptions."""
        rule = "auto"
        exceptions = {}
        for part in self.dtype.split(","):
            name, separator, value = part.strip().rpartition("=")
            if value not in ("auto", *StoredDtype) or (separator and value == "auto"):
                raise _invalid(
                    f"dtype is {self.dtype!r}; use auto, {', '.join(StoredDtype)}, or "
                    "location=dtype for one of them, separated by commas."
                )
            if separator:
                exceptions[parse_location(name)[0]] = StoredDtype(value)
            else:
                rule = value
        return rule, exceptions


def segment_rows_for(
    settings: IngestSettings, context: int, bytes_per_token: int, on_accelerator: bool
) -> int:
    """S by the rule of the format.

    16,384 on a CPU and 65,536 with an accelerator, halved while two segments pass the
    memory budget, and never under four contexts.

    Args:
        settings: a choice of S and the memory budget.
        context: the longest sequence.
        bytes_per_token: stored bytes of all chosen locations.
        on_accelerator: whether the model runs on one.

    Raises:
        InvalidInput: the chosen S is under four contexts, or no S can hold four.
    """
    least = -(-4 * context // PAGE_ROWS) * PAGE_ROWS
    if least > 65536:
        raise _invalid(f"context is {context}; a segment of 65536 rows must hold four.")
    if settings.segment_rows is not None:
        if settings.segment_rows < least:
            raise _invalid(
                f"segment_rows is {settings.segment_rows}; with context {context} it must be at "
                f"least {least} (four contexts)."
            )
        return settings.segment_rows
    rows = 65536 if on_accelerator else 16384
    while rows > least and 2 * rows * bytes_per_token > settings.memory_budget:
        rows //= 2
    return max(rows, least)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
