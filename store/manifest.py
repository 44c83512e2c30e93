"""``store.json``: what a store is made from, written once.

The ``identity`` decides whether an ingest continues this store: the model's
fingerprint, the tokenizer's, and every setting that changes stored bytes. Software
versions and the device are recorded beside it and may differ between runs.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore.store.blobs import LocalBlobs, missing_file
from actstore.store.errors import (
    ErrorKind,
    InvalidInput,
    NotAStore,
    StoreConflict,
    StoreDamaged,
)
from actstore.store.index_spec import IndexSpec
from actstore.store.layout import ArraySpec
from actstore.store.records import (
    canonical_json,
    decode_record,
    encode_record,
    newer_format,
    well_formed,
)

__all__ = [
    "FORMAT",
    "FileEntry",
    "LatentSpec",
    "SetRecord",
    "StoreManifest",
    "read_manifest",
    "read_sets",
    "replaced_arrays",
]

FORMAT = 1
"""The on-disk format that this version writes."""

MANIFEST = "store.json"

LATENT_FOLDER = "latents"
"""Autoencoders and their latents, in a folder per set."""


@dataclass(frozen=True)
class FileEntry:
    """A file that a record answers for."""

    path: str
    size: int
    crc32c: int

    def to_json(self) -> list[Any]:
        """``[path, size, crc32c]``."""
        return [self.path, self.size, f"{self.crc32c:08x}"]

    @classmethod
    def from_json(cls, fields: list[Any]) -> "FileEntry":
        """The entry that :meth:`to_json` described."""
        return cls(fields[0], fields[1], int(fields[2], 16))


@dataclass(frozen=True)
class StoreManifest:
    """What a store is made from.

    Attributes:
        model: name, revision, architecture, dimensions, fingerprint, weights policy.
        tokenizer: fingerprint, vocabulary size, special token ids, BOS id.
        config: context, stride, bos policy, segment rows, dtype policy, batch tokens, objective.
        environment: software versions, device and run dtype at creation; informative.
        files: the model's files, with their checksums.
    """

    model: dict[str, Any]
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """The members that must agree for a run to continue this store."""
        unnamed = {k: v for k, v in self.model.items() if k not in ("name", "revision")}
        return {"model": unnamed, "tokenizer": self.tokenizer, "config": self.config}

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits of the identity's hash."""
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()[:16]

    @property
    def segment_rows(self) -> int:
        """S, the token rows of a segment."""
        return int(self.config["segment_rows"])

    def encode(self) -> bytes:
        """The bytes of ``store.json``."""
        return encode_record(
            {
                "format": FORMAT,
                "id": self.id,
                "model": self.model,
                "tokenizer": self.tokenizer,
                "config": self.config,
                "environment": self.environment,
                "files": [entry.to_json() for entry in self.files],
            }
        )

    def require_same(self, other: "StoreManifest", path: object) -> None:
        """Refuse to continue this store with another model or config.

        Raises:
            StoreConflict: names every member that differs, with both values.
        """
        differences = [
            f"{part}.{key}: the store has {mine.get(key)!r}, this run {theirs.get(key)!r}"
            for part, mine in self.identity.items()
            for theirs in [other.identity[part]]
            for key in sorted({*mine, *theirs})
            if mine.get(key) != theirs.get(key)
        ]
        if differences:
            raise StoreConflict(
                f"{path} holds a store of another model or config: {'; '.join(differences)}. "
                "Ingest into another path, or repeat the store's own settings.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )


@dataclass(frozen=True)
class LatentSpec:
    """One autoencoder of a set, and where its latents lie.

    Attributes:
        layer: the layer that it reads.
        n_latents: its latents.
        file: its tensors; the store's own copy.
        settings: what it is besides its tensors, as ``write_autoencoder`` says it.
        made_from: the stored arrays that what it reads was made from, by key, and ``token_id``.
    """

    layer: int
    n_latents: int
    file: FileEntry
    settings: dict[str, Any]
    made_from: tuple[str, ...]

    @property
    def location(self) -> str:
        """Label of what it reads."""
        return str(self.settings["location"])

    @property
    def fingerprint(self) -> str:
        """Sha256 of its settings and of the values of its tensors, in hex."""
        return str(self.settings["fingerprint"])

    def to_json(self) -> dict[str, Any]:
        """The members of a set record that describe this autoencoder."""
        return {
            "layer": self.layer,
            "n_latents": self.n_latents,
            "file": self.file.to_json(),
            "settings": self.settings,
            "made_from": list(self.made_from),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "LatentSpec":
        """The spec that :meth:`to_json` described."""
        return cls(
            fields["layer"],
            fields["n_latents"],
            FileEntry.from_json(fields["file"]),
            dict(fields["settings"]),
            tuple(fields["made_from"]),
        )


@dataclass(frozen=True)
class SetRecord:
    """A named group of arrays, the latents of autoencoders, or indexes; with its commit records.

    Attributes:
        name: ``base`` for what ingest wrote first.
        arrays: the arrays whose values are kept.
        retention: location label -> ``raw``, ``index`` or ``none``; ``<label>/backward`` for
            gradients.
        replaces: keys of other sets' arrays that this set stores anew, in another dtype.
        latents: autoencoders of one location, by layer, whose latents are kept.
        files: further files that belong to the set as a whole.
        indexes: indexes of derived scalars.
        copies: copies by column of arrays of other sets.
    """

    name: str
    arrays: tuple[ArraySpec, ...]
    retention: dict[str, str]
    replaces: tuple[str, ...] = ()
    latents: tuple[LatentSpec, ...] = ()
    files: tuple[FileEntry, ...] = ()
    indexes: tuple[IndexSpec, ...] = ()
    copies: tuple[ArraySpec, ...] = ()

    def __post_init__(self) -> None:
        kinds = [self.arrays, self.latents, self.indexes, self.copies]
        if (self.indexes or self.copies) and sum(map(bool, kinds)) > 1:
            raise InvalidInput(
                f"Set {self.name!r} would hold indexes or copies and something else; those have a "
                "set of their own.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        objectives = {spec.objective for spec in self.arrays if spec.objective is not None}
        if len(objectives) > 1:
            raise InvalidInput(
                f"Set {self.name!r} would hold the gradients of {' and '.join(sorted(objectives))}; "
                "a set has one objective. Give each a set of its own.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        layers = [spec.layer for spec in self.latents]
        places = {spec.location for spec in self.latents}
        if layers != sorted(set(layers)) or len(places) > 1 or (layers and self.arrays):
            raise InvalidInput(
                f"Set {self.name!r} would hold latents of {', '.join(sorted(places))} at layers "
                f"{layers}; a set of latents is of one location, a layer once each, and has no "
                "arrays.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )

    @property
    def objective(self) -> str | None:
        """Name of what the set's backward arrays are the gradients of; None without any."""
        return next((spec.objective for spec in self.arrays if spec.objective is not None), None)

    @property
    def path(self) -> str:
        """The record's path inside the store."""
        return f"commits/{self.name}/set.json"

    def latent_path(self, layer: int, segment: int) -> str:
        """The file of the latents of one layer and segment."""
        return f"{LATENT_FOLDER}/{self.name}/{segment:06d}.{layer}.sections"

    def encode(self) -> bytes:
        """The bytes of the record."""
        fields: dict[str, Any] = {
            "set": self.name,
            "arrays": [spec.to_json() for spec in self.arrays],
            "retention": self.retention,
            "replaces": list(self.replaces),
        }
        if self.latents:
            fields["latents"] = [spec.to_json() for spec in self.latents]
            fields["files"] = [entry.to_json() for entry in self.files]
        if self.copies:
            fields["copies"] = [spec.to_json() for spec in self.copies]
        if self.indexes:
            fields["indexes"] = [spec.to_json() for spec in self.indexes]
        return encode_record(fields)

    @classmethod
    def decode(cls, data: bytes, name: str, segment_rows: int) -> "SetRecord":
        """Parse and verify a record.

        Args:
            data: the file's bytes.
            name: the file's path inside the store.
            segment_rows: S of the store.

        Raises:
            StoreDamaged: it fails its checksum, is a record of another sort, or stands under a
                name that is not its own.
        """
        fields = decode_record(data, name)
        with well_formed(name):
            record = cls(
                name=fields["set"],
                arrays=tuple(
                    ArraySpec.from_json(entry, segment_rows) for entry in fields["arrays"]
                ),
                retention=fields["retention"],
                replaces=tuple(fields["replaces"]),
                latents=tuple(LatentSpec.from_json(one) for one in fields.get("latents", [])),
                files=tuple(FileEntry.from_json(entry) for entry in fields.get("files", [])),
                copies=tuple(
                    ArraySpec.from_json(one, segment_rows) for one in fields.get("copies", [])
                ),
                indexes=tuple(
                    IndexSpec.from_json(one, segment_rows) for one in fields.get("indexes", [])
                ),
            )
        if record.path != name:
            raise StoreDamaged(
                f"{name} holds the record of {record.path}. Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return record


def read_manifest(blobs: LocalBlobs) -> StoreManifest:
    """Read and verify ``store.json``.

    Raises:
        NotAStore: there is none, or its format is newer than this version reads.
        StoreDamaged: it fails its checksum, or is a record of another sort.
    """
    if not blobs.exists(MANIFEST):
        raise NotAStore(
            f"{blobs.root} is not a store: it has no {MANIFEST}. "
            "Make one with `actstore ingest MODEL CORPUS --out DIR`.",
            kind=ErrorKind.NOT_A_STORE,
        )
    data = blobs.read(MANIFEST)
    newer = newer_format(data, MANIFEST, FORMAT)
    if newer is not None:
        raise NotAStore(
            f"{blobs.root} has format {newer}; this version reads up to {FORMAT}. "
            "Upgrade actstore.",
            kind=ErrorKind.NEWER_FORMAT,
        )
    fields = decode_record(data, MANIFEST)
    with well_formed(MANIFEST):
        manifest = StoreManifest(
            model=fields["model"],
            tokenizer=fields["tokenizer"],
            config=fields["config"],
            environment=fields["environment"],
            files=tuple(FileEntry.from_json(entry) for entry in fields["files"]),
        )
        named, own = fields["id"], manifest.id
    if named != own:
        raise StoreDamaged(
            f"{MANIFEST} names id {named}, its contents give {own}.",
            kind=ErrorKind.MALFORMED_FILE,
        )
    return manifest


def replaced_arrays(sets: dict[str, SetRecord]) -> set[str]:
    """Keys of the arrays that another set stores anew: no longer written, nor read."""
    return {key for record in sets.values() for key in record.replaces}


def read_sets(blobs: LocalBlobs, segment_rows: int) -> dict[str, SetRecord]:
    """Every set of a store by name, verified.

    Raises:
        StoreDamaged: a set's record fails its checksum, is a record of another sort, or is
            missing where a segment of the set is committed.
    """
    folder = blobs.path("commits")
    sets = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        path = f"commits/{name}/set.json"
        if blobs.exists(path):
            record = SetRecord.decode(blobs.read(path), path, segment_rows)
            sets[record.name] = record
        elif any(entry.endswith(".json") for entry in _entries(folder / name)):
            raise missing_file(path)
    return sets


def _entries(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
