"""Publishing the index of a derived scalar: a set without values of its own.

A segment of it is one checked file, ``zones/<scalar>/<pass>@<set>/NNNNNN.sections``, with the
sections of a zone file (:mod:`actstore.store.zones`) but for block checksums: there are no blocks.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from actstore.store.blobs import LocalBlobs
from actstore.store.commits import CommitRecord
from actstore.store.errors import ErrorKind, StoreConflict, StoreDamaged
from actstore.store.index_spec import IndexSpec
from actstore.store.manifest import SetRecord
from actstore.store.plan import SegmentPlan
from actstore.store.publishing import commit, publish_file
from actstore.store.sections import SectionFile, encode_sections
from actstore.store.zones import zone_attributes

__all__ = ["publish_index_segment", "publish_index_set"]


def publish_index_set(blobs: LocalBlobs, spec: IndexSpec) -> SetRecord:
    """Publish the record of an index's set, or find that it is there already.

    Raises:
        StoreConflict: the name is that of a set of something else.
        WriteFailed: the disk is full, read-only or failing.
    """
    record = SetRecord(spec.set_name, (), {}, indexes=(spec,))
    if not blobs.publish(record.path, [record.encode()]):
        stored = SetRecord.decode(blobs.read(record.path), record.path, spec.segment_rows)
        if stored != record:
            raise StoreConflict(
                f"Set {spec.set_name!r} holds something else than this index of {spec.scalar}, "
                "made from what this store would read now. Give the index another name.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )
    return record


def publish_index_segment(
    blobs: LocalBlobs,
    record: SetRecord,
    plan_hash: str,
    segment_plan: SegmentPlan,
    sections: Mapping[str, npt.NDArray[Any]],
) -> CommitRecord:
    """Publish the description of a segment, the commit record last.

    A file that is there already is kept, whoever wrote it.

    Args:
        blobs: the store.
        record: the set; it has one index.
        plan_hash: hash of the plan that fixed the segment's rows.
        segment_plan: the segment's rows.
        sections: what is published, ``(layer, unit, …)`` each.

    Returns:
        The record that is now published, by this call or by an earlier writer.

    Raises:
        WriteFailed: the disk is full, read-only or failing; nothing was committed.
        StoreDamaged: a file under the segment's name is not what its name promises.
    """
    (spec,) = record.indexes
    segment = segment_plan.number
    path = spec.zone_path(segment)
    attributes = zone_attributes(spec, segment, plan_hash)
    entry = publish_file(blobs, path, encode_sections(dict(sections), attributes))
    digest = hashlib.sha256()
    file = SectionFile(blobs.path(path), path)
    try:
        file.verify()
        if file.attributes != attributes:
            raise StoreDamaged(
                f"{path} was there before this run and is of something else: {file.attributes}. "
                "Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        for name in sorted(file.names):
            digest.update(f"{spec.key}/{name}\n".encode())
            digest.update(file.read(name).tobytes())
    finally:
        file.close()
    return commit(
        blobs,
        CommitRecord(
            set=record.name,
            segment=segment,
            plan=plan_hash,
            rows=segment_plan.n_rows,
            files=(entry,),
            statistics=digest.hexdigest(),
        ),
    )
