"""The errors that actstore raises.

The tree is grouped by what a caller does about it::

    ActstoreError
    ├── InvalidInput (ValueError)      change the call
    │   └── StoreConflict              the path holds a store of something else
    ├── NotAStore (FileNotFoundError)  change the path
    ├── Unavailable (LookupError)      the store does not hold what the query needs
    ├── StoreDamaged                   run ``actstore verify``, then repair
    └── IngestStopped                  make room or change the dtype, then resume
        └── WriteFailed (OSError)

Every error carries a ``kind``: a stable code that the command line, and later the
service, map without reading the message. Messages name the value, the rule and the
next step.
"""

from enum import StrEnum

__all__ = [
    "ActstoreError",
    "ErrorKind",
    "IngestStopped",
    "InvalidInput",
    "NotAStore",
    "StoreConflict",
    "StoreDamaged",
    "Unavailable",
    "WriteFailed",
]


class ErrorKind(StrEnum):
    """Stable codes; members are added, never renamed or removed."""

    INVALID_ARGUMENT = "invalid_argument"
    UNKNOWN_LOCATION = "unknown_location"
    UNKNOWN_SCALAR = "unknown_scalar"
    UNKNOWN_LAYER = "unknown_layer"
    UNKNOWN_UNIT = "unknown_unit"
    UNKNOWN_ROW = "unknown_row"
    INVALID_SQL = "invalid_sql"
    SQL_TIMEOUT = "sql_timeout"
    SQL_TOO_LARGE = "sql_too_large"
    EMPTY_CORPUS = "empty_corpus"
    INVALID_CORPUS = "invalid_corpus"
    TOKEN_OUT_OF_VOCABULARY = "token_out_of_vocabulary"
    UNSUPPORTED_MODEL = "unsupported_model"
    UNSUPPORTED_AUTOENCODER = "unsupported_autoencoder"
    CONFIG_CONFLICT = "config_conflict"
    CORPUS_CONFLICT = "corpus_conflict"
    NOT_A_STORE = "not_a_store"
    NEWER_FORMAT = "newer_format"
    NOT_STORED = "not_stored"
    NOTHING_COMMITTED = "nothing_committed"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    MISSING_FILE = "missing_file"
    MALFORMED_FILE = "malformed_file"
    TOO_LARGE = "too_large"
    NUMERIC_OVERFLOW = "numeric_overflow"
    CAPTURE_MISMATCH = "capture_mismatch"
    DISK_FULL = "disk_full"
    WRITE_FAILED = "write_failed"
    READ_ONLY = "read_only"


class ActstoreError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        kind: stable code of the cause.
        exit_code: what the command line returns for it.
    """

    exit_code = 2
    kind: ErrorKind

    def __init__(self, message: str, *, kind: ErrorKind) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), self.kind)


def _rebuild(cls: type[ActstoreError], message: str, kind: ErrorKind) -> ActstoreError:
    return cls(message, kind=kind)


class InvalidInput(ActstoreError, ValueError):
    """An argument, a name, a corpus or a model that cannot be used as given."""


class StoreConflict(InvalidInput):
    """The target path holds a store made from another model, config or corpus."""


class NotAStore(ActstoreError, FileNotFoundError):
    """The path holds no store that this version can read."""


class Unavailable(ActstoreError, LookupError):
    """The store does not hold, and cannot derive, what the query needs."""

    exit_code = 3


class StoreDamaged(ActstoreError):
    """A file of the store is missing, malformed or fails its checksum."""

    exit_code = 3


class IngestStopped(ActstoreError):
    """Ingest stopped before its end; what was committed is intact and it can resume."""

    exit_code = 1


class WriteFailed(IngestStopped, OSError):
    """The disk is full, read-only or failing."""
