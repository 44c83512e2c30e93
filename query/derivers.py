"""A derived scalar made ready for one question: from raw values to containers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.query.containers import ActivationsAndMetadata
from actstore.query.derived import DerivedScalar, Source, parse_scalar
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN, RawValues, evaluate, layers_of
from actstore.query.derived.registry import inputs_of, requires_gradient
from actstore.query.derived_store import DerivedScalarStore
from actstore.query.pass_values import PassValues
from actstore.query.raw_store import RawActivationStore
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.weights import ModelWeights
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ScalarDeriver", "derive_from_raw", "values_of"]


@dataclass(frozen=True)
class ScalarDeriver:
    """A scalar and what a question adds to it.

    Attributes:
        scalar: the declaration.
        config: the question.
    """

    scalar: DerivedScalar
    config: DstConfig = PLAIN

    @classmethod
    def of(cls, name: str, config: DstConfig = PLAIN) -> "ScalarDeriver":
        """The deriver of a scalar by name.

        Raises:
            InvalidInput: there is no such scalar, or the name holds a layer.
        """
        declared, layer = parse_scalar(name)
        if layer is not None:
            raise InvalidInput(
                f"{name!r} names layer {layer}; give it as DstConfig(layer_indices=[{layer}]).",
                kind=ErrorKind.UNKNOWN_SCALAR,
            )
        return cls(declared, config)

    @property
    def derivable_pass_types(self) -> tuple[PassType, ...]:
        """Forward, and backward where the config asks for it and it is defined."""
        backward = self.config.derive_gradients and self.scalar.gradient is not None
        return (PassType.FORWARD, PassType.BACKWARD) if backward else (PassType.FORWARD,)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The inputs, other scalars among them."""
        return self.scalar.sources_for(self.config)

    @property
    def required(self) -> tuple[Source, ...]:
        """The raw locations and directions that it rests on."""
        return inputs_of(self.scalar)

    @property
    def requires_gradient(self) -> bool:
        """Whether the forward value needs a backward pass that was run."""
        return requires_gradient(self.scalar)

    def derive(
        self, values: RawValues, pass_type: PassType = PassType.FORWARD
    ) -> ActivationsAndMetadata:
        """The scalar at every layer where it exists.

        Args:
            values: raw values of one sequence, of a pass, a container or a store.
            pass_type: one of :attr:`derivable_pass_types`, or backward where it is defined.

        Returns:
            float64 ``(token, *axes)`` per layer.

        Raises:
            Unavailable: a source cannot be had.
            InvalidInput: the config does not fit the scalar, or it has no backward value.
        """
        layers = layers_of(self.scalar, values.dimensions.n_layers, self.config)
        tensors = {
            layer: evaluate(self.scalar, values, layer, config=self.config, pass_type=pass_type)
            for layer in layers
        }
        return ActivationsAndMetadata(self.scalar.name, pass_type, tensors)


def values_of(raw: RawActivationStore, weights: ModelWeights) -> PassValues:
    """A container's tensors, with the model's weights, as derived scalars read them."""
    found: dict[tuple[ActivationLocationType, PassType, int | None], Tensor] = {}
    for (location, pass_type), held in raw.activations.items():
        for layer, tensor in held.activations_by_layer_index.items():
            ordered = tensor.transpose(1, 2) if location.is_pair_shaped else tensor
            found[location, pass_type, layer] = ordered
    return PassValues(found, weights)


def derive_from_raw(
    values: RawValues, derivers: Iterable[ScalarDeriver] | Mapping[str, DstConfig]
) -> DerivedScalarStore:
    """Several scalars of one sequence, every derivable pass of each.

    Args:
        values: raw values of one sequence.
        derivers: the scalars; or names with their configs.

    Raises:
        InvalidInput: a scalar is given twice.
        Unavailable: a source cannot be had.
    """
    if isinstance(derivers, Mapping):
        derivers = [ScalarDeriver.of(name, config) for name, config in derivers.items()]
    return DerivedScalarStore.from_list(
        [
            deriver.derive(values, pass_type)
            for deriver in derivers
            for pass_type in deriver.derivable_pass_types
        ]
    )
