"""Stored rows against an independent forward pass; the measured error is kept."""

import numpy as np
import torch

from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import parse_objective
from actstore.ingest.reference import stream_independent_forward, stream_independent_gradients
from actstore.ingest.targets import DocumentTargets
from actstore.store.plan import SegmentPlan
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.selfcheck import SelfCheck, publish_selfcheck
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["check_store"]

_SEED = 0
_WINDOW_ROWS = 256

_GRADIENT_FLOOR = 1e-4
"""Share of the largest gradient of a layer and sequence that is the least measure of a row.

Gradients cancel: a query that attends to one token has none at all, and what rounding leaves
of it is no error of that row alone.
"""

_NO_GRADIENT = 1e-9
"""Share of the residual stream's gradient below which a whole layer's cancels in float64."""


def check_store(reader: StoreReader, loaded: LoadedModel, sequences: int = 4) -> dict[str, float]:
    """Replay sampled sequences without hooks and compare with what is stored.

    The reference pass shares no code with capture: it computes every location from the
    weights, and differentiates the same mathematics for every objective that has gradients.
    The error of a row is its largest absolute difference relative to the row's largest
    magnitude (a gradient's, to no less than 1e-4 of the largest in its layer and sequence,
    or in the residual stream where all of a layer's cancel);
    a location's error is the worst of its sampled rows. Each tensor of the reference is
    compared as soon as it is computed and then dropped.

    Args:
        reader: the store, just opened.
        loaded: the model it was made with.
        sequences: how many sequences to replay; the choice is fixed by the committed set.

    Returns:
        location label, or key of an array of gradients, -> error. Also published in the store
        by array, where queries find it.

    Raises:
        StoreDamaged: a stored value fails its checksum.
        WriteFailed: the disk is full, read-only or failing.
    """
    forward = {
        location: array
        for (location, pass_type), array in reader.arrays.items()
        if pass_type is PassType.FORWARD
    }
    gradients = _gradients(reader)
    errors: dict[str, float] = {}
    compared: dict[str, tuple[int, ...]] = {}
    for segment, index in _sample(reader, sequences):
        replays = [_replay(loaded, _present(forward, segment), segment, index)]
        replays += [
            _replay_gradients(reader, loaded, name, _present(arrays, segment), segment, index)
            for name, arrays in gradients.items()
        ]
        for key, error in (item for replay in replays for item in replay.items()):
            errors[key] = max(errors.get(key, 0.0), error)
            compared[key] = (*compared.get(key, ()), segment.first_sequence + index)
    arrays = [*forward.values(), *(one for held in gradients.values() for one in held.values())]
    for numbers in sorted(set(compared.values())):
        measured = [one.spec for one in arrays if compared.get(one.spec.key) == numbers]
        check = SelfCheck(
            sequences=numbers,
            dtypes={spec.key: spec.dtype.value for spec in measured},
            errors={spec.key: errors[spec.key] for spec in measured},
        )
        publish_selfcheck(reader.blobs, check)
    return {
        (
            one.spec.location.label if one.spec.pass_type is PassType.FORWARD else one.spec.key
        ): errors[one.spec.key]
        for one in arrays
        if one.spec.key in errors
    }


_Arrays = dict[ActivationLocationType, StoredArray]


def _gradients(reader: StoreReader) -> dict[str, _Arrays]:
    """Objective -> location -> its array; one objective has a location in one set."""
    found: dict[str, _Arrays] = {}
    for name, objective in reader.objectives.items():
        for spec in reader.sets[name].arrays:
            if spec.pass_type is PassType.BACKWARD:
                array = reader.array_of(name, spec.location)
                found.setdefault(objective, {}).setdefault(spec.location, array)
    return found


def _present(arrays: _Arrays, segment: SegmentPlan) -> _Arrays:
    """Without those of a further set that has not reached this segment yet."""
    return {at: one for at, one in arrays.items() if segment.number in one.segments}


def _replay(
    loaded: LoadedModel, arrays: _Arrays, segment: SegmentPlan, index: int
) -> dict[str, float]:
    """The error of each array over one sequence, by key."""
    comparison = _Comparison(arrays, segment, index)
    if arrays:
        stream_independent_forward(
            loaded, comparison.token_ids, comparison.compare, locations=arrays
        )
    return comparison.errors


def _replay_gradients(
    reader: StoreReader,
    loaded: LoadedModel,
    name: str,
    arrays: _Arrays,
    segment: SegmentPlan,
    index: int,
) -> dict[str, float]:
    """The error of each array of gradients over one sequence, by key."""
    comparison = _Comparison(arrays, segment, index)
    if arrays:
        objective = parse_objective(name)
        vocabulary = loaded.dimensions.vocabulary_size
        targets = DocumentTargets(objective, reader.plans, loaded.tokenizer, vocabulary)
        stream_independent_gradients(
            loaded,
            comparison.token_ids,
            objective,
            targets.of(segment, [index]),
            comparison.compare_gradient,
            locations={*arrays, ActivationLocationType.RESID_POST_MLP},
        )
    return comparison.errors


class _Comparison:
    """Compares a sequence's stored rows with a reference as it comes.

    Args:
        arrays: what is stored.
        segment: the segment.
        index: the sequence as an index into the segment's.
    """

    def __init__(self, arrays: _Arrays, segment: SegmentPlan, index: int) -> None:
        self._arrays = arrays
        self._segment = segment
        self._start = int(segment.first_token[index]) - segment.first_row
        self.token_ids = torch.tensor(segment.sequence_token_ids(index), dtype=torch.int64)[None]
        self._stream = 0.0
        self.errors: dict[str, float] = {}

    def compare(
        self,
        location: ActivationLocationType,
        layer: int | None,
        reference: torch.Tensor,
        *,
        least: float = 0.0,
    ) -> None:
        """Note the worst error of one location and layer, ``(1, token, unit …)``.

        Args:
            location: the location.
            layer: its layer.
            reference: what should be stored.
            least: least magnitude that a row's error is relative to.
        """
        array = self._arrays[location]
        number = self._segment.number
        error = _error(array, number, layer or 0, self._start, reference[0].detach(), least)
        self.errors[array.spec.key] = max(self.errors.get(array.spec.key, 0.0), error)

    def compare_gradient(
        self, location: ActivationLocationType, layer: int | None, reference: torch.Tensor
    ) -> None:
        """The same of a gradient; that of the last residual stream comes before all others."""
        largest = float(reference.abs().max())
        if location is ActivationLocationType.RESID_POST_MLP:
            self._stream = max(self._stream, largest)
        if largest <= _NO_GRADIENT * self._stream:
            largest = self._stream
        if location in self._arrays:
            self.compare(location, layer, reference, least=_GRADIENT_FLOOR * largest)


def _error(
    array: StoredArray,
    segment: int,
    layer: int,
    start: int,
    reference: torch.Tensor,
    least: float,
) -> float:
    """The worst relative error of the rows from ``start`` on against ``(token, unit …)``."""
    tokens = len(reference)
    worst = 0.0
    least = max(least, float(np.finfo(np.float32).tiny))
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
        scale = np.maximum(np.abs(expected).max(1), least)
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
