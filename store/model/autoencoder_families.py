"""The autoencoders of one model: families of one location, at most one per node type."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.model.autoencoders import Autoencoder, latent_node_type
from actstore.store.vocabulary import ActivationLocationType, NodeType

__all__ = ["AutoencoderFamily", "Autoencoders"]


@dataclass(frozen=True)
class AutoencoderFamily:
    """The autoencoders of one location, one per layer; iterating yields them by layer.

    Layers may differ in how many latents they have.

    Attributes:
        autoencoders: at least one; kept in the order of their layers.

    Raises:
        InvalidInput: none is given, two are of one layer, or they read or write different
            locations.
    """

    autoencoders: tuple[Autoencoder, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.autoencoders, key=_order))
        object.__setattr__(self, "autoencoders", ordered)
        places = {(one.location, one.output_location) for one in ordered}
        if len(places) != 1:
            found = ", ".join(sorted({f"{read} to {write}" for read, write in places})) or "none"
            raise _conflict(
                f"A family of autoencoders is of one location, and these are of {found}"
            )
        for one, other in pairwise(ordered):
            if one.layer == other.layer:
                raise _conflict(
                    f"{one.name!r} and {other.name!r} are both of {_place(one)}, "
                    "where there is room for one"
                )

    @property
    def location(self) -> ActivationLocationType:
        """What they read."""
        return self.autoencoders[0].location

    @property
    def node_type(self) -> NodeType:
        """What their latents are called."""
        return latent_node_type(self.location)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layers that have one, ascending; None alone for a location without layers."""
        return tuple(one.layer for one in self.autoencoders)

    def at_layer(self, layer: int | None) -> Autoencoder:
        """The autoencoder of a layer.

        Raises:
            InvalidInput: this layer has none.
        """
        for one in self.autoencoders:
            if one.layer == layer:
                return one
        raise InvalidInput(
            f"No autoencoder of {self.location} at layer {layer}. There are some at layers "
            f"{', '.join(map(str, self.layers))}: name one of them, or add one for this layer.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )

    def n_latents(self, layer: int | None) -> int:
        """How many latents a layer's autoencoder has.

        Raises:
            InvalidInput: this layer has none.
        """
        return self.at_layer(layer).n_latents

    def __iter__(self) -> Iterator[Autoencoder]:
        return iter(self.autoencoders)

    def __len__(self) -> int:
        return len(self.autoencoders)


class Autoencoders:
    """The autoencoders in use together, in families: at most one family per node type.

    Args:
        autoencoders: in any order; may be empty.

    Attributes:
        families: by node type; empty when there is no autoencoder.

    Raises:
        InvalidInput: two are of one location and layer, or two locations share a node type.
    """

    def __init__(self, autoencoders: Iterable[Autoencoder] = ()) -> None:
        by_location: dict[ActivationLocationType, list[Autoencoder]] = {}
        for one in autoencoders:
            by_location.setdefault(one.location, []).append(one)
        self.families: dict[NodeType, AutoencoderFamily] = {}
        for members in by_location.values():
            family = AutoencoderFamily(tuple(members))
            other = self.families.setdefault(family.node_type, family)
            if other is not family:
                raise _conflict(
                    f"Autoencoders of {other.location} ({_names(other)}) and of {family.location} "
                    f"({_names(family)}) both have latents of type {family.node_type}, and one "
                    "location at a time can have them"
                )

    def __iter__(self) -> Iterator[Autoencoder]:
        for family in self.families.values():
            yield from family

    def __len__(self) -> int:
        return sum(map(len, self.families.values()))

    def of(self, node_type: NodeType) -> AutoencoderFamily:
        """The family whose latents are nodes of a type.

        Args:
            node_type: ``AUTOENCODER_LATENT`` stands for the only family, whatever it reads.

        Raises:
            InvalidInput: no type of latents, or ``AUTOENCODER_LATENT`` with several families.
            Unavailable: there is no such family.
        """
        if not node_type.is_autoencoder_latent:
            raise InvalidInput(
                f"Nodes of type {node_type} are no latents. Name one of "
                f"{', '.join(kind for kind in NodeType if kind.is_autoencoder_latent)}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if node_type is not NodeType.AUTOENCODER_LATENT:
            if node_type in self.families:
                return self.families[node_type]
            raise self._missing(f"has latents of type {node_type}")
        if len(self.families) > 1:
            raise InvalidInput(
                f"{node_type} may stand for the latents of several autoencoders here: "
                f"{self._inventory()}. Name the type of one of them, or its location with .at().",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if not self.families:
            raise self._missing(f"has latents of type {node_type}")
        return next(iter(self.families.values()))

    def at(self, location: ActivationLocationType) -> AutoencoderFamily:
        """The family that reads a location.

        Raises:
            Unavailable: there is none.
        """
        for family in self.families.values():
            if family.location is location:
                return family
        raise self._missing(f"reads {location}")

    def _missing(self, what: str) -> Unavailable:
        return Unavailable(
            f"No autoencoder here {what}; there are: {self._inventory()}. Add one that does.",
            kind=ErrorKind.NOT_STORED,
        )

    def _inventory(self) -> str:
        return (
            "; ".join(
                f"{node_type} of {family.location} at layers {', '.join(map(str, family.layers))}"
                for node_type, family in self.families.items()
            )
            or "none"
        )


def _order(one: Autoencoder) -> int:
    return -1 if one.layer is None else one.layer


def _place(one: Autoencoder) -> str:
    return f"{one.location}" if one.layer is None else f"{one.location} at layer {one.layer}"


def _names(family: AutoencoderFamily) -> str:
    return ", ".join(repr(one.name) for one in family)


def _conflict(reason: str) -> InvalidInput:
    return InvalidInput(f"{reason}. Leave some of them out.", kind=ErrorKind.INVALID_ARGUMENT)
