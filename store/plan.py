"""Plans: documents -> sequences -> batches -> segments, fixed once for every run.

A plan says which token every row of the store holds, so nobody reads the corpus twice
and writers need no coordinator. It is a folder ``plan/NNNN-<hash>/``::

    plan.json            config, counts, numbering, checksums; published last
    plan.sections        token ids without padding, and columns per sequence and batch
    documents.parquet    document, source, n_tokens and the caller's own columns

A row of the store is ``segment * segment_rows + offset``. Sequences fill a segment back
to back, one that does not fit starts the next segment, and a plan starts at a segment
boundary. Documents, sequences, segments and rows are numbered across plans.
:mod:`actstore.store.planning` writes plans; this module reads them.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from crc32c import crc32c
from pyarrow import parquet

from actstore.store.blobs import missing_file
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged
from actstore.store.manifest import FileEntry
from actstore.store.plan_record import (
    PLAN_FOLDER,
    RECORD_FILE,
    BosPolicy,
    ChainMark,
    PlanConfig,
    PlanCounts,
    PlanRecord,
    malformed,
)
from actstore.store.sections import SectionFile

__all__ = [
    "Batch",
    "BosPolicy",
    "ChainMark",
    "Plan",
    "PlanConfig",
    "PlanCounts",
    "PlanRecord",
    "SegmentPlan",
    "load_plans",
]

SECTION_FILE = "plan.sections"
DOCUMENT_FILE = "documents.parquet"

TOKENS_PER_SECTION = 2**22
"""Token ids of one section: 16 MiB, the most that a writer holds in memory at once."""


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


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan of a store, opened for reading; every read is verified.

    Args:
        root: the store's directory.
        record: its ``plan.json``.
    """

    root: Path
    record: PlanRecord

    @classmethod
    def open(cls, root: str | os.PathLike[str], folder: str) -> "Plan":
        """Open the plan in ``folder`` (``plan/NNNN-<hash>``) of the store at ``root``.

        Raises:
            NotAStore: the plan's format is newer than this version reads.
            StoreDamaged: the record fails its checksum, or a file is missing or cut short.
        """
        root, name = Path(root), f"{folder}/{RECORD_FILE}"
        try:
            data = (root / name).read_bytes()
        except FileNotFoundError as error:
            raise missing_file(name) from error
        plan = cls(root, PlanRecord.decode(data, name))
        for entry in plan.record.files:
            try:
                size = (root / entry.path).stat().st_size
            except FileNotFoundError as error:
                raise missing_file(entry.path) from error
            if size != entry.size:
                raise malformed(entry.path, f"has {size} bytes instead of {entry.size}")
        return plan

    def __reduce__(self) -> tuple[object, ...]:
        # A file descriptor means nothing in another process.
        return Plan, (self.root, self.record)

    @property
    def number(self) -> int:
        """Position among the store's plans."""
        return self.record.number

    @property
    def hash(self) -> str:
        """Sha256 of all that the plan fixes, in hex."""
        return self.record.hash

    @property
    def config(self) -> PlanConfig:
        """What the plan was made with."""
        return self.record.config

    @property
    def counts(self) -> PlanCounts:
        """How much the plan holds."""
        return self.record.counts

    @property
    def first_segment(self) -> int:
        """Global number of the first segment."""
        return self.record.first_segment

    @property
    def n_segments(self) -> int:
        """Number of segments."""
        return self.counts.segments

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that ``plan.json`` answers for; it has a checksum of its own."""
        return self.record.files

    @property
    def record_path(self) -> str:
        """The path of ``plan.json`` inside the store."""
        return f"{self.record.folder}/{RECORD_FILE}"

    @cached_property
    def _sections(self) -> SectionFile:
        name = f"{self.record.folder}/{SECTION_FILE}"
        sections = SectionFile(self.root / name, name)
        if sections.attributes.get("plan") != self.hash:
            raise malformed(name, "belongs to another plan")
        return sections

    @cached_property
    def _first_tokens(self) -> npt.NDArray[np.int64]:
        return self._sections.read("first_token")

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int32]:
        return self._sections.read("length")

    def segment(self, number: int) -> SegmentPlan:
        """The rows, sequences and batches of a segment.

        Args:
            number: global segment number.

        Raises:
            InvalidInput: the plan has no such segment.
            StoreDamaged: a block that holds them fails its checksum.
        """
        index = number - self.first_segment
        if not 0 <= index < self.n_segments:
            raise InvalidInput(
                f"There is no segment {number} in plan {self.number}; it has "
                f"{self.first_segment} to {self.first_segment + self.n_segments - 1}.",
                kind=ErrorKind.UNKNOWN_ROW,
            )
        sections, size = self._sections, self.config.segment_rows
        low, high = sections.slice("segment_first_sequence", index, index + 2).tolist()
        columns = {
            name: sections.slice(name, low, high)
            for name in ("document", "first_token", "length", "start", "batch")
        }
        length = columns["length"]
        n_rows = int(length.sum(dtype=np.int64))
        offset = int(sections.slice("token_offset", low, low + 1)[0])
        token_ids = self.token_ids(offset, offset + n_rows)
        first = columns["first_token"] - number * size
        positions = (np.arange(n_rows) - np.repeat(first, length)).astype(np.int32)
        special = (positions == 0) | np.isin(token_ids, self.config.special_token_ids)
        for array in (positions, special):
            array.setflags(write=False)
        first_batch, stop_batch = sections.slice("segment_first_batch", index, index + 2).tolist()
        return SegmentPlan(
            number=number,
            first_row=number * size,
            n_rows=n_rows,
            first_sequence=self.record.sequence_base + low,
            batches=_batches(
                columns["batch"],
                length,
                sections.slice("batch_padded_length", first_batch, stop_batch),
            ),
            token_ids=token_ids,
            positions=positions,
            special=special,
            **columns,
        )

    def filled_rows(self) -> npt.NDArray[np.int64]:
        """The filled rows of every segment of the plan, int64 ``(segments,)``."""
        firsts = self._sections.read("segment_first_sequence")
        offsets = self._sections.read("token_offset")
        rows: npt.NDArray[np.int64] = np.diff(np.append(offsets[firsts[:-1]], self.counts.tokens))
        return rows

    def token_ids(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Token ids ``start:stop`` of the plan's tokens in row order, without padding.

        Returns:
            int32 ``(token,)``.
        """
        size: int = self._sections.attributes["section_tokens"]
        parts = [
            self._sections.slice(
                token_section(part), max(start - part * size, 0), stop - part * size
            )
            for part in range(start // size, -(-stop // size))
        ]
        ids: npt.NDArray[np.int32] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ids.setflags(write=False)
        return ids

    def sequences(self) -> dict[str, npt.NDArray[Any]]:
        """Every sequence of the plan, column by column.

        Returns:
            Arrays ``(sequence,)``: ``sequence``, ``document``, ``first_token`` and
            ``segment`` (global numbers, int64), ``length``, ``start`` and ``batch``
            (int32; see :class:`SegmentPlan`).
        """
        first_token, base = self._first_tokens, self.record.sequence_base
        return {
            "sequence": np.arange(base, base + self.counts.sequences),
            "document": self._sections.read("document"),
            "first_token": first_token,
            "length": self._lengths,
            "start": self._sections.read("start"),
            "segment": first_token // self.config.segment_rows,
            "batch": self._sections.read("batch"),
        }

    def sequence_of_row(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The sequences that fill global rows.

        Args:
            rows: global rows, any order and shape.

        Returns:
            Global sequence numbers, int64 of the same shape; -1 where no sequence of this
            plan fills the row.
        """
        rows = np.asarray(rows, np.int64)
        found = np.searchsorted(self._first_tokens, rows, side="right") - 1
        inside = (found >= 0) & (rows - self._first_tokens[found] < self._lengths[found])
        return np.where(inside, found + self.record.sequence_base, -1)

    def chain_digests(self) -> npt.NDArray[np.uint64]:
        """The first 8 bytes of the corpus' rolling digest after each sequence.

        Returns:
            uint64 ``(sequence,)``, in the corpus' order even where the plan is shuffled.
        """
        return self._sections.read("rolling")

    def documents(self) -> pa.Table:
        """The documents, verified.

        Returns:
            Table of ``document`` (global number, int64), ``source``, ``n_tokens`` (tokens
            of the document's stream, a BOS before the document included, int64) and the
            caller's columns.

        Raises:
            StoreDamaged: the file fails its checksum.
        """
        entry = self._entry(DOCUMENT_FILE)
        data = (self.root / entry.path).read_bytes()
        if crc32c(data) != entry.crc32c:
            raise _failed_checksum(entry)
        return parquet.read_table(pa.BufferReader(data), use_threads=False)

    def verify(self) -> None:
        """Read every file of the plan in full.

        Raises:
            StoreDamaged: one fails its checksum, or they disagree with the counts.
        """
        for entry in self.files:
            checksum = 0
            with open(self.root / entry.path, "rb") as file:
                while block := file.read(2**20):
                    checksum = crc32c(block, checksum)
            if checksum != entry.crc32c:
                raise _failed_checksum(entry)
        entry = self._entry(DOCUMENT_FILE)
        if parquet.read_metadata(self.root / entry.path).num_rows != self.counts.documents:
            raise malformed(entry.path, f"does not hold {self.counts.documents} documents")
        if self._lengths.sum(dtype=np.int64) != self.counts.tokens:
            raise malformed(self._sections.name, f"does not hold {self.counts.tokens} tokens")

    def _entry(self, name: str) -> FileEntry:
        return next(entry for entry in self.files if entry.path.endswith(f"/{name}"))


def load_plans(root: str | os.PathLike[str]) -> list[Plan]:
    """Every plan of the store at ``root``, in order; a folder without ``plan.json`` is none.

    Raises:
        NotAStore: a plan's format is newer than this version reads.
        StoreDamaged: a plan is damaged, or the numbering shows that one is missing.
    """
    plans: list[Plan] = []
    for folder in plan_folders(root):
        plan = Plan.open(root, folder)
        record, before = plan.record, plans[-1].record if plans else None
        expected = (0, 0, 0) if before is None else following(before)
        numbers = (record.first_segment, record.sequence_base, record.document_base)
        if (record.number, numbers) != (len(plans), expected):
            raise malformed(
                plan.record_path, f"does not follow plan {len(plans) - 1}: a plan is missing"
            )
        plans.append(plan)
    return plans


def plan_folders(root: str | os.PathLike[str]) -> list[str]:
    """The folders of published plans inside the store, in order."""
    return sorted(
        path.parent.relative_to(root).as_posix()
        for path in Path(root).glob(f"{PLAN_FOLDER}/*/{RECORD_FILE}")
    )


def following(record: PlanRecord) -> tuple[int, int, int]:
    """First segment, sequence and document of the plan after ``record``'s."""
    return (
        record.first_segment + record.counts.segments,
        record.sequence_base + record.counts.sequences,
        record.document_base + record.counts.documents,
    )


def token_section(part: int) -> str:
    """The name of the section that holds part number ``part`` of the token ids."""
    return f"token_ids.{part}"


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


def _failed_checksum(entry: FileEntry) -> StoreDamaged:
    return StoreDamaged(
        f"{entry.path} fails its checksum {entry.crc32c:08x}. Run `actstore verify`.",
        kind=ErrorKind.CHECKSUM_MISMATCH,
    )
