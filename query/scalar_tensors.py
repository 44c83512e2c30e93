"""Several scalars' tensors in memory, by name and pass: looked up, filtered, combined.

Nothing here is changed once it is made; every operation gives a new container. Formulas and
names: derived_scalars.md (c.7).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from actstore.query.containers import ActivationsAndMetadata, one_device
from actstore.query.derived.registry import SCALARS, scalar
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.vocabulary import NodeType, PassType

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = ["DstAndPassType", "ScalarTensors"]

DstAndPassType = tuple[str, PassType]


class ScalarTensors:
    """(scalar, pass) -> tensors by layer.

    Args:
        activations: all on one device. Their order is that of ties in rankings.

    Raises:
        InvalidInput: a scalar is unknown, stands under another name, or on another device.
    """

    def __init__(self, activations: Mapping[DstAndPassType, ActivationsAndMetadata]) -> None:
        held = dict(activations)
        for (dst, pass_type), values in held.items():
            if (values.dst, values.pass_type) != (dst, pass_type) or scalar(dst).name != dst:
                raise _invalid(f"{values!r} stands under {dst}, {pass_type}.")
        one_device(
            "A store",
            (one for each in held.values() for one in each.activations_by_layer_index.values()),
        )
        self._held: Mapping[DstAndPassType, ActivationsAndMetadata] = MappingProxyType(held)

    @classmethod
    def from_list(cls, activations: Iterable[ActivationsAndMetadata]) -> Self:
        """From tensors that name themselves.

        Raises:
            InvalidInput: a scalar comes twice with the same pass, or is unknown.
        """
        held: dict[DstAndPassType, ActivationsAndMetadata] = {}
        for values in activations:
            if (values.dst, values.pass_type) in held:
                raise _invalid(f"{values.dst} {values.pass_type} is given twice.")
            held[values.dst, values.pass_type] = values
        return cls(held)

    # What is there

    @property
    def activations(self) -> Mapping[DstAndPassType, ActivationsAndMetadata]:
        """Everything, read-only."""
        return self._held

    @property
    def dsts(self) -> list[str]:
        """Names of the scalars, each once, in order."""
        return list(dict.fromkeys(dst for dst, _ in self._held))

    @property
    def node_types(self) -> set[NodeType]:
        """Types of their nodes."""
        return {SCALARS[dst].node_type for dst in self.dsts}

    @property
    def pass_types(self) -> set[PassType]:
        """Passes of at least one of them."""
        return {pass_type for _, pass_type in self._held}

    @property
    def device(self) -> "device | None":
        """Where the tensors are; None if there are none."""
        found = (values.device for values in self._held.values())
        return next((at for at in found if at is not None), None)

    def numel(self) -> int:
        """Values of all scalars and passes, masked pairs included."""
        return sum(values.numel for values in self._held.values())

    def get_activations_and_metadata(
        self, dst: str, pass_type: PassType = PassType.FORWARD
    ) -> ActivationsAndMetadata:
        """One scalar's tensors of one pass.

        Raises:
            InvalidInput: no such scalar.
            Unavailable: it is not in this store.
        """
        name = scalar(dst).name
        try:
            return self._held[name, pass_type]
        except KeyError:
            raise Unavailable(
                f"{name} {pass_type} is not here; there are "
                f"{', '.join(f'{of} {kind}' for of, kind in self._held) or 'no scalars'}. "
                "Derive it too.",
                kind=ErrorKind.NOT_STORED,
            ) from None

    # Functions of the tensors

    def apply_transform_fn_to_activations(self, transform_fn: Callable[..., "Tensor"]) -> Self:
        """``transform_fn(tensor)`` of every tensor; it must not change its argument."""
        return self._each(lambda values: values.apply_transform_fn_to_activations(transform_fn))

    def apply_transform_fn_to_multiple_activations(
        self, transform_fn: Callable[..., "Tensor"], others: Sequence["ScalarTensors"]
    ) -> Self:
        """``transform_fn(tensor, *other tensors)`` of every tensor.

        Raises:
            InvalidInput: another store has other scalars, passes or layers.
        """
        for other in others:
            if set(other._held) != set(self._held):
                raise _invalid(
                    f"{self!r} and {other!r} hold different scalars. Take the same ones with "
                    "`filter_dst_and_pass_types`."
                )
        return type(self)(
            {
                key: values.apply_transform_fn_to_multiple_activations(
                    transform_fn, [other._held[key] for other in others]
                )
                for key, values in self._held.items()
            }
        )

    def average(self, others: Sequence["ScalarTensors"]) -> Self:
        """Mean over this store and the others."""
        return self.apply_transform_fn_to_multiple_activations(
            lambda *tensors: sum(tensors[1:], start=tensors[0]) / len(tensors), others
        )

    def __add__(self, other: "ScalarTensors") -> Self:
        return self.apply_transform_fn_to_multiple_activations(lambda a, b: a + b, [other])

    def __sub__(self, other: "ScalarTensors") -> Self:
        return self.apply_transform_fn_to_multiple_activations(lambda a, b: a - b, [other])

    def __eq__(self, other: object) -> bool:
        """Whether scalars, layers, shapes and, to torch's usual tolerance, values are the same."""
        if not isinstance(other, ScalarTensors):
            return NotImplemented
        return set(self._held) == set(other._held) and all(
            values == other._held[key] for key, values in self._held.items()
        )

    __hash__ = None  # type: ignore[assignment]  # equality is to a tolerance

    def _each(self, function: Callable[[ActivationsAndMetadata], ActivationsAndMetadata]) -> Self:
        return type(self)({key: function(values) for key, values in self._held.items()})

    # Choices

    def filter_with_function(self, keep: Callable[[str, PassType], bool]) -> Self:
        """Those for which ``keep(dst, pass_type)``."""
        return type(self)({key: values for key, values in self._held.items() if keep(*key)})

    def filter_dsts(self, dsts: Iterable[str]) -> Self:
        """Those of these names, if present."""
        names = {scalar(dst).name for dst in dsts}
        return self.filter_with_function(lambda dst, _: dst in names)

    def filter_pass_type(self, pass_type: PassType) -> Self:
        """Those of one pass."""
        return self.filter_with_function(lambda _, kind: kind is pass_type)

    def filter_dst_and_pass_types(self, keys: Iterable[DstAndPassType]) -> Self:
        """Those of these names and passes, if present."""
        kept = {(scalar(dst).name, pass_type) for dst, pass_type in keys}
        return self.filter_with_function(lambda *key: key in kept)

    def filter_node_types(self, node_type: NodeType) -> Self:
        """Those whose nodes are of one type."""
        return self.filter_with_function(lambda dst, _: SCALARS[dst].node_type is node_type)

    def filter_layers(self, layer_indices: Iterable[int] | None) -> Self:
        """Only these layers, if present; what has no layers stays. None keeps all."""
        kept = None if layer_indices is None else list(layer_indices)
        return self._each(lambda values: values.filter_layers(kept))

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{of} {kind}' for of, kind in self._held)})"


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
