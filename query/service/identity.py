"""Whether the store on disk is still the one that was opened.

A store only grows: records are added, none is changed. So what was opened stays true, and
a server need not look again. What is checked is that nobody put another store into its
place, or took records away; then no number that follows could be trusted.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from crc32c import crc32c

from actstore.query.service.problems import HttpKind, ServiceError
from actstore.store.reader import StoreReader

__all__ = ["StoreIdentity"]

_MANIFEST = "store.json"
_FULL_CHECK_SECONDS = 1.0
"""Every record's file is looked at so often; the manifest and the folders at each request."""


@dataclass(frozen=True)
class _Mark:
    """What a file or folder looks like from outside."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "_Mark | None":
        try:
            found = os.stat(path)
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class StoreIdentity:
    """The manifest and the commit records of an open store, as they were when it was opened.

    Args:
        reader: the store.
    """

    def __init__(self, reader: StoreReader) -> None:
        self._root = reader.root
        self._lock = Lock()
        self._changed: str | None = None
        self._known = {
            name: frozenset(Path(record.path).name for record in records.values())
            for name, records in reader.commits.items()
        }
        self._listed: dict[str, frozenset[str]] = {}
        self._listed = self._listing()
        self._sums = {_MANIFEST: crc32c((self._root / _MANIFEST).read_bytes())}
        for records in reader.commits.values():
            self._sums.update({record.path: record.checksum for record in records.values()})
        self._marks: dict[str, _Mark | None] = dict.fromkeys(self._sums)
        self._folders: dict[str, _Mark | None] = {}
        self._checked_at = 0.0
        self.check()

    def check(self) -> None:
        """Refuse to go on with another store.

        Raises:
            ServiceError: a record is gone or differs; ``store_changed``, from then on always.
        """
        if not self.is_due:
            return
        with self._lock:
            if self._changed is None and self.is_due:
                self._changed = self._look()
            if self._changed is not None:
                raise ServiceError(
                    HttpKind.STORE_CHANGED,
                    f"{self._changed} is not what this server opened: the store was replaced or "
                    "cut while it ran. Start the server again.",
                )

    @property
    def has_changed(self) -> bool:
        """Whether another store stands here now."""
        try:
            self.check()
        except ServiceError:
            return True
        return False

    @property
    def has_grown(self) -> bool:
        """Whether sets or segments were added since."""
        listed = self._listing()
        # Of other sets an opening passes over what the base has not reached yet.
        return listed != self._listed or bool(
            listed.get("base", frozenset()) - self._known.get("base", frozenset())
        )

    def _listing(self) -> dict[str, frozenset[str]]:
        """Set -> the names of its records' files."""
        folder = self._root / "commits"
        try:
            sets = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            return {name: frozenset(filter(_is_record, os.listdir(folder / name))) for name in sets}
        except OSError:
            return self._listed

    @property
    def is_due(self) -> bool:
        """Whether :meth:`check` would look at the disk, or refuse; asks for a few files alone."""
        if self._changed is not None:
            return True
        if time.monotonic() - self._checked_at > _FULL_CHECK_SECONDS:
            return True
        if _Mark.of(self._root / _MANIFEST) != self._marks[_MANIFEST]:
            return True
        return any(_Mark.of(self._root / one) != mark for one, mark in self._folders.items())

    def _look(self) -> str | None:
        """The first file that is gone or differs; None if all are what they were."""
        for name in self._known:
            folder = f"commits/{name}"
            self._folders[folder] = _Mark.of(self._root / folder)
        for key, expected in self._sums.items():
            mark = _Mark.of(self._root / key)
            if mark is None:
                return key
            if mark != self._marks[key]:
                # A copy put back in place is the same store: bytes decide, not dates.
                try:
                    if crc32c((self._root / key).read_bytes()) != expected:
                        return key
                except OSError:
                    return key
                self._marks[key] = mark
        self._checked_at = time.monotonic()
        return None


def _is_record(name: str) -> bool:
    return name.endswith(".json") and name != "set.json"
