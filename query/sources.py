"""Where a location's values come from: stored, reconstructed, or nowhere.

A stored array is always read. What was not stored follows from what is, by the cheapest
chain of recipes of the model's architecture; the chain is fixed by the store, not by the
question. What no chain reaches needs the model itself.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from threading import Lock, local
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.derived.coefficients import unit_coefficients
from actstore.query.derived.declaration import DerivedScalar, Direction
from actstore.query.derived.post_norms import rescaled_source
from actstore.query.derived.registry import SCALARS
from actstore.query.gradients import GradientGraph, Place
from actstore.query.rows import SequenceRows
from actstore.query.sequence_values import SequenceValues
from actstore.store.errors import ErrorKind, Unavailable
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.readout import READOUT_KEY
from actstore.store.model.recipes import LAST_RESORT, RECIPES, Recipe, WeightName
from actstore.store.model.weights import ModelWeights, open_model
from actstore.store.reader import StoreReader
from actstore.store.selfcheck import read_selfchecks
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sources"]

_WEIGHT_BYTES = 2**30


class Sources:
    """What an open store can answer with.

    Args:
        reader: the store.
    """

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader
        self._weights: OrderedDict[tuple[WeightName, int | None], Tensor] = OrderedDict()
        self._coefficients: dict[tuple[str, int | None], npt.NDArray[np.float64]] = {}
        self._weight_bytes = 0
        self._lock = Lock()
        self._latest = local()

    @cached_property
    def model(self) -> ModelWeights:
        """The model that the store keeps."""
        return open_model(self.reader.root)

    @cached_property
    def dimensions(self) -> ModelDimensions:
        """The model's sizes, as the manifest has them: known without its weights."""
        return ModelDimensions(**self.reader.manifest.model["dimensions"])

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.dimensions.n_layers

    def unit_shape(
        self, axes: Sequence[Dimension], attended: int | None = None, latents: int = 0
    ) -> tuple[int, ...]:
        """Lengths of unit axes; an attended axis has the store's context, or ``attended``."""
        context = int(self.reader.manifest.config["context"]) if attended is None else attended
        given = {Dimension.ATTENDED: context, Dimension.LATENT: latents}
        return tuple(given[axis] if axis in given else self.dimensions.size(axis) for axis in axes)

    def coefficients(self, declared: DerivedScalar, layer: int | None) -> npt.NDArray[np.float64]:
        """The factor per unit of a scalar that rescales a raw value, float64 ``(unit,)``."""
        key = (declared.name, layer)
        if key not in self._coefficients:
            columns = int(np.prod(self.unit_shape(declared.axes)))
            factors = unit_coefficients(declared, layer, self.dimensions, self._readout, columns)
            factors.setflags(write=False)
            self._coefficients[key] = factors
        return self._coefficients[key]

    def _readout(self, section: str, layer: int) -> npt.NDArray[Any]:
        return self.reader.section_file(READOUT_KEY).row(section, layer)

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64, kept for the next sequence.

        Args:
            name: the weight, or the location whose bias is meant.
            layer: the layer; ignored for a weight outside the blocks.
        """
        import torch

        at = layer if isinstance(name, ActivationLocationType) or name.has_layers else None
        with self._lock:
            if (name, at) in self._weights:
                self._weights.move_to_end((name, at))
                return self._weights[name, at]
        if isinstance(name, WeightLocationType):
            array = self.model.weight(name, at)
        else:
            assert at is not None, "biases belong to layers"
            array = self.model.attention_bias(name, at)
        tensor = torch.from_numpy(array)
        with self._lock:
            if (name, at) not in self._weights:
                self._weights[name, at] = tensor
                self._weight_bytes += tensor.nbytes
            while self._weight_bytes > _WEIGHT_BYTES:
                self._weight_bytes -= self._weights.popitem(last=False)[1].nbytes
        return tensor

    @cached_property
    def errors(self) -> dict[str, float]:
        """The worst error that self-checks measured, by the array's key."""
        return read_selfchecks(self.reader.blobs)

    def _has_weight(self, name: WeightName) -> bool:
        architecture = self.model.architecture
        if isinstance(name, WeightLocationType):
            return name in architecture.weights
        return name in architecture.attention_biases

    @cached_property
    def routes(self) -> dict[Place, Recipe | None]:
        """How every place that can be had is had: None for stored, else its recipe."""
        usable = [
            recipe
            for recipe in self.recipes
            if all(self._has_weight(name) for name in recipe.weights)
        ]
        best: dict[Place, tuple[int, Recipe | None]] = {
            (location, layer): (0, None)
            for location, pass_type in self.reader.arrays
            if pass_type is PassType.FORWARD
            for layer in self._layers(location)
        }
        # Ascending, so that one sweep follows a chain through all layers.
        layers: list[int | None] = [None, *range(self.n_layers), None]
        changed = True
        while changed:
            changed = False
            for layer in layers:
                for recipe in usable:
                    if recipe.target.has_layers == (layer is None):
                        continue
                    places = self.inputs_of(recipe, layer)
                    if any(place not in best for place in places):
                        continue
                    # Depth, not the sum: chains share their steps.
                    cost = recipe.cost + max((best[place][0] for place in places), default=0)
                    known = best.get((recipe.target, layer))
                    if known is None or cost < known[0]:
                        best[recipe.target, layer] = (cost, recipe)
                        changed = True
        self._steps = {place: sum(divmod(cost, LAST_RESORT)) for place, (cost, _) in best.items()}
        return {place: recipe for place, (_, recipe) in best.items()}

    def steps(self, location: ActivationLocationType) -> int | None:
        """Recipes that follow one another to a forward location, in the layer with the most.

        0 for a stored one, None for one that cannot be had here.
        """
        places = [(location, layer) for layer in self._layers(location)]
        if not all(place in self.routes for place in places):
            return None
        return max(self._steps[place] for place in places)

    def inputs_error(self, location: ActivationLocationType) -> float | None:
        """The worst measured error of the stored arrays that a location is made from."""
        layers = self._layers(location)
        if not all((location, layer) in self.routes for layer in layers):
            return None
        names = {name for layer in layers for name in self.roots(location, layer)}
        found = [
            self.errors[array.spec.key]
            for (of, kind), array in self.reader.arrays.items()
            if kind is PassType.FORWARD and of.label in names and array.spec.key in self.errors
        ]
        return max(found, default=None)

    @property
    def recipes(self) -> Sequence[Recipe]:
        """How the model's locations follow from each other."""
        return RECIPES.get(self.model.architecture.name, ())

    @cached_property
    def gradients(self) -> GradientGraph:
        """Which gradients follow from the stored ones."""
        stored = {
            (location, layer)
            for location, pass_type in self.reader.arrays
            if pass_type is PassType.BACKWARD
            for layer in self._layers(location)
        }
        return GradientGraph(self.recipes, self.n_layers, stored)

    def _layers(self, location: ActivationLocationType) -> Sequence[int | None]:
        return range(self.n_layers) if location.has_layers else (None,)

    def inputs_of(self, recipe: Recipe, layer: int | None) -> list[Place]:
        """The places that a recipe needs for its target at ``layer``."""
        places = [source.place(layer, self.n_layers) for source in recipe.inputs]
        return [(of, at) for of, at in places if isinstance(of, ActivationLocationType)]

    def exists(self, location: ActivationLocationType) -> bool:
        """Whether the model's forward pass has a location."""
        return location in self.model.architecture.taps

    def kind(self, location: ActivationLocationType, pass_type: PassType) -> str:
        """How a location can be had, over all layers.

        Returns:
            ``stored``, ``reconstructed``, ``needs a model``, or ``not obtainable`` where the
            architecture has no such place.
        """
        if (location, pass_type) in self.reader.arrays:
            return "stored"
        if not location.is_online and not self.exists(location):
            return "not obtainable"
        known = self.routes if pass_type is PassType.FORWARD else self.gradients.reachable
        reachable = all((location, layer) in known for layer in self._layers(location))
        return "reconstructed" if reachable else "needs a model"

    def roots(
        self,
        location: ActivationLocationType,
        layer: int | None,
        pass_type: PassType = PassType.FORWARD,
    ) -> tuple[str, ...]:
        """The stored arrays that a place is made from; ``token_id`` where the tokens are.

        Of a gradient, the stored gradients; the forward values it passes are not listed.
        """
        if pass_type is PassType.BACKWARD:
            places = self.gradients.roots((location, layer))
            return tuple(sorted({f"{of}/{pass_type}" for of, _ in places}))
        found: dict[str, None] = {}
        waiting: list[Place] = [(location, layer)]
        seen: set[Place] = set()
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            seen.add(place)
            recipe = self.routes[place]
            if recipe is None:
                found[place[0].label] = None
                continue
            inputs = self.inputs_of(recipe, place[1])
            if not inputs:
                found["token_id"] = None
            waiting += inputs
        order = [location.label for location in ActivationLocationType]
        return tuple(sorted(found, key=lambda name: order.index(name) if name in order else -1))

    def describe(
        self, location: ActivationLocationType, pass_type: PassType = PassType.FORWARD
    ) -> str:
        """Where a location's values come from, for people."""
        array = self.reader.arrays.get((location, pass_type))
        if array is not None:
            error = self.errors.get(array.spec.key)
            measured = "" if error is None else f" (measured error {error:.1e})"
            return f"stored {array.spec.dtype.value}{measured}"
        kind = self.kind(location, pass_type)
        if kind == "not obtainable":
            return self.model.architecture.why_absent(location)
        if kind == "needs a model":
            return kind
        layers = self._layers(location)
        names = dict.fromkeys(
            name for layer in layers for name in self.roots(location, layer, pass_type)
        )
        return f"reconstructed from {', '.join(names)}"

    def describe_scalar(self, declared: DerivedScalar) -> str:
        """Where a derived scalar's values come from, for people."""
        source = rescaled_source(declared, self.dimensions)
        if source is not None:
            return self.describe(source.location, source.pass_type)
        inputs = dict.fromkeys(self._scalar_inputs(declared))
        notes = [f"{of} ({self.describe(of, pass_type)})" for of, pass_type in inputs]
        return f"derived from {', '.join(notes)}"

    def _scalar_inputs(
        self, declared: DerivedScalar
    ) -> Iterator[tuple[ActivationLocationType, PassType]]:
        for source in declared.sources:
            if isinstance(source.of, ActivationLocationType):
                yield source.of, source.pass_type
            elif source.of == Direction.FINAL_RESIDUAL_GRAD:
                yield ActivationLocationType.RESID_POST_MLP, PassType.BACKWARD
            elif source.of in SCALARS:
                yield from self._scalar_inputs(SCALARS[source.of])

    def require(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> Recipe | None:
        """The place's recipe, or None where it is stored or a gradient that follows.

        Raises:
            Unavailable: neither; the message says what would be needed.
        """
        if (location, pass_type) in self.reader.arrays:
            return None
        if pass_type is PassType.BACKWARD:
            if (location, layer) in self.gradients.reachable:
                return None
        elif (location, layer) in self.routes:
            return self.routes[location, layer]
        if not location.is_online and not self.exists(location):
            raise Unavailable(
                f"{self.model.architecture.why_absent(location)}. Ask for one of "
                f"{', '.join(str(one) for one in self.model.architecture.taps)}.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            )
        stored = ", ".join(sorted(array.spec.key for array in self.reader.arrays.values()))
        recipes = [
            recipe
            for recipe in self.recipes
            if recipe.target is location and pass_type is PassType.FORWARD
        ]
        ways = " or ".join(self._needs(recipe) for recipe in recipes)
        raise Unavailable(
            f"{location}/{pass_type} is not stored here and cannot be reconstructed"
            f"{f': it would need {ways}' if ways else ''}. Stored: {stored}. "
            + _advice(location, pass_type),
            kind=ErrorKind.NOT_STORED,
        )

    def _needs(self, recipe: Recipe) -> str:
        inputs = " and ".join(str(source.of) for source in recipe.inputs) or "token_id"
        weights = ", ".join(str(name) for name in recipe.weights)
        return f"{inputs} with the weights {weights}" if weights else inputs

    def sequence(self, rows: SequenceRows) -> "SequenceValues":
        """The values of one sequence; each thread keeps the last one it asked for."""
        latest: SequenceValues | None = getattr(self._latest, "values", None)
        if latest is None or latest.rows != rows:
            latest = self._latest.values = SequenceValues(self, rows)
        return latest


def _advice(location: ActivationLocationType, pass_type: PassType) -> str:
    if location.is_online:
        return "It exists in a pass with an autoencoder spliced in: ask a prompt."
    if pass_type is PassType.BACKWARD:
        return (
            "Add gradients of an objective with `actstore ingest … --set NAME --objective "
            f"next_token_log_prob --gradients {location}`."
        )
    return f"Ingest it with `--locations {location}` into another store."
