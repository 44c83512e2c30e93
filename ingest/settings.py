"""What a person may choose about an ingest, validated before anything is read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.layout import PAGE_ROWS, StoredDtype
from actstore.store.vocabulary import ActivationLocationType, parse_location, parse_locations

__all__ = ["IngestSettings", "Progress", "segment_rows_for"]

Progress = Callable[[str, int, int], None]
"""Called with a phase (``plan``, ``forward``, ``compact``), tokens done and tokens in all."""

_SET_NAME = re.compile("[a-z0-9][a-z0-9_-]*")
RETENTIONS = ("raw", "index", "none")


@dataclass(frozen=True)
class IngestSettings:
    """The choices of an ingest; every field has the default that most people want.

    Attributes:
        locations: presets and location names.
        keep: location -> ``raw`` (values kept) or ``none``.
        context: longest sequence; the model's own length by default.
        stride: tokens between the starts of a document's sequences; ``context`` by default.
        bos: ``auto``, ``document``, ``sequence`` or ``none``.
        dtype: ``auto`` or a dtype for all locations, with ``location=dtype`` exceptions.
        segment_rows: S; chosen from the device and the memory budget by default.
        batch_tokens: padded tokens of one forward pass.
        limit_tokens: plan no sequence that would pass this many tokens.
        shuffle: seed of a permutation of the sequences; None keeps the corpus' order.
        max_bytes: refuse to write more than this.
        memory_budget: bytes that two segments of the chosen locations may take.
        append: the corpus is a further one for a store that has others.
        set_name: ``base``, or a further set of locations for a store that has its base. A
            location that the store has already is stored anew, and replaces the old array.
        worker: (number, workers): this process starts at its share of the segments.
    """

    locations: str | tuple[str, ...] = "neurons"
    keep: Mapping[str, str] = field(default_factory=dict)
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
        _ = self.chosen, self.dtype_rules
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
        names = self.locations if isinstance(self.locations, str) else list(self.locations)
        chosen = set(parse_locations(names))
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
        if not chosen:
            raise _invalid("keep leaves no location to store.")
        return tuple(location for location in ActivationLocationType if location in chosen)

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
