"""What a plan's record says: its config, its counts, its place among the plans.

The record, ``plan.json``, is published last and answers for the plan's other files.
Its hash covers all that the plan fixes, so one hash means one arrangement of rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from actstore.store.errors import ErrorKind, InvalidInput, NotAStore, StoreConflict, StoreDamaged
from actstore.store.manifest import FORMAT, FileEntry
from actstore.store.records import (
    canonical_json,
    decode_record,
    encode_record,
    newer_format,
    well_formed,
)

__all__ = ["BosPolicy", "ChainMark", "PlanConfig", "PlanCounts", "PlanRecord"]

BosPolicy = Literal["document", "sequence", "none"]
"""Where a beginning-of-sequence token is put: before documents, sequences, or nowhere."""

PLAN_FOLDER = "plan"
RECORD_FILE = "plan.json"

PAD_MULTIPLE = 8
"""Padded lengths are multiples of this: tensor cores want it, and shapes repeat."""

_ROWS_MULTIPLE = 512
_FREE_FIELDS = ("limit_tokens", "shuffle")


@dataclass(frozen=True)
class PlanConfig:
    """What turns token streams into rows; the same in every plan of a store.

    Attributes:
        context: tokens of a sequence at most, a BOS token included.
        bos: BOS before each document's first token, at the start of each sequence, or none.
        bos_token_id: the BOS token's id; None if and only if ``bos`` is ``none``.
        special_token_ids: the tokenizer's special tokens, sorted.
        vocabulary_size: token ids lie in ``range(vocabulary_size)``.
        segment_rows: S, rows of a segment; a multiple of 512, at least 4 contexts.
        batch_tokens: tokens of a padded batch at most; a batch has one member at least.
        stride: document tokens between the starts of two sequences; 0 stands for no
            overlap, which is ``window``. Less than ``window``: sequences overlap.
        limit_tokens: whole sequences are planned while their tokens fit below this.
        shuffle: seed of a permutation of all sequences (numpy's PCG64); None keeps order.
    """

    context: int
    vocabulary_size: int
    segment_rows: int
    batch_tokens: int
    bos: BosPolicy = "none"
    bos_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    stride: int = 0
    limit_tokens: int | None = None
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if self.bos not in get_args(BosPolicy):
            raise _invalid("bos", self.bos, f"it must be one of {', '.join(get_args(BosPolicy))}")
        least_context = 2 if self.bos == "sequence" else 1
        _require("context", self.context, least_context)
        _require("vocabulary_size", self.vocabulary_size, 1)
        _require("batch_tokens", self.batch_tokens, 1)
        _require("segment_rows", self.segment_rows, 4 * self.context)
        if self.segment_rows % _ROWS_MULTIPLE:
            raise _invalid(
                "segment_rows", self.segment_rows, f"it must be a multiple of {_ROWS_MULTIPLE}"
            )
        if (self.bos == "none") != (self.bos_token_id is None):
            raise _invalid(
                "bos_token_id",
                self.bos_token_id,
                f"bos={self.bos!r} needs {'none' if self.bos == 'none' else 'one'}",
            )
        special = tuple(sorted(set(self.special_token_ids)))
        object.__setattr__(self, "special_token_ids", special)
        for name, token_id in [("bos_token_id", self.bos_token_id)] + [
            ("special_token_ids", token_id) for token_id in special
        ]:
            if token_id is not None and not 0 <= token_id < self.vocabulary_size:
                raise _invalid(
                    name, token_id, f"it must be below the vocabulary size {self.vocabulary_size}"
                )
        if self.stride == 0:
            object.__setattr__(self, "stride", self.window)
        _require("stride", self.stride, 1)
        if self.stride > self.window:
            raise _invalid(
                "stride",
                self.stride,
                f"above {self.window} it would leave tokens of a document out",
            )
        if self.limit_tokens is not None:
            _require("limit_tokens", self.limit_tokens, 1)
        if self.shuffle is not None:
            _require("shuffle", self.shuffle, 0)

    @property
    def window(self) -> int:
        """Document tokens of a full sequence: the context less a BOS of its own."""
        return self.context - (self.bos == "sequence")

    def padded_length(self, length: int) -> int:
        """The length that a batch is padded to whose longest member has ``length`` tokens."""
        return min(-(-length // PAD_MULTIPLE) * PAD_MULTIPLE, self.context)

    def require_same(self, stored: "PlanConfig") -> None:
        """Refuse to plan with another config than the store's.

        Raises:
            StoreConflict: names every field that differs, with both values; the limit and
                the shuffle belong to one plan and may differ.
        """
        differences = [
            f"{field.name}: the store has {getattr(stored, field.name)!r}, this run "
            f"{getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in _FREE_FIELDS
            and getattr(stored, field.name) != getattr(self, field.name)
        ]
        if differences:
            raise StoreConflict(
                f"The store was planned with another config: {'; '.join(differences)}. "
                "Repeat the store's own settings, or ingest into another path.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )

    def to_json(self) -> dict[str, Any]:
        """The members of ``plan.json`` that hold the config."""
        return {**asdict(self), "special_token_ids": list(self.special_token_ids)}

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "PlanConfig":
        """The config that :meth:`to_json` described."""
        return cls(**{**members, "special_token_ids": tuple(members["special_token_ids"])})


@dataclass(frozen=True)
class PlanCounts:
    """How much a plan holds.

    Attributes:
        documents: rows of its ``documents.parquet``.
        sequences: model contexts.
        tokens: filled rows.
        segments: units of S rows, the last one partly filled.
        batches: forward passes.
        padded_tokens: tokens of all batches with their padding.
        dropped: documents left out, by reason.
    """

    documents: int
    sequences: int
    tokens: int
    segments: int
    batches: int
    padded_tokens: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class ChainMark:
    """How far a corpus had been read when a plan was made.

    The counts are those of the corpus since its beginning, over the plan and those that
    it continues, in the corpus' own order (before a shuffle).

    Attributes:
        sequences: sequences so far.
        documents: documents so far, without dropped ones.
        tokens: tokens so far.
        dropped: dropped documents so far, by reason.
        last_document: global number of the last document; a further plan may continue it.
        digest: sha256 over every document's columns and every sequence's ids, in hex.
    """

    sequences: int
    documents: int
    tokens: int
    dropped: Mapping[str, int]
    last_document: int
    digest: str


@dataclass(frozen=True)
class PlanRecord:
    """``plan.json``.

    Attributes:
        number: position among the store's plans.
        config: what the plan was made with.
        counts: what it holds.
        first_segment: global number of its first segment.
        sequence_base: global number of its first sequence.
        document_base: global number of the first document of its ``documents.parquet``.
        continues: hash of the plan whose corpus this one goes on with, or None.
        chain: where the corpus stood at the plan's end.
        sources: sha256 over the names of the documents' sources, in hex.
        files: its other files, paths inside the store.
    """

    number: int
    config: PlanConfig
    counts: PlanCounts
    first_segment: int
    sequence_base: int
    document_base: int
    continues: str | None
    chain: ChainMark
    sources: str
    files: tuple[FileEntry, ...] = ()

    @cached_property
    def hash(self) -> str:
        """Sha256, in hex, of all that the plan fixes; files follow from it."""
        members = self._members()
        del members["files"]
        return hashlib.sha256(canonical_json(members)).hexdigest()

    @property
    def folder(self) -> str:
        """``plan/NNNN-<12 digits of the hash>``, the plan's folder inside the store."""
        return f"{PLAN_FOLDER}/{self.number:04d}-{self.hash[:12]}"

    def with_files(self, files: Sequence[FileEntry]) -> "PlanRecord":
        """The record that also answers for ``files``."""
        return replace(self, files=tuple(files))

    def _members(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "format": FORMAT,
            "config": self.config.to_json(),
            "files": [entry.to_json() for entry in self.files],
        }

    def encode(self) -> bytes:
        """The bytes of ``plan.json``."""
        return encode_record({**self._members(), "hash": self.hash})

    @classmethod
    def decode(cls, data: bytes, name: str) -> "PlanRecord":
        """Parse and verify a record.

        Raises:
            NotAStore: its format is newer than this version reads.
            StoreDamaged: it fails its checksum, or is not the record of its folder.
        """
        newer = newer_format(data, name, FORMAT)
        if newer is not None:
            raise NotAStore(
                f"{name} has format {newer}; this version reads up to {FORMAT}. Upgrade actstore.",
                kind=ErrorKind.NEWER_FORMAT,
            )
        members = decode_record(data, name)
        try:
            with well_formed(name):
                record = cls._from_members(members)
                own = members["hash"] == record.hash
        except InvalidInput as error:
            raise malformed(name, f"is not the record of a plan: {error}") from error
        if not own or name != f"{record.folder}/{RECORD_FILE}":
            raise malformed(name, "holds the record of another plan")
        return record

    @classmethod
    def _from_members(cls, members: Mapping[str, Any]) -> "PlanRecord":
        return cls(
            number=members["number"],
            config=PlanConfig.from_json(members["config"]),
            counts=PlanCounts(**members["counts"]),
            first_segment=members["first_segment"],
            sequence_base=members["sequence_base"],
            document_base=members["document_base"],
            continues=members["continues"],
            chain=ChainMark(**members["chain"]),
            sources=members["sources"],
            files=tuple(FileEntry.from_json(entry) for entry in members["files"]),
        )


def _require(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _invalid(name, value, f"it must be a whole number of at least {least}")


def _invalid(name: str, value: object, rule: str) -> InvalidInput:
    return InvalidInput(f"{name} is {value!r}; {rule}.", kind=ErrorKind.INVALID_ARGUMENT)


def malformed(name: str, what: str) -> StoreDamaged:
    """The error for a file of a plan whose checksum holds and whose contents do not."""
    return StoreDamaged(f"{name} {what}. Run `actstore verify`.", kind=ErrorKind.MALFORMED_FILE)
