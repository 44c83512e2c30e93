"""Derived scalars in memory: values at an index or node, sums, rankings, files.

What :meth:`actstore.query.session.Store.derive` returns carries its rows instead. Formulas and
names: derived_scalars.md (c.7).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from actstore.query.containers import ActivationsAndMetadata
from actstore.query.derived.registry import SCALARS
from actstore.query.indexing import DerivedScalarIndex
from actstore.query.reductions import LayerValues, rank, total, without_masked_pairs
from actstore.query.scalar_tensors import ScalarTensors
from actstore.query.tensor_files import load_activations, save_activations
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.nodes import NodeIndex
from actstore.store.vocabulary import Dimension, NodeType, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DerivedScalarStore"]

_KIND = "derived_scalar_store"


class DerivedScalarStore(ScalarTensors):
    """(scalar, pass) -> tensors by layer.

    Args:
        activations: all on one device. Their order is that of ties in rankings.

    Raises:
        InvalidInput: a scalar is unknown, stands under another name, or on another device.
    """

    # Values at a place

    @overload
    def __getitem__(self, key: str) -> ActivationsAndMetadata: ...

    @overload
    def __getitem__(self, key: DerivedScalarIndex | Sequence[DerivedScalarIndex]) -> "Tensor": ...

    def __getitem__(
        self, key: str | DerivedScalarIndex | Sequence[DerivedScalarIndex]
    ) -> "ActivationsAndMetadata | Tensor":
        """A scalar's forward tensors; the values at an index; those at several, stacked.

        Axes without an index stay whole. The values are a copy.

        Raises:
            InvalidInput: an unknown scalar, a layer or place that is not there, or indices
                whose values differ in shape.
            Unavailable: the scalar is not in this store.
        """
        import torch

        if isinstance(key, str):
            return self.get_activations_and_metadata(key)
        if isinstance(key, DerivedScalarIndex):
            return self._at(key)
        found = [self._at(index) for index in key]
        if len({one.shape for one in found}) != 1:
            raise _invalid(
                f"{len(found)} indices have values of the shapes "
                f"{sorted({tuple(one.shape) for one in found})}; only one shape can be stacked."
            )
        return torch.stack(found)

    def _at(self, index: DerivedScalarIndex) -> "Tensor":
        values = self.get_activations_and_metadata(index.dst, index.pass_type)
        tensor = values.at(index.layer_index)
        places = index.tensor_indices
        if len(places) > tensor.ndim or any(
            place is not None and place >= size
            for place, size in zip(places, tensor.shape, strict=False)
        ):
            raise InvalidInput(
                f"{index.dst} is {tuple(tensor.shape)} in layer {index.layer_index}; "
                f"{places} is outside.",
                kind=ErrorKind.UNKNOWN_UNIT,
            )
        # A copy, so that `value += 1` changes the value and not the store.
        return tensor[tuple(slice(None) if at is None else at for at in places)].clone()

    def get_dst_for_node_type(self, node_type: NodeType) -> str:
        """The one scalar of a node type.

        Raises:
            InvalidInput: there is none, or there are several.
        """
        found = [dst for dst in self.dsts if SCALARS[dst].node_type is node_type]
        if len(found) != 1:
            raise _invalid(
                f"{len(found)} scalars have {node_type} nodes: {', '.join(found) or 'none'}; "
                "exactly one must. Choose with `filter_dsts`."
            )
        return found[0]

    def get_ds_indices_for_node_indices(
        self, node_indices: Iterable[NodeIndex]
    ) -> list[DerivedScalarIndex]:
        """Where the nodes' values stand, each in the one scalar of its node type."""
        return [
            DerivedScalarIndex.from_node_index(node, self.get_dst_for_node_type(node.node_type))
            for node in node_indices
        ]

    def get_derived_scalars_for_node_indices(self, node_indices: Iterable[NodeIndex]) -> "Tensor":
        """The nodes' values, stacked: ``(node, *axes left open)``."""
        return self[self.get_ds_indices_for_node_indices(node_indices)]

    # Numbers

    def sum(
        self,
        node_type: NodeType | None = None,
        layer_indices: Iterable[int] | None = None,
        dims_to_keep: Sequence[Dimension] = (),
        pass_type: PassType = PassType.FORWARD,
    ) -> "Tensor":
        """Sum over scalars and layers; see :func:`actstore.query.reductions.total`.

        Args:
            node_type: of these nodes only.
            layer_indices: of these layers, and of what has none.
            dims_to_keep: axes that stay; every scalar must have them, equally long.
            pass_type: of this pass.
        """
        return total(self._pieces(node_type, layer_indices, pass_type), dims_to_keep)

    def sum_abs(
        self,
        node_type: NodeType | None = None,
        layer_indices: Iterable[int] | None = None,
        dims_to_keep: Sequence[Dimension] = (),
        pass_type: PassType = PassType.FORWARD,
    ) -> "Tensor":
        """Sum of magnitudes; see :meth:`sum`."""
        return self._magnitudes().sum(node_type, layer_indices, dims_to_keep, pass_type)

    def num_nonzero(
        self,
        node_type: NodeType | None = None,
        layer_indices: Iterable[int] | None = None,
        pass_type: PassType = PassType.FORWARD,
    ) -> int:
        """How many values are not zero; NaN is not, a masked pair is."""
        pieces = self._pieces(node_type, layer_indices, pass_type)
        kept = (without_masked_pairs(piece.dst, piece.values) for piece in pieces)
        return sum(int(values.count_nonzero()) for values in kept)

    def max(
        self, node_type: NodeType | None = None, pass_type: PassType = PassType.FORWARD
    ) -> tuple["Tensor", DerivedScalarIndex]:
        """0-d: the greatest value, and where it stands.

        Raises:
            InvalidInput: no value ranks.
        """
        values, indices = rank(self._pieces(node_type, None, pass_type), 1, largest=True)
        if not indices:
            raise _invalid(f"{self!r} has no {pass_type} value that ranks.")
        return values[0], indices[0]

    def max_abs(
        self, node_type: NodeType | None = None, pass_type: PassType = PassType.FORWARD
    ) -> tuple["Tensor", DerivedScalarIndex]:
        """0-d: the greatest magnitude, and where it stands; see :meth:`max`."""
        return self._magnitudes().max(node_type, pass_type)

    def topk(
        self,
        k: int | None,
        pass_type: PassType = PassType.FORWARD,
        dsts: Iterable[str] | None = None,
        layer_indices: Iterable[int] | None = None,
        largest: bool = True,
    ) -> tuple["Tensor", list[DerivedScalarIndex]]:
        """The k best values of all scalars together, best first in the asked direction.

        Ties go by the order of scalars in this store, then by layer and index. NaN and
        masked pairs never rank.

        Args:
            k: how many at most over all scalars; None for all.
            pass_type: of this pass.
            dsts: of these scalars; of all that have the pass by default.
            layer_indices: of these layers, and of what has none.
            largest: the greatest, else the least.

        Returns:
            ``(rank,)`` values and where each stands.

        Raises:
            InvalidInput: k is below 1, or no scalar has a layer that was asked for.
            Unavailable: a scalar is not in this store with that pass.
        """
        chosen = self
        if dsts is not None:
            names = [self.get_activations_and_metadata(dst, pass_type).dst for dst in dsts]
            chosen = self.filter_dsts(names)
        layers = None if layer_indices is None else list(layer_indices)
        present = {at for values in chosen._held.values() for at in values.layer_indices}
        absent = set(layers or ()) - present
        if absent:
            raise InvalidInput(
                f"No scalar has the layers {sorted(absent)}; there are "
                f"{sorted(at for at in present if at is not None)}.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        return rank(chosen._pieces(None, layers, pass_type), k, largest)

    def _pieces(
        self, node_type: NodeType | None, layers: Iterable[int] | None, pass_type: PassType
    ) -> list[LayerValues]:
        kept = self if node_type is None else self.filter_node_types(node_type)
        if pass_type not in kept.pass_types:
            raise Unavailable(
                f"{kept!r} has no {pass_type} values. Derive them too.", kind=ErrorKind.NOT_STORED
            )
        held = kept.filter_pass_type(pass_type).filter_layers(layers)._held.values()
        return [piece for values in held for piece in values.layer_values()]

    def _magnitudes(self) -> Self:
        return self.apply_transform_fn_to_activations(lambda tensor: tensor.abs())

    # Files

    def to_dict(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Plain values: (dst, pass) -> dst, pass_type, activations_by_layer_index (copies)."""
        return {
            (dst, str(pass_type)): {
                "dst": dst,
                "pass_type": str(pass_type),
                "activations_by_layer_index": dict(values.clone().activations_by_layer_index),
            }
            for (dst, pass_type), values in self._held.items()
        }

    @classmethod
    def from_dict(
        cls, data: Mapping[tuple[str, str], Mapping[str, Any]], skip_missing_dsts: bool = False
    ) -> Self:
        """From what :meth:`to_dict` gave.

        Args:
            data: names and passes in either case.
            skip_missing_dsts: leave out scalars that are not declared here.

        Raises:
            InvalidInput: an entry lacks a member, or its scalar is unknown.
        """
        found = []
        for key, entry in data.items():
            try:
                dst, pass_type = str(entry["dst"]).lower(), PassType(entry["pass_type"].lower())
                found.append(
                    ActivationsAndMetadata(dst, pass_type, entry["activations_by_layer_index"])
                )
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise _invalid(
                    f"The entry {key} is malformed: {error!r}. It needs dst, pass_type and "
                    "activations_by_layer_index."
                ) from error
        return cls._known(found, skip_missing_dsts)

    def save_to_file(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; see :mod:`actstore.query.tensor_files`.

        Raises:
            WriteFailed: the disk is full, read-only or failing.
        """
        save_activations(path, _KIND, self._held.values())

    @classmethod
    def load_from_file(
        cls, path: str | os.PathLike[str], device: str = "cpu", skip_missing_dsts: bool = False
    ) -> Self:
        """Read what :meth:`save_to_file` wrote, bit for bit.

        Raises:
            NotAStore: there is no such file, or it has a newer format.
            StoreDamaged: the file is damaged, or of another kind.
            InvalidInput: it holds a scalar that is not declared here.
        """
        return cls._known(load_activations(path, _KIND, device), skip_missing_dsts)

    @classmethod
    def _known(cls, activations: Iterable[ActivationsAndMetadata], skip_missing: bool) -> Self:
        return cls.from_list(
            values for values in activations if not skip_missing or values.dst in SCALARS
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
