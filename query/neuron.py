"""One neuron: what its weights say of it, and what the corpus does."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.statistics import UnitSummary, stored_histograms, unit_histogram, unit_summary
from actstore.query.units import readout_file, require_unit
from actstore.store.errors import Unavailable
from actstore.store.histograms import Histogram
from actstore.store.vocabulary import ActivationLocationType, PassType, WeightLocationType

if TYPE_CHECKING:
    from actstore.query.examples import Examples
    from actstore.query.session import Store

__all__ = [
    "LogitToken",
    "Neuron",
    "SimilarNeuron",
    "neuron",
    "similar_neurons",
]

ACTIVATION = "mlp_post_act"
"""The scalar that is a neuron's activation."""

_WEIGHTS = ("write_norm", "read_norm", "bias")
_SIMILAR = 10
_EXAMPLES = 20
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class LogitToken:
    """A vocabulary token, and what a neuron adds to its logit per unit of activation.

    Attributes:
        token_id: of the vocabulary.
        text: decoded.
        logit: with the final norm's gain and without its denominator, less the mean over
            the vocabulary.
    """

    token_id: int
    text: str
    logit: float

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return {"token_id": self.token_id, "text": self.text, "logit": self.logit}


@dataclass(frozen=True)
class SimilarNeuron:
    """A neuron that writes in nearly the same direction.

    Attributes:
        layer, neuron: which.
        cosine: of the two output rows, float64.
    """

    layer: int
    neuron: int
    cosine: float

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return {"layer": self.layer, "neuron": self.neuron, "cosine": self.cosine}


@dataclass(frozen=True)
class Neuron:
    """A neuron of an MLP. What costs a search or a scan is found when it is looked at.

    Attributes:
        layer, neuron: which.
        neurons: how many the layer has.
        write_norm, read_norm, bias: of its weights; None where the store keeps none.
        write_rank: 1 for the greatest write norm of the layer; equal norms share a rank.
        promoted, suppressed: the tokens at either end of its effect on the logits.
        statistics: over ordinary rows; None where the store has no index of activations.
    """

    layer: int
    neuron: int
    neurons: int
    write_norm: float | None
    read_norm: float | None
    bias: float | None
    write_rank: int | None
    promoted: tuple[LogitToken, ...]
    suppressed: tuple[LogitToken, ...]
    statistics: UnitSummary | None
    _store: "Store" = field(repr=False, compare=False)

    @property
    def firing_rate(self) -> float | None:
        """Share of the ordinary rows at which it is above zero; None where not known."""
        return None if self.statistics is None else self.statistics.positive_share

    @property
    def dead(self) -> bool | None:
        """Whether it is above zero at no ordinary row; None where that is not known."""
        rate = self.firing_rate
        return None if rate is None else rate == 0

    @cached_property
    def histogram(self) -> Histogram | None:
        """How its activations are spread; None where they cannot be had.

        Read where the store keeps it, else counted from every activation.

        Raises:
            StoreDamaged: a file that it is read from fails its checksum.
        """
        try:
            return unit_histogram(self._store, ACTIVATION, (self.layer, self.neuron))
        except Unavailable:
            return None

    @cached_property
    def similar(self) -> tuple[SimilarNeuron, ...]:
        """The ten neurons of all layers with the nearest output weights; empty without weights."""
        return self._similar(all_layers=True)

    @cached_property
    def similar_in_layer(self) -> tuple[SimilarNeuron, ...]:
        """The ten neurons of its own layer with the nearest output weights."""
        return self._similar(all_layers=False)

    def _similar(self, *, all_layers: bool) -> tuple[SimilarNeuron, ...]:
        try:
            return similar_neurons(self._store, self.layer, self.neuron, all_layers=all_layers)
        except Unavailable:
            return ()

    def examples(self, **options: Any) -> "Examples":
        """Contexts of it; see :func:`actstore.query.examples.examples`."""
        from actstore.query.examples import examples

        return examples(self._store, ACTIVATION, (self.layer, self.neuron), **options)

    @cached_property
    def top(self) -> "Examples | None":
        """The 20 sequences where it is greatest; None where activations cannot be had."""
        return self._examples("top")

    @cached_property
    def bottom(self) -> "Examples | None":
        """The 20 sequences where it is least; None where activations cannot be had."""
        return self._examples("bottom")

    def _examples(self, kind: str) -> "Examples | None":
        try:
            return self.examples(kind=kind, k=_EXAMPLES)
        except Unavailable:
            return None

    @property
    def _is_counted(self) -> bool:
        """Whether its histogram costs at most one column of what is stored."""
        place = (ActivationLocationType.MLP_POST_ACT, PassType.FORWARD)
        declared = self._store.scalar(ACTIVATION)
        return (
            place in self._store.reader.arrays
            or stored_histograms(self._store, declared) is not None
        )

    def _repr_html_(self) -> str | None:
        from actstore.query.notebooks import neuron_html

        return neuron_html(self)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values.

        The histogram and the examples are there where the store has activations or their index:
        nothing is derived for them.
        """
        top, bottom = (self.top, self.bottom) if self._is_counted else (None, None)
        histogram = self.histogram if self._is_counted else None
        return {
            "layer": self.layer,
            "neuron": self.neuron,
            "write_norm": self.write_norm,
            "read_norm": self.read_norm,
            "bias": self.bias,
            "write_rank": self.write_rank,
            "neurons": self.neurons,
            "firing_rate": self.firing_rate,
            "dead": self.dead,
            "statistics": None if self.statistics is None else self.statistics.to_json(),
            "histogram": None if histogram is None else histogram.to_json(),
            "promoted": [one.to_json() for one in self.promoted],
            "suppressed": [one.to_json() for one in self.suppressed],
            "similar": [one.to_json() for one in self.similar],
            "similar_in_layer": [one.to_json() for one in self.similar_in_layer],
            "top": None if top is None else top.to_json(),
            "bottom": None if bottom is None else bottom.to_json(),
        }

    def __repr__(self) -> str:
        parts = []
        if self.write_norm is not None:
            parts.append(
                f"write norm {self.write_norm:.4g}, number {self.write_rank} of {self.neurons}"
            )
        found = self.statistics
        if found is None:
            parts.append("no statistics of its activations are stored")
        elif self.dead:
            parts.append(f"dead: above zero at none of {found.count:,} rows")
        elif found.positive_share is not None:
            parts.append(f"above zero at {found.positive_share:.3%} of {found.count:,} rows")
        if found is not None and found.max is not None:
            parts.append(f"from {found.min:.4g} to {found.max:.4g}")
        for name, tokens in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            if tokens:
                parts.append(f"{name} {' '.join(repr(one.text) for one in tokens[:5])}")
        return f"<Neuron {self.layer}:{self.neuron}: {'; '.join(parts)}>"


def neuron(store: "Store", layer: int, number: int) -> Neuron:
    """A neuron of an open store.

    Args:
        store: the store.
        layer: its layer.
        number: its number in the layer.

    Raises:
        InvalidInput: there is no such neuron.
        StoreDamaged: a file that it is read from fails its checksum.
    """
    count = store.sources.dimensions.d_mlp
    require_unit(store, layer, number, count, "neuron")
    file = readout_file(store)
    norms: list[float | None] = [None, None, None]
    rank = None
    ends: list[tuple[LogitToken, ...]] = [(), ()]
    if file is not None:
        norms = [float(file.row(name, layer, number)) for name in _WEIGHTS]
        rank = 1 + int((file.row("write_norm", layer) > norms[0]).sum())
        ends = [
            _logit_tokens(
                store,
                file.row(f"{name}_token", layer, number),
                file.row(f"{name}_score", layer, number),
            )
            for name in ("promoted", "suppressed")
        ]
    known = None
    if store.reader.segments:
        known = unit_summary(store, store.scalar(ACTIVATION), layer, number)
    return Neuron(
        layer=layer,
        neuron=number,
        neurons=count,
        write_norm=norms[0],
        read_norm=norms[1],
        bias=norms[2],
        write_rank=rank,
        promoted=ends[0],
        suppressed=ends[1],
        statistics=known,
        _store=store,
    )


def _logit_tokens(
    store: "Store", tokens: npt.NDArray[np.integer], logits: npt.NDArray[np.float32]
) -> tuple[LogitToken, ...]:
    texts = store.texts(tokens.tolist())
    return tuple(
        LogitToken(token, text, logit)
        for token, text, logit in zip(tokens.tolist(), texts, logits.tolist(), strict=True)
    )


def similar_neurons(
    store: "Store", layer: int, number: int, *, k: int = _SIMILAR, all_layers: bool = True
) -> tuple[SimilarNeuron, ...]:
    """The neurons whose output weights have the greatest cosine with one's, in float64.

    A layer's weights are in memory at a time, in float32. Neurons that write nothing are no
    answers, and have none.

    Args:
        store: the open store.
        layer: the neuron's layer.
        number: its number in the layer.
        k: how many, fewer where there are not so many.
        all_layers: look beyond its own layer.

    Returns:
        By cosine descending, then layer, neuron.

    Raises:
        InvalidInput: there is no such neuron.
        Unavailable: the store keeps no output weights.
        StoreDamaged: a weight fails its checksum.
    """
    require_unit(store, layer, number, store.sources.dimensions.d_mlp, "neuron")
    own = _written(store, layer)[number].astype(np.float64)
    length = float(np.linalg.norm(own))
    if length == 0:
        return ()
    own /= length
    best: list[SimilarNeuron] = []
    for other in range(store.n_layers) if all_layers else [layer]:
        cosines = _cosines(_written(store, other), own)
        if other == layer:
            cosines[number] = np.nan
        order = np.argsort(-cosines, kind="stable")[:k]
        best += [
            SimilarNeuron(other, int(place), float(cosines[place]))
            for place in order
            if not math.isnan(cosines[place])
        ]
        best = sorted(best, key=lambda one: (-one.cosine, one.layer, one.neuron))[:k]
    return tuple(best)


def _cosines(
    rows: npt.NDArray[np.float32], direction: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The cosine of every row with a direction of length one; NaN for rows of zeros."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[start : start + _ROWS_AT_ONCE].astype(np.float64)
        with np.errstate(invalid="ignore"):
            # Row by row, so that equal rows have equal cosines.
            dots = np.einsum("nd,d->n", block, direction)
            found[start : start + len(block)] = dots / np.sqrt(np.einsum("nd,nd->n", block, block))
    return found


def _written(store: "Store", layer: int) -> npt.NDArray[np.float32]:
    """Output rows of a layer's neurons ``(neuron, channel)``, with the gain of a norm after them."""
    model = store.sources.model
    rows = model.weight(WeightLocationType.MLP_TO_RESIDUAL, layer, "float32")
    if store.sources.dimensions.has_post_norms:
        rows = rows * model.weight(WeightLocationType.LAYER_NORM_GAIN_POST_MLP, layer, "float32")
    return rows.astype(np.float32, copy=False)
