"""The compacted index of an array: what the segments' zone files say, unit by unit.

A zone file is ordered by segment, so a question about one unit would touch every one of
them. Compaction turns them into one checked file per array, where what concerns a unit
lies together and is read with one or two verified blocks::

    zones/<location>/<pass>/index-<coverage>.sections

======================  ======================  ===========================================
section, per layer      shape                   meaning
======================  ======================  ===========================================
``lists.<layer>``       (unit, bytes)           a record per unit: ``proven`` (2 tails)
                                                uint16, ``complete`` (2) uint8, ``rows``
                                                (2, depth), ``keys`` (2, depth); tails are
                                                top, low
``bounds.<layer>``      (unit, 4, segment)      keys: max, min over ordinary, then special
                                                rows
``moments.<layer>``     (unit, 4)               mean, M2, M3, M4
``counts.<layer>``      (unit, 3)               ordinary values, > 0, NaN
``histograms.<layer>``  (unit, bytes)           see :mod:`actstore.store.histogram_sections`
======================  ======================  ===========================================

The index of a derived scalar has those of them that it was made with.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from actstore.store.blobs import TEMPORARY_MARK
from actstore.store.coverage import Coverage
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.histogram_sections import LayerHistograms, pack_histograms
from actstore.store.index_fold import LayerIndex, Moments, fold_layer, list_depth
from actstore.store.reader import DescribedUnits, StoreReader
from actstore.store.records import well_formed
from actstore.store.sections import SectionFile, encode_sections
from actstore.store.unit_grid import UnitGrid
from actstore.store.unit_histograms import (
    MERGED_SECTION,
    fold_histograms,
    merged_histograms,
)
from actstore.store.unit_lists import NO_ROW, TAILS, Tail, UnitLists

__all__ = [
    "ByteCache",
    "IndexFile",
    "array_coverage",
    "index_paths",
    "newest_index_file",
    "publish_index",
]

_CACHE_BYTES = 256 * 2**20
_ZONE_SECTIONS = ("lists", "bounds", "moments", "counts")
_DENSE = 8
"""A layer is read whole when at least one in so many of its units is asked for."""

Units = npt.NDArray[np.int64]


class IndexFile:
    """A compacted file, open for verified reads.

    Args:
        root: the store's directory.
        path: the file's path inside the store.
        spec: the array that it indexes.

    Attributes:
        coverage: the commit records it was made from.
        segments: the covered segments, ascending.
        path: as given.

    Raises:
        StoreDamaged: the file is missing, or not the index of that array and coverage.
    """

    def __init__(self, root: Path, path: str, spec: UnitGrid) -> None:
        self.path = path
        self._file = SectionFile(root / path, path)
        attributes = self._file.attributes
        try:
            self.coverage = Coverage.from_json(attributes["coverage"])
            rows, depth = np.dtype(attributes["rows"]), attributes["depth"]
            self._record = _record_dtype(spec.dtype.keys, rows, depth)
            own = attributes["array"] == spec.key and _index_path(spec, self.coverage) == path
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(path) from error
        if not own:
            raise _malformed(path)
        self.segments = [record.segment for record in self.coverage.records]
        self._cache = ByteCache()

    def lists(self, layer: int, tail: Tail, units: Units | None) -> UnitLists:
        """Merged lists of some units, or of all."""
        data = self._units(f"lists.{layer}", units)
        records = np.ascontiguousarray(data).view(self._record)[:, 0]
        number = TAILS.index(tail)
        rows = records["rows"][:, number]
        missing = rows == np.iinfo(rows.dtype).max
        return UnitLists(
            np.ascontiguousarray(records["keys"][:, number]),
            np.where(missing, NO_ROW, rows.astype(np.int64)),
            records["proven"][:, number].astype(np.int64),
            records["complete"][:, number].astype(bool),
        )

    def bounds(self, layer: int, units: Units | None) -> npt.NDArray[np.signedinteger]:
        """Keys ``(unit, 4, segment)`` of some units, or of all."""
        return self._units(f"bounds.{layer}", units)

    def counts(self, layer: int, unit: int) -> npt.NDArray[np.int64]:
        """Ordinary values, those above 0 and NaN of one unit, int64 ``(3,)``."""
        return self._file.row(f"counts.{layer}", unit)

    def moments(self, layer: int) -> Moments:
        """Moments ``(unit, 4)`` and counts ``(unit, 3)``."""
        return self._file.read(f"moments.{layer}"), self._file.read(f"counts.{layer}")

    def histograms(self, layer: int) -> LayerHistograms:
        """The histograms of all units."""
        return merged_histograms(self._file, layer)

    def layer(self, layer: int) -> LayerIndex:
        """Everything about a layer but its histograms."""
        moments, counts = self.moments(layer)
        return LayerIndex(
            self.lists(layer, "top", None),
            self.lists(layer, "low", None),
            self.bounds(layer, None),
            moments,
            counts,
        )

    def _units(self, section: str, units: Units | None) -> npt.NDArray[Any]:
        if units is not None and len(units) * _DENSE < self._file.shape(section)[0]:
            rows = [self._file.row(section, int(unit)) for unit in units]
            shape = (len(rows), *self._file.shape(section)[1:])
            return np.concatenate(rows).reshape(shape) if rows else np.empty(shape, np.uint8)
        whole = self._cache.get(section, lambda: self._file.read(section))
        return whole if units is None else whole[units]


def publish_index(reader: StoreReader, array: DescribedUnits) -> str | None:
    """Write the compacted index of an array over the segments that the reader sees.

    Works a layer at a time, on top of an older index whose segments come first. A sound
    file that is there already is kept, a damaged one made anew.

    Returns:
        The file's path inside the store; None when no segment is committed.

    Raises:
        StoreDamaged: a zone file is missing or fails a checksum.
        WriteFailed: the disk is full, read-only or failing.
    """
    coverage = array_coverage(reader, array)
    path = _index_path(array.spec, coverage)
    if not len(coverage):
        return None
    if _is_sound(reader.root, path):
        return path
    reader.blobs.delete(path)
    older = newest_index_file(reader.root, array.spec, coverage, skip_damaged=True)
    if older is not None and not (
        older.coverage.is_beginning_of(coverage) and _is_sound(reader.root, older.path)
    ):
        older = None
    row_dtype = _row_dtype(array.spec, array.segments)
    attributes = {
        "array": array.spec.key,
        "coverage": coverage.to_json(),
        "depth": list_depth(len(array.segments)),
        "rows": row_dtype.str,
    }
    sections = _LayerSections(array, older, row_dtype)
    reader.blobs.publish(path, encode_sections(sections, attributes))
    return path


def array_coverage(reader: StoreReader, array: DescribedUnits) -> Coverage:
    """The commit records that the segments of an array rest on."""
    for name, record in reversed(reader.sets.items()):
        if array.spec in record.arrays or array.spec in record.indexes:
            return Coverage.of(reader.commits[name].values())
    raise AssertionError(f"no set of this store has {array.spec.key}")


def index_paths(root: Path, spec: UnitGrid) -> list[str]:
    """The compacted files of an array at this moment."""
    folder = f"zones/{spec.key}"
    try:
        names = os.listdir(root / folder)
    except FileNotFoundError:
        return []
    return sorted(
        f"{folder}/{name}"
        for name in names
        if name.startswith("index-") and name.endswith(".sections") and TEMPORARY_MARK not in name
    )


def read_index_coverage(root: Path, path: str) -> Coverage:
    """The commit records that a compacted file covers.

    Raises:
        StoreDamaged: the file is missing or malformed.
    """
    file = SectionFile(root / path, path)
    try:
        with well_formed(path):
            return Coverage.from_json(file.attributes["coverage"])
    finally:
        file.close()


class _LayerSections(Mapping[str, npt.NDArray[Any]]):
    """The sections of an index, made when they are written, one layer in memory."""

    def __init__(
        self, array: DescribedUnits, older: "IndexFile | None", row_dtype: np.dtype[Any]
    ) -> None:
        self._array = array
        self._older = older
        covered = set(older.segments) if older else set()
        self._rest = [segment for segment in array.segments if segment not in covered]
        self._row_dtype = row_dtype
        self._layer: tuple[int, LayerIndex] | None = None
        self._names = (*(_ZONE_SECTIONS if array.spec.has_zones else ()),)
        if array.spec.has_histogram:
            self._names += (MERGED_SECTION,)

    def __iter__(self) -> Iterator[str]:
        for layer in range(self._array.spec.layer_count):
            for name in self._names:
                yield f"{name}.{layer}"

    def __len__(self) -> int:
        return len(self._names) * self._array.spec.layer_count

    def __getitem__(self, section: str) -> npt.NDArray[Any]:
        name, _, number = section.partition(".")
        if name == MERGED_SECTION:
            return self._histograms(int(number))
        index = self._fold(int(number))
        if name == "lists":
            return _encode_lists(index, self._row_dtype)
        part: npt.NDArray[Any] = getattr(index, name)
        return part

    def _fold(self, layer: int) -> LayerIndex:
        if self._layer is None or self._layer[0] != layer:
            beginning = self._older.layer(layer) if self._older else None
            self._layer = layer, fold_layer(self._array, self._rest, layer, beginning)
        return self._layer[1]

    def _histograms(self, layer: int) -> npt.NDArray[np.uint8]:
        beginning = self._older.histograms(layer) if self._older else None
        return pack_histograms(fold_histograms(self._array, self._rest, layer, beginning))


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_S = TypeVar("_S", bound=_Sized)


class ByteCache:
    """The last used values, up to a number of bytes; safe among threads."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: str, make: Callable[[], _S]) -> _S:
        """The value under ``key``, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                found: _S = self._values[key]
                return found
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._bytes += value.nbytes
            while self._bytes > _CACHE_BYTES and len(self._values) > 1:
                self._bytes -= self._values.popitem(last=False)[1].nbytes
        return value


def newest_index_file(
    root: Path, spec: UnitGrid, committed: Coverage, *, skip_damaged: bool = False
) -> IndexFile | None:
    """The compacted file that covers most of the committed segments.

    Args:
        root: the store's directory.
        spec: the array.
        committed: the commit records that the reader sees.
        skip_damaged: pass over a damaged file instead of raising.

    Raises:
        StoreDamaged: a compacted file is malformed.
    """
    best: IndexFile | None = None
    for path in index_paths(root, spec):
        try:
            file = IndexFile(root, path, spec)
        except StoreDamaged as error:
            # Compaction may have removed it since: what replaced it covers more than we see.
            is_gone = error.kind is ErrorKind.MISSING_FILE or not (root / path).exists()
            if skip_damaged or is_gone:
                continue
            raise
        is_wider = best is None or len(file.coverage) > len(best.coverage)
        if is_wider and file.coverage.is_within(committed):
            best = file
    return best


def _is_sound(root: Path, path: str) -> bool:
    if not (root / path).exists():
        return False
    try:
        file = SectionFile(root / path, path)
        file.verify()
        file.close()
    except StoreDamaged:
        return False
    return True


def _index_path(spec: UnitGrid, coverage: Coverage) -> str:
    return f"zones/{spec.key}/index-{coverage.hash}.sections"


def _row_dtype(spec: UnitGrid, segments: list[int]) -> np.dtype[Any]:
    # The greatest number stands for a missing entry.
    short = (max(segments, default=0) + 1) * spec.segment_rows < 2**32
    return np.dtype("<u4" if short else "<i8")


def _record_dtype(keys: np.dtype[Any], rows: np.dtype[Any], depth: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("proven", "<u2", (2,)),
            ("complete", "u1", (2,)),
            ("rows", rows, (2, depth)),
            ("keys", keys, (2, depth)),
        ]
    )


def _encode_lists(index: LayerIndex, rows: np.dtype[Any]) -> npt.NDArray[np.uint8]:
    units, depth = index.top.keys.shape
    records = np.zeros(units, _record_dtype(index.top.keys.dtype, rows, depth))
    for number, lists in enumerate((index.top, index.low)):
        records["proven"][:, number] = lists.proven
        records["complete"][:, number] = lists.complete
        missing = np.iinfo(rows).max
        records["rows"][:, number] = np.where(lists.rows == NO_ROW, missing, lists.rows)
        records["keys"][:, number] = lists.keys
    return records.view(np.uint8).reshape(units, records.dtype.itemsize)


def _malformed(path: str) -> StoreDamaged:
    return StoreDamaged(
        f"{path} is not the index that its name promises. Run `actstore verify`.",
        kind=ErrorKind.MALFORMED_FILE,
    )
