"""Stored rows against an independent forward pass; the measured error is kept."""

import numpy as np
import torch

from actstore.ingest.model import LoadedModel
from actstore.ingest.reference import independent_forward
from actstore.store.plan import SegmentPlan
from actstore.store.reader import StoreReader
from actstore.store.selfcheck import SelfCheck, publish_selfcheck

__all__ = ["check_store"]

_SEED = 0


def check_store(reader: StoreReader, loaded: LoadedModel, sequences: int = 4) -> dict[str, float]:
    """Replay sampled sequences without hooks and compare with what is stored.

    The reference pass shares no code with capture: it computes every location from the
    weights. The error of a row is its largest absolute difference relative to the row's
    largest magnitude; a location's error is the worst of its sampled rows.

    Args:
        reader: the store, just opened.
        loaded: the model it was made with.
        sequences: how many sequences to replay; the choice is fixed by the committed set.

    Returns:
        location label -> error. Also published in the store, where queries find it.
    """
    chosen = _sample(reader, sequences)
    errors: dict[str, float] = {}
    for segment, index in chosen:
        ids = torch.tensor(segment.sequence_token_ids(index), dtype=torch.int64)
        expected = independent_forward(loaded, ids[None])
        start = int(segment.first_token[index]) - segment.first_row
        stop = start + int(segment.length[index])
        for (location, _), array in reader.arrays.items():
            if segment.number not in array.segments:
                continue
            for layer in range(array.spec.layer_count):
                stored = array.reader.window(segment.number, layer, start, stop)
                value = array.spec.dtype.to_float32(stored).astype(np.float64)
                reference = expected[location][layer][0].double().cpu()
                if location.is_pair_shaped:
                    value = value.reshape(len(value), *array.spec.unit_shape)[..., : len(value)]
                    value = np.nan_to_num(value.reshape(len(value), -1), neginf=0.0)
                    reference = reference.nan_to_num(neginf=0.0)
                wanted = reference.reshape(len(value), -1).numpy()
                scale = np.maximum(np.abs(wanted).max(1), np.finfo(np.float32).tiny)
                error = float((np.abs(value - wanted).max(1) / scale).max())
                errors[location.label] = max(errors.get(location.label, 0.0), error)
    numbers = tuple(segment.first_sequence + index for segment, index in chosen)
    publish_selfcheck(reader.blobs, SelfCheck(numbers, errors))
    return errors


def _sample(reader: StoreReader, count: int) -> list[tuple[SegmentPlan, int]]:
    """Sequences drawn from the committed segments, the first of all among them."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    segments = reader.segments
    chosen = [(reader.segment(segments[0]), 0)] if segments else []
    while segments and len(chosen) < count:
        segment = reader.segment(segments[int(random.integers(len(segments)))])
        chosen.append((segment, int(random.integers(segment.n_sequences))))
    return chosen
