"""Several stores of derived scalars side by side: the same nodes seen by several measures.

Formulas and names: derived_scalars.md (c.8, h.2).
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from actstore.query.derived_store import DerivedScalarStore
from actstore.query.indexing import DerivedScalarIndex
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import NodeIndex
from actstore.store.vocabulary import NodeType, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GroupId", "MultiGroupDerivedScalarStore"]


class GroupId(StrEnum):
    """Usual names of groups; any other name serves too."""

    ACT_TIMES_GRAD = "act_times_grad"
    ACTIVATION = "activation"
    DIRECT_WRITE_TO_GRAD = "direct_write_to_grad"
    DIRECTION_WRITE = "direction_write"
    LOGITS = "logits"
    MLP_LAYER_WRITE = "mlp_layer_write"
    SINGLETON = "singleton"
    TOKEN_WRITE = "token_write"
    TOKEN_READ = "token_read"
    WRITE_NORM = "write_norm"
    TOKEN_PAIR_ATTRIBUTION = "token_pair_attribution"

    @property
    def exclude_bottom_k(self) -> bool:
        """Whether its least values say nothing."""
        return self in (GroupId.WRITE_NORM, GroupId.ACTIVATION, GroupId.LOGITS)


class MultiGroupDerivedScalarStore:
    """Stores with the same node types, one scalar per node type and store.

    Args:
        stores: group -> store.
        exclude_bottom_k_by_group_id: groups whose least values are not looked for; groups
            left out follow :attr:`GroupId.exclude_bottom_k`, others are looked at.

    Raises:
        InvalidInput: no store, a name without a store, stores with different node types, or
            two scalars of one node type in a store.
    """

    def __init__(
        self,
        stores: Mapping[str, DerivedScalarStore],
        exclude_bottom_k_by_group_id: Mapping[str, bool] | None = None,
    ) -> None:
        excluded = dict(exclude_bottom_k_by_group_id or {})
        unknown = sorted(set(excluded) - set(stores))
        if not stores or unknown:
            raise _invalid(f"The groups are {list(stores)}; {unknown} have no store.")
        first, *rest = stores
        for group in rest:
            if stores[group].node_types != stores[first].node_types:
                raise _invalid(
                    f"Group {first} has {_names(stores[first].node_types)} nodes and {group} has "
                    f"{_names(stores[group].node_types)}. Give every group the same ones."
                )
        for store in stores.values():
            for node_type in store.node_types:
                store.get_dst_for_node_type(node_type)
        self._stores = MappingProxyType(dict(stores))
        self._excluded = {
            group: excluded.get(group, isinstance(group, GroupId) and group.exclude_bottom_k)
            for group in stores
        }

    @property
    def stores(self) -> Mapping[str, DerivedScalarStore]:
        """Group -> store, read-only."""
        return self._stores

    @property
    def node_types(self) -> set[NodeType]:
        """Node types of every group."""
        return next(iter(self._stores.values())).node_types

    def topk(
        self,
        k: int | None,
        transform_activations_fn: "Callable[[Tensor], Tensor] | None" = None,
        transform_indices_fn: Callable[[DerivedScalarIndex], DerivedScalarIndex] | None = None,
        pass_type: PassType = PassType.FORWARD,
    ) -> tuple[list[NodeIndex], dict[str, "Tensor"]]:
        """The nodes that are among the best of any group, and their values in every group.

        Args:
            k: how many greatest, and how many least, of each group; None for all.
            transform_activations_fn: applied to the tensors before they are ranked, for
                example to choose one token.
            transform_indices_fn: from an index of a transformed tensor to one of the tensor
                itself, for example to put that token back.
            pass_type: of this pass.

        Returns:
            The nodes, each once: group by group its greatest, best first, then its least,
            least first. And per group ``(node,)`` values, looked up in the untransformed store.

        Raises:
            InvalidInput: k is below 1, or a value has no node of its own.
            Unavailable: a group lacks the pass, or a node.
        """
        nodes: dict[NodeIndex, None] = {}
        for group, store in self._stores.items():
            ranked = store
            if transform_activations_fn is not None:
                ranked = store.apply_transform_fn_to_activations(transform_activations_fn)
            for largest in (True, False):
                if not largest and (self._excluded[group] or k is None):
                    continue
                for index in ranked.topk(k, pass_type, largest=largest)[1]:
                    own = index if transform_indices_fn is None else transform_indices_fn(index)
                    nodes.setdefault(own.to_node_index())
        found = list(nodes)
        return found, {
            group: store.get_derived_scalars_for_node_indices(found)
            for group, store in self._stores.items()
        }


def _names(node_types: set[NodeType]) -> str:
    return ", ".join(sorted(node_types)) or "no"


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
