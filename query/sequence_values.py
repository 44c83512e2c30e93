"""Raw values of one stored sequence: read, or made from what is stored."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.query.derived.declaration import DerivedScalar
from actstore.query.gradients import Consumer, Place, pull_back
from actstore.query.rows import SequenceRows
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import Recipe, Setting, WeightName
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.query.sources import Sources

__all__ = ["SequenceValues"]


class SequenceValues:
    """Raw values of one committed sequence, in float64.

    Values of the layer at hand are kept, so that several scalars of one layer share
    their steps; a step to the next layer keeps the residual stream alone.

    Args:
        sources: the open store.
        rows: the sequence.
    """

    def __init__(self, sources: "Sources", rows: SequenceRows) -> None:
        self._sources = sources
        self.rows = rows
        self._held: dict[Place, Tensor] = {}
        self._gradients: dict[Place, Tensor] = {}

    @property
    def dimensions(self) -> ModelDimensions:
        """The model's sizes."""
        return self._sources.dimensions

    @property
    def recipes(self) -> Sequence[Recipe]:
        """How the model's locations follow from each other."""
        return self._sources.recipes

    def has(self, location: ActivationLocationType, layer: int | None) -> bool:
        """Whether a location is stored; ``layer`` is one of those that it has."""
        return (location, PassType.FORWARD) in self._sources.reader.arrays

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64."""
        return self._sources.weight(name, layer)

    def coefficients(self, declared: DerivedScalar, layer: int | None) -> npt.NDArray[np.float64]:
        """The factor per unit of a scalar that rescales a raw value."""
        return self._sources.coefficients(declared, layer)

    def raw(
        self,
        location: ActivationLocationType,
        pass_type: PassType = PassType.FORWARD,
        layer: int | None = None,
    ) -> "Tensor":
        """A location's values, read or reconstructed.

        Returns:
            float64 ``(token, *unit axes)``, not to be written to; an attended axis has the
            sequence's length.

        Raises:
            Unavailable: the location cannot be had.
        """
        if pass_type is PassType.BACKWARD:
            self._sources.require(location, pass_type, layer)
            return self._gradient((location, layer))
        held = self._held
        # A stack of our own: a chain through a deep model is longer than Python's.
        waiting = [(location, layer)]
        while waiting:
            place = waiting[-1]
            if place in held:
                waiting.pop()
                continue
            of, at = place
            recipe = self._sources.require(of, PassType.FORWARD, at)
            inputs = [] if recipe is None else self._sources.inputs_of(recipe, at)
            missing = [needed for needed in inputs if needed not in held]
            if missing:
                waiting += reversed(missing)
                continue
            value = (
                self._read(of, PassType.FORWARD, at)
                if recipe is None
                else self._follow(recipe, [held[needed] for needed in inputs], at)
            )
            _forget(held, of, at, -1)
            held[place] = value
            waiting.pop()
        return held[location, layer]

    def _gradient(self, asked: Place) -> "Tensor":
        """A gradient that is stored or follows from stored ones."""
        held, graph = self._gradients, self._sources.gradients
        waiting = [asked]
        while waiting:
            place = waiting[-1]
            if place in held:
                waiting.pop()
                continue
            if (place[0], PassType.BACKWARD) in self._sources.reader.arrays:
                value = self._read(place[0], PassType.BACKWARD, place[1])
            else:
                consumers = graph.consumers(place)
                missing = [one.place for one in consumers if one.place not in held]
                if missing:
                    waiting += missing
                    continue
                parts = [self._pulled_back(place, one) for one in consumers]
                value = parts[0]
                for part in parts[1:]:
                    value = value + part
            _forget(held, place[0], place[1], 1)
            held[place] = value
            waiting.pop()
        return held[asked]

    def _pulled_back(self, place: Place, consumer: Consumer) -> "Tensor":
        recipe, layer = consumer.recipe, consumer.layer
        # Each is asked for by itself: what a step needs may drop what another left.
        inputs = [
            self.raw(of, PassType.FORWARD, at) for of, at in self._sources.inputs_of(recipe, layer)
        ]
        weights = [self._sources.weight(name, layer) for name in recipe.weights]
        setting = Setting(self.dimensions, layer, self._token_ids)
        gradient = self._gradients[consumer.place]
        return pull_back(
            consumer,
            gradient,
            inputs,
            weights,
            setting,
            lambda: self.raw(place[0], PassType.FORWARD, place[1]),
        )

    def _follow(self, recipe: Recipe, inputs: "list[Tensor]", layer: int | None) -> "Tensor":
        weights = [self._sources.weight(name, layer) for name in recipe.weights]
        setting = Setting(self._sources.model.dimensions, layer, self._token_ids)
        return recipe.function(inputs, weights, setting)

    @cached_property
    def _token_ids(self) -> "Tensor":
        import torch

        plan = self._sources.reader.segment(self.rows.segment)
        start = self.rows.first_token - plan.first_row
        ids = plan.token_ids[start : start + self.rows.length]
        return torch.from_numpy(ids.astype(np.int64))

    def _read(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> "Tensor":
        import torch

        array = self._sources.reader.array(location, pass_type)
        start = self.rows.first_token - self.rows.segment * array.spec.segment_rows
        # A set of its own may cover fewer segments than the base set.
        array.rows_of(self.rows.segment)
        stored = array.reader.window(self.rows.segment, layer or 0, start, start + self.rows.length)
        values = array.spec.dtype.to_float32(stored).astype(np.float64)
        tensor = torch.from_numpy(values).reshape(len(values), *array.spec.unit_shape)
        return tensor[..., : self.rows.length] if location.is_pair_shaped else tensor


def _forget(
    held: "dict[Place, Tensor]", location: ActivationLocationType, layer: int | None, step: int
) -> None:
    """Drop what a step at ``layer`` leaves behind: all other layers but its residual.

    Args:
        held: the values kept; changed.
        location: what the step computed.
        layer: its layer.
        step: from a layer to the one that its values come from: -1 forward, 1 backward.
    """
    residual = ActivationLocationType.RESID_POST_MLP
    for of, at in list(held):
        if at is None or layer is None or at == layer:
            continue
        # A residual is an input of the next layer, whose values stay.
        is_next = location is residual and at == layer - step
        if not is_next and not (of is residual and at == layer + step):
            del held[of, at]
