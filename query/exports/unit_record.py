"""What the exports of neuron pages say of one unit, gathered once for every schema."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived import DerivedScalar
from actstore.query.examples import Example, Kind, examples, unit_values
from actstore.query.neuron import LogitToken, neuron
from actstore.query.statistics import UnitSummary, unit_summary
from actstore.store.histograms import Histogram
from actstore.store.statistics import UnitStatistics
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["Bars", "ExportChoice", "Moments", "UnitReader", "UnitRecord"]

_BINS = 50


@dataclass(frozen=True)
class ExportChoice:
    """What of each unit is written.

    Attributes:
        top: examples with the greatest values.
        random: examples drawn uniformly.
        bottom: examples with the least values, where the schema has a place for them.
        quantiles: examples from the middle of equal shares of the ranking, where the schema
            has a place for them.
        window: tokens before and after each example's own.
        seed: of the random draw.
    """

    top: int = 20
    random: int = 20
    bottom: int = 5
    quantiles: int = 5
    window: tuple[int, int] = (32, 31)
    seed: int = 0


@dataclass(frozen=True)
class Moments:
    """Population moments over the ordinary rows; None where they are undefined.

    Kurtosis is 3 for a normal distribution.
    """

    mean: float | None
    variance: float | None
    skewness: float | None
    kurtosis: float | None

    @classmethod
    def of(cls, found: UnitSummary) -> "Moments":
        """Those that the store has."""
        return cls(found.mean, found.variance, found.skewness, found.kurtosis)

    @classmethod
    def of_values(cls, values: npt.NDArray[np.float32]) -> "Moments":
        """Those of values ``(row,)`` without NaN, in float64, by the store's own formulas."""
        wide = values.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = float(wide.mean()) if len(wide) else 0.0
            sums = [mean, *(float(((wide - mean) ** power).sum()) for power in (2, 3, 4))]
        counts = np.array([[len(wide), int((wide > 0).sum()), 0]])
        found = UnitStatistics.from_moments(np.array([sums]), counts)
        numbers = (found.mean, found.variance, found.skewness, found.kurtosis)
        return cls(*(None if np.isnan(one[0]) else float(one[0]) for one in numbers))


@dataclass(frozen=True)
class Bars:
    """A chart of the values that are not zero.

    Attributes:
        centres: middle of each bar.
        heights: values in it, estimated where the bins that were counted are wider.
    """

    centres: tuple[float, ...] = ()
    heights: tuple[float, ...] = ()

    @classmethod
    def of(cls, found: Histogram) -> "Bars":
        """Fifty bars of equal width over the values that are not zero."""
        counts = np.where((found.edges[:-1] == 0), 0, found.counts)
        if not counts.any():
            return cls()
        shown = replace(found, counts=counts).rebinned(_BINS)
        centres = (shown.edges[:-1] + shown.edges[1:]) / 2
        return cls(tuple(centres.tolist()), tuple(shown.counts.tolist()))


@dataclass(frozen=True)
class UnitRecord:
    """One unit with its statistics and contexts.

    Attributes:
        layer, unit: which one.
        moments: over ordinary rows.
        histogram: over ordinary rows.
        promoted, suppressed: tokens with the greatest and least direct effect on their logit,
            with the effect; empty where the store does not know the weights, or the unit is
            no neuron.
        similar: neurons of its layer with the nearest output weights, with the cosine; empty
            likewise.
        examples: contexts by kind, in rank order.
    """

    layer: int
    unit: int
    moments: Moments
    histogram: Histogram
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    similar: tuple[tuple[int, float], ...]
    examples: dict[Kind, tuple[Example, ...]]

    @property
    def greatest(self) -> float | None:
        """Of the ordinary rows; None without any."""
        return self.histogram.maximum if self.histogram.total else None

    @property
    def least(self) -> float | None:
        """Of the ordinary rows; None without any."""
        return self.histogram.minimum if self.histogram.total else None

    @property
    def share_positive(self) -> float | None:
        """Share of the ordinary values above zero, exactly; None without any."""
        return self.histogram.share_above(0).estimate if self.histogram.total else None


class UnitReader:
    """Reads the records of a store's units.

    Args:
        store: the open store.
        declared: the scalar whose values are shown.
        choice: how many contexts.
    """

    def __init__(self, store: "Store", declared: DerivedScalar, choice: ExportChoice) -> None:
        self._store = store
        self._declared = declared
        self._choice = choice
        self._are_neurons = declared.axes == (Dimension.NEURON,)

    def read(self, layer: int, unit: int, kinds: Sequence[Kind]) -> UnitRecord:
        """Everything of one unit.

        Args:
            layer: its layer.
            unit: its number.
            kinds: of examples.

        Raises:
            InvalidInput: there is no such unit.
            Unavailable: the store cannot derive the scalar.
        """
        choice = self._choice
        counts: dict[Kind, int] = {
            "top": choice.top,
            "random": choice.random,
            "bottom": choice.bottom,
            "quantile": choice.quantiles,
        }
        found = {
            kind: examples(
                self._store,
                self._declared,
                (layer, unit),
                k=counts[kind],
                kind=kind,
                window=choice.window,
                seed=choice.seed,
            ).rows
            for kind in kinds
            if counts[kind]
        }
        known = unit_summary(self._store, self._declared, layer, unit)
        if known is None:
            values, _ = unit_values(self._store, self._declared, layer, unit, None, False)
            moments = Moments.of_values(values)
        else:
            moments = Moments.of(known)
        weights = neuron(self._store, layer, unit) if self._are_neurons else None
        return UnitRecord(
            layer=layer,
            unit=unit,
            moments=moments,
            histogram=self._store.histogram(self._declared, (layer, unit)),
            promoted=_tokens(weights.promoted) if weights else (),
            suppressed=_tokens(weights.suppressed) if weights else (),
            similar=tuple((one.neuron, one.cosine) for one in weights.similar_in_layer)
            if weights
            else (),
            examples=found,
        )


def _tokens(found: Sequence[LogitToken]) -> tuple[tuple[str, float], ...]:
    return tuple((one.text, one.logit) for one in found)
