"""One attention head, or one latent of an autoencoder: what the store says of it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.statistics import UnitSummary
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.readout import READOUT_KEY
from actstore.store.model.weights import ModelSnapshot

if TYPE_CHECKING:
    from actstore.query.session import Store
    from actstore.store.latent_reader import LatentSet
    from actstore.store.sections import SectionFile

__all__ = ["Head", "Latent", "head", "latent", "readout_file", "require_unit"]


def require_unit(store: "Store", layer: int, number: int, count: int, what: str) -> None:
    """Refuse a place that the model does not have.

    Args:
        store: the open store.
        layer: the layer.
        number: of the unit.
        count: units of a layer.
        what: the unit's name, such as ``neuron``.

    Raises:
        InvalidInput: there is no such layer or unit.
    """
    places: tuple[tuple[str, Any, int, ErrorKind], ...] = (
        ("layer", layer, store.n_layers, ErrorKind.UNKNOWN_LAYER),
        (what, number, count, ErrorKind.UNKNOWN_UNIT),
    )
    for name, value, size, kind in places:
        is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_number or not 0 <= value < size:
            raise InvalidInput(f"{name} is {value!r}; this model has 0 to {size - 1}.", kind=kind)


def readout_file(store: "Store") -> "SectionFile | None":
    """The coefficients computed from the weights; None where the store keeps none.

    Raises:
        StoreDamaged: the file is missing or fails a checksum.
    """
    if READOUT_KEY not in ModelSnapshot.read(store.reader.root).files:
        return None
    return store.reader.section_file(READOUT_KEY)


@dataclass(frozen=True)
class Head:
    """An attention head.

    Attributes:
        layer, head: which.
        heads: how many the layer has.
        write_norm: Frobenius norm of its output map; None where the store keeps no weights.
        value_output_norm: of its value map times its output map.
        write_rank: 1 for the greatest ``write_norm`` of the layer.
    """

    layer: int
    head: int
    heads: int
    write_norm: float | None
    value_output_norm: float | None
    write_rank: int | None

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return dict(self.__dict__)


def head(store: "Store", layer: int, number: int) -> Head:
    """An attention head of an open store.

    Raises:
        InvalidInput: there is no such head.
        StoreDamaged: a file that it is read from fails its checksum.
    """
    count = store.sources.dimensions.n_heads
    require_unit(store, layer, number, count, "head")
    file = readout_file(store)
    if file is None:
        return Head(layer, number, count, None, None, None)
    norms = file.row("head_write_norm", layer)
    return Head(
        layer=layer,
        head=number,
        heads=count,
        write_norm=float(norms[number]),
        value_output_norm=float(file.row("head_value_output_norm", layer, number)),
        write_rank=1 + int((norms > norms[number]).sum()),
    )


@dataclass(frozen=True)
class Latent:
    """A latent of an autoencoder whose values the store keeps.

    Attributes:
        set: the set's name.
        location: what its autoencoder reads.
        layer, latent: which.
        latents: how many the layer has.
        decoder_norm: norm of its decoder's row.
        write_norm: of what it writes to the stream; None where that is not defined.
        active: ordinary rows at which it is not zero.
        statistics: over ordinary rows, zeros among the values.
    """

    set: str
    location: str
    layer: int
    latent: int
    latents: int
    decoder_norm: float
    write_norm: float | None
    active: int
    statistics: UnitSummary

    @property
    def firing_rate(self) -> float | None:
        """Share of the ordinary rows at which it is not zero; None where there is no row."""
        return self.active / self.statistics.count if self.statistics.count else None

    @property
    def dead(self) -> bool | None:
        """Whether it is zero at every ordinary row; None where there is none."""
        return self.active == 0 if self.statistics.count else None

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return dict(self.__dict__) | {
            "statistics": self.statistics.to_json(),
            "firing_rate": self.firing_rate,
            "dead": self.dead,
        }


def latent(store: "Store", of: str | None, layer: int, number: int) -> Latent:
    """A latent of an open store.

    Args:
        store: the store.
        of: a set's name, or what its autoencoders read; None for the only set.
        layer: its layer.
        number: its number in the layer.

    Raises:
        InvalidInput: there is no such latent, or several sets would do.
        Unavailable: there is no such set.
        StoreDamaged: a file that it is read from fails its checksum.
    """
    found = store.kept_latents.named(of)
    if layer not in found.layers:
        known = ", ".join(map(str, found.layers))
        raise InvalidInput(
            f"layer is {layer!r}; set {found.name!r} has latents of layers {known}.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    array = found.layers[layer]
    require_unit(store, layer, number, array.n_latents, "latent")
    norms = found.norms(layer)
    active, summary = _latent_summary(found, layer, number)
    return Latent(
        set=found.name,
        location=found.location,
        layer=layer,
        latent=number,
        latents=array.n_latents,
        decoder_norm=float(norms.decoder[number]),
        write_norm=None if norms.write is None else float(norms.write[number]),
        active=active,
        statistics=summary,
    )


def _latent_summary(found: "LatentSet", layer: int, number: int) -> tuple[int, UnitSummary]:
    seen = found.layers[layer].statistics()

    def known(values: npt.NDArray[Any]) -> float | None:
        value = float(values[number])
        return None if math.isnan(value) else value

    moments = seen.moments
    count = int(moments.count[number])
    variance = known(moments.variance)
    return int(seen.active[number]), UnitSummary(
        count=count,
        nan=int(moments.nan[number]),
        positive_share=int(moments.positive[number]) / count if count else None,
        mean=known(moments.mean),
        variance=variance,
        std=None if variance is None else math.sqrt(variance),
        skewness=known(moments.skewness),
        kurtosis=known(moments.kurtosis),
        min=known(seen.minimum),
        max=known(seen.maximum),
        special_min=known(seen.special_minimum),
        special_max=known(seen.special_maximum),
        quantiles={},
    )
