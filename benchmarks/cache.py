"""The activation cache's memory over a thousand sequences, beside what upstream needs.

Allowed is ``result + intermediate + 32 MiB``: the float32 result, the largest float64 tensor
made of one sequence (its longest layer of neurons, ``tokens x max(d_mlp, d_model) x 8``), and
a constant for what libraries and readers hold. Peaks are of the resident memory above what
the process held before, after one call on one sequence has paid for what is made once.
Upstream stacks ``components x batch x position x d_model`` in float32 and projects that; its
bytes are computed, and neither its model's pass nor its copies are counted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import actstore
from actstore.query.cache import ActivationCache
from benchmarks.harness import Options, Ratio, Result, Timing, measured_peak, scratch
from benchmarks.models import demo_model

FULL_SIZE = 1000
_LENGTH = 64
_CONSTANT = 32 * 2**20
# A peak of nothing still has to be a number above 0.
_PAGE = 4096

_Question = Callable[[ActivationCache], torch.Tensor]


def run(size: int, options: Options | None = None) -> Result:
    """Time and weigh decompositions on one direction, at the last token and at every one.

    Args:
        size: sequences of 64 tokens.
        options: seed and threads; the defaults when None.
    """
    options = options or Options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded, name = demo_model()
    dimensions = loaded.dimensions
    rng = np.random.default_rng(options.seed)
    sequences = rng.integers(1, dimensions.vocabulary_size, (size, _LENGTH)).tolist()
    direction = torch.from_numpy(rng.standard_normal(dimensions.d_model))
    intermediate = _LENGTH * max(dimensions.d_mlp, dimensions.d_model) * 8
    timings, ratios = [], []
    facts: dict[str, Any] = {
        "bound": "result + intermediate + constant",
        "intermediate bytes: tokens x max(d_mlp, d_model) x 8": intermediate,
        "constant bytes": _CONSTANT,
        "upstream": "components x batch x position x d_model x 4 bytes, computed",
    }
    with scratch() as folder:
        store = actstore.ingest(
            (loaded.model, None), sequences, folder / "store", locations="neurons", context=_LENGTH
        )
        for label, ask in _questions(direction).items():
            ask(store.cache([0]))
            answer, seconds, peak = measured_peak(partial(ask, store.cache()))
            assert isinstance(answer, torch.Tensor)
            shape = tuple(answer.shape)
            del answer
            result = 4 * int(np.prod(shape))
            bound = result + intermediate + _CONSTANT
            positions = 1 if "last token" in label else _LENGTH
            upstream = shape[0] * size * positions * dimensions.d_model * 4
            timings.append(Timing(label, (seconds,), size, "sequences"))
            over = max(peak, _PAGE) / bound
            ratios.append(Ratio(f"{label}: peak / bound", over, over, over, aim=1.0))
            facts |= {
                f"{label}: shape": list(shape),
                f"{label}: peak MB": peak / 1e6,
                f"{label}: result MB": result / 1e6,
                f"{label}: bound MB": bound / 1e6,
                f"{label}: upstream MB": upstream / 1e6,
                f"{label}: under its bound": "yes" if peak <= bound else "no",
            }
    parameters = {"model": name, "sequences": size, "tokens each": _LENGTH, "directions": 1}
    return Result("cache", size, parameters, tuple(timings), tuple(ratios), facts)


def _questions(direction: torch.Tensor) -> dict[str, _Question]:
    found: dict[str, _Question] = {}
    for where, position in (("last token", -1), ("every position", None)):
        found[f"full decomposition, {where}"] = partial(_decomposition, direction, position)
        found[f"neurons, {where}"] = partial(_neurons, direction, position)
    found["accumulated_resid, last token"] = _accumulated
    return found


def _decomposition(
    direction: torch.Tensor, position: int | None, cache: ActivationCache
) -> torch.Tensor:
    found = cache.get_full_resid_decomposition(pos_slice=position, project_output_onto=direction)
    assert isinstance(found, torch.Tensor)
    return found


def _neurons(direction: torch.Tensor, position: int | None, cache: ActivationCache) -> torch.Tensor:
    found = cache.stack_neuron_results(None, pos_slice=position, project_output_onto=direction)
    assert isinstance(found, torch.Tensor)
    return found


def _accumulated(cache: ActivationCache) -> torch.Tensor:
    found = cache.accumulated_resid(pos_slice=-1)
    assert isinstance(found, torch.Tensor)
    return found
