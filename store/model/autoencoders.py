"""Sparse autoencoders of a model's activations: what one is and computes.

Formulas are those of spec/derived_scalars.md (g), with what published autoencoders add
to them: a normalised input, latents rescaled by the norm of their decoder rows, a skip
connection, another place that the output stands for (transcoders)::

    pre     = (norm(x) - input_bias) encoder + latent_bias      [· |decoder rows|]
    latents = activation(pre)
    output  = undo_norm(latents [/ |decoder rows|] decoder + output_bias) [+ x skip]

All of it is differentiable, in reverse and forward mode, and takes any leading axes.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.autoencoder_functions import (
    Activation,
    ActivationKind,
    Normalisation,
    unsupported_autoencoder,
)
from actstore.store.records import canonical_json
from actstore.store.vocabulary import ActivationLocationType, Dimension, NodeType

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

__all__ = ["Autoencoder", "latent_node_type"]

_MATRICES = ("encoder", "decoder", "latent_bias", "input_bias", "output_bias")
_PREFIX = "activation."
_HEADS = (
    (Dimension.HEAD, Dimension.HEAD_CHANNEL),
    (Dimension.KV_HEAD, Dimension.HEAD_CHANNEL),
)
_READABLE = ((Dimension.CHANNEL,), (Dimension.NEURON,), *_HEADS)
_NODE_TYPES = {
    ActivationLocationType.MLP_POST_ACT: NodeType.MLP_AUTOENCODER_LATENT,
    ActivationLocationType.RESID_DELTA_MLP: NodeType.MLP_AUTOENCODER_LATENT,
    ActivationLocationType.RESID_DELTA_ATTN: NodeType.ATTENTION_AUTOENCODER_LATENT,
}


def latent_node_type(location: ActivationLocationType) -> NodeType:
    """The node type of the latents of an autoencoder that reads ``location``.

    >>> str(latent_node_type(ActivationLocationType.RESID_DELTA_MLP))
    'mlp_autoencoder_latent'
    """
    return _NODE_TYPES.get(location, NodeType.AUTOENCODER_LATENT)


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """One autoencoder of one location and layer; immutable, compared by identity.

    Inputs have the axes of their location: (..., channel), (..., neuron), or (..., head,
    head_channel), whose two axes are read as one, heads outermost. Inputs must have the
    dtype and device of the tensors (see :meth:`to`).

    Attributes:
        name: for people.
        location: what it reads.
        layer: the layer, None where the location has no layers.
        encoder: (channel_in, latent).
        decoder: (latent, channel_out).
        latent_bias: (latent,).
        input_bias: (channel_in,), subtracted from the input; zeros where there is none.
        output_bias: (channel_out,).
        activation: from the encoder's values to the latents.
        normalisation: what is done to the input before ``input_bias``.
        rescale_acts_by_decoder_norm: whether latents are measured in units of their
            decoder rows' norms.
        writes_to: location and layer that the output stands for, of a transcoder; None
            where it stands for the input.
        skip: (channel_in, channel_out), from the raw input to the output, or None.
        source_format: the published format that it was read from.

    Raises:
        InvalidInput: shapes, dtypes or devices disagree, a number is not finite, ``k`` is
            out of range, the location is one that no autoencoder reads.
    """

    name: str
    location: ActivationLocationType
    layer: int | None
    encoder: "Tensor"
    decoder: "Tensor"
    latent_bias: "Tensor"
    input_bias: "Tensor"
    output_bias: "Tensor"
    activation: Activation
    normalisation: Normalisation = Normalisation.NONE
    rescale_acts_by_decoder_norm: bool = False
    writes_to: tuple[ActivationLocationType, int | None] | None = None
    skip: "Tensor | None" = None
    source_format: str = ""

    def __post_init__(self) -> None:
        self._check_place(self.location, self.layer)
        self._check_place(self.output_location, self.output_layer)
        # Frozen for good: a parameter that wants a gradient would drag its own into every pass.
        fixed = {name: tensor.detach() for name, tensor in self.tensors.items()}
        for name, value in self._fields_of(fixed).items():
            object.__setattr__(self, name, value)
        for name, matrix in (("encoder", self.encoder), ("decoder", self.decoder)):
            if matrix.ndim != 2 or 0 in matrix.shape:
                raise self._unusable(f"its {name} has shape {tuple(matrix.shape)}")
        self._check_tensors()
        if fault := self.activation.fault(self.n_latents):
            raise self._unusable(fault)
        if self.normalisation is Normalisation.LAYER_NORM and self.channel_in < 2:
            raise self._unusable("one channel has no standard deviation to normalise by")
        if self.is_transcoder and self.output_location.axes in _HEADS:
            raise self._unusable(f"transcoders into {self.output_location} are not supported")

    def _unusable(self, reason: str, advice: str = "Export it again.") -> InvalidInput:
        return unsupported_autoencoder(self.name, reason, advice)

    def _check_place(self, location: ActivationLocationType, layer: int | None) -> None:
        if location.is_online or location.axes not in _READABLE:
            raise self._unusable(
                f"{location} has axes {', '.join(location.axes) or 'none'}",
                "Autoencoders are of locations of channels, neurons, or heads and channels.",
            )
        if location.has_layers != (layer is not None) or (
            layer is not None and (type(layer) is not int or layer < 0)
        ):
            needed = "a layer, a number from 0" if location.has_layers else "no layer"
            raise InvalidInput(
                f"Layer {layer!r} of the autoencoder {self.name!r}: {location} has {needed}. "
                "Pass it as layer=.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )

    def _check_tensors(self) -> None:
        latent, entering, leaving = self.n_latents, self.channel_in, self.channel_out
        shapes = {
            "encoder": (entering, latent),
            "decoder": (latent, leaving),
            "latent_bias": (latent,),
            "input_bias": (entering,),
            "output_bias": (leaving,),
            "skip": (entering, leaving),
        }
        if not self.is_transcoder and entering != leaving:
            raise self._unusable(f"it reads {entering} channels and writes {leaving}")
        for name, tensor in self.tensors.items():
            expected = shapes.get(name, (latent,))
            if tuple(tensor.shape) != expected:
                raise self._unusable(
                    f"its {name} has shape {tuple(tensor.shape)}, where {expected} is needed"
                )
            found = f"{tensor.dtype} on {tensor.device}"
            if found != f"{self.dtype} on {self.device}" or not tensor.is_floating_point():
                raise self._unusable(f"its {name} is {found}; needed is one dtype of real numbers")
            if wrong := tensor.numel() - int(tensor.isfinite().sum()):
                raise self._unusable(f"{wrong} numbers of its {name} are not finite")

    # What it is

    @property
    def output_location(self) -> ActivationLocationType:
        """What the output stands for."""
        return self.location if self.writes_to is None else self.writes_to[0]

    @property
    def output_layer(self) -> int | None:
        """The layer of what the output stands for."""
        return self.layer if self.writes_to is None else self.writes_to[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether the output stands for another place."""
        return self.writes_to is not None

    @property
    def node_type(self) -> NodeType:
        """What the latents are called, by what is read."""
        return latent_node_type(self.location)

    @property
    def n_latents(self) -> int:
        """How many latents."""
        return self.encoder.shape[1]

    @property
    def channel_in(self) -> int:
        """Channels of the input, of all heads together."""
        return self.encoder.shape[0]

    @property
    def channel_out(self) -> int:
        """Channels of the output."""
        return self.decoder.shape[-1]

    @property
    def dtype(self) -> "torch.dtype":
        """Of all tensors."""
        return self.encoder.dtype

    @property
    def device(self) -> "torch.device":
        """Where all tensors are."""
        return self.encoder.device

    @property
    def has_linear_encoder_and_relu(self) -> bool:
        """Whether latents are a ReLU of an affine function of the input."""
        return (
            self.normalisation is Normalisation.NONE and self.activation.kind is ActivationKind.RELU
        )

    @property
    def latents_encoder_rows(self) -> "Tensor":
        """(latent, channel_in): d pre / d x, up to the input's normalisation."""
        rows = self.encoder.T
        return rows * self._row_norms()[:, None] if self.rescale_acts_by_decoder_norm else rows

    @property
    def latents_decoder_rows(self) -> "Tensor":
        """(latent, channel_out): what a latent of 1 adds to the output, before :meth:`output_scale`."""
        rows = self.decoder
        return rows / self._row_norms()[:, None] if self.rescale_acts_by_decoder_norm else rows

    @property
    def tensors(self) -> "dict[str, Tensor]":
        """All tensors by name; those of the activation as ``activation.NAME``."""
        own = {name: getattr(self, name) for name in _MATRICES}
        if self.skip is not None:
            own["skip"] = self.skip
        return own | {_PREFIX + name: value for name, value in self.activation.tensors.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """All that it is besides its tensors, its name and its source: JSON values."""
        return {
            "location": self.location.label,
            "layer": self.layer,
            "writes_to": self.writes_to and [self.writes_to[0].label, self.writes_to[1]],
            "activation": {"kind": str(self.activation.kind), **self.activation.settings},
            "normalisation": str(self.normalisation),
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Sha256, in hex, of the settings and of the tensors' values.

        Of the values, not of their dtype: a copy in a wider dtype is the same autoencoder.
        """
        digest = hashlib.sha256(canonical_json(self.settings))
        for name, tensor in sorted(self.tensors.items()):
            values = tensor.cpu()
            single = values.float()
            if values.element_size() > 4 and not single.double().equal(values):
                single = values
            array = np.ascontiguousarray(single.numpy())
            digest.update(canonical_json([name, array.dtype.name, list(array.shape)]))
            digest.update(array.data)
        return digest.hexdigest()

    def to(
        self, dtype: "torch.dtype | None" = None, device: "torch.device | str | None" = None
    ) -> "Autoencoder":
        """This autoencoder in another dtype or on another device; the last copy is kept.

        Raises:
            InvalidInput: a value is too large for the dtype.
        """
        import torch

        kind = dtype or self.dtype
        place = self.device if device is None else torch.device(device)
        copy: Autoencoder
        for copy in (self, self.__dict__.get("_copy", self)):
            if (copy.dtype, copy.device) == (kind, place):
                return copy
        with torch.inference_mode(False):  # else the copy could never enter a backward pass
            tensors = {name: value.to(place, kind) for name, value in self.tensors.items()}
            copy = replace(self, **self._fields_of(tensors))
        self.__dict__["_copy"] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}

    def _fields_of(self, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
        own = {name: value for name, value in tensors.items() if not name.startswith(_PREFIX)}
        further = {
            name.removeprefix(_PREFIX): value for name, value in tensors.items() if name not in own
        }
        return {**own, "activation": self.activation.with_tensors(further)}

    # What it computes

    def encode_pre_act(self, x: "Tensor") -> "Tensor":
        """What the activation function gets.

        Args:
            x: the location's values, (..., its axes).

        Returns:
            (..., latent).

        Raises:
            InvalidInput: the shape, dtype or device is not the autoencoder's.
        """
        flat = self.normalisation.normalise(self._flat(x))
        pre = (flat - self.input_bias) @ self.encoder + self.latent_bias
        return pre * self._row_norms() if self.rescale_acts_by_decoder_norm else pre

    def activate(self, pre: "Tensor") -> "Tensor":
        """The latents of :meth:`encode_pre_act`'s values; (..., latent) to (..., latent)."""
        return self.activation(pre)

    def encode(self, x: "Tensor") -> "Tensor":
        """The latents, (..., latent), of the location's values.

        Raises:
            InvalidInput: the shape, dtype or device is not the autoencoder's.
        """
        return self.activate(self.encode_pre_act(x))

    def decode(self, latents: "Tensor", x: "Tensor | None" = None) -> "Tensor":
        """What the latents stand for.

        Args:
            latents: (..., latent).
            x: the input they came from, needed where :attr:`decoding_needs_input`.

        Returns:
            (..., the axes of the output's location).

        Raises:
            InvalidInput: ``x`` is needed and missing, or a shape or dtype is not the
                autoencoder's.
        """
        self._check_input(latents.shape[-1] if latents.ndim else 0, self.n_latents, latents)
        if self.rescale_acts_by_decoder_norm:
            latents = latents / self._row_norms()
        output = latents @ self.decoder + self.output_bias
        if self._restores:
            output = self.normalisation.undo(output, self._flat(self._needed(x)))
        if self.skip is not None:
            output = output + self._flat(self._needed(x)) @ self.skip
        if self.output_location.axes in _HEADS:
            heads = self._needed(x).shape[-2:]
            output = output.reshape(*output.shape[:-1], *heads)
        return output

    def output_scale(self, x: "Tensor") -> "Tensor":
        """The factor, (..., 1), that undoing the normalisation puts on the decoder's rows."""
        restored = self.normalisation if self._restores else Normalisation.NONE
        return restored.moments(self._flat(x))[1]

    @property
    def decoding_needs_input(self) -> bool:
        """Whether :meth:`decode` needs ``x``: a normalisation to undo, a skip, split heads."""
        return self._restores or self.skip is not None or self.output_location.axes in _HEADS

    @property
    def _restores(self) -> bool:
        # A transcoder's output is in units of its own place, never of the input.
        return self.normalisation is not Normalisation.NONE and not self.is_transcoder

    def _row_norms(self) -> "Tensor":
        norms: Tensor = self.decoder.norm(dim=-1)
        return norms.masked_fill(norms == 0, 1)  # of a latent that writes nothing

    def _flat(self, x: "Tensor") -> "Tensor":
        if self.location.axes in _HEADS:
            self._check_input(math.prod(x.shape[-2:]) if x.ndim > 1 else 0, self.channel_in, x)
            return x.flatten(-2)
        self._check_input(x.shape[-1] if x.ndim else 0, self.channel_in, x)
        return x

    def _check_input(self, found: int, expected: int, given: "Tensor") -> None:
        if found != expected or given.dtype != self.dtype or given.device != self.device:
            raise InvalidInput(
                f"The autoencoder {self.name!r} got {given.dtype} {tuple(given.shape)} on "
                f"{given.device}, and takes {self.dtype} (..., {expected}) on {self.device}, "
                "heads on an axis of their own. Convert the values, or the autoencoder by .to().",
                kind=ErrorKind.INVALID_ARGUMENT,
            )

    def _needed(self, x: "Tensor | None") -> "Tensor":
        if x is None:
            raise InvalidInput(
                f"Decoding {self.name!r} needs the input that the latents came from. Pass x=.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        return x
