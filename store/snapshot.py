"""Snapshots: one read-only DuckDB file with everything that SQL asks about.

A snapshot is made from committed segments and named by the records it covers:
``catalog/<coverage>.duckdb`` with a record beside it, ``catalog/<coverage>.json``, that
answers for its bytes. A reader takes the one that covers all it has seen. Where the
store has none, the reader makes its own in the user's cache, or in memory when the store
is small: opening never writes to the store.

Compaction keeps the newest alone. Older snapshots and index files are removed once the
new ones are published: whoever has one open keeps its file, and a reader that comes too
late makes its own.
"""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from crc32c import crc32c

from actstore.store.blobs import TEMPORARY_MARK, LocalBlobs, write_failed, writer_id
from actstore.store.commits import lock_segment, read_commits
from actstore.store.coverage import Coverage
from actstore.store.errors import ErrorKind, StoreDamaged, WriteFailed
from actstore.store.index_file import index_paths, publish_index, read_index_coverage
from actstore.store.manifest import FileEntry
from actstore.store.publishing import publish_file
from actstore.store.reader import StoreReader
from actstore.store.records import decode_record, encode_record
from actstore.store.tables import fill_tables

__all__ = ["CompactionResult", "Snapshot", "compact", "newest_snapshot", "open_snapshot"]

FOLDER = "catalog"

CHECKED_BYTES = 256 * 2**20
"""Snapshots up to this size are checked whole when opened; DuckDB checks its blocks always."""

MEMORY_ROWS = 2**17
"""Stores up to this many rows get their snapshot in memory when they have none on disk."""

_PIECE = 8 * 2**20

_HARDENED: Mapping[str, Any] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
}
