"""Gradients that were not stored, from those that were: the chain rule along the recipes.

The gradient at a place is the sum, over what is computed from it, of that value's gradient
pulled back through its recipe. So gradients of scores and patterns follow from the
gradient of the weighted values, and all of a layer's from the residual streams around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from actstore.store.model.recipes import Recipe, Setting
from actstore.store.vocabulary import ActivationLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Consumer", "GradientGraph", "Place", "pull_back"]

Place = tuple[ActivationLocationType, int | None]
"""A location and its layer."""


@dataclass(frozen=True)
class Consumer:
    """A value that is computed from a place.

    Attributes:
        recipe: how.
        layer: the value's layer.
        argument: which of the recipe's inputs the place is; None for the norm's denominator.
    """

    recipe: Recipe
    layer: int | None
    argument: int | None

    @property
    def place(self) -> Place:
        """The computed value's own place."""
        return self.recipe.target, self.layer


class GradientGraph:
    """Which gradients follow from which, for one architecture and number of layers.

    Args:
        recipes: the architecture's; the first of each target is the model's own computation.
        n_layers: blocks of the model.
        stored: places whose gradients are stored.
    """

    def __init__(self, recipes: Sequence[Recipe], n_layers: int, stored: set[Place]) -> None:
        self._recipes = tuple({recipe.target: recipe for recipe in reversed(recipes)}.values())
        self._n_layers = n_layers
        self._stored = stored

    @cached_property
    def _consumers(self) -> dict[Place, list[Consumer]]:
        scales = {recipe.scale for recipe in self._recipes}
        found: dict[Place, list[Consumer]] = {}
        for recipe in self._recipes:
            if recipe.target in scales:
                # Recomputed within what divides by it: its gradient is counted there.
                continue
            layers: Sequence[int | None] = (
                range(self._n_layers) if recipe.target.has_layers else (None,)
            )
            for layer in layers:
                for argument, source in enumerate(recipe.inputs):
                    of, at = source.place(layer, self._n_layers)
                    assert isinstance(of, ActivationLocationType)
                    found.setdefault((of, at), []).append(Consumer(recipe, layer, argument))
                if recipe.scale is not None:
                    at = layer if recipe.scale.has_layers else None
                    found.setdefault((recipe.scale, at), []).append(Consumer(recipe, layer, None))
        return found

    def consumers(self, place: Place) -> Sequence[Consumer]:
        """What is computed from a place, through other values at most once each."""
        return self._consumers.get(place, ())

    @cached_property
    def reachable(self) -> frozenset[Place]:
        """Every place whose gradient is stored or follows from stored ones."""
        reached = set(self._stored)
        order = sorted(
            self._consumers, key=lambda place: self._n_layers if place[1] is None else place[1]
        )
        changed = True
        while changed:
            before = len(reached)
            for place in reversed(order):
                if all(consumer.place in reached for consumer in self._consumers[place]):
                    reached.add(place)
            changed = len(reached) > before
        return frozenset(reached)

    def roots(self, place: Place) -> set[Place]:
        """The stored gradients that a reachable one follows from."""
        waiting, seen, found = [place], set[Place](), set[Place]()
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            if one in self._stored:
                found.add(one)
            else:
                waiting += [consumer.place for consumer in self.consumers(one)]
        return found


def pull_back(
    consumer: Consumer,
    gradient: "Tensor",
    inputs: Sequence["Tensor"],
    weights: Sequence["Tensor"],
    setting: Setting,
    scale: "Callable[[], Tensor]",
) -> "Tensor":
    """What a value's gradient adds to that of a place it is computed from.

    Args:
        consumer: the value and the place.
        gradient: the value's gradient, in its own shape.
        inputs: the recipe's inputs, forward.
        weights: the recipe's weights.
        setting: the value's.
        scale: gives the norm's denominator, forward; asked for where that is the place.

    Returns:
        In the place's shape.
    """
    import torch

    given = [tensor.detach() for tensor in inputs]
    if consumer.argument is None:
        leaf = scale().detach().requires_grad_()
        setting = replace(setting, scale=leaf)
    else:
        leaf = given[consumer.argument].requires_grad_()
    with torch.enable_grad():
        value = consumer.recipe.function(given, weights, setting)
        (pulled,) = torch.autograd.grad(value, leaf, gradient)
    return pulled
