"""The latents that a store keeps, as questions see them: which autoencoders, which values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.derived.config import DstConfig
from actstore.query.derived.declaration import DerivedScalar
from actstore.query.rows import Rows
from actstore.query.sources import Sources
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.latent_reader import LatentArray, LatentSet, open_latent_sets
from actstore.store.location_names import parse_location
from actstore.store.reader import StoreReader
from actstore.store.vocabulary import Dimension, NodeType, PassType

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.store.model.autoencoder_families import Autoencoders
    from actstore.store.model.autoencoders import Autoencoder

__all__ = [
    "Latents",
    "StoredLatents",
    "dense_window",
    "describe_kept",
    "latent_columns",
    "made_from",
    "read_latents",
]


_FORWARD = PassType.FORWARD
_ENTRY_BYTES = 24
"""Of one entry in memory: its row, its latent, its value, and what joins them."""


class StoredLatents:
    """The sets of latents of an open store.

    Args:
        reader: the store.
        sources: where its values come from.

    Attributes:
        sets: by name, ascending.
    """

    def __init__(self, reader: StoreReader, sources: Sources) -> None:
        self._sources = sources
        self.sets: Mapping[str, LatentSet] = open_latent_sets(reader)
        self._own: dict[NodeType, Autoencoders] = {}
        self._made_from: dict[tuple[str, int], tuple[str, ...]] = {}

    def config_for(self, declared: DerivedScalar, config: DstConfig) -> DstConfig:
        """A config with the store's own autoencoders, where a scalar needs some and it has none.

        Raises:
            InvalidInput: several sets have such autoencoders of one layer, or of two locations.
        """
        if declared.latents is None or config.autoencoders is not None or not self.sets:
            return config
        return replace(config, autoencoders=self._of(declared.latents))

    def _of(self, wanted: NodeType) -> "Autoencoders":
        """All autoencoders of the store that can be in use together, those wanted among them."""
        from actstore.store.model.autoencoder_families import Autoencoders

        if wanted in self._own:
            return self._own[wanted]
        grouped: dict[NodeType, list[LatentSet]] = {}
        for one in self.sets.values():
            grouped.setdefault(_node_type(one), []).append(one)
        chosen: list[Autoencoder] = []
        for node_type, members in grouped.items():
            places = {
                (one.location, layer): array.spec.fingerprint
                for one in members
                for layer, array in one.layers.items()
            }
            prints = {array.spec.fingerprint for one in members for array in one.layers.values()}
            if len(prints) == len(places) and len({place for place, _ in places}) == 1:
                found = {auto.fingerprint: auto for one in members for auto in one.autoencoders}
                chosen += found.values()
            elif wanted in (node_type, NodeType.AUTOENCODER_LATENT):
                names = " and ".join(repr(one.name) for one in members)
                raise InvalidInput(
                    f"Sets {names} both have latents of type {node_type}. Choose one: "
                    f"DstConfig(autoencoders=store.autoencoders({members[0].name!r})).",
                    kind=ErrorKind.INVALID_ARGUMENT,
                )
        self._own[wanted] = Autoencoders(chosen)
        return self._own[wanted]

    def arrays_of(self, declared: DerivedScalar, config: DstConfig) -> dict[int, LatentArray]:
        """The layers at which a scalar's values are kept for a config's autoencoders."""
        kind = declared.latents
        if kind is None or declared.name != kind.value or config.autoencoders is None:
            return {}
        found = self.matching(config.family(kind)) if self.sets else {}
        # Others are values of the store as it was; what it says now is computed.
        return {layer: array for layer, array in found.items() if self.is_current(array)}

    def is_current(self, array: LatentArray) -> bool:
        """Whether what the autoencoder reads comes from where it came from when it was encoded.

        A further set may store a location in another dtype, or one that was reconstructed.
        """
        place = (array.spec.location, array.layer)
        if place not in self._made_from:
            self._made_from[place] = made_from(self._sources, *place)
        return self._made_from[place] in ((), array.spec.made_from)

    def matching(self, family: "Iterable[Autoencoder]") -> dict[int, LatentArray]:
        """The kept latents of a family's autoencoders, by layer: current ones, then the most."""
        arrays = [array for one in self.sets.values() for array in one.layers.values()]
        arrays.sort(key=lambda array: (self.is_current(array), len(array.segments)))
        kept = {array.spec.fingerprint: array for array in arrays}
        return {
            one.layer: kept[one.fingerprint]
            for one in family
            if one.layer is not None and one.fingerprint in kept
        }

    def named(self, of: str | None) -> LatentSet:
        """A set by its name, or by the location that its autoencoders read.

        Raises:
            Unavailable: there is no such set.
            InvalidInput: several would do.
        """
        found = [one for one in self.sets.values() if of in (None, one.name)]
        if of is not None and not found:
            try:
                label = parse_location(of)[0].label
            except InvalidInput:
                label = ""
            found = [one for one in self.sets.values() if one.location == label]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{one.name} ({one.location})" for one in self.sets.values()) or "none"
        if not found:
            raise Unavailable(
                f"No latents of {of or 'an autoencoder'} are kept here; sets of latents: {known}. "
                "Add some with `actstore add-saes`.",
                kind=ErrorKind.NOT_STORED,
            )
        raise InvalidInput(
            f"{of or 'Latents'} may be of several sets: {known}. Name one of them.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )


def made_from(sources: Sources, location: str, layer: int) -> tuple[str, ...]:
    """Keys of the stored arrays that a location's values come from, ``token_id`` for the tokens.

    Nothing for a location that cannot be had.
    """
    place = parse_location(location)[0]
    arrays = sources.reader.arrays
    if (place, layer) not in sources.routes:
        return ()
    names = sources.roots(place, layer)
    keys = {of.label: array.spec.key for (of, kind), array in arrays.items() if kind is _FORWARD}
    return tuple(keys.get(name, name) for name in names)


def _node_type(found: LatentSet) -> NodeType:
    from actstore.store.model.autoencoders import latent_node_type

    return latent_node_type(parse_location(found.location)[0])


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of one layer that are not zero, with their places.

    Attributes:
        name: the set.
        layer: the layer.
        n_latents: latents of the autoencoder.
        rows: the rows that were asked for.
        index: which of ``rows`` each entry belongs to, int64 ``(entry,)``.
        latent: int64 ``(entry,)``.
        value: float32 ``(entry,)``, canonical.
    """

    name: str
    layer: int
    n_latents: int
    rows: Rows
    index: npt.NDArray[np.int64]
    latent: npt.NDArray[np.int64]
    value: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return (
            f"Latents({self.name}, layer {self.layer}: {len(self):,} of {len(self.rows):,} rows x "
            f"{self.n_latents:,} latents are not zero)"
        )

    @cached_property
    def table(self) -> pa.Table:
        """Columns ``layer, token, latent, value, sequence, position``, in the order of the entries."""
        rows = self.rows
        return pa.table(
            {
                "layer": pa.array(np.full(len(self), self.layer), pa.int32()),
                "token": pa.array(rows.token[self.index], pa.int64()),
                "latent": pa.array(self.latent, pa.int32()),
                "value": pa.array(self.value, pa.float32()),
                "sequence": pa.array(rows.sequence[self.index], pa.int64()),
                "position": pa.array(rows.position[self.index], pa.int32()),
            }
        )

    def sparse(self) -> "Tensor":
        """A sparse COO tensor, float32 ``(row, latent)``; ``.to_dense()`` has the zeros too."""
        import torch

        places = torch.from_numpy(np.stack([self.index, self.latent]))
        shape = (len(self.rows), self.n_latents)
        tensor = torch.sparse_coo_tensor(
            places, torch.from_numpy(self.value), shape, check_invariants=False
        )
        return tensor.coalesce()


def read_latents(
    array: LatentArray, rows: Rows, latents: int | Iterable[int] | None, max_bytes: int
) -> Latents:
    """Latents of some rows: by token, or, where few latents are meant, by latent.

    Args:
        array: the latents of one layer.
        rows: committed rows in any order, repeats allowed.
        latents: which; all by default.
        max_bytes: of the entries together.

    Raises:
        InvalidInput: there is no such latent, or there are too many entries.
        Unavailable: the set lacks a row's segment.
        StoreDamaged: a block fails its checksum.
    """
    if latents is None:
        count = array.count(rows.token)
        if count * _ENTRY_BYTES > max_bytes:
            raise InvalidInput(
                f"{count:,} latents are not zero, {count * _ENTRY_BYTES:,} bytes, more than the "
                f"limit of {max_bytes:,}. Ask for fewer rows, or open the store with a greater "
                "`max_result_bytes`.",
                kind=ErrorKind.TOO_LARGE,
            )
        found = array.by_token(rows.token)
        index, latent, value = found.index, found.latents, found.values
    else:
        index, latent, value = _by_latent(array, rows, _numbers(latents, array.n_latents))
    return Latents(
        array.record.name, array.layer, array.n_latents, rows, index, latent, np.array(value)
    )


def _numbers(latents: int | Iterable[int], n_latents: int) -> npt.NDArray[np.int64]:
    wanted: list[Any] = list(latents) if isinstance(latents, Iterable) else [latents]
    for one in wanted:
        if not isinstance(one, int | np.integer) or not 0 <= one < n_latents:
            raise InvalidInput(
                f"latents names {one!r}; this layer has 0 to {n_latents - 1}.",
                kind=ErrorKind.UNKNOWN_UNIT,
            )
    return np.unique(np.array(wanted, np.int64))


def _by_latent(
    array: LatentArray, rows: Rows, latents: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Entries of some latents alone, in the order of the rows, then of the latents."""
    size = array.segment_rows
    order = np.argsort(rows.token, kind="stable")
    ascending = rows.token[order]
    parts: list[tuple[npt.NDArray[np.int64], int, npt.NDArray[np.float32]]] = []
    for segment in np.unique(ascending // size).tolist():
        for one in latents.tolist():
            at, values = array.by_latent(segment, one)
            first = np.searchsorted(ascending, at + segment * size, side="left")
            last = np.searchsorted(ascending, at + segment * size, side="right")
            repeats = last - first
            starts = np.repeat(first - (np.cumsum(repeats) - repeats), repeats)
            places = order[starts + np.arange(int(repeats.sum()))]
            parts.append((places, one, np.repeat(values, repeats)))
    index = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
    latent = np.concatenate(
        [np.empty(0, np.int64), *(np.full(len(part[0]), part[1]) for part in parts)]
    )
    value = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
    sorting = np.lexsort((latent, index))
    return index[sorting], latent[sorting], value[sorting]


def dense_window(
    array: LatentArray, first_token: int, position: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Values ``(row, latent)`` at positions of a sequence, zeros included."""
    return array.by_token(first_token + position).dense(array.n_latents)


def latent_columns(declared: DerivedScalar, config: DstConfig) -> int:
    """Latents of a scalar's latent axis: those of its widest layer; 0 without such an axis."""
    if Dimension.LATENT not in declared.axes:
        return 0
    assert declared.latents is not None, f"{declared.name} has latents of no autoencoder"
    return max(one.n_latents for one in config.family(declared.latents))


def describe_kept(arrays: Iterable[LatentArray]) -> str:
    """Where kept latents come from, for people."""
    names = dict.fromkeys(array.record.name for array in arrays)
    return f"stored float32 (latents of {', '.join(names)})"
