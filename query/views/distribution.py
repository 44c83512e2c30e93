"""How the values of one unit are spread over the rows."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from actstore.query.views.charts import Drawing, can_draw, draw_distribution
from actstore.query.views.text import number
from actstore.store.histograms import Histogram

__all__ = ["BINS", "Distribution"]

BINS = 48
"""Bars that fit a page's width and can still be told apart."""


@dataclass(frozen=True)
class Distribution:
    """A histogram.

    Attributes:
        edges: of the bins, ascending; one more than there are counts.
        counts: rows of each bin; the last one holds its upper edge too.
        not_finite: values that are NaN or infinite, in no bin.
        is_estimated: whether wider bins than these were counted and shared out.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    not_finite: int = 0
    is_estimated: bool = False

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.edges)} edges for {len(self.counts)} counts.")

    @classmethod
    def of_values(cls, values: npt.NDArray[np.floating]) -> Self:
        """The distribution of some values.

        Zero is an edge where values lie on both sides of it, so that no bar mixes signs.
        """
        finite = values[np.isfinite(values)].astype(np.float64)
        lost = len(values) - len(finite)
        if not len(finite):
            return cls((0.0, 1.0), (0,), lost)
        low, high = float(finite.min()), float(finite.max())
        if low == high:
            return cls((low, low + (abs(low) or 1.0) * 1e-6), (len(finite),), lost)
        edges = np.linspace(low, high, BINS + 1)
        if low < 0 < high:
            below = min(max(round(BINS * -low / (high - low)), 1), BINS - 1)
            edges = np.concatenate(
                [np.linspace(low, 0, below + 1)[:-1], np.linspace(0, high, BINS - below + 1)]
            )
        counts, _ = np.histogram(finite, edges)
        return cls(tuple(edges.tolist()), tuple(counts.tolist()), lost)

    @classmethod
    def of_histogram(cls, found: Histogram) -> Self:
        """A kept histogram in bins of equal width."""
        if not found.total:
            return cls((0.0, 1.0), (0,), found.nan)
        shown = found.rebinned(BINS)
        # Rounded sums, not counts: so no row is lost, and none is counted twice.
        sums = np.rint(np.cumsum(shown.counts)).astype(np.int64)
        counts = tuple(np.diff(sums, prepend=0).tolist())
        return cls(tuple(shown.edges.tolist()), counts, found.nan, is_estimated=True)

    @property
    def total(self) -> int:
        """Values in bins."""
        return sum(self.counts)

    def drawing(self, title: str) -> Drawing:
        """The histogram as a chart, and as a table of its bins that hold rows.

        Args:
            title: of the values' axis.
        """
        bins = zip(self.edges, self.edges[1:], self.counts, strict=False)
        rows = tuple((number(a), number(b), f"{n:,}") for a, b, n in bins if n)
        svg = draw_distribution(self, title) if can_draw() else ""
        return Drawing(svg, f"Histogram of {title}", ("from", "to", "rows"), rows)
