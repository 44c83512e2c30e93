"""One location's or scalar's tensors in memory, by layer.

Nothing here is changed once it is made. Operations give new containers, whose tensors may be
the old ones; mappings cannot be written to. Formulas and names: derived_scalars.md (c.1).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from actstore.query.indexing import (
    DUMMY,
    DerivedScalarIndex,
    LayerIndexer,
)
from actstore.query.reductions import LayerValues, rank, without_masked_pairs
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import PassType

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = ["ActivationsAndMetadata", "Layer", "one_device"]

Layer = int | None
TensorFunction = Callable[..., "Tensor"]


@dataclass(frozen=True, eq=False)
class ActivationsAndMetadata:
    """One location's or scalar's tensors of one pass, by layer.

    Attributes:
        dst: the location's or scalar's name.
        pass_type: values, or gradients.
        activations_by_layer_index: layer -> tensor, ascending and read-only; outside the
            blocks the one layer None. All on one device.

    Raises:
        InvalidInput: layers and None together, or several devices.
    """

    dst: str
    pass_type: PassType
    activations_by_layer_index: Mapping[Layer, "Tensor"]

    def __post_init__(self) -> None:
        given = dict(self.activations_by_layer_index)
        if any(layer is not None and (type(layer) is not int or layer < 0) for layer in given):
            raise _invalid(f"{self.dst} has the layers {list(given)}; count from 0, or use None.")
        if None in given and len(given) > 1:
            raise _invalid(f"{self.dst} has the layers {list(given)}; None stands alone.")
        ordered = {layer: given[layer] for layer in sorted(given, key=lambda at: at or 0)}
        one_device(self.dst, ordered.values())
        object.__setattr__(self, "dst", str(self.dst))
        object.__setattr__(self, "pass_type", PassType(self.pass_type))
        object.__setattr__(self, "activations_by_layer_index", MappingProxyType(ordered))

    # What is there

    @property
    def layer_indices(self) -> list[Layer]:
        """The layers, ascending."""
        return list(self.activations_by_layer_index)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first layer's tensor.

        Raises:
            InvalidInput: there is no tensor.
        """
        return tuple(self._first().shape)

    @property
    def numel(self) -> int:
        """Values of all layers."""
        return sum(tensor.numel() for tensor in self._tensors())

    @property
    def device(self) -> "device | None":
        """Where the tensors are; None if there are none."""
        return next((tensor.device for tensor in self._tensors()), None)

    def _tensors(self) -> Iterable["Tensor"]:
        return self.activations_by_layer_index.values()

    def _first(self) -> "Tensor":
        for tensor in self._tensors():
            return tensor
        raise _invalid(f"{self.dst} has no layer, so no value. Check what was recorded.")

    def at(self, layer: Layer) -> "Tensor":
        """The tensor of one layer.

        Raises:
            InvalidInput: there is none.
        """
        try:
            return self.activations_by_layer_index[layer]
        except KeyError:
            raise InvalidInput(
                f"{self.dst} {self.pass_type} has no layer {layer}; it has {self.layer_indices}.",
                kind=ErrorKind.UNKNOWN_LAYER,
            ) from None

    # Copies and choices

    def cpu(self) -> Self:
        """The same on the CPU."""
        return self._each(lambda tensor: tensor.cpu())

    def clone(self) -> Self:
        """A detached copy."""
        return self._each(lambda tensor: tensor.detach().clone())

    def _each(self, function: TensorFunction) -> Self:
        changed = {at: function(tensor) for at, tensor in self.activations_by_layer_index.items()}
        return replace(self, activations_by_layer_index=changed)

    def filter_layers(self, layer_indices: Iterable[int] | None) -> Self:
        """Only these layers, if present; what has no layers stays. None keeps all."""
        if layer_indices is None:
            return self
        kept = {None, *layer_indices}
        found = {at: one for at, one in self.activations_by_layer_index.items() if at in kept}
        return replace(self, activations_by_layer_index=found)

    def apply_layer_indexer(
        self, indexer: LayerIndexer, desired_layer_indices: Sequence[Layer] | None = None
    ) -> Self:
        """Tensors for exactly the desired layers.

        A source layer that is missing is zero: nothing there is upstream of an objective.
        Without any tensor, and where the indexer names none, that is a 0-d zero. What has no
        layers serves every layer. The original stays as it is.

        Args:
            indexer: desired layers -> source layers.
            desired_layer_indices: the own layers by default.

        Raises:
            InvalidInput: the value outside the blocks is asked of one that has layers.
        """
        import torch

        own = self.activations_by_layer_index
        desired = self.layer_indices if desired_layer_indices is None else desired_layer_indices
        chosen: dict[Layer, Tensor] = {}
        for layer, source in zip(desired, indexer.source_layers(desired), strict=True):
            if source == DUMMY or not own:
                chosen[layer] = torch.zeros((), device=self.device)
            elif source in own:
                chosen[layer] = own[source]
            elif None in own:
                chosen[layer] = own[None]
            elif source is None:
                raise InvalidInput(
                    f"{self.dst} has the layers {self.layer_indices} and no value outside the "
                    "blocks. Ask for a layer.",
                    kind=ErrorKind.UNKNOWN_LAYER,
                )
            else:
                chosen[layer] = torch.zeros_like(self._first())
        return replace(self, activations_by_layer_index=chosen)

    # Functions of the tensors

    def apply_transform_fn_to_activations(
        self,
        transform_fn: TensorFunction,
        output_dst: str | None = None,
        output_pass_type: PassType | None = None,
    ) -> Self:
        """``transform_fn(tensor)`` of every layer.

        Args:
            transform_fn: must not change its argument.
            output_dst: what the result is called; as this by default.
            output_pass_type: of the result; as this by default.
        """
        return self.apply_layerwise_transform_fn_to_multiple_activations(
            lambda tensor, _: transform_fn(tensor), (), output_dst, output_pass_type
        )

    def apply_layerwise_transform_fn_to_activations(
        self,
        transform_fn: TensorFunction,
        output_dst: str | None = None,
        output_pass_type: PassType | None = None,
    ) -> Self:
        """``transform_fn(tensor, layer)`` of every layer."""
        return self.apply_layerwise_transform_fn_to_multiple_activations(
            transform_fn, (), output_dst, output_pass_type
        )

    def apply_transform_fn_to_multiple_activations(
        self,
        transform_fn: TensorFunction,
        others: Sequence["ActivationsAndMetadata"],
        output_dst: str | None = None,
        output_pass_type: PassType | None = None,
    ) -> Self:
        """``transform_fn(tensor, *other tensors)`` of every layer.

        Raises:
            InvalidInput: another one has other layers.
        """
        return self.apply_layerwise_transform_fn_to_multiple_activations(
            lambda *arguments: transform_fn(*arguments[:-1]), others, output_dst, output_pass_type
        )

    def apply_layerwise_transform_fn_to_multiple_activations(
        self,
        transform_fn: TensorFunction,
        others: Sequence["ActivationsAndMetadata"],
        output_dst: str | None = None,
        output_pass_type: PassType | None = None,
    ) -> Self:
        """``transform_fn(tensor, *other tensors, layer)`` of every layer.

        Raises:
            InvalidInput: another one has other layers.
        """
        for other in others:
            if other.layer_indices != self.layer_indices:
                raise InvalidInput(
                    f"{self.dst} has the layers {self.layer_indices} and {other.dst} "
                    f"{other.layer_indices}. Take the same ones with `filter_layers`.",
                    kind=ErrorKind.UNKNOWN_LAYER,
                )
        made = {
            layer: transform_fn(
                tensor, *(other.activations_by_layer_index[layer] for other in others), layer
            )
            for layer, tensor in self.activations_by_layer_index.items()
        }
        return replace(
            self,
            dst=self.dst if output_dst is None else output_dst,
            pass_type=self.pass_type if output_pass_type is None else output_pass_type,
            activations_by_layer_index=made,
        )

    def __add__(self, other: "ActivationsAndMetadata") -> Self:
        return self.apply_transform_fn_to_multiple_activations(_plus, [other])

    def __sub__(self, other: "ActivationsAndMetadata") -> Self:
        return self.apply_transform_fn_to_multiple_activations(_minus, [other])

    def __eq__(self, other: object) -> bool:
        """Whether layers, shapes and, to torch's usual tolerance, values are the same.

        Name and pass do not count.
        """
        if not isinstance(other, ActivationsAndMetadata):
            return NotImplemented
        return self.layer_indices == other.layer_indices and all(
            _close(mine, theirs)
            for mine, theirs in zip(self._tensors(), other._tensors(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # equality is to a tolerance

    # Numbers

    def max(self) -> "Tensor":
        """0-d: the greatest value of all layers; NaN and masked pairs do not count.

        Raises:
            InvalidInput: there is no value.
        """
        values, _ = rank(self.layer_values(), 1, largest=True)
        if not len(values):
            raise _invalid(f"{self.dst} has no value that ranks.")
        return values[0]

    def sum(self) -> "Tensor":
        """0-d float64: the sum over all layers, without masked pairs."""
        return self._total(lambda tensor: tensor)

    def sum_abs(self) -> "Tensor":
        """0-d float64: the sum of magnitudes over all layers, without masked pairs."""
        return self._total(lambda tensor: tensor.abs())

    def _total(self, function: TensorFunction) -> "Tensor":
        import torch

        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tensor in self._tensors():
            wide = without_masked_pairs(self.dst, tensor).to(torch.float64)
            total = total + function(wide).sum()
        return total

    def topk(
        self, k: int | None = None, largest: bool = True
    ) -> tuple["Tensor", list[DerivedScalarIndex]]:
        """The k best values of all layers; see :func:`actstore.query.reductions.rank`.

        Args:
            k: how many at most; None for all.
            largest: the greatest, else the least.

        Returns:
            ``(rank,)`` values, best first, and where each stands.
        """
        return rank(self.layer_values(), k, largest)

    def layer_values(self) -> list[LayerValues]:
        """Every layer's tensor with its labels, in order."""
        return [
            LayerValues(self.dst, self.pass_type, layer, tensor)
            for layer, tensor in self.activations_by_layer_index.items()
        ]

    def __repr__(self) -> str:
        layers = {layer: tuple(one.shape) for layer, one in self.activations_by_layer_index.items()}
        return f"ActivationsAndMetadata({self.dst!r}, {self.pass_type}, {layers})"


def one_device(name: str, tensors: Iterable["Tensor"]) -> None:
    """Refuse tensors of several devices.

    Raises:
        InvalidInput: there are several.
    """
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise _invalid(f"{name} is on {', '.join(sorted(devices))}. Move it to one device.")


def _plus(left: "Tensor", right: "Tensor") -> "Tensor":
    return left + right


def _minus(left: "Tensor", right: "Tensor") -> "Tensor":
    return left - right


def _close(left: "Tensor", right: "Tensor") -> bool:
    import torch

    if left.shape != right.shape:
        return False
    dtype = torch.promote_types(left.dtype, right.dtype)
    return torch.allclose(left.to(dtype), right.to(dtype))


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
