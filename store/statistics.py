"""Mergeable statistics of units: counts and the first four central moments.

Pages are summarised in float32 relative to their own mean, then joined in float64 with
the update of Chan and Pébay (Pébay 2008, SAND2008-6212, eqs. 1.4, 2.1 and 3.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.layout import PAGE_ROWS

__all__ = ["UnitStatistics", "join_moments", "merge_moments", "page_moments"]

_LANES = 16


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
    values: npt.NDArray[np.float32],
    left_out: npt.NDArray[np.int64],
    missing: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.float64]:
    """Mean, M2, M3 and M4 of every page and unit.

    Args:
        values: ``(row, unit)``, whole pages; overwritten.
        left_out: rows that do not count.
        missing: ``(row, unit)``, values that do not count; None where there are none.

    Returns:
        float64 ``(page, unit, 4)``; zeros for a page without a value.
    """
    rows, units = values.shape
    kept = np.ones(rows)
    kept[left_out] = 0
    count = np.repeat(kept.reshape(-1, PAGE_ROWS).sum(1)[:, None], units, axis=1)
    values[left_out] = 0
    if missing is not None:
        values[missing] = 0
        count -= missing.reshape(-1, PAGE_ROWS, units).sum(1)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = _page_sums(values, np.float64) / np.maximum(count, 1)
        about = mean.astype(np.float32)
        # Sixteen rows side by side: long inner loops, where the units alone are too few.
        lanes = values.reshape(len(mean), -1, _LANES * units)
        lanes -= np.tile(about, (1, _LANES))[:, None]
        values[left_out] = 0
        if missing is not None:
            values[missing] = 0
        squared = values * values
        s2 = _page_sums(squared, np.float32)
        values *= squared
        s3 = _page_sums(values, np.float32)
        squared *= squared
        s4 = _page_sums(squared, np.float32)
        # Moments about the rounded mean, moved to the mean itself.
        shift = mean - about
        m2 = s2 - count * shift**2
        m3 = s3 - 3 * shift * s2 + 2 * count * shift**3
        m4 = s4 - 4 * shift * s3 + 6 * shift**2 * s2 - 3 * count * shift**4
    return np.stack([mean, m2, m3, m4], axis=2)


def _page_sums(values: npt.NDArray[np.float32], first: type) -> npt.NDArray[np.float64]:
    """float64 sums ``(page, unit)`` of ``(row, unit)``, the first 8 addends in ``first``.

    Eight float32 additions lose at most 7 * 2**-24 of the sum of magnitudes. The order of all
    additions is fixed, so the sums do not depend on the processor.
    """
    rows, units = values.shape
    pages = rows // PAGE_ROWS
    partial = values.reshape(pages, 8, -1).sum(1, dtype=first)
    total: npt.NDArray[np.float64] = partial.reshape(pages, -1, units).sum(1, dtype=np.float64)
    return total


def join_moments(
    moments: npt.NDArray[np.float64], count: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Moments ``(unit, 4)`` of disjoint samples ``(sample, unit, 4)`` together.

    Moments about each sample's mean, moved to the common one and added (Pébay 2008, eq. 2.1).

    Args:
        moments: mean, M2, M3, M4 of each sample.
        count: values of each, ``(sample, unit)``.
    """
    mean, m2, m3, m4 = np.moveaxis(moments, 2, 0)
    n = count.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        common = (n * mean).sum(0) / np.maximum(n.sum(0), 1)
        delta = mean - common
        square = delta * delta
        return np.stack(
            [
                common,
                (m2 + n * square).sum(0),
                (m3 + delta * (3 * m2 + n * square)).sum(0),
                (m4 + delta * (4 * m3) + square * (6 * m2 + n * square)).sum(0),
            ],
            axis=1,
        )


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
