"""What an ingest will write and take, before anything is written."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore.store.errors import ErrorKind, IngestStopped
from actstore.store.layout import PAGE_ROWS, ArraySpec
from actstore.store.sections import BLOCK
from actstore.store.zones import LIST_LENGTH

__all__ = ["Estimate", "array_bytes", "require_space", "zone_bytes"]

_SPACE_SHARE = 0.8
"""Share of the free space that an ingest may plan to fill."""


@dataclass(frozen=True)
class Estimate:
    """The size and cost of an ingest.

    Attributes:
        tokens: token rows.
        sequences: model contexts.
        documents: source texts with at least one token.
        segments: segments of the plan.
        bytes_by_array: ``location/pass`` -> bytes of its shards.
        zone_bytes: zone maps, lists, statistics and checksums.
        other_bytes: model, plan, parts and snapshot, approximately.
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
        blocks = sum(
            math.ceil(size / BLOCK) for size in [checksums, *(s for group in sections for s in group)]
        )
        total += blocks * (BLOCK + 4) + 600
    return total


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
    existing = target
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if max_bytes is not None and total > max_bytes:
        raise IngestStopped(
            f"This ingest would write {total:,} bytes, more than max_bytes={max_bytes:,}. "
            "Choose fewer locations, a smaller --limit-tokens, or a larger --max-bytes.",
            kind=ErrorKind.TOO_LARGE,
        )
    if total > _SPACE_SHARE * free:
        raise IngestStopped(
            f"This ingest would write {total:,} bytes, more than 80 % of the {free:,} free at "
            f"{existing}. Make room, choose fewer locations or a smaller --limit-tokens.",
            kind=ErrorKind.TOO_LARGE,
        )
    return free
