"""How sequences become rows and batches: pure arithmetic on their lengths.

Sequences fill a segment back to back in plan order; one that does not fit starts the
next. Inside a segment they are sorted by length and cut into padded batches, so that
little is padded and no batch crosses a segment. Both depend on the plan alone, never on
the machine: the same bytes come out of every run.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.plan import token_section
from actstore.store.plan_record import PlanConfig
from actstore.store.spool import Spool

__all__ = ["Arrangement", "PlanSections", "arrange"]


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The rows and batches of a plan's sequences.

    Attributes:
        order: the sequences as indices into the lengths given, int64 ``(sequence,)``; all
            columns below follow it.
        first_token: row of the first token, int64 ``(sequence,)``.
        length: tokens, int32 ``(sequence,)``.
        token_offset: tokens before the sequence, int64 ``(sequence,)``.
        batch: number of the batch in its segment, int32 ``(sequence,)``.
        segment_first_sequence: int64 ``(segments + 1,)``.
        segment_first_batch: int64 ``(segments + 1,)``.
        batch_padded_length: int32 ``(batches,)``.
        padded_tokens: tokens of all batches with their padding.
    """

    order: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    token_offset: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int32]
    segment_first_sequence: npt.NDArray[np.int64]
    segment_first_batch: npt.NDArray[np.int64]
    batch_padded_length: npt.NDArray[np.int32]
    padded_tokens: int

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self.segment_first_sequence) - 1


def arrange(lengths: npt.NDArray[np.int32], config: PlanConfig, first_segment: int) -> Arrangement:
    """Place sequences in rows and batches.

    Args:
        lengths: tokens of each sequence in the corpus' order, int32 ``(sequence,)``.
        config: segment rows, batch tokens and the shuffle's seed.
        first_segment: global number of the plan's first segment.
    """
    order = np.arange(len(lengths))
    if config.shuffle is not None:
        order = np.random.Generator(np.random.PCG64(config.shuffle)).permutation(order)
    length = lengths[order]
    stop = np.cumsum(length, dtype=np.int64)
    token_offset = stop - length
    firsts = [0]
    while firsts[-1] < len(length):
        filled = token_offset[firsts[-1]] + config.segment_rows
        firsts.append(int(np.searchsorted(stop, filled, side="right")))
    first_token = token_offset.copy()
    for number, (low, high) in enumerate(pairwise(firsts), start=first_segment):
        first_token[low:high] += number * config.segment_rows - token_offset[low]
    batch = np.empty(len(length), np.int32)
    padded_lengths, first_batches, padded_tokens = array("i"), [0], 0
    for low, high in pairwise(firsts):
        for number, (members, padded) in enumerate(_cut(length[low:high], config)):
            batch[low + members] = number
            padded_lengths.append(padded)
            padded_tokens += len(members) * padded
        first_batches.append(len(padded_lengths))
    return Arrangement(
        order=order,
        first_token=first_token,
        length=length,
        token_offset=token_offset,
        batch=batch,
        segment_first_sequence=np.array(firsts, np.int64),
        segment_first_batch=np.array(first_batches, np.int64),
        batch_padded_length=np.array(padded_lengths, np.int32),
        padded_tokens=padded_tokens,
    )


def _cut(
    length: npt.NDArray[np.int32], config: PlanConfig
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    order = np.argsort(-length, kind="stable")
    done = 0
    while done < len(order):
        padded = config.padded_length(int(length[order[done]]))
        members = order[done : done + max(1, config.batch_tokens // padded)]
        yield members, padded
        done += len(members)


class PlanSections(Mapping[str, npt.NDArray[Any]]):
    """The sections of a plan's file, made as they are written.

    Token ids are fetched from their spool one section at a time, so that a plan of any
    size is written in the memory of one section.

    Args:
        arrangement: where the sequences lie.
        columns: further sections.
        ids: int32 token ids of all sequences in the corpus' order.
        first_id: where in ``ids`` the arrangement's corpus begins, in tokens.
        lengths: tokens of each sequence in the corpus' order.
        section_tokens: token ids of one section.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        columns: Mapping[str, npt.NDArray[Any]],
        *,
        ids: Spool,
        first_id: int,
        lengths: npt.NDArray[np.int32],
        section_tokens: int,
    ) -> None:
        self._columns: dict[str, npt.NDArray[Any]] = {
            "first_token": arrangement.first_token,
            "length": arrangement.length,
            "token_offset": arrangement.token_offset,
            "batch": arrangement.batch,
            "segment_first_sequence": arrangement.segment_first_sequence,
            "segment_first_batch": arrangement.segment_first_batch,
            "batch_padded_length": arrangement.batch_padded_length,
            **columns,
        }
        self._arrangement = arrangement
        self._ids = ids
        stops = np.cumsum(lengths, dtype=np.int64)
        self._source = (first_id + stops - lengths)[arrangement.order]
        self._tokens = int(stops[-1])
        self._section_tokens = section_tokens
        parts = range(-(-self._tokens // section_tokens))
        self._parts = {token_section(part): part for part in parts}

    def __iter__(self) -> Iterator[str]:
        yield from self._columns
        yield from self._parts

    def __len__(self) -> int:
        return len(self._columns) + len(self._parts)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name in self._columns:
            return self._columns[name]
        start = self._parts[name] * self._section_tokens
        return self._token_ids(start, min(start + self._section_tokens, self._tokens))

    def _token_ids(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        offsets = self._arrangement.token_offset
        low = int(np.searchsorted(offsets, start, side="right")) - 1
        high = int(np.searchsorted(offsets, stop, side="left"))
        offset, length = offsets[low:high], self._arrangement.length[low:high]
        begin, end = np.maximum(offset, start), np.minimum(offset + length, stop)
        shift = self._source[low:high] - offset
        begin, end = begin + shift, end + shift
        # Neighbours in the plan that are neighbours in the spool too are read at once.
        cuts = np.flatnonzero(begin[1:] != end[:-1])
        firsts, lasts = np.append(0, cuts + 1), np.append(cuts, len(begin) - 1)
        runs = zip(begin[firsts].tolist(), end[lasts].tolist(), strict=True)
        data = b"".join(self._ids.read(4 * one, 4 * (other - one)) for one, other in runs)
        ids: npt.NDArray[np.int32] = np.frombuffer(data, "<i4")
        return ids
