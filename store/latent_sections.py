"""The sections of a segment's latents: both orders of the non-zero ones, and their summary.

A segment's file is a checked file (``store.sections``) with both orders of the same
numbers, so that a token's latents and a latent's rows are each a few blocks:

==================  ==============  ====================================================
section             shape           meaning
==================  ==============  ====================================================
``token_offsets``   (row + 1,)      where each row's entries begin
``token_latents``   (entry,)        latents, ascending within a row
``token_values``    (entry,)        float32
``latent_offsets``  (latent + 1,)   where each latent's entries begin
``latent_rows``     (entry,)        rows in the segment, ascending within a latent
``latent_values``   (entry,)        float32
``extremes``        (latent, 4)     max and min of the non-zero values of ordinary, then
                                    special rows; minus and plus infinity for none
``counts``          (latent, 3)     ordinary rows that are not zero, that are above zero;
                                    special rows that are not zero
``moments``         (latent, 4)     mean, M2, M3, M4 over all ordinary rows, zeros included
``top_rows``,       (listed,)       up to 8 of the greatest values above zero of each
``top_values``                      latent over ordinary rows, one latent after another
``low_rows``,       (listed,)       the least values below zero, likewise
``low_values``
==================  ==============  ====================================================

What is not there is zero: 0.0, whatever the sign of the zero that was computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LIST_LENGTH", "STATISTICS", "SegmentLatents", "latent_sections"]

LIST_LENGTH = 8
"""Entries per latent and tail that a segment's lists keep."""

STATISTICS = ("extremes", "counts", "moments", "top_rows", "top_values", "low_rows", "low_values")
"""The sections that summarise a segment."""


@dataclass(frozen=True)
class SegmentLatents:
    """The non-zero latents of one layer of a segment, by token.

    Attributes:
        offsets: where each row's entries begin, int64 ``(row + 1,)``.
        latents: uint32 ``(entry,)``, ascending within a row.
        values: float32 ``(entry,)``, not zero.
        n_latents: latents of the autoencoder.
    """

    offsets: npt.NDArray[np.int64]
    latents: npt.NDArray[np.uint32]
    values: npt.NDArray[np.float32]
    n_latents: int

    @classmethod
    def of(cls, window: npt.NDArray[np.float32]) -> "SegmentLatents":
        """The non-zero values of a dense window ``(row, latent)``."""
        rows, latents = np.nonzero(window)
        offsets = np.searchsorted(rows, np.arange(len(window) + 1))
        return cls(
            offsets.astype(np.int64),
            latents.astype(np.uint32),
            window[rows, latents],
            window.shape[1],
        )

    @classmethod
    def join(cls, parts: Sequence["SegmentLatents"]) -> "SegmentLatents":
        """Windows one after another; at least one."""
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            np.concatenate([np.zeros(1, np.int64), *offsets]),
            np.concatenate([part.latents for part in parts]),
            np.concatenate([part.values for part in parts]),
            parts[0].n_latents,
        )


def latent_sections(
    found: SegmentLatents, special: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    """The sections of a segment's file.

    Args:
        found: the latents.
        special: ``(row,)``; such rows are summarised apart.
    """
    rows = np.repeat(np.arange(len(found.offsets) - 1, dtype=np.uint32), np.diff(found.offsets))
    # Stable: within a latent the rows stay ascending.
    order = np.argsort(found.latents, kind="stable")
    latents, rows, values = found.latents[order], rows[order], found.values[order]
    offset = np.dtype("<u4" if len(values) < 2**32 else "<u8")
    per_latent = np.bincount(latents, minlength=found.n_latents)
    latent_offsets = np.zeros(found.n_latents + 1, offset)
    np.cumsum(per_latent, out=latent_offsets[1:])
    return {
        "token_offsets": found.offsets.astype(offset),
        "token_latents": found.latents.astype("<u4"),
        "token_values": found.values.astype("<f4"),
        "latent_offsets": latent_offsets,
        "latent_rows": rows.astype("<u4"),
        "latent_values": values.astype("<f4"),
        **_summary(latents, rows, values, found.n_latents, special),
    }


def _summary(
    latents: npt.NDArray[np.uint32],
    rows: npt.NDArray[np.uint32],
    values: npt.NDArray[np.float32],
    n_latents: int,
    special: npt.NDArray[np.bool_],
) -> dict[str, npt.NDArray[Any]]:
    """Statistics and lists of entries in the order of their latents, then rows."""
    is_special = special[rows]
    extremes = np.empty((n_latents, 4), "<f4")
    counts = np.zeros((n_latents, 3), "<u4")
    for number, chosen in enumerate((~is_special, is_special)):
        which, some = latents[chosen], values[chosen]
        high = np.full(n_latents, -np.inf, np.float32)
        low = np.full(n_latents, np.inf, np.float32)
        np.maximum.at(high, which, some)
        np.minimum.at(low, which, some)
        extremes[:, 2 * number], extremes[:, 2 * number + 1] = high, low
        counts[:, 2 * number] = np.bincount(which, minlength=n_latents)
    ordinary = ~is_special
    latents, rows, values = latents[ordinary], rows[ordinary], values[ordinary]
    counts[:, 1] = np.bincount(latents[values > 0], minlength=n_latents)
    sections: dict[str, npt.NDArray[Any]] = {
        "extremes": extremes,
        "counts": counts,
        "moments": _moments(latents, values, n_latents, int((~special).sum())),
    }
    for tail, sign in (("top", np.float32(1)), ("low", np.float32(-1))):
        listed = np.flatnonzero(sign * values > 0)
        # Stable, so that equal values stay in the order of their rows.
        listed = listed[np.lexsort((-sign * values[listed], latents[listed]))]
        which = latents[listed]
        first = np.searchsorted(which, which, side="left")
        kept = listed[np.arange(len(listed)) - first < LIST_LENGTH]
        sections[f"{tail}_rows"] = rows[kept].astype("<u4")
        sections[f"{tail}_values"] = values[kept].astype("<f4")
    return sections


def _moments(
    latents: npt.NDArray[np.uint32],
    values: npt.NDArray[np.float32],
    n_latents: int,
    rows: int,
) -> npt.NDArray[np.float64]:
    """Mean, M2, M3, M4 ``(latent, 4)`` over ``rows`` rows, of which the absent ones are zero."""
    wide = values.astype(np.float64)
    absent = rows - np.bincount(latents, minlength=n_latents)
    mean = np.bincount(latents, wide, n_latents) / max(rows, 1)
    delta = wide - mean[latents]
    sums = [
        np.bincount(latents, delta**power, n_latents) + absent * (-mean) ** power
        for power in (2, 3, 4)
    ]
    return np.stack([mean, *sums], axis=1)
