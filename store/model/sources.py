"""Where an input of a computed value comes from: what it is, which pass, which layer.

Recipes of locations and declarations of derived scalars name their inputs in these words.
"""

from dataclasses import dataclass
from enum import StrEnum

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["LayerRule", "Source"]


class LayerRule(StrEnum):
    """Which layer of a source a value at layer ``l`` is made from."""

    SAME = "same"
    PREVIOUS = "previous"
    NODE = "node"
    """The layer of the node that the question is about; see ``DstConfig``."""
    NONE = "none"


@dataclass(frozen=True)
class Source:
    """One input of a derived scalar or of a reconstruction.

    Attributes:
        of: a location, or the name of a derived scalar.
        pass_type: its forward values or their gradient.
        layer: the same layer, the one before, the asked node's, a fixed one (an integer;
            negative ones count from the last), or none for a source outside the blocks. The
            residual stream before layer 0 is the embedding's output.
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
        self, layer: int | None, n_layers: int, node_layer: int | None = None
    ) -> tuple[ActivationLocationType | str, int | None]:
        """The source and its layer for a value at ``layer``.

        Args:
            layer: the value's layer, None for one outside the blocks.
            n_layers: blocks of the model.
            node_layer: the asked node's layer, for ``LayerRule.NODE``.

        >>> Source(ActivationLocationType.RESID_POST_MLP, layer=LayerRule.PREVIOUS).place(0, 12)
        (ActivationLocationType.RESID_POST_EMBEDDING, None)
        """
        if isinstance(self.layer, int):
            return self.of, range(n_layers)[self.layer]
        if self.layer is LayerRule.NONE:
            return self.of, None
        if self.layer is LayerRule.NODE:
            return self.of, node_layer
        if self.layer is LayerRule.SAME:
            return self.of, layer
        assert layer is not None, "a value outside the blocks has no previous layer"
        return (self.of, layer - 1) if layer else (_L.RESID_POST_EMBEDDING, None)


_L = ActivationLocationType


def _invalid(name: str, rule: str) -> InvalidInput:
    return InvalidInput(
        f"The source {name!r} is inconsistent: {rule}.", kind=ErrorKind.INVALID_ARGUMENT
    )
