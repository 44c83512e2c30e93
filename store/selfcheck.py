"""The measured error of a store's values, kept beside them.

``selfcheck/<hash>.json`` holds the worst relative error of each array over the sequences
that an independent forward pass replayed. The hash names what was compared: the sequences,
and the arrays with their dtypes. So an array that a further set adds, or stores anew in
another dtype, gets an error of its own.
"""

import hashlib
from dataclasses import dataclass

from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.records import canonical_json, decode_record, encode_record, well_formed

__all__ = ["SelfCheck", "publish_selfcheck", "read_selfchecks"]

FOLDER = "selfcheck"


@dataclass(frozen=True)
class SelfCheck:
    """One replay.

    Attributes:
        sequences: the global numbers of the replayed sequences; every array has them all.
        dtypes: key of each array that was compared -> how its values are stored.
        errors: key of the array -> largest difference of a row, relative to its largest magnitude.
    """

    sequences: tuple[int, ...]
    dtypes: dict[str, str]
    errors: dict[str, float]

    def __post_init__(self) -> None:
        assert self.dtypes.keys() == self.errors.keys(), "every compared array has an error"

    @property
    def path(self) -> str:
        """The record's path inside the store."""
        compared = [list(self.sequences), self.dtypes]
        return f"{FOLDER}/{hashlib.sha256(canonical_json(compared)).hexdigest()[:16]}.json"

    def encode(self) -> bytes:
        """The bytes of the record."""
        return encode_record(
            {"sequences": list(self.sequences), "dtypes": self.dtypes, "errors": self.errors}
        )

    @classmethod
    def decode(cls, data: bytes, name: str) -> "SelfCheck":
        """Parse and verify a record.

        Raises:
            StoreDamaged: it fails its checksum, is a record of another sort, or stands under a
                name that is not its own.
        """
        fields = decode_record(data, name)
        with well_formed(name):
            check = cls(
                sequences=tuple(int(number) for number in fields["sequences"]),
                dtypes={key: str(fields["dtypes"][key]) for key in fields["errors"]},
                errors={key: float(error) for key, error in fields["errors"].items()},
            )
            path = check.path
        if path != name:
            raise StoreDamaged(
                f"{name} is the record that belongs under {path}. Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return check


def publish_selfcheck(blobs: LocalBlobs, check: SelfCheck) -> None:
    """Keep a replay's errors; one of the same sequences and arrays is kept once.

    Raises:
        WriteFailed: the disk is full, read-only or failing.
    """
    blobs.publish(check.path, [check.encode()])


def read_selfchecks(blobs: LocalBlobs) -> dict[str, float]:
    """The worst error of each array over all replays, by its key; empty before the first.

    Raises:
        StoreDamaged: a record fails its checksum, or is a record of another sort.
    """
    worst: dict[str, float] = {}
    for name in blobs.listing(FOLDER):
        if name.endswith(".json"):
            for key, error in SelfCheck.decode(blobs.read(name), name).errors.items():
                worst[key] = max(worst.get(key, 0.0), error)
    return worst
