"""Mergeable statistics of units: counts and the first four central moments.

Pages are summarised in float32 relative to their own mean, then merged in float64 with
the pairwise update of Chan and Pébay (Pébay 2008, SAND2008-6212, eqs. 1.4 and 3.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.layout import PAGE_ROWS

__all__ = ["UnitStatistics", "merge_moments", "page_moments"]


@dataclass(frozen=True)
class UnitStatistics:
    """Statistics over ordinary rows; every array is ``(unit,)``.

    Attributes:
        count: values, NaN excluded.
        positive: values greater than zero.
        nan: NaN values.
        mean, variance, skewness, kurtosis: population moments (kurtosis is 3 for a normal
            distribution); NaN where they are undefined.
    """

    count: npt.NDArray[np.int64]
    positive: npt.NDArray[np.int64]
    nan: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    skewness: npt.NDArray[np.float64]
    kurtosis: npt.NDArray[np.float64]

    @classmethod
    def from_moments(
        cls, moments: npt.NDArray[np.float64], counts: npt.NDArray[Any]
    ) -> "UnitStatistics":
        """Statistics of merged ``moments (unit, 4)`` and ``counts (unit, 3)``."""
        count = counts[:, 0].astype(np.int64)
        mean, m2, m3, m4 = moments.T
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = m2 / count
            skewness = np.sqrt(count) * m3 / m2**1.5
            kurtosis = count * m4 / m2**2
        return cls(
            count=count,
            positive=counts[:, 1].astype(np.int64),
            nan=counts[:, 2].astype(np.int64),
            mean=np.where(count > 0, mean, np.nan),
            variance=variance,
            skewness=np.where(m2 > 0, skewness, np.nan),
            kurtosis=np.where(m2 > 0, kurtosis, np.nan),
        )


def page_moments(
    values: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Mean, M2, M3 and M4 of every unit over the usable rows.

    Args:
        values: ``(row, unit)``.
        usable: ``(row,)``, or ``(row, unit)`` where units lose different rows to NaN.

    Returns:
        float64 ``(unit, 4)``.
    """
    units = values.shape[1]
    total = np.zeros((units, 4))
    count = np.zeros(units)
    for start in range(0, len(values), PAGE_ROWS):
        page, mask = values[start : start + PAGE_ROWS], usable[start : start + PAGE_ROWS]
        part, part_count = _moments(page[mask], None) if mask.ndim == 1 else _moments(page, mask)
        total, count = merge_moments(total, count, part, part_count)
    return total


def _moments(
    values: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    units = values.shape[1]
    if mask is None:
        count = np.full(units, float(len(values)))
        weights: Any = np.float32(1)
    else:
        count = mask.sum(0).astype(np.float64)
        weights = mask.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean = np.where(count > 0, (values * weights).sum(0, dtype=np.float64) / count, 0.0)
        centred = (values - mean.astype(np.float32)) * weights
        squared = centred * centred
        shift = mean - mean.astype(np.float32)
        # Moments about the rounded mean, moved to the mean itself.
        s2 = squared.sum(0, dtype=np.float64)
        s3 = (squared * centred).sum(0, dtype=np.float64)
        s4 = (squared * squared).sum(0, dtype=np.float64)
        m2 = s2 - count * shift**2
        m3 = s3 - 3 * shift * s2 + 2 * count * shift**3
        m4 = s4 - 4 * shift * s3 + 6 * shift**2 * s2 - 3 * count * shift**4
    return np.stack([mean, m2, m3, m4], axis=1), count


def merge_moments(
    left: npt.NDArray[np.float64],
    left_count: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
    right_count: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Moments ``(unit, 4)`` and counts ``(unit,)`` of two disjoint samples together."""
    count = left_count + right_count
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        delta = right[:, 0] - left[:, 0]
        share = np.where(count > 0, right_count / count, 0.0)
        mean = left[:, 0] + delta * share
        product = left_count * right_count
        m2 = left[:, 1] + right[:, 1] + np.where(count > 0, delta**2 * product / count, 0.0)
        m3 = (
            left[:, 2]
            + right[:, 2]
            + np.where(count > 0, delta**3 * product * (left_count - right_count) / count**2, 0.0)
            + np.where(
                count > 0,
                3 * delta * (left_count * right[:, 1] - right_count * left[:, 1]) / count,
                0,
            )
        )
        m4 = (
            left[:, 3]
            + right[:, 3]
            + np.where(
                count > 0,
                delta**4 * product * (left_count**2 - product + right_count**2) / count**3,
                0.0,
            )
            + np.where(
                count > 0,
                6
                * delta**2
                * (left_count**2 * right[:, 1] + right_count**2 * left[:, 1])
                / count**2,
                0.0,
            )
            + np.where(
                count > 0,
                4 * delta * (left_count * right[:, 2] - right_count * left[:, 2]) / count,
                0,
            )
        )
    return np.stack([mean, m2, m3, m4], axis=1), count
