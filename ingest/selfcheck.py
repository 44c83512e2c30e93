"""Stored rows against an independent forward pass; the measured error is kept."""

import numpy as np
import torch

from actstore.ingest.model import LoadedModel
from actstore.ingest.reference import stream_independent_forward
from actstore.store.plan import SegmentPlan
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.selfcheck import SelfCheck, publish_selfcheck
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["check_store"]

_SEED = 0
_WINDOW_ROWS = 256


def check_store(reader: StoreReader, loaded: LoadedModel, sequences: int = 4) -> dict[str, float]:
    """Replay sampled sequences without hooks and compare with what is stored.

    The reference pass shares no code with capture: it computes every location from the
    weights. The error of a row is its largest absolute difference relative to the row's
    largest magnitude; a location's error is the worst of its sampled rows. Each tensor of the
    reference is compared as soon as it is computed and then dropped.

    Args:
        reader: the store, just opened.
        loaded: the model it was made with.
        sequences: how many sequences to replay; the choice is fixed by the committed set.

    Returns:
        location label -> error. Also published in the store by array, where queries find it.

    Raises:
        StoreDamaged: a stored value fails its checksum.
        WriteFailed: the disk is full, read-only or failing.
    """
    arrays = {
        location: array
        for (location, pass_type), array in reader.arrays.items()
        if pass_type is PassType.FORWARD
    }
    errors: dict[ActivationLocationType, float] = {}
    compared: dict[ActivationLocationType, tuple[int, ...]] = {}
    for segment, index in _sample(reader, sequences):
        # A further set may not have reached this segment yet.
        present = {at: one for at, one in arrays.items() if segment.number in one.segments}
        for location, error in _replay(loaded, present, segment, index).items():
            errors[location] = max(errors.get(location, 0.0), error)
            number = segment.first_sequence + index
            compared[location] = (*compared.get(location, ()), number)
    for numbers in sorted(set(compared.values())):
        measured = [location for location in arrays if compared.get(location) == numbers]
        check = SelfCheck(
            sequences=numbers,
            dtypes={arrays[at].spec.key: arrays[at].spec.dtype.value for at in measured},
            errors={arrays[at].spec.key: errors[at] for at in measured},
        )
        publish_selfcheck(reader.blobs, check)
    return {location.label: errors[location] for location in arrays if location in errors}


def _replay(
    loaded: LoadedModel,
    arrays: dict[ActivationLocationType, StoredArray],
    segment: SegmentPlan,
    index: int,
) -> dict[ActivationLocationType, float]:
    """The error of each array over one sequence."""
    start = int(segment.first_token[index]) - segment.first_row
    worst: dict[ActivationLocationType, float] = {}

    def compare(
        location: ActivationLocationType, layer: int | None, reference: torch.Tensor
    ) -> None:
        error = _error(arrays[location], segment.number, layer or 0, start, reference[0])
        worst[location] = max(worst.get(location, 0.0), error)

    ids = torch.tensor(segment.sequence_token_ids(index), dtype=torch.int64)
    stream_independent_forward(loaded, ids[None], compare, locations=arrays)
    return worst


def _error(
    array: StoredArray, segment: int, layer: int, start: int, reference: torch.Tensor
) -> float:
    """The worst relative error of the rows from ``start`` on against ``(token, unit …)``."""
    tokens = len(reference)
    worst = 0.0
    for first in range(0, tokens, _WINDOW_ROWS):
        last = min(first + _WINDOW_ROWS, tokens)
        stored = array.reader.window(segment, layer, start + first, start + last)
        value = array.spec.dtype.to_float32(stored).astype(np.float64)
        wanted = reference[first:last].double().cpu()
        if array.spec.location.is_pair_shaped:
            value = value.reshape(len(value), *array.spec.unit_shape)[..., :tokens]
            value = np.nan_to_num(value.reshape(len(value), -1), neginf=0.0)
            wanted = wanted.nan_to_num(neginf=0.0)
        expected = wanted.reshape(len(value), -1).numpy()
        scale = np.maximum(np.abs(expected).max(1), np.finfo(np.float32).tiny)
        worst = max(worst, float((np.abs(value - expected).max(1) / scale).max()))
    return worst


def _sample(reader: StoreReader, count: int) -> list[tuple[SegmentPlan, int]]:
    """Sequences drawn from the committed segments, the first of all among them."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    segments = reader.segments
    chosen = [(reader.segment(segments[0]), 0)] if segments else []
    while segments and len(chosen) < count:
        segment = reader.segment(segments[int(random.integers(len(segments)))])
        chosen.append((segment, int(random.integers(segment.n_sequences))))
    return chosen
