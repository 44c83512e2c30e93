"""Stores of chosen values for the benchmarks, written by the code that ingest uses."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The builder is the tests' own: one way to make a store from values is enough.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from store_builder import build_store

__all__ = ["activations", "build_store", "document_columns", "residuals"]

SEGMENT_ROWS = 16384
CONTEXT = 1024
PARTS = 100
"""Documents carry a column ``part``, 0 to 99 in turn, for predicates of known selectivity."""

_PIECE = 2**16


def document_columns(documents: int) -> Sequence[Mapping[str, Any]]:
    """The caller's columns of every document."""
    return [{"part": number % PARTS} for number in range(documents)]


def residuals(rows: int, width: int, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Normal values ``(layer, row, column)`` with a scale of each column's own; one layer."""
    scale = np.exp(rng.standard_normal(width)).astype(np.float32)
    values = np.empty((1, rows, width), np.float16)
    for start in range(0, rows, _PIECE):
        stop = min(start + _PIECE, rows)
        values[0, start:stop] = rng.standard_normal((stop - start, width), np.float32) * scale
    return values


def activations(rows: int, neurons: int, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Synthetic MLP activations ``(layer, row, neuron)``: heavy tails, one layer.

    GELU's sigmoid approximation of normal noise plus bursts, which are short runs of tokens
    with exponential heights, times a lognormal scale of each neuron's own.
    """
    scale = np.exp(rng.standard_normal(neurons)).astype(np.float32)
    values = np.empty((1, rows, neurons), np.float16)
    for start in range(0, rows, _PIECE):
        stop = min(start + _PIECE, rows)
        drive = rng.standard_normal((stop - start, neurons), np.float32)
        drive -= np.float32(0.8)
        bursts = drive.size // 2000
        row, neuron = rng.integers(0, stop - start, bursts), rng.integers(0, neurons, bursts)
        height = rng.exponential(3.0, bursts).astype(np.float32)
        for step in range(4):
            drive[np.minimum(row + step, stop - start - 1), neuron] += height / (step + 1)
        values[0, start:stop] = drive / (1 + np.exp(np.float32(-1.702) * drive)) * scale
    return values
