"""Latents of autoencoders on disk: the non-zero ones, by token and by latent.

A set of latents belongs to autoencoders of one location. Beside its commit records it has a
folder that makes the store self-contained::

    latents/<set>/autoencoder-<layer>.safetensors    the autoencoders themselves
                  norms.sections                     what each latent writes, in length
                  NNNNNN.<layer>.sections            the latents of a segment

A segment's file is a checked file (``store.sections``) with the sections of
:mod:`actstore.store.latent_sections`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import LocalBlobs
from actstore.store.commits import CommitRecord
from actstore.store.errors import ErrorKind, InvalidInput, StoreConflict, StoreDamaged
from actstore.store.latent_sections import STATISTICS, SegmentLatents, latent_sections
from actstore.store.manifest import LATENT_FOLDER, FileEntry, LatentSpec, SetRecord
from actstore.store.model.autoencoder_files import read_autoencoder, write_autoencoder
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.plan import SegmentPlan
from actstore.store.publishing import commit, publish_file
from actstore.store.records import canonical_json
from actstore.store.sections import SectionFile, encode_sections

__all__ = [
    "WriteNorms",
    "latent_attributes",
    "latent_set_name",
    "norms_path",
    "publish_latent_segment",
    "publish_latent_set",
    "read_stored_autoencoder",
    "set_conflict",
]

_NAME_DIGITS = 12


@dataclass(frozen=True)
class WriteNorms:
    """How much each latent of a layer writes.

    Attributes:
        decoder: L2 norms of the decoder's rows, float64 ``(latent,)``.
        write: L2 norms of what a latent of 1 adds to the residual stream, float64
            ``(latent,)``; None where the output stands for something else.
    """

    decoder: npt.NDArray[np.float64]
    write: npt.NDArray[np.float64] | None


def latent_set_name(
    autoencoders: Iterable[Autoencoder], made_from: Mapping[int, Sequence[str]]
) -> str:
    """The name of a set that was given none: it follows from the autoencoders and their source."""
    prints = sorted(one.fingerprint for one in autoencoders)
    sources = [[layer, *names] for layer, names in sorted(made_from.items())]
    digits = hashlib.sha256(canonical_json([prints, sources])).hexdigest()
    return f"sae-{digits[:_NAME_DIGITS]}"


def norms_path(name: str) -> str:
    """The file of a set's norms; sections ``decoder.<layer>`` and ``write.<layer>``."""
    return f"{LATENT_FOLDER}/{name}/norms.sections"


def publish_latent_set(
    blobs: LocalBlobs,
    name: str,
    autoencoders: Iterable[Autoencoder],
    norms: Mapping[int, WriteNorms],
    made_from: Mapping[int, Sequence[str]],
) -> SetRecord:
    """Keep autoencoders of one location in a store, and publish their set's record last.

    Args:
        blobs: the store.
        name: the set's name.
        autoencoders: one per layer, by layer.
        norms: by layer.
        made_from: the stored arrays that what is read was made from, by layer.

    Returns:
        The record that is now published, by this call or by an earlier one.

    Raises:
        StoreConflict: the name is that of a set of something else.
        StoreDamaged: a file of that set is there and is not what its name promises.
        WriteFailed: the disk is full, read-only or failing.
    """
    specs = []
    for one in autoencoders:
        assert one.layer is not None, "checked by the caller"
        data, settings = write_autoencoder(one)
        path = f"{LATENT_FOLDER}/{name}/autoencoder-{one.layer}.safetensors"
        entry = publish_file(blobs, path, [data])
        sources = tuple(made_from[one.layer])
        spec = LatentSpec(one.layer, one.n_latents, entry, settings, sources)
        # A file that was there before may be of another autoencoder, or damaged.
        if entry.crc32c != crc32c(data):
            _require_same(blobs, name, spec)
        specs.append(spec)
    sections: dict[str, npt.NDArray[Any]] = {}
    for layer, found in norms.items():
        sections[f"decoder.{layer}"] = found.decoder
        if found.write is not None:
            sections[f"write.{layer}"] = found.write
    path = norms_path(name)
    entry = publish_file(blobs, path, encode_sections(sections, {"set": name}))
    _require_sound(blobs, path, {"set": name}).close()
    record = SetRecord(name, (), {}, (), tuple(specs), (entry,))
    if not blobs.publish(record.path, [record.encode()]):
        stored = SetRecord.decode(blobs.read(record.path), record.path, 0)
        if _identity(stored) != _identity(record):
            raise set_conflict(name)
        return stored
    return record


def _require_same(blobs: LocalBlobs, name: str, spec: LatentSpec) -> None:
    try:
        read_autoencoder(blobs.read(spec.file.path), spec.settings)
    except (StoreDamaged, InvalidInput) as error:
        raise StoreConflict(
            f"{spec.file.path} is there already and holds another autoencoder. Give this set "
            f"another name than {name!r}.",
            kind=ErrorKind.CONFIG_CONFLICT,
        ) from error


def _identity(record: SetRecord) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(spec.layer, spec.fingerprint, spec.made_from) for spec in record.latents]


def set_conflict(name: str) -> StoreConflict:
    """The error for a set's name that is taken by something else."""
    return StoreConflict(
        f"Set {name!r} holds something else than the latents of these autoencoders, made from "
        "what this store would read now. Give them another name.",
        kind=ErrorKind.CONFIG_CONFLICT,
    )


def read_stored_autoencoder(blobs: LocalBlobs, spec: LatentSpec) -> Autoencoder:
    """An autoencoder that a set keeps, verified.

    Raises:
        StoreDamaged: its file is missing or fails its checksum.
    """
    data = blobs.read(spec.file.path)
    if (len(data), crc32c(data)) != (spec.file.size, spec.file.crc32c):
        raise StoreDamaged(
            f"{spec.file.path} fails its checksum {spec.file.crc32c:08x}. Run `actstore verify`.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    return read_autoencoder(data, spec.settings)


# A segment


def latent_attributes(name: str, spec: LatentSpec, segment: int, plan_hash: str) -> dict[str, Any]:
    """What a file of latents says of itself, so that one in another's place is not believed."""
    return {
        "set": name,
        "layer": spec.layer,
        "fingerprint": spec.fingerprint,
        "segment": segment,
        "plan": plan_hash,
    }


def publish_latent_segment(
    blobs: LocalBlobs,
    record: SetRecord,
    plan_hash: str,
    segment_plan: SegmentPlan,
    layers: Mapping[int, SegmentLatents],
) -> CommitRecord:
    """Publish the latents of a segment, the commit record last.

    A file that is there already is kept, whoever wrote it.

    Args:
        blobs: the store.
        record: the set.
        plan_hash: hash of the plan that fixed the segment's rows.
        segment_plan: the segment's rows.
        layers: latents by layer; those whose file is there already may be left out.

    Returns:
        The record that is now published, by this call or by an earlier writer.

    Raises:
        WriteFailed: the disk is full, read-only or failing; nothing was committed.
        StoreDamaged: a file under one of the segment's names is not what its name promises.
    """
    segment = segment_plan.number
    files: list[FileEntry] = []
    digest = hashlib.sha256()
    for spec in record.latents:
        path = record.latent_path(spec.layer, segment)
        attributes = latent_attributes(record.name, spec, segment, plan_hash)
        # Looking first saves a resumed run the sorting.
        if blobs.exists(path):
            files.append(publish_file(blobs, path, ()))
        else:
            sections = latent_sections(layers[spec.layer], segment_plan.special)
            files.append(publish_file(blobs, path, encode_sections(sections, attributes)))
        file = _require_sound(blobs, path, attributes)
        for name in STATISTICS:
            digest.update(f"{spec.layer}/{name}\n".encode())
            digest.update(file.read(name).tobytes())
        file.close()
    return commit(
        blobs,
        CommitRecord(
            set=record.name,
            segment=segment,
            plan=plan_hash,
            rows=segment_plan.n_rows,
            files=tuple(files),
            statistics=digest.hexdigest(),
        ),
    )


def _require_sound(blobs: LocalBlobs, path: str, attributes: Mapping[str, Any]) -> SectionFile:
    """The checked file under a name, every block of it verified."""
    file = SectionFile(blobs.path(path), path)
    file.verify()
    if file.attributes != attributes:
        raise StoreDamaged(
            f"{path} was there before this run and is of something else: {file.attributes}. "
            "Run `actstore verify`.",
            kind=ErrorKind.MALFORMED_FILE,
        )
    return file
