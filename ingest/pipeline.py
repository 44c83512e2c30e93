"""Model and corpus in, committed segments out: the order of the steps."""

import platform
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from crc32c import crc32c

from actstore.ingest.model import LoadedModel
from actstore.ingest.preparation import Corpus, PlannedIngest, plan_ingest
from actstore.ingest.recording import Recorder
from actstore.ingest.report import IngestReport
from actstore.ingest.selfcheck import check_store
from actstore.ingest.settings import IngestSettings, Progress
from actstore.ingest.snapshot import snapshot_files
from actstore.ingest.writer import NumericOverflow, SegmentWriter
from actstore.store.blobs import LocalBlobs, Part
from actstore.store.commits import CommitRecord, commit_path, lock_segment, read_commits
from actstore.store.errors import ErrorKind, StoreConflict
from actstore.store.manifest import (
    MANIFEST,
    FileEntry,
    read_manifest,
)
from actstore.store.plan import Plan
from actstore.store.publishing import publish_file, publish_metadata
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact

__all__ = ["ingest", "peak_memory"]

_COMPACT_EVERY = 64


def ingest(
    loaded: LoadedModel,
    corpus: Corpus,
    out: str | Path,
    settings: IngestSettings,
    progress: Progress | None = None,
) -> IngestReport:
    """Run the model over a corpus and store its activations.

    What is committed is never touched again, so a run that was killed, stopped or out of
    disk is finished by running it again, and running a finished one changes nothing.

    Args:
        loaded: the model.
        corpus: what to read.
        out: the store's directory.
        settings: locations, context, dtype and the rest.
        progress: told how far each phase is, in tokens.

    Returns:
        The counts. After Ctrl-C ``interrupted`` is set and the store is sound.

    Raises:
        StoreConflict: the path holds a store of another model, config or corpus.
        IngestStopped: too little space, an overflow, or a failing disk.
    """
    started = time.monotonic()
    planned = plan_ingest(loaded, corpus, out, settings, progress)
    blobs = planned.blobs
    if planned.remaining:
        _publish_store(planned)
    written: list[CommitRecord] = []
    interrupted = False
    forward_started = time.monotonic()
    try:
        _write_segments(planned, written, progress)
    except KeyboardInterrupt:
        interrupted = True
    except NumericOverflow as error:
        raise error.with_command(loaded.name, str(out)) from error
    forward_seconds = time.monotonic() - forward_started
    errors: Mapping[str, float] = {}
    with closing(StoreReader(blobs.root)) as reader:
        if not interrupted and reader.segments:
            compact(reader)
            errors = check_store(reader, loaded)
    rows = sum(record.rows for record in written)
    commits = read_commits(blobs, settings.set_name)
    stored = sum(record.rows for record in commits.values())
    return IngestReport(
        path=str(out),
        planned=sum(plan.counts.tokens for plan in planned.plans),
        stored=stored,
        dropped=dict(planned.outcome.dropped),
        segments=reader.planned_segments,
        committed=len(commits),
        written=len(written),
        seconds=time.monotonic() - started,
        tokens_per_second=rows / forward_seconds if rows else None,
        bytes_written=sum(entry.size for record in written for entry in record.files),
        peak_memory=peak_memory(),
        errors=errors,
        objective=planned.set_record.objective,
        interrupted=interrupted,
    )


def peak_memory() -> int:
    """The process' largest resident set so far, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_segments(
    planned: PlannedIngest, written: list[CommitRecord], progress: Progress | None
) -> None:
    blobs = planned.blobs
    total = sum(planned.remaining.values())
    done = 0

    def committed(record: CommitRecord) -> None:
        written.append(record)
        if len(written) % _COMPACT_EVERY == 0:
            with closing(StoreReader(blobs.root)) as reader:
                compact(reader)

    if not planned.remaining:
        return
    name = planned.set_record.name
    with ExitStack() as stack:
        # When other sets replace every array, what is left is the rows themselves.
        recorder = stack.enter_context(
            Recorder(
                planned.loaded, planned.arrays, planned.settings.chosen_objective, planned.plans
            )
        )
        writer = SegmentWriter(blobs, planned.set_record, planned.arrays, committed)
        try:
            for number in _order(sorted(planned.remaining), planned.settings.worker):
                with ExitStack() as lock:
                    is_ours = lock.enter_context(lock_segment(blobs.root, name, number))
                    if not is_ours or blobs.exists(commit_path(name, number)):
                        total -= planned.remaining[number]
                        continue
                    plan = _plan_of(planned.plans, number)
                    segment = plan.segment(number)
                    assembly = writer.reserve(segment)
                    for batch in segment.batches:
                        recorder.record(assembly, batch)
                        done += int(segment.length[batch.members].sum())
                        if progress is not None:
                            progress("forward", done, total)
                    writer.submit(plan.hash, assembly, lock.pop_all().close)
                    del assembly
        finally:
            writer.close()


def _order(segments: list[int], worker: tuple[int, int]) -> Iterator[int]:
    """Worker i of n begins at its share and goes round, so that none waits for another."""
    number, workers = worker
    start = number * len(segments) // workers
    yield from segments[start:]
    yield from segments[:start]


def _plan_of(plans: Iterable[Plan], segment: int) -> Plan:
    for plan in plans:
        if plan.first_segment <= segment < plan.first_segment + plan.n_segments:
            return plan
    raise AssertionError(f"segment {segment} belongs to no plan")


def _publish_store(planned: PlannedIngest) -> None:
    """Model files, then ``store.json``, the set and the Zarr metadata."""
    blobs, manifest = planned.blobs, planned.manifest
    if planned.is_new:
        files = snapshot_files(planned.loaded)
        manifest = replace(
            manifest, files=tuple(_publish_same(blobs, key, files[key]) for key in files)
        )
        if not blobs.publish(MANIFEST, [manifest.encode()]):
            read_manifest(blobs).require_same(manifest, blobs.root)
    _publish_same(blobs, planned.set_record.path, [planned.set_record.encode()])
    last = planned.plans[-1]
    publish_metadata(blobs, planned.set_record, last.first_segment + last.n_segments)


def _publish_same(blobs: LocalBlobs, key: str, parts: Iterable[Part]) -> FileEntry:
    """Publish a file, or find that it is there with the same bytes."""
    entry = publish_file(blobs, key, parts)
    checksum = 0
    for part in parts:
        checksum = crc32c(part, checksum)
    if checksum != entry.crc32c:
        raise StoreConflict(
            f"{blobs.path(key)} is there already and is not what this run would write: another "
            "run began here with another model or other settings. Repeat that run's, or ingest "
            "into another path.",
            kind=ErrorKind.CONFIG_CONFLICT,
        )
    return entry
