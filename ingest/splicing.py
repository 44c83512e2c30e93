"""Autoencoders inside a forward pass: a location's values as reconstruction plus error.

Formulas: spec/derived_scalars.md (g). The error is taken with latents of its own, so the
two parts sum to the location's values and to its gradient; what is done to the latents
afterwards changes the reconstruction alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from actstore.ingest.hooks import Place, wide_dtype
from actstore.ingest.model import LoadedModel
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.autoencoder_families import AutoencoderFamily, Autoencoders
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.vocabulary import ActivationLocationType, NodeType

__all__ = ["Observer", "Splice", "splices_of"]

Observer = Callable[[tuple[Place, ...], torch.Tensor], torch.Tensor]
"""Sees a tensor that goes by the names given; returns what is computed on with."""

_L = ActivationLocationType

_ERRORS = {
    _L.MLP_POST_ACT: _L.ONLINE_MLP_AUTOENCODER_ERROR,
    _L.RESID_DELTA_MLP: _L.ONLINE_RESIDUAL_MLP_AUTOENCODER_ERROR,
    _L.RESID_DELTA_ATTN: _L.ONLINE_RESIDUAL_ATTENTION_AUTOENCODER_ERROR,
}
_LATENTS = {
    NodeType.MLP_AUTOENCODER_LATENT: _L.ONLINE_MLP_AUTOENCODER_LATENT,
    NodeType.ATTENTION_AUTOENCODER_LATENT: _L.ONLINE_ATTENTION_AUTOENCODER_LATENT,
}


@dataclass(frozen=True)
class Splice:
    """One autoencoder in a forward pass.

    Attributes:
        autoencoder: in the dtype and on the device of the pass.
        latents: the places that its latents go by; the first names them, the generic one
            follows where it is unambiguous.
        error: the place of what the reconstruction leaves over.
    """

    autoencoder: Autoencoder
    latents: tuple[Place, ...]
    error: Place

    def __call__(self, inputs: torch.Tensor, observe: Observer) -> torch.Tensor:
        """The location's values again, now made of latents and error.

        Args:
            inputs: (batch, token, *unit axes).
            observe: sees latents and error, and may replace them.
        """
        wide = inputs.to(self.autoencoder.dtype)
        latents = self.autoencoder.encode(wide)
        error = wide - self.autoencoder.decode(latents, wide)
        # A variable of its own: the gradient of the latents inside the error would cancel it.
        latents = observe(self.latents, latents.view_as(latents))
        error = observe((self.error,), error)
        return (self.autoencoder.decode(latents, wide) + error).to(inputs.dtype)


def splices_of(loaded: LoadedModel, autoencoders: Autoencoders | None) -> Mapping[Place, Splice]:
    """Where the autoencoders stand in a model's forward pass.

    Args:
        loaded: the model.
        autoencoders: all of them are spliced in.

    Returns:
        The place that each reads -> its splice.

    Raises:
        InvalidInput: one reads a location that is no write of attention or the MLP, writes to
            another than it reads, or is of a layer that the model lacks.
    """
    families = {} if autoencoders is None else autoencoders.families
    splices: dict[Place, Splice] = {}
    for family in families.values():
        _check(loaded, family)
        names = [_LATENTS[family.node_type]]
        if len(families) == 1:
            names.append(_L.ONLINE_AUTOENCODER_LATENT)
        for autoencoder in family:
            layer = autoencoder.layer
            splices[family.location, layer] = Splice(
                autoencoder.to(wide_dtype(loaded.dtype), loaded.device),
                tuple((name, layer) for name in names),
                (_ERRORS[family.location], layer),
            )
    return splices


def _check(loaded: LoadedModel, family: AutoencoderFamily) -> None:
    autoencoder = next(iter(family))
    if family.location not in _ERRORS or autoencoder.is_transcoder:
        raise InvalidInput(
            f"The autoencoder {autoencoder.name!r} maps {family.location} to "
            f"{autoencoder.output_location}; a forward pass takes autoencoders of "
            f"{', '.join(map(str, _ERRORS))} only. Leave it out.",
            kind=ErrorKind.UNSUPPORTED_AUTOENCODER,
        )
    for autoencoder in family:
        if autoencoder.layer not in range(loaded.dimensions.n_layers):
            raise InvalidInput(
                f"The autoencoder {autoencoder.name!r} is of layer {autoencoder.layer}, and the "
                f"model has layers 0 to {loaded.dimensions.n_layers - 1}. Leave it out.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
