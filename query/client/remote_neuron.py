"""A neuron of a store that a server serves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from actstore.query.neuron import ACTIVATION, LogitToken, Neuron, SimilarNeuron
from actstore.query.statistics import Statistics, UnitSummary
from actstore.store.errors import Unavailable
from actstore.store.histograms import QUANTILES, Bracket, Histogram

if TYPE_CHECKING:
    from actstore.query.client.remote_store import RemoteStore
    from actstore.query.examples import Examples

__all__ = ["RemoteNeuron"]

_PLAIN = ("layer", "neuron", "neurons", "write_norm", "read_norm", "bias", "write_rank")


@dataclass(frozen=True, repr=False)
class RemoteNeuron(Neuron):
    """A neuron as :class:`actstore.query.neuron.Neuron` tells of it.

    Attributes:
        row: its row of the table of neurons.
    """

    row: Mapping[str, Any] = field(repr=False, compare=False)
    _remote: "RemoteStore" = field(repr=False, compare=False)
    _found: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, remote: "RemoteStore", found: Mapping[str, Any]) -> Self:
        """The neuron of a server's answer.

        Args:
            remote: what answers further questions.
            found: the answer.
        """
        place = (found["layer"], found["neuron"])
        known = None
        if found["statistics"] is not None:
            # JSON has no infinities; the table of one unit has.
            known = _summary(remote.statistics(ACTIVATION, units=[place]))
        return cls(
            **{name: found[name] for name in _PLAIN},
            promoted=tuple(LogitToken(**one) for one in found["promoted"]),
            suppressed=tuple(LogitToken(**one) for one in found["suppressed"]),
            statistics=known,
            row=found["row"],
            _store=None,  # type: ignore[arg-type]
            _remote=remote,
            _found=found,
        )

    @cached_property
    def histogram(self) -> Histogram | None:
        """How its activations are spread; None where they cannot be had."""
        try:
            return self._remote.histogram(ACTIVATION, (self.layer, self.neuron))
        except Unavailable:
            return None

    def _similar(self, *, all_layers: bool) -> tuple[SimilarNeuron, ...]:
        found = self._found["similar" if all_layers else "similar_in_layer"]
        return tuple(SimilarNeuron(**one) for one in found)

    def examples(self, **options: Any) -> "Examples":
        """Contexts of it; see :func:`actstore.query.examples.examples`."""
        return self._remote.examples(ACTIVATION, (self.layer, self.neuron), **options)

    @property
    def _is_counted(self) -> bool:
        return self._found["histogram"] is not None


def _summary(found: Statistics) -> UnitSummary:
    (row,) = found.rows()
    quantiles = {}
    for share, name in zip(QUANTILES, _quantile_columns(found), strict=False):
        if row[name] is not None:
            quantiles[share] = Bracket(row[name], row[f"{name}_low"], row[f"{name}_high"])
    members = UnitSummary.__dataclass_fields__
    return UnitSummary(
        **{name: row[name] for name in members if name != "quantiles"}, quantiles=quantiles
    )


def _quantile_columns(found: Statistics) -> list[str]:
    """Columns of the estimates, in the order of the shares."""
    names = found.to_arrow().column_names
    return [name.removesuffix("_low") for name in names if name.endswith("_low")]
