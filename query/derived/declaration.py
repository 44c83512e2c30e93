"""What a derived scalar is: one declaration that everything else is read from.

A declaration names its sources, its weights, its axes and the function that turns the
sources' tensors into the value. Names, shapes, tables, bounds and messages follow from
it, so adding a scalar is adding one declaration.

Nothing here imports torch: listing scalars and ranking scaled arrays do not need it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from actstore.query.derived.config import ABOUT, DstConfig
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import WeightName
from actstore.store.model.sources import LayerRule, Source
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
)

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.query.derived.post_norms import PostNorm
    from actstore.store.model.autoencoders import Autoencoder

__all__ = [
    "UNIT_ARGUMENTS",
    "Coefficient",
    "Dependence",
    "DerivedScalar",
    "Direction",
    "Formula",
    "Frame",
    "General",
    "Gradient",
    "Identity",
    "LatentWrites",
    "LayerRule",
    "Product",
    "ScaledBy",
    "Source",
]


UNIT_ARGUMENTS: Mapping[Dimension, str] = MappingProxyType(
    {
        Dimension.NEURON: "neurons",
        Dimension.HEAD: "heads",
        Dimension.KV_HEAD: "heads",
        Dimension.LATENT: "latents",
        Dimension.CHANNEL: "channels",
        Dimension.HEAD_CHANNEL: "channels",
        Dimension.ATTENDED: "attended",
    }
)
"""Unit axis -> the argument by which every query restricts it."""


class Direction(StrEnum):
    """A gradient at one residual stream, on which writes before it are projected.

    As a source it is ``(token, channel)``; a write that does not come strictly before that
    residual stream gives zeros.
    """

    FINAL_RESIDUAL_GRAD = "final_residual_grad"
    """Gradient of the pass that was run, at the last residual stream that it reached: before
    the final norm, or before the traced node."""
    FINAL_ACTIVATION_RESIDUAL_GRAD = "final_activation_residual_grad"
    """Gradient of the traced activation at the residual stream before it, recomputed."""
    SUBNODE_ATTRIBUTION_GRAD = "subnode_attribution_grad"
    """Gradient of one node's attribution at the residual stream before it, recomputed."""


class Coefficient(StrEnum):
    """Numbers per unit, float64, that the model alone fixes."""

    WRITE_NORM = "write_norm"
    """L2 norm of a neuron's row of the MLP's output weights."""
    QUERY_KEY_SCALE = "query_key_scale"
    """Square root of the factor on query-key products: d_head^(-1/4) in GPT-2."""


@dataclass(frozen=True)
class Identity:
    """The value is the raw value of the same layer, token and unit."""


@dataclass(frozen=True)
class ScaledBy:
    """The value is the raw value of the same layer, token and unit times a coefficient."""

    coefficient: Coefficient


@dataclass(frozen=True)
class Product:
    """The value is the product of the sources' values at the same layer, token and unit."""


@dataclass(frozen=True)
class General:
    """The value is any function of its sources' rows of the sequence."""


Dependence = Identity | ScaledBy | Product | General
"""How a value hangs on raw ones: all that a search needs to bound it from zone maps."""


@dataclass(frozen=True)
class LatentWrites:
    """As a weight: what each latent of an autoencoder writes, ``(latent, channel)``.

    The decoder's rows; through the MLP's output weights where it decodes neurons.
    """

    node_type: NodeType


class Frame(Protocol):
    """What a formula may ask for besides its sources and weights."""

    @property
    def name(self) -> str:
        """The scalar's name, for messages."""
        ...

    @property
    def layer(self) -> int | None:
        """The value's layer."""
        ...

    @property
    def config(self) -> DstConfig:
        """The question."""
        ...

    @property
    def dimensions(self) -> ModelDimensions:
        """The model's sizes."""
        ...

    def weight(self, name: WeightName | LatentWrites, layer: int | None) -> "Tensor":
        """A weight in float64."""
        ...

    def autoencoder(self, node_type: NodeType, layer: int) -> "Autoencoder":
        """An autoencoder in float64."""
        ...

    def restored(self, node_type: NodeType, latents: "Tensor") -> "Tensor":
        """Latents ``(token, latent)`` with their input's normalisation undone."""
        ...

    def post_norm(self, weight: WeightName) -> "PostNorm | None":
        """The norm that what a weight maps into the stream passes in this layer."""
        ...

    def recompute(
        self,
        target: ActivationLocationType,
        layer: int,
        given: Mapping[ActivationLocationType, "Tensor"],
        before: "Tensor | None" = None,
        *,
        detach_scale: bool = False,
    ) -> "Tensor":
        """A location as a differentiable function of what is given; see ``recompute``."""
        ...


_OF_A_LAYER = {LayerRule.SAME, LayerRule.PREVIOUS}

Formula = Callable[[Sequence["Tensor"], Sequence["Tensor"], Frame], "Tensor"]
"""``(sources, weights, frame) -> value``, float64, for one whole sequence and one layer.

Sources and weights come in the order of the declaration; the first axis of every source
and of the value is the token.
"""


@dataclass(frozen=True)
class Gradient:
    """How the backward value of a derived scalar is made.

    Attributes:
        sources: its inputs.
        formula: the function; the first source where None.
        definition: the formula in plain text.
    """

    sources: tuple[Source, ...]
    formula: Formula | None = None
    definition: str = "gradient of the objective with respect to the value"


@dataclass(frozen=True)
class DerivedScalar:
    """A named function of raw tensors and weights.

    Attributes:
        name: lower-case name, as in code, docs, SQL and paths.
        meaning: one line for people.
        definition: the formula in plain text, such as ``a[t, f] * |W_out[f]|``; the symbols
            are those of the docs' pages.
        axes: the axes after the token axis.
        node_type: what the last axis indexes.
        has_layers: whether there is one tensor per layer.
        sources: the inputs, the one that ``dependence`` speaks of first.
        dependence: how the value depends on raw values per unit.
        weights: the model's weights that the formula needs, of the value's own layer.
        formula: the function; None where ``dependence`` already says it.
        row_wise: whether the formula gives a row the same bits without its neighbours. True
            of elementwise products, not of matrix products.
        whole: the sources that such a formula takes with all their rows, by number.
        is_flattened: the first axis runs over pairs (token, attended token up to it), row by
            row, and not over tokens.
        gradient: how its backward value is made; None where it has none.
        about: the member of ``DstConfig`` that names the node the scalar is about.
        only_node_layer: it exists at that node's layer alone.
        latents: the autoencoders whose latents or errors it speaks of.
        choose_sources: the inputs for a config, where they depend on it; ``sources`` are then
            the usual ones.
        layers: the layers at which it exists, ascending, where it is not at all of them.
        origin: where a user declared it; None for one of the package's own.
    """

    name: str
    meaning: str
    definition: str
    axes: tuple[Dimension, ...]
    node_type: NodeType
    has_layers: bool
    sources: tuple[Source, ...]
    dependence: Dependence
    weights: tuple[WeightName | LatentWrites, ...] = ()
    formula: Formula | None = None
    row_wise: bool = False
    whole: tuple[int, ...] = ()
    is_flattened: bool = False
    gradient: Gradient | None = None
    about: str | None = None
    only_node_layer: bool = False
    latents: NodeType | None = None
    choose_sources: Callable[[DstConfig], tuple[Source, ...]] | None = None
    layers: tuple[int, ...] | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        if self.name != self.name.lower() or not self.name.isidentifier():
            raise _invalid(self.name, "a name is a lower-case identifier")
        if not self.meaning.strip() or not self.definition.strip():
            raise _invalid(self.name, "it says what it means and how it is defined")
        if not self.axes or not self.sources:
            raise _invalid(self.name, "at least one axis and one source are needed")
        implied = isinstance(self.dependence, Identity | ScaledBy)
        if implied:
            object.__setattr__(self, "row_wise", True)
        if implied == (self.formula is not None):
            raise _invalid(self.name, "a formula is needed unless the dependence is the formula")
        if implied and (
            len(self.sources) != 1
            or self.weights
            or self.sources[0].layer not in (LayerRule.SAME, LayerRule.NONE)
        ):
            raise _invalid(self.name, "a value per raw value has that one source and no weights")
        rules = {source.layer for source in self.sources}
        if (rules == {LayerRule.NONE}) if self.has_layers else rules & _OF_A_LAYER:
            raise _invalid(self.name, f"has_layers={self.has_layers} does not fit its sources")
        if self.layers is not None and not self._has_sound_layers(self.layers):
            raise _invalid(self.name, f"layers is {self.layers}; give ascending layer numbers")
        if self.about not in (None, *ABOUT) or (self.only_node_layer and self.about is None):
            raise _invalid(self.name, f"about is {self.about!r}; use one of {', '.join(ABOUT)}")

    def _has_sound_layers(self, layers: tuple[int, ...]) -> bool:
        if not self.has_layers or not layers:
            return False
        return min(layers) >= 0 and list(layers) == sorted(set(layers))

    def sources_for(self, config: DstConfig) -> tuple[Source, ...]:
        """The inputs for a config."""
        return self.sources if self.choose_sources is None else self.choose_sources(config)

    @property
    def is_pair_shaped(self) -> bool:
        """Whether an axis runs over attended tokens."""
        return Dimension.ATTENDED in self.axes

    @property
    def ranked_axes(self) -> tuple[Dimension, ...]:
        """The unit axes of a ranking, in the order that breaks ties.

        The pairs of a flattened scalar rank by their attended token, as they do unflattened.
        """
        return (Dimension.ATTENDED, *self.axes) if self.is_flattened else self.axes

    @property
    def raw_source(self) -> Source | None:
        """The raw source that this value rescales; None where it is no such thing.

        Exact searches read that array and its zone maps.
        """
        implied = isinstance(self.dependence, Identity | ScaledBy)
        is_raw = isinstance(self.sources[0].of, ActivationLocationType)
        return self.sources[0] if implied and is_raw else None

    @property
    def pass_type(self) -> PassType:
        """The pass of the first source."""
        return self.sources[0].pass_type

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"DerivedScalar({self.name!r}, axes={[str(axis) for axis in self.axes]})"


def _invalid(name: str, rule: str) -> InvalidInput:
    return InvalidInput(
        f"The declaration of {name!r} is inconsistent: {rule}.", kind=ErrorKind.INVALID_ARGUMENT
    )
