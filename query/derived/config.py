"""What a question adds to a derived scalar: the node it is about, the autoencoders."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import ActivationIndex, NodeIndex, TraceConfig
from actstore.store.vocabulary import (
    ActivationLocationType,
    LocationWithinLayer,
    NodeType,
    PassType,
)

if TYPE_CHECKING:
    from actstore.store.model.autoencoder_families import AutoencoderFamily, Autoencoders
    from actstore.store.model.autoencoders import Autoencoder

__all__ = ["ABOUT", "DstConfig"]

_L = ActivationLocationType

ABOUT = ("trace_config", "node_index_for_attribution", "activation_index_for_fake_grad")
"""Members of a config that a scalar can be about."""


@dataclass(frozen=True)
class DstConfig:
    """What a question adds to a derived scalar.

    Attributes:
        layer_indices: the layers wanted; None for all.
        derive_gradients: derive the backward values too, where they are defined.
        autoencoders: those that scalars of latents and errors speak of.
        trace_config: the node whose activation was the objective, or, for the gradients of
            a latent, the latent.
        node_index_for_attribution: the node at one end of edges.
        detach_layer_norm_scale_for_attribution: for attributions along edges, take the norm's
            denominator as a constant.
        activation_index_for_fake_grad: the neuron or latent whose input direction every
            vocabulary token is projected on; its last index counts.
    """

    layer_indices: tuple[int, ...] | None = None
    derive_gradients: bool = False
    autoencoders: "Autoencoders | None" = None
    trace_config: TraceConfig | None = None
    node_index_for_attribution: NodeIndex | None = None
    detach_layer_norm_scale_for_attribution: bool = False
    activation_index_for_fake_grad: ActivationIndex | None = None

    def __post_init__(self) -> None:
        if self.layer_indices is not None:
            object.__setattr__(self, "layer_indices", tuple(self.layer_indices))
        traced = self.trace_config
        if traced is not None and traced.node_index.pass_type is not PassType.FORWARD:
            raise _invalid("A trace is of the forward pass.")

    def layer_about(self, about: str, name: str) -> int:
        """The layer of the node that a scalar is about.

        Raises:
            InvalidInput: the config does not say the node.
        """
        if about == "trace_config":
            layer = self.traced(name).node_index.layer_index
        elif about == "node_index_for_attribution":
            layer = self.attributed(name).layer_index
        else:
            layer = self.faked(name).layer_index
        if layer is None:
            raise _invalid(f"{name} needs a node of a layer; {about} names none.")
        return layer

    def traced(self, name: str) -> TraceConfig:
        """The trace.

        Raises:
            InvalidInput: there is none.
        """
        if self.trace_config is None:
            raise _missing(name, "trace_config", "TraceConfig(NodeIndex(…))")
        return self.trace_config

    def attributed(self, name: str) -> NodeIndex:
        """The node at one end of edges.

        Raises:
            InvalidInput: there is none.
        """
        if self.node_index_for_attribution is None:
            raise _missing(name, "node_index_for_attribution", "NodeIndex(…)")
        return self.node_index_for_attribution

    def faked(self, name: str) -> ActivationIndex:
        """The activation whose input direction is meant.

        Raises:
            InvalidInput: there is none.
        """
        if self.activation_index_for_fake_grad is None:
            raise _missing(name, "activation_index_for_fake_grad", "ActivationIndex(…)")
        return self.activation_index_for_fake_grad

    def family(self, node_type: NodeType) -> "AutoencoderFamily":
        """The autoencoders of one kind; the generic kind where there is one kind only.

        Raises:
            InvalidInput: there are none, or the generic kind is ambiguous.
        """
        if self.autoencoders is None:
            raise InvalidInput(
                f"Autoencoders are needed for {node_type} values, and none are given. Load them "
                "with `load_autoencoder` and pass DstConfig(autoencoders=Autoencoders([…])).",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        return self.autoencoders.of(node_type)

    def autoencoder(self, node_type: NodeType, layer: int) -> "Autoencoder":
        """One layer's autoencoder of one kind.

        Raises:
            InvalidInput: there is none.
        """
        return self.family(node_type).at_layer(layer)

    def within_layer(self, location: ActivationLocationType) -> LocationWithinLayer | None:
        """Where in its layer a location writes; latents of the one autoencoder where that does."""
        if location is _L.ONLINE_AUTOENCODER_LATENT:
            return self.family(NodeType.AUTOENCODER_LATENT).location.within_layer
        return location.within_layer

    def residual_before(self, node_type: NodeType) -> ActivationLocationType:
        """The residual stream that a node reads: of the layer before, or after attention.

        Returns:
            ``resid_post_mlp`` for heads and what reads attention's output (of the layer
            before, the embedding before layer 0), ``resid_post_attn`` for what comes later.
        """
        if node_type is NodeType.MLP_NEURON:
            return _L.RESID_POST_ATTN
        if node_type is NodeType.ATTENTION_HEAD:
            return _L.RESID_POST_MLP
        place = self.family(node_type).location.within_layer
        return _L.RESID_POST_ATTN if place is LocationWithinLayer.MLP else _L.RESID_POST_MLP


def _missing(name: str, member: str, example: str) -> InvalidInput:
    return InvalidInput(
        f"{name} is about one node, and the config names none. Pass DstConfig({member}={example}).",
        kind=ErrorKind.INVALID_ARGUMENT,
    )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
