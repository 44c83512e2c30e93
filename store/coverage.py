"""Which commit records a derived file was made from.

Indexes and snapshots are made from committed segments and can always be made again.
Each names the records it covers by set, segment and checksum; a reader may use it when
all of them are among the records that the reader has seen.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from actstore.store.commits import CommitRecord
from actstore.store.records import canonical_json

__all__ = ["Coverage", "CoveredRecord"]


class CoveredRecord(NamedTuple):
    """A commit record by name and contents."""

    set: str
    segment: int
    crc32c: int


@dataclass(frozen=True)
class Coverage:
    """A set of commit records.

    Attributes:
        records: sorted by set, then segment.
    """

    records: tuple[CoveredRecord, ...]

    @classmethod
    def of(cls, commits: Iterable[CommitRecord]) -> "Coverage":
        """The coverage of something made from ``commits``."""
        covered = (CoveredRecord(c.set, c.segment, c.checksum) for c in commits)
        return cls(tuple(sorted(covered)))

    @classmethod
    def of_sets(cls, commits: Mapping[str, Mapping[int, CommitRecord]]) -> "Coverage":
        """The coverage of something made from every commit of every set."""
        return cls.of(record for members in commits.values() for record in members.values())

    @cached_property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that name the coverage."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.records)

    def is_within(self, other: "Coverage") -> bool:
        """Whether every record is among the other's."""
        return set(self.records) <= set(other.records)

    def is_beginning_of(self, other: "Coverage") -> bool:
        """Whether the records are the other's first ones."""
        return self.records == other.records[: len(self.records)]

    def segments(self, set_name: str) -> list[int]:
        """The covered segments of a set, ascending."""
        return [record.segment for record in self.records if record.set == set_name]

    def to_json(self) -> list[list[Any]]:
        """``[[set, segment, crc32c], …]``."""
        return [[name, segment, f"{checksum:08x}"] for name, segment, checksum in self.records]

    @classmethod
    def from_json(cls, fields: Iterable[Iterable[Any]]) -> "Coverage":
        """The coverage that :meth:`to_json` described."""
        return cls(
            tuple(CoveredRecord(name, segment, int(digits, 16)) for name, segment, digits in fields)
        )
