"""What a plan fixes about one segment: its rows, its sequences, its forward passes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from actstore.store.plan_record import PlanRecord
from actstore.store.sections import SectionFile

__all__ = ["Batch", "SegmentPlan", "read_segment"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One padded forward pass.

    Attributes:
        members: sequences as indices into the segment's, int64 ``(member,)``; the rows of
            the batch in order, longest first.
        padded_length: tokens that each member is padded to, on the right.
    """

    members: npt.NDArray[np.int64]
    padded_length: int


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """Everything that is fixed about one segment; arrays are read-only.

    Attributes:
        number: global segment number.
        first_row: global row of the segment's first.
        n_rows: filled rows; they are the first of the segment.
        first_sequence: global number of its first sequence.
        document: global document number, int64 ``(sequence,)``.
        first_token: global row of the first token, int64 ``(sequence,)``.
        length: tokens, int32 ``(sequence,)``.
        start: offset of the first token of the document in the document's stream,
            int32 ``(sequence,)``; a BOS of the sequence's own is not part of the stream.
        batch: number of the batch, int32 ``(sequence,)``.
        batches: the forward passes, in order.
        token_ids: int32 ``(n_rows,)``.
        positions: position in the sequence, int32 ``(n_rows,)``.
        special: position 0 and special tokens, bool ``(n_rows,)``.
    """

    number: int
    first_row: int
    n_rows: int
    first_sequence: int
    document: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    start: npt.NDArray[np.int32]
    batch: npt.NDArray[np.int32]
    batches: tuple[Batch, ...]
    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    special: npt.NDArray[np.bool_]

    @property
    def n_sequences(self) -> int:
        """Sequences of the segment."""
        return len(self.length)

    @cached_property
    def row_sequence(self) -> npt.NDArray[np.int64]:
        """Every row's sequence as an index into the segment's, int64 ``(n_rows,)``."""
        return np.repeat(np.arange(self.n_sequences), self.length)

    def sequence_token_ids(self, index: int) -> npt.NDArray[np.int32]:
        """The token ids of the segment's sequence ``index``, int32 ``(length,)``."""
        offset = int(self.first_token[index]) - self.first_row
        return self.token_ids[offset : offset + int(self.length[index])]


def read_segment(
    sections: SectionFile,
    record: PlanRecord,
    number: int,
    token_ids: Callable[[int, int], npt.NDArray[np.int32]],
) -> SegmentPlan:
    """A segment of a plan.

    Args:
        sections: the plan's checked file.
        record: its record.
        number: global segment number, one of the plan's.
        token_ids: ``(start, stop) ->`` ids of the plan's tokens in row order.

    Raises:
        StoreDamaged: a block that holds the segment fails its checksum.
    """
    index, size = number - record.first_segment, record.config.segment_rows
    low, high = sections.slice("segment_first_sequence", index, index + 2).tolist()
    columns = {
        name: sections.slice(name, low, high)
        for name in ("document", "first_token", "length", "start", "batch")
    }
    length = columns["length"]
    n_rows = int(length.sum(dtype=np.int64))
    offset = int(sections.slice("token_offset", low, low + 1)[0])
    ids = token_ids(offset, offset + n_rows)
    first = columns["first_token"] - number * size
    positions = (np.arange(n_rows) - np.repeat(first, length)).astype(np.int32)
    special = (positions == 0) | np.isin(ids, record.config.special_token_ids)
    for array in (positions, special):
        array.setflags(write=False)
    first_batch, stop_batch = sections.slice("segment_first_batch", index, index + 2).tolist()
    padded_length = sections.slice("batch_padded_length", first_batch, stop_batch)
    return SegmentPlan(
        number=number,
        first_row=number * size,
        n_rows=n_rows,
        first_sequence=record.sequence_base + low,
        batches=_batches(columns["batch"], length, padded_length),
        token_ids=ids,
        positions=positions,
        special=special,
        **columns,
    )


def _batches(
    batch: npt.NDArray[np.int32],
    length: npt.NDArray[np.int32],
    padded_length: npt.NDArray[np.int32],
) -> tuple[Batch, ...]:
    order = np.lexsort((-length, batch))
    bounds = np.searchsorted(batch[order], np.arange(len(padded_length) + 1))
    order.setflags(write=False)
    return tuple(
        Batch(order[bounds[number] : bounds[number + 1]], int(padded))
        for number, padded in enumerate(padded_length)
    )
