"""One neuron: statistics, distribution, what it promotes, where it is active, who is like it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from actstore.query.examples import Kind
from actstore.query.neuron import ACTIVATION, LogitToken, Neuron, similar_neurons
from actstore.query.neuron import neuron as describe_neuron
from actstore.query.scored import score
from actstore.query.statistics import stored_histograms
from actstore.query.views.colours import Scale
from actstore.query.views.distribution import Distribution
from actstore.query.views.strips import TokenStrip, example_strips
from actstore.query.views.tables import fetch_rows
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from actstore.query.results import Certificate
    from actstore.query.session import Store

__all__ = [
    "ACTIVATION",
    "EXAMPLE_KINDS",
    "NeuronCard",
    "NeuronStatistics",
    "SimilarEntry",
    "similar_entries",
]

EXAMPLE_KINDS: tuple[Kind, ...] = ("top", "random", "bottom", "quantile")

_WINDOW = (20, 10)
_FULL_WINDOW = (4096, 4096)
_COUNTED_ROWS = 4_000_000
"""Rows of which one column is read for a histogram: 16 MB, a few milliseconds."""

_RECONSTRUCTED_ROWS = 20_000
"""Rows that are reconstructed for the examples of a page: a second or two."""

_COMPARED = 1 << 25
"""Output weights read for a search over all layers; beyond that, one layer's."""


@dataclass(frozen=True)
class NeuronStatistics:
    """What is known of a neuron over ordinary rows; None where nothing was indexed.

    Attributes:
        count: values.
        max, min, mean, spread, skewness, kurtosis: of them.
        firing_rate: share above zero.
        dead: above zero nowhere.
        write_norm, read_norm, bias: of its weights.
        write_rank: 1 for the greatest write norm of the layer.
    """

    count: int | None
    max: float | None
    min: float | None
    mean: float | None
    spread: float | None
    skewness: float | None
    kurtosis: float | None
    firing_rate: float | None
    dead: bool | None
    write_norm: float | None
    read_norm: float | None
    bias: float | None
    write_rank: int | None

    @classmethod
    def of(cls, found: Neuron) -> Self:
        """What a neuron's weights and its index say."""
        known = found.statistics
        return cls(
            **{
                name: None if known is None else getattr(known, name)
                for name in ("count", "max", "min", "mean", "skewness", "kurtosis")
            },
            spread=None if known is None else known.std,
            firing_rate=found.firing_rate,
            dead=found.dead,
            write_norm=found.write_norm,
            read_norm=found.read_norm,
            bias=found.bias,
            write_rank=found.write_rank,
        )


@dataclass(frozen=True)
class SimilarEntry:
    """A neuron whose output weights point the same way.

    Attributes:
        layer, neuron: which.
        cosine: of the two rows of output weights.
        promoted: tokens that it promotes.
    """

    layer: int
    neuron: int
    cosine: float
    promoted: tuple[str, ...]


@dataclass(frozen=True)
class NeuronCard:
    """A neuron as its page shows it.

    Attributes:
        layer, neuron: which.
        layers, neurons: how many the model has.
        statistics: over ordinary rows.
        distribution: of its values; None where it was not counted.
        promoted, suppressed: tokens at either end of its effect on the logits.
        kind: which examples are shown.
        strips: the examples.
        scale: the page's, from the greatest magnitude of the neuron.
        certificate: how the examples were found; None where there are none.
        missing: why there are no activations; empty where there are.
        sql: the query for the neuron's row.
    """

    layer: int
    neuron: int
    layers: int
    neurons: int
    statistics: NeuronStatistics
    distribution: Distribution | None
    promoted: tuple[LogitToken, ...]
    suppressed: tuple[LogitToken, ...]
    kind: Kind
    strips: tuple[TokenStrip, ...]
    scale: Scale
    certificate: "Certificate | None"
    missing: str
    sql: str

    @classmethod
    def of(
        cls,
        store: "Store",
        layer: int,
        neuron: int,
        *,
        kind: Kind = "top",
        k: int = 12,
        whole: bool = False,
        seed: int = 0,
    ) -> Self:
        """A neuron of an open store.

        Args:
            store: the store.
            layer: its layer.
            neuron: its number in the layer.
            kind: ``top``, ``random``, ``bottom`` or ``quantile``.
            k: examples.
            whole: show whole sequences, not snippets.
            seed: of random examples.

        Raises:
            InvalidInput: there is no such neuron or kind.
            StoreDamaged: a file that the numbers come from fails its checksum.
        """
        found_neuron = describe_neuron(store, layer, neuron)
        if kind not in EXAMPLE_KINDS:
            raise InvalidInput(
                f"examples is {kind!r}; use {', '.join(EXAMPLE_KINDS)}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        sql = f"SELECT *\nFROM neurons\nWHERE layer = {layer} AND neuron = {neuron}"
        statistics = NeuronStatistics.of(found_neuron)
        scale = Scale.over([statistics.max, statistics.min])
        strips: tuple[TokenStrip, ...] = ()
        certificate = None
        distribution = None
        missing = ""
        try:
            _require_little_work(store, kind)
            found = store.examples(
                ACTIVATION,
                (layer, neuron),
                k=k,
                kind=kind,
                window=_FULL_WINDOW if whole else _WINDOW,
                seed=seed,
            )
        except Unavailable as error:
            missing = str(error)
        else:
            certificate = found.certificate
            if statistics.max is None:
                scale = Scale.over(value for example in found for value in example.values)
            strips = example_strips(store, found, scale)
            distribution = _distribution(store, found_neuron)
        return cls(
            layer=layer,
            neuron=neuron,
            layers=store.n_layers,
            neurons=store.sources.dimensions.d_mlp,
            statistics=statistics,
            distribution=distribution,
            promoted=found_neuron.promoted,
            suppressed=found_neuron.suppressed,
            kind=kind,
            strips=strips,
            scale=scale,
            certificate=certificate,
            missing=missing,
            sql=sql,
        )

    @property
    def previous(self) -> tuple[int, int] | None:
        """The neuron before it in the model; None before the first."""
        return self._neighbour(-1)

    @property
    def next(self) -> tuple[int, int] | None:
        """The neuron after it in the model; None after the last."""
        return self._neighbour(1)

    def _neighbour(self, step: int) -> tuple[int, int] | None:
        number = self.layer * self.neurons + self.neuron + step
        if not 0 <= number < self.layers * self.neurons:
            return None
        return divmod(number, self.neurons)


def _require_little_work(store: "Store", kind: Kind) -> None:
    """Refuse examples that would keep a page waiting.

    Raises:
        Unavailable: the activations can be had, but not soon, or not at all.
    """
    found = score(store, store.scalar(ACTIVATION), few_units=True)
    is_indexed = found.zoned is not None and kind in ("top", "bottom")
    if found.source != "stored" and not is_indexed and store.n_tokens > _RECONSTRUCTED_ROWS:
        raise Unavailable(
            f"{ACTIVATION} is not stored here, and to reconstruct it for {store.n_tokens:,} rows "
            f"takes longer than a page may. Index it once with `actstore index STORE {ACTIVATION}`.",
            kind=ErrorKind.NOT_STORED,
        )


def _distribution(store: "Store", found: Neuron) -> Distribution | None:
    """Of the values at ordinary rows: counted if they are few, else from the kept histogram."""
    is_stored = (ActivationLocationType.MLP_POST_ACT, PassType.FORWARD) in store.reader.arrays
    is_quick = is_stored and store.n_tokens <= _COUNTED_ROWS
    if not is_quick and stored_histograms(store, store.scalar(ACTIVATION)) is None:
        return None
    return None if found.histogram is None else Distribution.of_histogram(found.histogram)


def similar_entries(
    store: "Store", layer: int, neuron: int, *, k: int = 10
) -> tuple[SimilarEntry, ...]:
    """The neurons whose output weights have the greatest cosine with one's.

    All layers are searched where their weights are few, else the neuron's own.

    Raises:
        InvalidInput: there is no such neuron.
        Unavailable: the store keeps no output weights.
        StoreDamaged: a weight fails its checksum.
    """
    dimensions = store.sources.dimensions
    size = store.n_layers * dimensions.d_mlp * dimensions.d_model
    found = similar_neurons(store, layer, neuron, k=k, all_layers=size <= _COMPARED)
    if not found:
        return ()
    listed = ", ".join(f"({one.layer}, {one.neuron})" for one in found)
    rows = fetch_rows(
        store, f"SELECT layer, neuron, promoted FROM neurons WHERE (layer, neuron) IN ({listed})"
    )
    promoted = {(row["layer"], row["neuron"]): row["promoted"] or () for row in rows}
    return tuple(
        SimilarEntry(
            one.layer,
            one.neuron,
            one.cosine,
            tuple(text or "" for text in promoted[one.layer, one.neuron]),
        )
        for one in found
    )
