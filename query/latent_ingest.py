"""Adding the latents of autoencoders to a store: computed from what it holds, then published.

A segment's latents are the canonical values of ``mlp_autoencoder_latent`` and its like:
what the autoencoder reads is read or reconstructed in float64, sequence by sequence, and the
latents are rounded once to float32. Running it again goes on where the last run stopped,
and completes segments that were ingested since.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import evaluate
from actstore.query.derived.registry import SCALARS
from actstore.query.latent_sets import made_from
from actstore.query.opening import OpenStore
from actstore.query.rows import SequenceRows
from actstore.store.blobs import LocalBlobs
from actstore.store.commits import commit_path, lock_segment, read_commits
from actstore.store.errors import ErrorKind, IngestStopped, InvalidInput
from actstore.store.latent_files import (
    WriteNorms,
    latent_set_name,
    publish_latent_segment,
    publish_latent_set,
    read_stored_autoencoder,
    set_conflict,
)
from actstore.store.latent_sections import SegmentLatents
from actstore.store.manifest import SetRecord
from actstore.store.model.autoencoder_families import AutoencoderFamily, Autoencoders
from actstore.store.model.autoencoder_formats import load_autoencoder
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.plan import SegmentPlan
from actstore.store.publishing import BASE_SET
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AddedLatents", "add_autoencoders", "complete_latents"]

Progress = Callable[[str, int, int], None]

_L = ActivationLocationType


@dataclass(frozen=True)
class AddedLatents:
    """What a run did for one set.

    Attributes:
        set: its name.
        location: what its autoencoders read.
        layers: their layers.
        segments: segments that the set has now.
        written: segments that this run wrote.
        entries: non-zero latents that this run wrote.
        bytes: bytes of the files that this run wrote.
    """

    set: str
    location: str
    layers: tuple[int, ...]
    segments: int
    written: int
    entries: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)


def add_autoencoders(
    path: str | Path,
    autoencoders: Iterable[Autoencoder | str | os.PathLike[str]],
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> list[AddedLatents]:
    """Compute the latents of a store's committed segments and keep them, a set per location.

    Segments that are there already are left alone, so a run that was killed or stopped is
    finished by the same call, and repeating a finished one changes nothing.

    Args:
        path: the store's directory.
        autoencoders: at most one per location and layer; a path is loaded.
        name: of the set; by default ``sae-`` and digits that follow from the autoencoders.
        progress: called with ``encode``, tokens done and tokens in all.

    Returns:
        What was done, by set.

    Raises:
        InvalidInput: an autoencoder does not fit the model, two are of one place, or the name
            cannot be used.
        StoreConflict: the name is that of a set of something else.
        Unavailable: what an autoencoder reads cannot be had from the store.
        IngestStopped: a latent is not finite, or the disk is full, read-only or failing.
    """
    given = [one if isinstance(one, Autoencoder) else load_autoencoder(one) for one in autoencoders]
    with OpenStore(path) as store:
        store.require_committed()
        families = _families(store, given)
        if name is not None and len(families) > 1:
            raise _invalid(
                f"name is {name!r} for autoencoders of {len(families)} locations, which are sets "
                "of their own. Add those of one location at a time, or leave out the name."
            )
        _check_name(name)
        store.reader.blobs.sweep()
        records = [_open_set(store, family, name) for family in families]
        total = _count_tokens(store, records)
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            if progress is not None:
                progress("encode", done, total)

        added = [
            _complete(store, record, family, advance)
            for record, family in zip(records, families, strict=True)
        ]
    _compact(path)
    return added


def complete_latents(
    path: str | Path, *, name: str | None = None, progress: Progress | None = None
) -> list[AddedLatents]:
    """Bring the sets of latents of a store up to its committed segments.

    Args:
        path: the store's directory.
        name: one set; by default all that are made from what the store would read now.
        progress: as for :func:`add_autoencoders`.

    Returns:
        What was done, by set.

    Raises:
        InvalidInput: the store has no such set.
        StoreConflict: that set was made from what the store no longer reads.
        Unavailable: what an autoencoder reads cannot be had from the store.
        IngestStopped: as for :func:`add_autoencoders`.
    """
    with OpenStore(path) as store:
        sets = {n: record for n, record in store.reader.sets.items() if record.latents}
        if name is not None and name not in sets:
            raise _invalid(f"There is no set of latents {name!r}; there are: {', '.join(sets)}.")
        kept = store.kept_latents
        wanted = {
            one: record
            for one, record in sets.items()
            if (one == name)
            or (name is None and all(map(kept.is_current, kept.sets[one].layers.values())))
        }
    added: list[AddedLatents] = []
    for number, (one, record) in enumerate(sorted(wanted.items())):
        stored = [read_stored_autoencoder(LocalBlobs(path), spec) for spec in record.latents]
        told = None if progress is None else _numbered(progress, number, len(wanted))
        added += add_autoencoders(path, stored, name=one, progress=told)
    return added


def _numbered(progress: Progress, number: int, sets: int) -> Progress:
    if sets == 1:
        return progress
    return lambda phase, done, total: progress(f"{phase} {number + 1} of {sets}", done, total)


def _compact(path: str | Path) -> None:
    # Also where nothing was written: the last run may have been killed just before this.
    with closing(StoreReader(path)) as reader:
        compact(reader)


# What may be added


def _families(store: OpenStore, given: Sequence[Autoencoder]) -> list[AutoencoderFamily]:
    if not given:
        raise _invalid("No autoencoder is given; name one at least.")
    grouped: dict[ActivationLocationType, list[Autoencoder]] = {}
    for one in given:
        _check_fit(store, one)
        grouped.setdefault(one.location, []).append(one)
    return [AutoencoderFamily(tuple(members)) for members in grouped.values()]


def _check_fit(store: OpenStore, one: Autoencoder) -> None:
    if one.layer is None or one.layer >= store.n_layers:
        raise InvalidInput(
            f"The autoencoder {one.name!r} is of {one.location} at layer {one.layer}; this model "
            f"has layers 0 to {store.n_layers - 1}. Say its layer when it is loaded.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    width = int(np.prod(store.sources.unit_shape(one.location.axes)))
    if one.channel_in != width:
        raise _invalid(
            f"The autoencoder {one.name!r} reads {one.channel_in} channels; {one.location} of "
            f"this model has {width}. It is another model's."
        )
    store.sources.require(one.location, PassType.FORWARD, one.layer)


def _check_name(name: str | None) -> None:
    allowed = name is None or (
        name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        and name.isascii()
        and not name.startswith(".")
    )
    if not allowed or name == BASE_SET:
        raise _invalid(
            f"name is {name!r}; a set's name has letters, digits, '-', '_' and '.', and is not "
            f"{BASE_SET!r}."
        )


def _open_set(store: OpenStore, family: AutoencoderFamily, name: str | None) -> SetRecord:
    """The family's set, published if it is new."""
    reads = {
        one.layer: made_from(store.sources, one.location.label, one.layer)
        for one in family
        if one.layer is not None
    }
    chosen = latent_set_name(family, reads) if name is None else name
    stored = store.reader.sets.get(chosen)
    if stored is not None:
        mine = [
            (layer, one.fingerprint, reads[layer])
            for one in family
            if (layer := one.layer) in reads
        ]
        if [(one.layer, one.fingerprint, one.made_from) for one in stored.latents] != mine:
            raise set_conflict(chosen)
        return stored
    norms = {one.layer: _write_norms(store, one) for one in family if one.layer is not None}
    return publish_latent_set(store.reader.blobs, chosen, family, norms, reads)


def _write_norms(store: OpenStore, one: Autoencoder) -> WriteNorms:
    """Norms in float64 of the decoder's rows, and of what they add to the residual stream.

    Where that passes a norm, its gain counts and its denominator does not.
    """
    import torch

    rows = one.to(torch.float64).latents_decoder_rows
    writes: Tensor | None = None
    if one.output_location.axes == (Dimension.CHANNEL,):
        writes = rows
    elif one.output_location is _L.MLP_POST_ACT:
        writes = rows @ store.sources.weight(WeightLocationType.MLP_TO_RESIDUAL, one.output_layer)
        if store.sources.dimensions.has_post_norms:
            gain = WeightLocationType.LAYER_NORM_GAIN_POST_MLP
            writes = writes * store.sources.weight(gain, one.output_layer)
    elif one.output_location is _L.ATTN_WEIGHTED_SUM_OF_VALUES:
        output = store.sources.weight(WeightLocationType.ATTN_TO_RESIDUAL, one.output_layer)
        writes = rows @ output.flatten(0, 1)
        if store.sources.dimensions.has_post_norms:
            gain = WeightLocationType.LAYER_NORM_GAIN_POST_ATTN
            writes = writes * store.sources.weight(gain, one.output_layer)
    return WriteNorms(_row_norms(rows), None if writes is None else _row_norms(writes))


def _row_norms(rows: "Tensor") -> npt.NDArray[np.float64]:
    norms: npt.NDArray[np.float64] = rows.square().sum(-1).sqrt().numpy()
    return norms


# The segments


def _count_tokens(store: OpenStore, records: Sequence[SetRecord]) -> int:
    base = store.reader.commits[BASE_SET]
    return sum(
        commit.rows
        for record in records
        for segment, commit in base.items()
        if not store.reader.blobs.exists(commit_path(record.name, segment))
    )


def _complete(
    store: OpenStore,
    record: SetRecord,
    family: AutoencoderFamily,
    advance: Callable[[int], None],
) -> AddedLatents:
    blobs = store.reader.blobs
    written = entries = size = 0
    for segment in store.reader.segments:
        path = commit_path(record.name, segment)
        if blobs.exists(path):
            continue
        with lock_segment(store.path, record.name, segment) as is_ours:
            plan = store.reader.segment(segment)
            # Looked at again: another process may have finished it since.
            if is_ours and not blobs.exists(path):
                layers = _encode_segment(store, record, plan, family, advance)
                hashed = store.reader.plan_of(segment).hash
                commit = publish_latent_segment(blobs, record, hashed, plan, layers)
                written += 1
                entries += sum(len(one.values) for one in layers.values())
                size += sum(entry.size for entry in commit.files)
            else:
                advance(plan.n_rows)
    return AddedLatents(
        set=record.name,
        location=family.location.label,
        layers=tuple(spec.layer for spec in record.latents),
        segments=len(read_commits(blobs, record.name)),
        written=written,
        entries=entries,
        bytes=size,
    )


def _encode_segment(
    store: OpenStore,
    record: SetRecord,
    plan: SegmentPlan,
    family: AutoencoderFamily,
    advance: Callable[[int], None],
) -> dict[int, SegmentLatents]:
    """The latents of every layer whose file is not there yet."""
    import torch

    declared = SCALARS[family.node_type.value]
    config = DstConfig(autoencoders=Autoencoders(family))
    exists = store.reader.blobs.exists
    missing = [
        spec for spec in record.latents if not exists(record.latent_path(spec.layer, plan.number))
    ]
    windows: dict[int, list[SegmentLatents]] = {spec.layer: [] for spec in missing}
    for index in range(plan.n_sequences):
        place = store.row_map.sequence(plan.first_sequence + index)
        values = store.sources.sequence(place)
        for spec in missing:
            found = evaluate(declared, values, spec.layer, config=config)
            dense = found.to(torch.float32).numpy()
            _require_finite(dense, record, spec.layer, place)
            windows[spec.layer].append(SegmentLatents.of(dense))
        advance(place.length)
    return {layer: SegmentLatents.join(parts) for layer, parts in windows.items()}


def _require_finite(
    dense: npt.NDArray[np.float32], record: SetRecord, layer: int, place: SequenceRows
) -> None:
    rows, latents = np.nonzero(~np.isfinite(dense))
    if len(rows):
        raise IngestStopped(
            f"Latent {latents[0]} of layer {layer} is {dense[rows[0], latents[0]]} at token "
            f"{place.first_token + rows[0]}, which set {record.name!r} cannot hold as float32. "
            "What is committed is intact. Rescale the autoencoder, or leave it out.",
            kind=ErrorKind.NUMERIC_OVERFLOW,
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
