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
from actstore.store.segment_plan import Batch, SegmentPlan, read_segment

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

_SMALL_PLAN = 8192
"""Sequences of a plan whose columns are read whole, 64 KiB each, to place a few rows."""


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
    def _token_offsets(self) -> npt.NDArray[np.int64]:
        return self._sections.read("token_offset")

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
        return read_segment(self._sections, self.record, number, self.token_ids)

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

    def places_of(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where filled rows lie; reads what concerns their segments alone.

        Args:
            rows: global rows that sequences of this plan fill, int64 ``(row,)``.

        Returns:
            Global sequence number and position in the sequence, int64 ``(row,)`` each.

        Raises:
            StoreDamaged: a block that says so fails its checksum.
        """
        if self.counts.sequences <= _SMALL_PLAN:
            found = np.searchsorted(self._first_tokens, rows, side="right") - 1
            return self.record.sequence_base + found, rows - self._first_tokens[found]
        segments, which = np.unique(rows // self.config.segment_rows, return_inverse=True)
        index = segments - self.first_segment
        edges = self._sections.take("segment_first_sequence", np.concatenate([index, index + 1]))
        low, high = np.split(edges, 2)
        # The sequences of those segments, one segment after another.
        count = high - low
        begin = np.cumsum(count) - count
        wanted = np.arange(int(count.sum())) + np.repeat(low - begin, count)
        first = self._sections.take("first_token", wanted)
        found = np.searchsorted(first, rows, side="right") - 1
        assert (found >= begin[which]).all(), "a segment begins with its first sequence"
        return self.record.sequence_base + wanted[found], rows - first[found]

    def tokens_at(
        self, sequences: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        """Token ids at positions of sequences of this plan, in any order.

        Args:
            sequences: global sequence numbers, int64 ``(row,)``.
            positions: positions in these, int64 ``(row,)``.

        Returns:
            int32 ``(row,)``.

        Raises:
            StoreDamaged: a block that holds one fails its checksum.
        """
        index = sequences - self.record.sequence_base
        offset = (
            self._token_offsets[index]
            if self.counts.sequences <= _SMALL_PLAN
            else self._sections.take("token_offset", index)
        )
        places, size = offset + positions, self._sections.attributes["section_tokens"]
        ids = np.empty(len(places), np.int32)
        for part in set((places // size).tolist()):
            chosen = places // size == part
            ids[chosen] = self._sections.take(token_section(part), places[chosen] - part * size)
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


def _failed_checksum(entry: FileEntry) -> StoreDamaged:
    return StoreDamaged(
        f"{entry.path} fails its checksum {entry.crc32c:08x}. Run `actstore verify`.",
        kind=ErrorKind.CHECKSUM_MISMATCH,
    )
