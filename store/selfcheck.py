"""The measured error of a store's values, kept beside them.

``selfcheck/<sequences hash>.json`` holds the worst relative error of each location over
the sequences that an independent forward pass replayed.
"""

import hashlib
from dataclasses import dataclass

from actstore.store.blobs import LocalBlobs
from actstore.store.records import canonical_json, decode_record, encode_record

__all__ = ["SelfCheck", "publish_selfcheck", "read_selfchecks"]

FOLDER = "selfcheck"


@dataclass(frozen=True)
class SelfCheck:
    """One replay.

    Attributes:
        sequences: the global numbers of the replayed sequences.
        errors: location label -> largest difference of a row, relative to its largest magnitude.
    """

    sequences: tuple[int, ...]
    errors: dict[str, float]

    @property
    def path(self) -> str:
        """The record's path inside the store."""
        digest = hashlib.sha256(canonical_json(list(self.sequences))).hexdigest()[:16]
        return f"{FOLDER}/{digest}.json"


def publish_selfcheck(blobs: LocalBlobs, check: SelfCheck) -> None:
    """Keep a replay's errors; a replay of the same sequences is kept once."""
    fields = {"sequences": list(check.sequences), "errors": check.errors}
    blobs.publish(check.path, [encode_record(fields)])


def read_selfchecks(blobs: LocalBlobs) -> dict[str, float]:
    """The worst error of each location over all replays; empty before the first."""
    worst: dict[str, float] = {}
    for key in blobs.listing(FOLDER):
        if key.endswith(".json"):
            for location, error in decode_record(blobs.read(key), key)["errors"].items():
                worst[location] = max(worst.get(location, 0.0), error)
    return worst
