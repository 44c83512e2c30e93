"""Deriving every scalar for a thousand sequences: from the store, and by running the model.

Both sides end with the same tensors, sequence by sequence and layer by layer, by the same
formulas; the store's side reads and reconstructs, the other runs the model over batches of
sixteen sequences, forward or forward and backward, and records what the scalar needs.
Peaks are of the resident memory above what the process held before, scalar by scalar.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

import actstore
from actstore.ingest.live_pass import run_pass
from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import NextTokenLogProb
from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.derived.evaluation import RawValues, evaluate, layers_of
from actstore.query.derived.registry import inputs_of, requires_gradient
from actstore.query.pass_values import PassValues
from actstore.query.session import Store
from actstore.store.vocabulary import ActivationLocationType
from benchmarks.harness import Options, Ratio, Result, Timing, measured_peak, scratch
from benchmarks.models import demo_model

FULL_SIZE = 1000
_LENGTH = 64
_BATCH = 16


def run(size: int, options: Options | None = None) -> Result:
    """Time and weigh every scalar that needs no node and no autoencoder.

    Args:
        size: sequences of 64 tokens.
        options: seed and threads; the defaults when None.
    """
    options = options or Options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded, name = demo_model()
    rng = np.random.default_rng(options.seed)
    vocabulary = loaded.dimensions.vocabulary_size
    sequences = rng.integers(1, vocabulary, (size, _LENGTH)).tolist()
    timings, ratios, peaks = [], [], {}
    with scratch() as folder:
        store = actstore.ingest(
            (loaded.model, None),
            sequences,
            folder / "store",
            locations="attention",
            objective="next_token_log_prob",
            context=_LENGTH,
        )
        for scalar in _plain_scalars(loaded):
            # The first sequence of each side pays for what is made once.
            _consume(scalar, _stored(store, 1))
            _consume(scalar, _rerun(loaded, scalar, sequences[:1]))
            _, read, read_peak = measured_peak(partial(_consume_stored, scalar, store, size))
            _, ran, ran_peak = measured_peak(partial(_consume_rerun, scalar, loaded, sequences))
            for side, seconds in (("store", read), ("model", ran)):
                label = f"{scalar.name}, {side}"
                timings.append(Timing(label, (seconds,), size, "sequences"))
            ratios.append(
                Ratio(f"{scalar.name}: store / model", read / ran, read / ran, read / ran)
            )
            peaks[f"{scalar.name}: peak MB, store / model"] = (
                f"{read_peak / 1e6:.0f} / {ran_peak / 1e6:.0f}"
            )
        held = sum(entry.bytes for entry in store.info().locations.values())
    every = sorted(ratio.value for ratio in ratios)
    facts = {
        "scalars": len(ratios),
        "median ratio": float(np.median(every)),
        "stored MB": held / 1e6,
        **peaks,
    }
    parameters = {"model": name, "sequences": size, "tokens each": _LENGTH, "batch": _BATCH}
    return Result("derive", size, parameters, tuple(timings), tuple(ratios), facts)


def _plain_scalars(loaded: LoadedModel) -> list[DerivedScalar]:
    known = set(loaded.architecture.taps) - {_LOGITS}
    return [
        declared
        for declared in SCALARS.values()
        if declared.about is None
        and declared.latents is None
        and all(
            source.of in known
            for source in inputs_of(declared)
            if isinstance(source.of, ActivationLocationType)
        )
    ]


_LOGITS = ActivationLocationType.LOGITS


def _stored(store: Store, count: int) -> Iterator[RawValues]:
    for number in range(count):
        yield store.sources.sequence(store.row_map.sequence(number))


def _rerun(
    loaded: LoadedModel, scalar: DerivedScalar, sequences: list[list[int]]
) -> Iterator[RawValues]:
    objective = NextTokenLogProb() if requires_gradient(scalar) else None
    locations = {
        source.of for source in inputs_of(scalar) if isinstance(source.of, ActivationLocationType)
    }
    # Gradients at the final residual stream, and the stream that enters the first layer.
    locations |= {
        ActivationLocationType.RESID_POST_MLP,
        ActivationLocationType.RESID_POST_EMBEDDING,
    }
    weights = loaded.weights()
    for start in range(0, len(sequences), _BATCH):
        batch = sequences[start : start + _BATCH]
        for one in run_pass(loaded, batch, objective=objective, locations=locations):
            yield PassValues(one.values, weights)


def _consume_stored(scalar: DerivedScalar, store: Store, count: int) -> None:
    _consume(scalar, _stored(store, count))


def _consume_rerun(scalar: DerivedScalar, loaded: LoadedModel, sequences: list[list[int]]) -> None:
    _consume(scalar, _rerun(loaded, scalar, sequences))


def _consume(scalar: DerivedScalar, values: Iterator[RawValues]) -> None:
    for one in values:
        for layer in layers_of(scalar, one.dimensions.n_layers):
            evaluate(scalar, one, layer)
