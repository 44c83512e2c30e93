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
from typing import TYPE_CHECKING

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "UNIT_ARGUMENTS",
    "Coefficient",
    "Dependence",
    "DerivedScalar",
    "Formula",
    "General",
    "Identity",
    "LayerRule",
    "Product",
    "ScaledBy",
    "Source",
]


class LayerRule(StrEnum):
    """Which layer of a source a value at layer ``l`` is made from."""

    SAME = "same"
    PREVIOUS = "previous"
    NONE = "none"


@dataclass(frozen=True)
class Source:
    """One input of a derived scalar or of a reconstruction.

    Attributes:
        of: a location, or the name of another derived scalar.
        pass_type: its forward values or their gradient.
        layer: the same layer, the one before, a fixed one (an integer; negative ones count
            from the last), or none for a source outside the blocks. The residual stream
            before layer 0 is the embedding's output.
    """

    of: ActivationLocationType | str
    pass_type: PassType = PassType.FORWARD
    layer: LayerRule | int = LayerRule.SAME

    def __post_init__(self) -> None:
        if self.layer is LayerRule.PREVIOUS and self.of is not _L.RESID_POST_MLP:
            raise _invalid(str(self.of), "only resid_post_mlp continues before layer 0")
        if isinstance(self.of, ActivationLocationType) and (
            self.of.has_layers == (self.layer is LayerRule.NONE)
        ):
            raise _invalid(str(self.of), f"layer={self.layer!r} does not fit its layers")

    @property
    def location(self) -> ActivationLocationType:
        """The location, for a source that is one."""
        assert isinstance(self.of, ActivationLocationType), f"{self.of} is a derived scalar"
        return self.of

    def place(
        self, layer: int | None, n_layers: int
    ) -> tuple[ActivationLocationType | str, int | None]:
        """The source and its layer for a value at ``layer``.

        Args:
            layer: the value's layer, None for one outside the blocks.
            n_layers: blocks of the model.

        >>> Source(ActivationLocationType.RESID_POST_MLP, layer=LayerRule.PREVIOUS).place(0, 12)
        (ActivationLocationType.RESID_POST_EMBEDDING, None)
        """
        if isinstance(self.layer, int):
            return self.of, range(n_layers)[self.layer]
        if self.layer is LayerRule.NONE:
            return self.of, None
        if self.layer is LayerRule.SAME:
            return self.of, layer
        assert layer is not None, "a value outside the blocks has no previous layer"
        return (self.of, layer - 1) if layer else (_L.RESID_POST_EMBEDDING, None)


_L = ActivationLocationType


UNIT_ARGUMENTS: Mapping[Dimension, str] = MappingProxyType(
    {
        Dimension.NEURON: "neurons",
        Dimension.HEAD: "heads",
        Dimension.LATENT: "latents",
        Dimension.CHANNEL: "channels",
        Dimension.HEAD_CHANNEL: "channels",
        Dimension.ATTENDED: "attended",
    }
)
"""Unit axis -> the argument by which every query restricts it."""


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

Formula = Callable[[Sequence["Tensor"], Sequence["Tensor"]], "Tensor"]
"""``(sources, weights) -> value``, float64, for one whole sequence and one layer.

Sources and weights come in the order of the declaration; the first axis of every source
and of the value is the token.
"""


@dataclass(frozen=True)
class DerivedScalar:
    """A named function of raw tensors and weights.

    Attributes:
        name: lower-case name, as in code, docs, SQL and paths.
        meaning: one line for people, with the formula.
        axes: the axes after the token axis.
        node_type: what the last axis indexes.
        has_layers: whether there is one tensor per layer.
        sources: the inputs, the one that ``dependence`` speaks of first.
        dependence: how the value depends on raw values per unit.
        weights: the model's weights that the formula needs, of the value's own layer.
        formula: the function; None where ``dependence`` already says it.
        row_wise: whether the formula gives a row the same bits without its neighbours. True
            of elementwise products, not of matrix products.
    """

    name: str
    meaning: str
    axes: tuple[Dimension, ...]
    node_type: NodeType
    has_layers: bool
    sources: tuple[Source, ...]
    dependence: Dependence
    weights: tuple[WeightLocationType, ...] = ()
    formula: Formula | None = None
    row_wise: bool = False

    def __post_init__(self) -> None:
        if self.name != self.name.lower() or not self.name.isidentifier():
            raise _invalid(self.name, "a name is a lower-case identifier")
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
        if self.has_layers == all(source.layer is LayerRule.NONE for source in self.sources):
            raise _invalid(self.name, f"has_layers={self.has_layers} does not fit its sources")

    @property
    def is_pair_shaped(self) -> bool:
        """Whether an axis runs over attended tokens."""
        return Dimension.ATTENDED in self.axes

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
