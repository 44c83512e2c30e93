"""Facts about units of an open store: statistics, histograms, neurons, heads, latents."""

from typing import TYPE_CHECKING, Any

from actstore.query.store_tensors import ScalarName, StoreTensors

if TYPE_CHECKING:
    from actstore.query.neuron import Neuron
    from actstore.query.session import Store
    from actstore.query.statistics import Statistics
    from actstore.query.units import Head, Latent
    from actstore.store.histograms import Histogram

__all__ = ["StoreUnits"]


class StoreUnits(StoreTensors):
    """The part of :class:`actstore.query.session.Store` that tells of units."""

    def statistics(self: "Store", name: ScalarName, **options: Any) -> "Statistics":  # type: ignore[misc]
        """Counts, moments, extremes and quantiles; see :mod:`actstore.query.statistics`."""
        from actstore.query.statistics import statistics

        return statistics(self, name, **options)

    def histogram(  # type: ignore[misc]
        self: "Store", name: ScalarName, unit: tuple[int, ...], *, pass_type: str = "forward"
    ) -> "Histogram":
        """One unit's values by size: as it is kept, else counted now by reading its column.

        Args:
            name: a derived scalar with one value per (layer, token, unit).
            unit: (layer, neuron), (layer, head, channel) …
            pass_type: ``backward`` for the gradient of the store's objective.

        Raises:
            InvalidInput: an unknown scalar or unit.
            Unavailable: the store cannot derive the scalar.
        """
        from actstore.query.statistics import unit_histogram

        return unit_histogram(self, name, unit, pass_type=pass_type)

    def neuron(self: "Store", layer: int, neuron: int) -> "Neuron":  # type: ignore[misc]
        """What the weights and the corpus say of a neuron; see :mod:`actstore.query.neuron`.

        Raises:
            InvalidInput: there is no such layer or neuron.
        """
        from actstore.query.neuron import neuron as find_neuron

        return find_neuron(self, layer, neuron)

    def head(self: "Store", layer: int, head: int) -> "Head":  # type: ignore[misc]
        """What the weights say of an attention head.

        Raises:
            InvalidInput: there is no such layer or head.
        """
        from actstore.query.units import head as find_head

        return find_head(self, layer, head)

    def latent(self: "Store", layer: int, latent: int, *, of: str | None = None) -> "Latent":  # type: ignore[misc]
        """What the autoencoder and the corpus say of a kept latent.

        Args:
            layer: the layer.
            latent: its number.
            of: the set's name, or what its autoencoders read; the only set by default.

        Raises:
            InvalidInput: there is no such layer or latent, or several sets would do.
            Unavailable: there is no such set.
        """
        from actstore.query.units import latent as find_latent

        return find_latent(self, of, layer, latent)
