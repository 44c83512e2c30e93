"""Latents of an open store: verified reads by token and by latent, and their summaries."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.store.errors import ErrorKind, StoreDamaged, Unavailable
from actstore.store.index_file import ByteCache
from actstore.store.keys import ordered_keys
from actstore.store.latent_files import (
    WriteNorms,
    latent_attributes,
    norms_path,
    read_stored_autoencoder,
)
from actstore.store.latent_sections import LIST_LENGTH
from actstore.store.layout import StoredDtype
from actstore.store.manifest import LatentSpec, SetRecord
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.reader import StoreReader
from actstore.store.sections import SectionFile
from actstore.store.statistics import UnitStatistics, merge_moments
from actstore.store.unit_lists import LIST_DEPTH, NO_ROW, ListMerger, Tail, UnitLists

__all__ = [
    "LatentArray",
    "LatentRows",
    "LatentSet",
    "LatentStatistics",
    "open_latent_sets",
]

_LIST_GROUP = 16
"""Segments whose lists are merged at once: bounds the memory."""

_DENSE = 64
"""Extremes are read whole when at least one in so many latents is asked for."""

_WORST: Mapping[Tail, int] = {"top": np.iinfo(np.int32).min, "low": np.iinfo(np.int32).max}
"""The key of an entry that does not exist."""


@dataclass(frozen=True)
class LatentRows:
    """Non-zero latents of some rows, row after row.

    Attributes:
        offsets: where each row's entries begin, int64 ``(row + 1,)``.
        latents: int64 ``(entry,)``, ascending within a row.
        values: float32 ``(entry,)``.
    """

    offsets: npt.NDArray[np.int64]
    latents: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]

    @property
    def index(self) -> npt.NDArray[np.int64]:
        """Which of the rows each entry belongs to, int64 ``(entry,)``."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def take(self, rows: npt.NDArray[np.int64]) -> "LatentRows":
        """The entries of some of the rows, int64 ``(row,)``."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        places = np.repeat(self.offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
        return LatentRows(offsets, self.latents[places], self.values[places])

    def dense(self, n_latents: int) -> npt.NDArray[np.float32]:
        """float32 ``(row, latent)``."""
        values = np.zeros((len(self.offsets) - 1, n_latents), np.float32)
        values[self.index, self.latents] = self.values
        return values


@dataclass(frozen=True)
class LatentStatistics:
    """A layer's latents over all segments; every array is ``(latent,)``.

    Attributes:
        moments: count and moments over ordinary rows, zeros included.
        active: ordinary rows that are not zero.
        special_active: special rows that are not zero.
        maximum, minimum: float32, over ordinary rows, zeros included; NaN without a row.
        special_maximum, special_minimum: of the non-zero values of special rows; NaN where
            there is none.
    """

    moments: UnitStatistics
    active: npt.NDArray[np.int64]
    special_active: npt.NDArray[np.int64]
    maximum: npt.NDArray[np.float32]
    minimum: npt.NDArray[np.float32]
    special_maximum: npt.NDArray[np.float32]
    special_minimum: npt.NDArray[np.float32]


class LatentArray:
    """The latents of one autoencoder over the committed segments.

    Args:
        store: the open store.
        record: the set.
        spec: the autoencoder.

    Attributes:
        record, spec: as given.
        layer, n_latents: of the autoencoder.
        segments: committed segments, ascending.
    """

    def __init__(self, store: StoreReader, record: SetRecord, spec: LatentSpec) -> None:
        self._store = store
        self.record = record
        self.spec = spec
        self.layer = spec.layer
        self.n_latents = spec.n_latents
        self._commits = store.commits[record.name]
        self.segments = sorted(self._commits)
        self._cache = ByteCache()

    @property
    def segment_rows(self) -> int:
        """S, the token rows of a segment."""
        return self._store.segment_rows

    def rows_of(self, segment: int) -> int:
        """Filled rows of a committed segment."""
        return self._commits[segment].rows

    def file(self, segment: int) -> SectionFile:
        """The segment's file; every read is verified.

        Raises:
            Unavailable: the set lacks the segment.
            StoreDamaged: the file is missing, malformed, or that of something else.
        """
        if segment not in self._commits:
            raise Unavailable(
                f"Set {self.record.name!r} has no latents of segment {segment} yet. Complete it "
                "with `actstore add-saes`.",
                kind=ErrorKind.NOT_STORED,
            )
        path = self.record.latent_path(self.layer, segment)
        file = self._store.section_file(path)
        plan = self._commits[segment].plan
        if file.attributes != latent_attributes(self.record.name, self.spec, segment, plan):
            raise StoreDamaged(
                f"{path} is the file of something else: {file.attributes}. Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return file

    def by_token(self, rows: npt.NDArray[np.int64]) -> LatentRows:
        """The non-zero latents of global rows, in any order, repeats allowed.

        Neighbours are read together; a single row costs a block of each section.

        Raises:
            Unavailable: the set lacks a row's segment.
            StoreDamaged: a block fails its checksum.
        """
        size = self._store.segment_rows
        breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % size == 0)) + 1
        counts, latents, values = [], [], []
        for run in np.split(rows, breaks):
            if len(run):
                segment, start = divmod(int(run[0]), size)
                found = self.window(segment, start, start + len(run))
                counts.append(np.diff(found.offsets))
                latents.append(found.latents)
                values.append(found.values)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.concatenate([np.empty(0, np.int64), *counts]), out=offsets[1:])
        return LatentRows(
            offsets,
            np.concatenate([np.empty(0, np.int64), *latents]),
            np.concatenate([np.empty(0, np.float32), *values]),
        )

    def count(self, rows: npt.NDArray[np.int64]) -> int:
        """Non-zero latents of global rows; reads where they begin, and nothing of them."""
        size, total = self.segment_rows, 0
        segments, starts = np.unique(rows // size, return_inverse=True)
        for number, segment in enumerate(segments.tolist()):
            offsets = self.file(segment).read("token_offsets").astype(np.int64)
            total += int(np.diff(offsets)[rows[starts == number] - segment * size].sum())
        return total

    def window(self, segment: int, start: int, stop: int) -> LatentRows:
        """The non-zero latents of the filled rows ``start:stop`` of a segment.

        Raises:
            Unavailable: the set lacks the segment.
            StoreDamaged: a block fails its checksum.
        """
        file = self.file(segment)
        offsets = file.slice("token_offsets", start, stop + 1).astype(np.int64)
        assert len(offsets) == stop - start + 1, f"rows {start} to {stop} are not filled"
        first, last = int(offsets[0]), int(offsets[-1])
        return LatentRows(
            offsets - first,
            file.slice("token_latents", first, last).astype(np.int64),
            file.slice("token_values", first, last),
        )

    def by_latent(
        self, segment: int, latent: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The rows of a segment where a latent is not zero, ascending, and its values there.

        Raises:
            Unavailable: the set lacks the segment.
            StoreDamaged: a block fails its checksum.
        """
        file = self.file(segment)
        first, last = file.slice("latent_offsets", latent, latent + 2).tolist()
        rows = file.slice("latent_rows", first, last).astype(np.int64)
        return rows, file.slice("latent_values", first, last)

    def extremes(
        self, segment: int, latents: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Max and min of the non-zero values of ordinary, then special rows, ``(latent, 4)``.

        Args:
            segment: a committed segment.
            latents: which; all by default. Many are looked up in the whole, which is kept.
        """
        file = self.file(segment)
        if latents is not None and len(latents) * _DENSE < self.n_latents:
            rows = [file.row("extremes", int(latent)) for latent in latents]
            return np.array(rows, np.float32).reshape(-1, 4)
        path = self.record.latent_path(self.layer, segment)
        whole = self._cache.get(path, lambda: file.read("extremes"))
        return whole if latents is None else whole[latents]

    def entries(self, segment: int) -> int:
        """Non-zero latents of a segment."""
        return self.file(segment).shape("token_values")[0]

    @property
    def bytes(self) -> int:
        """Size of the committed files."""
        wanted = {self.record.latent_path(self.layer, segment) for segment in self.segments}
        entries = (entry for record in self._commits.values() for entry in record.files)
        return sum(entry.size for entry in entries if entry.path in wanted)

    # Over all segments

    def statistics(self) -> LatentStatistics:
        """Counts, moments and extremes, merged segment by segment in order.

        Raises:
            StoreDamaged: a block fails its checksum.
        """
        shape = self.n_latents
        moments = np.zeros((shape, 4))
        rows = np.zeros(shape)
        counts = np.zeros((shape, 3), np.int64)
        high, low = (
            np.full((2, shape), -np.inf, np.float32),
            np.full((2, shape), np.inf, np.float32),
        )
        for segment in self.segments:
            file = self.file(segment)
            ordinary = int((~self._store.segment(segment).special).sum())
            moments, rows = merge_moments(
                moments, rows, file.read("moments"), np.full(shape, float(ordinary))
            )
            found = file.read("counts").astype(np.int64)
            counts += found
            extremes = file.read("extremes").T
            high, low = np.maximum(high, extremes[0::2]), np.minimum(low, extremes[1::2])
            has_zero = found[:, 0] < ordinary
            high[0] = np.where(has_zero, np.maximum(high[0], 0), high[0])
            low[0] = np.where(has_zero, np.minimum(low[0], 0), low[0])
        absent = high < low
        high[absent] = low[absent] = np.nan
        per_unit = np.stack([rows, counts[:, 1], np.zeros(shape)], axis=1)
        return LatentStatistics(
            UnitStatistics.from_moments(moments, per_unit),
            counts[:, 0],
            counts[:, 2],
            high[0],
            low[0],
            high[1],
            low[1],
        )

    def lists(self, tail: Tail) -> UnitLists:
        """Merged lists of the values above zero (``top``) or below it (``low``).

        Values over ordinary rows; ``complete`` says that the list has all of them.

        Raises:
            StoreDamaged: a block fails its checksum.
        """
        merger = ListMerger(self.n_latents, StoredDtype.FLOAT32, tail, LIST_DEPTH)
        size = self._store.segment_rows
        for start in range(0, len(self.segments), _LIST_GROUP):
            group = self.segments[start : start + _LIST_GROUP]
            shape = (self.n_latents, len(group), LIST_LENGTH)
            keys = np.full(shape, _WORST[tail], np.int32)
            rows = np.full(shape, NO_ROW, np.int64)
            has_more = np.empty(shape[:2], bool)
            for number, segment in enumerate(group):
                file = self.file(segment)
                counts = file.read("counts").astype(np.int64)
                count = counts[:, 1] if tail == "top" else counts[:, 0] - counts[:, 1]
                listed = np.minimum(count, LIST_LENGTH)
                latent = np.repeat(np.arange(self.n_latents), listed)
                place = np.arange(len(latent)) - np.repeat(np.cumsum(listed) - listed, listed)
                values = file.read(f"{tail}_values")
                keys[latent, number, place] = ordered_keys(values, StoredDtype.FLOAT32)
                rows[latent, number, place] = file.read(f"{tail}_rows") + segment * size
                has_more[:, number] = count > LIST_LENGTH
            merger.add(keys, rows, has_more)
        return merger.lists


class LatentSet:
    """A set of latents of an open store.

    Args:
        store: the open store.
        record: the set.

    Attributes:
        name: the set's name.
        location: label of what its autoencoders read.
        layers: layer -> latents; ascending.
        segments: committed segments, ascending.
    """

    def __init__(self, store: StoreReader, record: SetRecord) -> None:
        self._store = store
        self._record = record
        self.name = record.name
        self.location = record.latents[0].location
        self.layers = {spec.layer: LatentArray(store, record, spec) for spec in record.latents}
        self.segments = sorted(store.commits[record.name])
        self._autoencoders: tuple[Autoencoder, ...] | None = None

    @property
    def autoencoders(self) -> tuple[Autoencoder, ...]:
        """The autoencoders, by layer, read and verified once.

        Raises:
            StoreDamaged: a file of theirs fails its checksum.
        """
        if self._autoencoders is None:
            blobs = self._store.blobs
            self._autoencoders = tuple(
                read_stored_autoencoder(blobs, spec) for spec in self._record.latents
            )
        return self._autoencoders

    @property
    def is_complete(self) -> bool:
        """Whether it covers every committed segment of the store."""
        return self.segments == self._store.segments

    @property
    def bytes(self) -> int:
        """Size of the committed files and of the autoencoders."""
        kept = [*self._record.files, *(spec.file for spec in self._record.latents)]
        return sum(entry.size for entry in kept) + sum(one.bytes for one in self.layers.values())

    def norms(self, layer: int) -> WriteNorms:
        """How much the latents of a layer write.

        Raises:
            StoreDamaged: a block fails its checksum.
        """
        file = self._store.section_file(norms_path(self.name))
        write = f"write.{layer}"
        return WriteNorms(
            file.read(f"decoder.{layer}"), file.read(write) if write in file else None
        )


def open_latent_sets(store: StoreReader) -> dict[str, LatentSet]:
    """The sets of latents of an open store, by name, ascending."""
    return {
        name: LatentSet(store, record)
        for name, record in sorted(store.sets.items())
        if record.latents
    }
