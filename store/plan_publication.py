"""How a plan enters a store: its files, the caller's consent, and its record last.

Two runs may plan at once. One that publishes a plan holds a lock meanwhile, so the other
sees what it published; and since not every file system has locks, what was published is
looked at again afterwards, and one of two plans with the same number is taken back.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from crc32c import crc32c

from actstore.store.blobs import LocalBlobs, make_durable, write_failed
from actstore.store.errors import ErrorKind, StoreConflict
from actstore.store.manifest import FileEntry
from actstore.store.plan import Plan, plan_folders
from actstore.store.plan_record import RECORD_FILE, PlanRecord

__all__ = ["Approval", "publish_plan"]

Approval = Callable[[Plan], None]
"""Told of a plan whose files are there and whose record is not; raises to refuse it."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_RIVAL_SECONDS = 10.0
"""How long the lesser of two plans waits for the greater one's writer to take it back."""


def publish_plan(
    blobs: LocalBlobs,
    record: PlanRecord,
    publish_files: Callable[[], dict[str, bool]],
    existing: Sequence[Plan],
    approve: Approval | None,
) -> tuple[Plan, bool]:
    """Publish a plan unless another one was added since the store's were read.

    Args:
        blobs: the store.
        record: the plan's record, without files.
        publish_files: publishes the plan's other files; tells for each whether it was not
            there before.
        existing: the plans that ``record`` follows.
        approve: asked before the record is published. When it raises, nothing of the plan
            stays that this call wrote.

    Returns:
        The plan, and whether this call published it: another worker of the same corpus may
        have been first, and then nobody is asked.

    Raises:
        StoreConflict: another run added another plan meanwhile.
        StoreDamaged: a file of the plan was there before and is not what it should be.
        WriteFailed: the disk is full, read-only or failing.
    """
    known = {plan.record.folder for plan in existing}
    record_path = f"{record.folder}/{RECORD_FILE}"
    try:
        with _lock(blobs.root) as is_alone:
            _require_no_other(blobs.root, known | {record.folder})
            if blobs.exists(record_path):
                return Plan.open(blobs.root, record.folder), False
            made = publish_files()
            try:
                files = [_file_entry(blobs, key) for key in made]
                plan = Plan(blobs.root, record.with_files(files))
                plan.verify()
                if approve is not None:
                    approve(plan)
                _require_no_other(blobs.root, known | {record.folder})
            except Exception:
                # Without the lock another worker may be about to name these very files.
                for key in made:
                    if is_alone and made[key]:
                        blobs.delete(key)
                raise
            is_new = blobs.publish(record_path, [plan.record.encode()])
    except Exception:
        _remove_empty_folders(blobs.root, record.folder)
        raise
    _settle_with_rivals(blobs, record)
    return Plan.open(blobs.root, record.folder), is_new


def _require_no_other(root: Path, known: set[str]) -> None:
    if set(plan_folders(root)) - known:
        raise _conflict(root)


def _settle_with_rivals(blobs: LocalBlobs, record: PlanRecord) -> None:
    """Of two plans with one number keep the lesser hash, or the one that nobody takes back.

    The writer of the greater one may have looked before ours was there, and be at work: then
    its plan stays, and ours goes.
    """
    deadline = time.monotonic() + _RIVAL_SECONDS
    number = record.folder.rpartition("-")[0]
    while True:
        same = [one for one in plan_folders(blobs.root) if one.rpartition("-")[0] == number]
        if not set(same) - {record.folder}:
            return
        if min(same) != record.folder or time.monotonic() > deadline:
            blobs.delete(f"{record.folder}/{RECORD_FILE}")
            raise _conflict(blobs.root)
        time.sleep(0.05)


def _conflict(root: Path) -> StoreConflict:
    return StoreConflict(
        f"Another run added a plan to {root} meanwhile. Run ingest again.",
        kind=ErrorKind.CORPUS_CONFLICT,
    )


def _file_entry(blobs: LocalBlobs, key: str) -> FileEntry:
    # From the bytes that are there: a run that was killed may have left the file.
    size, checksum = 0, 0
    with open(blobs.path(key), "rb") as file:
        while block := file.read(2**20):
            size, checksum = size + len(block), crc32c(block, checksum)
    return FileEntry(key, size, checksum)


def _remove_empty_folders(root: Path, folder: str) -> None:
    """Leave no empty folders of a plan that was refused, nor of a store that never was."""
    for path in (root / folder, (root / folder).parent, root / "locks", root):
        with suppress(OSError):
            path.rmdir()


@contextmanager
def _lock(root: Path) -> Iterator[bool]:
    """Wait for whoever publishes a plan here; yields False where there are no locks.

    Raises:
        WriteFailed: the disk is full, read-only or failing.
    """
    path = root / "locks" / "plan.lock"
    try:
        descriptor = _acquire(path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise write_failed(path, error) from error
        path.unlink(missing_ok=True)
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        # The first thing that an ingest makes; so the store's own name is synced here.
        make_durable(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # A refused run has just removed the empty folder.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Who held it before has removed the file; the lock of a lost file keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
