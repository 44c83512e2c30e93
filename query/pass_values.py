"""Raw values of one fresh pass over a prompt, as derived scalars read them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived.coefficients import unit_coefficients
from actstore.query.derived.declaration import DerivedScalar
from actstore.store.errors import ErrorKind, Unavailable
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import RECIPES, Recipe, WeightName
from actstore.store.model.weights import ModelWeights
from actstore.store.vocabulary import ActivationLocationType, PassType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PassValues"]

Values = Mapping[tuple[ActivationLocationType, PassType, int | None], "Tensor"]


class PassValues:
    """Values of one sequence in memory, with the model's weights.

    Gradients exist upstream of the objective alone; where a pass reached a location in
    some layers, it is zero in the others.

    Args:
        values: (location, pass, layer) -> ``(token, *location.axes)``, in any dtype.
        weights: the model's.
    """

    def __init__(self, values: Values, weights: ModelWeights) -> None:
        self._values = values
        self._weights = weights
        self._held: dict[tuple[WeightName, int | None], Tensor] = {}
        self.has_gradients = any(key[1] is PassType.BACKWARD for key in values)

    @property
    def dimensions(self) -> ModelDimensions:
        """The model's sizes."""
        return self._weights.dimensions

    @property
    def recipes(self) -> Sequence[Recipe]:
        """How the model's locations follow from each other."""
        return RECIPES[self._weights.architecture.name]

    def has(self, location: ActivationLocationType, layer: int | None) -> bool:
        """Whether the pass recorded a location."""
        return (location, PassType.FORWARD, layer) in self._values

    def layers(
        self, location: ActivationLocationType, pass_type: PassType
    ) -> tuple[int | None, ...]:
        """The layers that the pass recorded, ascending."""
        found = {at for of, kind, at in self._values if (of, kind) == (location, pass_type)}
        return tuple(sorted(found, key=lambda layer: -1 if layer is None else layer))

    def raw(
        self,
        location: ActivationLocationType,
        pass_type: PassType = PassType.FORWARD,
        layer: int | None = None,
    ) -> "Tensor":
        """float64 ``(token, *location.axes)``.

        Raises:
            Unavailable: the pass did not record it.
        """
        import torch

        found = self._values.get((location, pass_type, layer))
        if found is not None:
            return found.to(torch.float64)
        if pass_type is PassType.BACKWARD and self.has_gradients:
            forward = self._values.get((location, PassType.FORWARD, layer))
            if forward is not None:
                return torch.zeros_like(forward, dtype=torch.float64)
        raise Unavailable(
            f"{location}/{pass_type} of layer {layer} was not recorded in this pass. "
            + (
                "Run the pass with an objective or a trace."
                if pass_type is PassType.BACKWARD
                else "Run it with an autoencoder spliced in."
                if location.is_online
                else "Record the location."
            ),
            kind=ErrorKind.NOT_STORED,
        )

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64; the layer is ignored for a weight outside the blocks."""
        import torch

        if isinstance(name, ActivationLocationType):
            assert layer is not None, "biases belong to layers"
            key: tuple[WeightName, int | None] = (name, layer)
            if key not in self._held:
                self._held[key] = torch.from_numpy(self._weights.attention_bias(name, layer))
        else:
            key = (name, layer if name.has_layers else None)
            if key not in self._held:
                self._held[key] = torch.from_numpy(self._weights.weight(name, key[1]))
        return self._held[key]

    def coefficients(self, declared: DerivedScalar, layer: int | None) -> npt.NDArray[np.float64]:
        """The factor per unit of a scalar that rescales a raw value, ``(unit,)``."""
        columns = int(np.prod([self.dimensions.size(axis) for axis in declared.axes]))
        return unit_coefficients(declared, layer, self.dimensions, self._readout, columns)

    def _readout(self, section: str, layer: int) -> npt.NDArray[np.float64]:
        assert section == "write_norm", section
        rows = self.weight(WeightLocationType.MLP_TO_RESIDUAL, layer)
        if self.dimensions.has_post_norms:
            rows = rows * self.weight(WeightLocationType.LAYER_NORM_GAIN_POST_MLP, layer)
        norms: npt.NDArray[np.float64] = rows.square().sum(-1).sqrt().numpy()
        return norms
