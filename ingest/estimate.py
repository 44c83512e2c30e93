"""What an ingest will write and take, before anything is written."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actstore.store.errors import ErrorKind, IngestStopped
from actstore.store.index_fold import list_depth
from actstore.store.layout import PAGE_ROWS, ArraySpec
from actstore.store.plan import Plan
from actstore.store.sections import BLOCK
from actstore.store.zones import LIST_LENGTH

__all__ = ["Estimate", "StoreSize", "array_bytes", "free_space", "require_space", "zone_bytes"]

_SPACE_SHARE = 0.8
"""Share of the free space that an ingest may plan to fill."""

_LISTED_ENTRIES = 32
_ZONE_FOOTER = 410
_PLAIN_FOOTER = 90

# Measured on stores of 4,000 to 200,000 rows: what compression leaves.
_PART_BYTES = 1500
_PART_BYTES_PER_ROW = 4.6
_SNAPSHOT_BYTES = 2_850_000
_SNAPSHOT_BYTES_PER_ROW = 2.6
_SNAPSHOT_BYTES_PER_ENTRY = 3.5
_SNAPSHOT_BYTES_PER_NEURON = 60.0
_SNAPSHOT_BYTES_PER_PIECE = 10.0
_RECORD_BYTES = 250
_RECORD_BYTES_PER_FILE = 57
_METADATA_BYTES = 450


@dataclass(frozen=True)
class Estimate:
    """The size and cost of an ingest, less what is done already.

    Attributes:
        tokens: token rows.
        sequences: model contexts.
        documents: source texts with at least one token.
        segments: segments of the plan.
        bytes_by_array: ``location/pass`` -> bytes of its shards.
        zone_bytes: zone maps, lists, statistics and checksums.
        other_bytes: model, plan, parts, index and snapshot, approximately.
        files: files written.
        seconds: forward passes and writing, from a measured sample.
        rerun_seconds: the forward passes alone: what one further question costs without a store.
        free_bytes: free space of the target.
    """

    tokens: int
    sequences: int
    documents: int
    segments: int
    bytes_by_array: dict[str, int]
    zone_bytes: int
    other_bytes: int
    files: int
    seconds: float | None
    rerun_seconds: float | None
    free_bytes: int

    @property
    def array_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.bytes_by_array.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.array_bytes + self.zone_bytes + self.other_bytes

    def to_json(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class StoreSize:
    """Everything that the size of an ingest follows from.

    Attributes:
        arrays: the arrays that are written.
        segment_rows: rows of a segment.
        has_rows: whether the rows themselves (token ids, parts) are written too.
        plans: all plans of the store.
        remaining: segment -> filled rows, of the segments not committed.
        n_layers, neurons, vocabulary: sizes of the model.
        model_bytes: of the model's files, if they are to be written.
        model_files: how many these are.
        plan_bytes: of the plan's files, if they are to be written.
        is_new: whether the store itself is to be written.
        has_new_plan: whether a plan is to be written.
    """

    arrays: tuple[ArraySpec, ...]
    segment_rows: int
    has_rows: bool
    plans: tuple[Plan, ...]
    remaining: Mapping[int, int]
    n_layers: int
    neurons: int
    vocabulary: int
    model_bytes: int = 0
    model_files: int = 0
    plan_bytes: int = 0
    is_new: bool = False
    has_new_plan: bool = False

    @property
    def tokens(self) -> int:
        """Token rows still to be ingested."""
        return sum(self.remaining.values())

    def estimate(
        self, *, seconds: float | None, rerun_seconds: float | None, free_bytes: int
    ) -> Estimate:
        """The estimate of what remains.

        Args:
            seconds: measured elsewhere; see :class:`Estimate`.
            rerun_seconds: likewise.
            free_bytes: free space of the target.
        """
        rows = list(self.remaining.values())
        sequences, documents = self._sequences_and_documents()
        return Estimate(
            tokens=self.tokens,
            sequences=sequences,
            documents=documents,
            segments=len(rows),
            bytes_by_array={spec.key: array_bytes(spec, rows) for spec in self.arrays},
            zone_bytes=sum(zone_bytes(spec, rows) for spec in self.arrays),
            other_bytes=self._other_bytes(rows) if rows else 0,
            files=self._files() if rows else 0,
            seconds=seconds,
            rerun_seconds=rerun_seconds,
            free_bytes=free_bytes,
        )

    def _sequences_and_documents(self) -> tuple[int, int]:
        numbers = np.array(sorted(self.remaining), np.int64)
        sequences = 0
        documents: set[int] = set()
        for plan in self.plans:
            columns = plan.sequences()
            segment = columns["first_token"].astype(np.int64) // plan.config.segment_rows
            wanted = np.isin(segment, numbers)
            sequences += int(wanted.sum())
            documents.update(np.unique(columns["document"][wanted]).tolist())
        return sequences, len(documents)

    def _other_bytes(self, rows: Sequence[int]) -> int:
        chunk = math.gcd(self.segment_rows, 4096)
        index_bytes = 16 * self.segment_rows // chunk + 4
        token_ids = sum(4 * chunk * -(-n // chunk) + index_bytes for n in rows)
        parts = _PART_BYTES * len(rows) + _PART_BYTES_PER_ROW * self.tokens
        commits = len(rows) * (_RECORD_BYTES + _RECORD_BYTES_PER_FILE * self._segment_files)
        index = sum(self._index_bytes(spec) for spec in self.arrays if spec.has_zones)
        metadata = _METADATA_BYTES * (2 * len(self.arrays) + 5) if self.is_new else 0
        return round(
            (token_ids + parts if self.has_rows else 0)
            + commits
            + index
            + self._snapshot_bytes()
            + metadata
            + self.model_bytes
            + self.plan_bytes
        )

    @property
    def _segment_files(self) -> int:
        """Files of one segment, without its commit record."""
        return sum(spec.shards + 1 for spec in self.arrays) + (2 if self.has_rows else 0)

    @property
    def _segments(self) -> int:
        return sum(plan.n_segments for plan in self.plans)

    def _files(self) -> int:
        # Zarr metadata of every location and array, of their group and of the token ids.
        metadata = len({spec.location for spec in self.arrays}) + len(self.arrays) + 2
        per_store = metadata + self.model_files + 2 if self.is_new else 0
        # The snapshot and its record, and the self-check.
        derived = sum(spec.has_zones for spec in self.arrays) + 3
        plan = 3 if self.has_new_plan else 0
        return len(self.remaining) * (self._segment_files + 1) + derived + plan + per_store

    def _index_bytes(self, spec: ArraySpec) -> int:
        """The compacted index of an array, which covers all segments."""
        depth = list_depth(self._segments)
        key = spec.dtype.keys.itemsize
        row = 4 if self._segments * spec.segment_rows < 2**32 else 8
        record = 6 + 2 * depth * (row + key)
        per_unit = record + 4 * self._segments * key + 4 * 8 + 3 * 8
        return spec.layer_count * (spec.columns * per_unit + 2 * BLOCK) + _ZONE_FOOTER

    def _snapshot_bytes(self) -> float:
        tokens = sum(plan.counts.tokens for plan in self.plans)
        units = sum(spec.layer_count * spec.columns for spec in self.arrays if spec.has_zones)
        entries = 2 * units * min(_LISTED_ENTRIES, LIST_LENGTH * self._segments)
        return (
            _SNAPSHOT_BYTES
            + _SNAPSHOT_BYTES_PER_ROW * tokens
            + _SNAPSHOT_BYTES_PER_ENTRY * entries
            + _SNAPSHOT_BYTES_PER_NEURON * self.n_layers * self.neurons
            + _SNAPSHOT_BYTES_PER_PIECE * self.vocabulary
        )


def array_bytes(spec: ArraySpec, rows: Sequence[int]) -> int:
    """Bytes of an array's shards, given the filled rows of each segment: exact."""
    return sum(spec.shard_bytes(shard, n) for n in rows for shard in range(spec.shards))


def zone_bytes(spec: ArraySpec, rows: Sequence[int]) -> int:
    """Bytes of an array's zone files, given the filled rows of each segment."""
    key = spec.dtype.keys.itemsize
    units = spec.layer_count * spec.columns if spec.has_zones else 0
    sections = [
        2 * [units * spec.segment_rows // PAGE_ROWS * key],
        [units * 4 * key],
        2 * [units * LIST_LENGTH * key],
        2 * [units * LIST_LENGTH * 2],
        [units * 4 * 8],
        [units * 3 * 4],
    ]
    total = 0
    for n in rows:
        chunks = spec.layer_count * spec.present_row_chunks(n) * spec.column_chunks
        checksums = chunks * (spec.chunk_rows // spec.checksum_rows) * 4
        sizes = [checksums, *(size for group in sections for size in group)]
        blocks = sum(math.ceil(size / BLOCK) for size in sizes)
        total += blocks * (BLOCK + 4) + (_ZONE_FOOTER if units else _PLAIN_FOOTER)
    return total


def free_space(target: Path) -> int:
    """Free bytes of the file system that a directory is on, or will be."""
    return shutil.disk_usage(_existing(target)).free


def require_space(total: int, target: Path, max_bytes: int | None) -> int:
    """Refuse an ingest that would not fit.

    Args:
        total: bytes still to be written.
        target: the store's directory; it need not exist.
        max_bytes: the caller's limit.

    Returns:
        The free bytes of the target's file system.

    Raises:
        IngestStopped: ``total`` passes ``max_bytes`` or 80 % of the free space.
    """
    free = free_space(target)
    if max_bytes is not None and total > max_bytes:
        raise IngestStopped(
            f"This ingest would write {total:,} bytes, more than max_bytes={max_bytes:,}. "
            "Choose fewer locations, a smaller --limit-tokens, or a larger --max-bytes.",
            kind=ErrorKind.TOO_LARGE,
        )
    if total > _SPACE_SHARE * free:
        raise IngestStopped(
            f"This ingest would write {total:,} bytes, more than 80 % of the {free:,} free at "
            f"{_existing(target)}. Make room, choose fewer locations or a smaller --limit-tokens.",
            kind=ErrorKind.TOO_LARGE,
        )
    return free


def _existing(target: Path) -> Path:
    """The nearest directory that is there."""
    while not target.exists():
        target = target.parent
    return target
