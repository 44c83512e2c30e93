"""What an ingest did: every token is stored, dropped for a stated reason, or missing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["IngestReport"]


@dataclass(frozen=True)
class IngestReport:
    """The outcome of an ingest.

    Attributes:
        path: the store.
        planned: token rows of all plans.
        stored: token rows of the committed segments.
        dropped: reason -> documents left out of the corpus' plan.
        segments: segments of all plans.
        committed: segments committed when the run ended.
        written: segments that this run committed.
        seconds: wall time of the run.
        tokens_per_second: of the segments this run wrote, forward pass to commit; None if none.
        bytes_written: bytes of the files that this run committed.
        peak_memory: the process' largest resident set, in bytes.
        errors: location, or ``<location>/backward[@<set>]``, -> largest relative error that the
            self-check measured.
        objective: what this run's gradients are of; None where it kept none.
        interrupted: the run was stopped by the user; running it again resumes.
    """

    path: str
    planned: int
    stored: int
    dropped: Mapping[str, int]
    segments: int
    committed: int
    written: int
    seconds: float
    tokens_per_second: float | None
    bytes_written: int
    peak_memory: int
    errors: Mapping[str, float] = field(default_factory=dict)
    objective: str | None = None
    interrupted: bool = False

    @property
    def missing(self) -> int:
        """Token rows that are planned and not committed."""
        return self.planned - self.stored

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "missing": self.missing}
