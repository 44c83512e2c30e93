"""Mergeable statistics of units: counts and the first four central moments.

Blocks of rows are summarised in float32 relative to their own mean, then joined in float64
with the update of Chan and Pébay (Pébay 2008, SAND2008-6212, eqs. 1.4, 2.1 and 3.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "BlockSums",
    "UnitStatistics",
    "central_moments",
    "join_moments",
    "merge_moments",
]

_LANES = 256
"""Rows worked on side by side: long inner loops, where the units alone are too few."""

_FIRST = 16
"""Addends of the first sums, which are float32."""


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


class BlockSums:
    """Sums of powers over blocks of rows, about a number near every unit's mean.

    Holds the buffers that every block needs: memory that stays in the processor's cache.

    Args:
        rows: of the largest block; whole pages.
        units: of every block.
    """

    def __init__(self, rows: int, units: int) -> None:
        self.values = np.empty((rows, units), np.float32)
        self._powers = np.empty((rows, units), np.float32)
        self._narrow = np.empty((3, rows * units // _FIRST), np.float32)
        self._wide = np.empty((4, rows * units // _FIRST))

    def add(
        self,
        rows: int,
        left_out: npt.NDArray[np.int64],
        missing: npt.NDArray[np.bool_] | None,
        sums: npt.NDArray[np.float64],
    ) -> None:
        """Sum the block in the first rows of ``values``; those are overwritten.

        Sixteen float32 additions lose at most 15 * 2**-24 of the sum of magnitudes; the others,
        and those of the values themselves, are float64. The order of all additions is
        fixed, so the sums do not depend on the processor.

        Args:
            rows: of the block; whole pages.
            left_out: rows that do not count.
            missing: ``(row, unit)``, values that do not count; None where there are none.
            sums: filled with ``(5, unit)``: the number, the sum, and the sums of the second to
                fourth power about the number.
        """
        values, powers = self.values[:rows], self._powers[:rows]
        units = values.shape[1]
        length = rows * units // _FIRST
        narrow, wide = self._narrow[:, :length], self._wide[:, :length]
        count: Any = rows - len(left_out)
        values[left_out] = 0
        if missing is not None:
            values[missing] = 0
            count = count - missing.sum(0)
        parts = values.reshape(_FIRST, length)
        np.add.reduce(parts, axis=0, dtype=np.float64, out=wide[0])
        sums[1] = _fold_sums(wide[:1], units)
        about = (sums[1] / np.maximum(count, 1)).astype(np.float32)
        sums[0] = about
        lanes = values.reshape(-1, _LANES * units)
        lanes -= np.repeat(about[None], _LANES, axis=0).reshape(-1)
        values[left_out] = 0
        if missing is not None:
            values[missing] = 0
        raised = powers.reshape(_FIRST, length)
        np.multiply(values, values, out=powers)
        np.add.reduce(raised, axis=0, out=narrow[0])
        values *= powers
        np.add.reduce(parts, axis=0, out=narrow[1])
        powers *= powers
        np.add.reduce(raised, axis=0, out=narrow[2])
        wide[1:] = narrow
        sums[2:] = _fold_sums(wide[1:], units)


def _fold_sums(partial: npt.NDArray[np.float64], units: int) -> npt.NDArray[np.float64]:
    """``(power, unit)`` sums of ``(power, row, unit)``, whose rows are a multiple of 32."""
    powers = len(partial)
    # Long rows add fastest.
    partial = np.add.reduce(partial.reshape(powers, 8, -1), axis=1)
    total: npt.NDArray[np.float64] = np.add.reduce(partial.reshape(powers, -1, units), axis=1)
    return total


def central_moments(
    sums: npt.NDArray[np.float64], count: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Mean, M2, M3 and M4 ``(block, unit, 4)`` from :meth:`BlockSums.add`.

    Args:
        sums: ``(block, 5, unit)``.
        count: values, ``(block, unit)``; a unit without one has zeros.
    """
    about, total, s2, s3, s4 = np.moveaxis(sums, 1, 0)
    n = count.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = total / np.maximum(n, 1)
        # Moments about the rounded mean, moved to the mean itself.
        shift = mean - about
        m2 = s2 - n * shift**2
        m3 = s3 - 3 * shift * s2 + 2 * n * shift**3
        m4 = s4 - 4 * shift * s3 + 6 * shift**2 * s2 - 3 * n * shift**4
    return np.stack([mean, m2, m3, m4], axis=2)


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
