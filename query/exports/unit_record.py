"""What the exports of neuron pages say of one unit, gathered once for every schema."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived import DerivedScalar
from actstore.query.examples import Example, Kind, examples, unit_values
from actstore.query.neuron import LogitToken, neuron
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["ExportChoice", "Histogram", "Moments", "UnitReader", "UnitRecord"]

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
    """Population moments over the ordinary rows; None where there are too few values.

    Kurtosis is 3 for a normal distribution.
    """

    count: int
    mean: float | None
    variance: float | None
    skewness: float | None
    kurtosis: float | None

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> "Moments":
        """The moments of finite values ``(row,)``, in float64."""
        if not len(values):
            return cls(0, None, None, None, None)
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        second, third, fourth = (float(((wide - mean) ** power).mean()) for power in (2, 3, 4))
        if second <= 0:
            return cls(len(wide), mean, 0.0, None, None)
        return cls(len(wide), mean, second, third / second**1.5, fourth / second**2)


@dataclass(frozen=True)
class Histogram:
    """Counts of the values that are not zero.

    Attributes:
        centres: middle of each bin.
        counts: values in it.
    """

    centres: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> "Histogram":
        """Fifty equal bins over the finite values ``(row,)`` that are not zero."""
        found = values[values != 0].astype(np.float64)
        if not len(found):
            return cls()
        counts, edges = np.histogram(found, bins=_BINS)
        centres = (edges[:-1] + edges[1:]) / 2
        return cls(tuple(centres.tolist()), tuple(counts.tolist()))


@dataclass(frozen=True)
class UnitRecord:
    """One unit with its statistics and contexts.

    Attributes:
        layer, unit: which one.
        moments: over ordinary rows.
        greatest, least: of the ordinary rows; None without any.
        share_positive: share of ordinary values above zero; None without any.
        histogram: of the values that are not zero.
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
    greatest: float | None
    least: float | None
    share_positive: float | None
    histogram: Histogram
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    similar: tuple[tuple[int, float], ...]
    examples: dict[Kind, tuple[Example, ...]]


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
        values, _ = unit_values(self._store, self._declared, layer, unit, None, False)
        values = values[np.isfinite(values)]
        weights = neuron(self._store, layer, unit) if self._are_neurons else None
        return UnitRecord(
            layer=layer,
            unit=unit,
            moments=Moments.of(values),
            greatest=float(values.max()) if len(values) else None,
            least=float(values.min()) if len(values) else None,
            share_positive=float((values > 0).mean()) if len(values) else None,
            histogram=Histogram.of(values),
            promoted=_tokens(weights.promoted) if weights else (),
            suppressed=_tokens(weights.suppressed) if weights else (),
            similar=tuple((one.neuron, one.cosine) for one in weights.similar_in_layer)
            if weights
            else (),
            examples=found,
        )


def _tokens(found: Sequence[LogitToken]) -> tuple[tuple[str, float], ...]:
    return tuple((one.text, one.logit) for one in found)
