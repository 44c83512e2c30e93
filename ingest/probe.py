"""Which dtype each location is stored in: measured on a fixed sample, then written down."""

import math
from collections.abc import Sequence

import torch

from actstore.ingest.capture import Capture
from actstore.ingest.model import LoadedModel
from actstore.ingest.settings import IngestSettings
from actstore.store.layout import ArraySpec, StoredDtype
from actstore.store.plan import Plan
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["PROBE_LIMIT", "array_specs", "choose_dtypes", "largest_values"]

PROBE_LIMIT = 8192.0
"""Largest magnitude of the sample that float16 is trusted with: 1/8 of its range."""

PROBE_SEQUENCES = 64


def choose_dtypes(
    loaded: LoadedModel, settings: IngestSettings, plan: Plan
) -> dict[ActivationLocationType, StoredDtype]:
    """The dtype of every chosen location.

    A bfloat16 model's values are kept bit-exact. Else float16 where the first 64 sequences
    of the plan stay below 8192, float32 where they do not; the caller's own choice first.
    """
    rule, exceptions = settings.dtype_rules
    chosen = settings.chosen
    if rule != "auto":
        return {place: exceptions.get(place, StoredDtype(rule)) for place in chosen}
    if loaded.dtype is torch.bfloat16:
        return {place: exceptions.get(place, StoredDtype.BFLOAT16) for place in chosen}
    open_places = [place for place in chosen if place not in exceptions]
    largest = largest_values(loaded, open_places, plan) if open_places else {}
    return {
        place: exceptions[place]
        if place in exceptions
        else (StoredDtype.FLOAT16 if largest[place] < PROBE_LIMIT else StoredDtype.FLOAT32)
        for place in chosen
    }


def largest_values(
    loaded: LoadedModel, locations: Sequence[ActivationLocationType], plan: Plan
) -> dict[ActivationLocationType, float]:
    """The largest magnitude of each location over the probe's sequences; NaN counts as inf."""
    largest = dict.fromkeys(locations, 0.0)
    segment = plan.segment(plan.first_segment)

    def sink(location: ActivationLocationType, layer: int | None, tensor: torch.Tensor) -> None:
        magnitude = tensor.detach().abs()
        if location.is_pair_shaped:
            # Scores ahead of the diagonal are minus infinity by design.
            magnitude = magnitude.nan_to_num(nan=torch.inf).masked_fill(tensor == -torch.inf, 0)
        value = float(magnitude.max())
        largest[location] = max(largest[location], float("inf") if math.isnan(value) else value)

    with Capture(loaded, locations) as capture:
        for index in range(min(PROBE_SEQUENCES, segment.n_sequences)):
            ids = torch.tensor(segment.sequence_token_ids(index)[None], dtype=torch.int64)
            capture.stream(ids, sink)
    return largest


def array_specs(
    loaded: LoadedModel,
    dtypes: dict[ActivationLocationType, StoredDtype],
    segment_rows: int,
    context: int,
    gradients: Sequence[ActivationLocationType] = (),
    objective: str | None = None,
) -> tuple[ArraySpec, ...]:
    """The arrays of a set, values before gradients, in the order of the locations.

    Args:
        loaded: the model.
        dtypes: location -> dtype of its values.
        segment_rows: S of the store.
        context: where the attended axis of pairs ends.
        gradients: locations whose gradients are kept, as float32.
        objective: name of what they are the gradients of.
    """
    dimensions = loaded.dimensions
    kinds = [(location, PassType.FORWARD, dtype) for location, dtype in dtypes.items()]
    kinds += [(location, PassType.BACKWARD, StoredDtype.FLOAT32) for location in gradients]
    return tuple(
        ArraySpec(
            location=location,
            pass_type=pass_type,
            layers=dimensions.n_layers if location.has_layers else None,
            unit_shape=dimensions.unit_shape(location, context),
            dtype=dtype,
            segment_rows=segment_rows,
            objective=objective if pass_type is PassType.BACKWARD else None,
        )
        for location, pass_type, dtype in kinds
    )
