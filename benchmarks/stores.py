"""Stores of chosen values for the benchmarks, written by the code that ingest uses."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# The builder is the tests' own: one way to make a store from values is enough.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from store_builder import build_store

__all__ = [
    "activations",
    "build_store",
    "document_columns",
    "residuals",
    "write_activations",
    "write_gradients",
]

SEGMENT_ROWS = 16384
CONTEXT = 1024
PARTS = 100
"""Documents carry a column ``part``, 0 to 99 in turn, for predicates of known selectivity."""

_PIECE = 2**16
_WRITTEN_ROWS = 4096


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


def write_activations(path: Path, rows: int, neurons: int, seed: int) -> None:
    """A file of activations like :func:`activations`' own, float16 ``(row, neuron)``.

    Made and written in pieces of 4096 rows, so of any length in little memory: about 10 ns
    a value.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(neurons, generator=generator).exp_()

    def piece(count: int) -> torch.Tensor:
        drive = torch.randn(count, neurons, generator=generator).sub_(0.8)
        bursts = drive.numel() // 2000
        row = torch.randint(count, (bursts,), generator=generator)
        neuron = torch.randint(neurons, (bursts,), generator=generator)
        height = torch.empty(bursts).exponential_(1 / 3, generator=generator)
        for step in range(4):
            at = ((row + step).clamp_(max=count - 1), neuron)
            drive.index_put_(at, height / (step + 1), accumulate=True)
        return torch.sigmoid(drive * 1.702).mul_(drive).mul_(scale)

    _write_pieces(path, rows, piece)


def write_gradients(path: Path, rows: int, neurons: int, seed: int) -> None:
    """A file of gradients, float16 ``(row, neuron)``: normal, at a scale of each row's own."""
    generator = torch.Generator().manual_seed(seed)

    def piece(count: int) -> torch.Tensor:
        scale = torch.randn(count, 1, generator=generator).exp_()
        return torch.randn(count, neurons, generator=generator).mul_(scale)

    _write_pieces(path, rows, piece)


def _write_pieces(path: Path, rows: int, piece: Callable[[int], torch.Tensor]) -> None:
    with open(path, "xb", buffering=0) as file:
        for start in range(0, rows, _WRITTEN_ROWS):
            values = piece(min(_WRITTEN_ROWS, rows - start)).to(torch.float16)
            file.write(values.numpy().reshape(-1).view(np.uint8).data)
