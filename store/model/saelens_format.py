"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors``, versions 3 to 6.

Up to version 5 all settings are top-level keys; from 6 on those about the model are under
``metadata`` (``meta`` in betas). Both are read the same way: a key is looked for at the
top, then in there, under its newest name, then under its older ones.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.location_names import parse_location
from actstore.store.model.autoencoder_files import (
    TensorFile,
    malformed_file,
    read_json,
    read_safetensors,
)
from actstore.store.model.autoencoder_functions import (
    Activation,
    Gated,
    JumpReLU,
    Normalisation,
    ReLU,
    TopK,
    unsupported_autoencoder,
)
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.vocabulary import ActivationLocationType, Dimension

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ARCHITECTURES", "CONFIG", "WEIGHTS", "load_saelens"]

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "gated",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
"""SAELens' architectures that are read; its BatchTopK and Matryoshka ones are saved as jumprelu."""

Place = tuple[ActivationLocationType, int | None]

_OLD_NAMES = {
    "hook_name": ("hook_point",),
    "hook_layer": ("hook_point_layer",),
    "hook_head_index": ("hook_point_head_index",),
    "activation_fn": ("activation_fn_str",),
}


class _Config:
    """The settings of one folder, whatever version wrote them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._top = read_json(path)
        below = self._top.get("metadata") or self._top.get("meta") or {}
        if not isinstance(below, dict):
            raise malformed_file(path, f"has {below!r} for its metadata")
        self._below = below

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; ``default`` where it is absent or null."""
        for known in (name, *_OLD_NAMES.get(name, ())):
            for level in (self._top, self._below):
                if level.get(known) is not None:
                    return level[known]
        return default

    def text(self, name: str, default: str = "") -> str:
        """The value of a key that holds a string.

        Raises:
            InvalidInput: it holds something else.
        """
        value = self.get(name, default)
        if not isinstance(value, str):
            raise malformed_file(self.path, f"has {value!r} for {name}, which is a string")
        return value


def load_saelens(
    folder: Path, location: ActivationLocationType | None, layer: int | None
) -> Autoencoder:
    """The autoencoder of a SAELens folder.

    Args:
        folder: holds ``cfg.json`` and ``sae_weights.safetensors``.
        location: what it reads; None for what its hook name says.
        layer: its layer; None for what its hook name or ``hook_layer`` says.

    Raises:
        InvalidInput: a file is missing or malformed, the place is neither given nor known,
            or the architecture or a setting is not supported.
    """
    config = _Config(folder / CONFIG)
    name = folder.name
    architecture = _architecture(config, name)
    transcodes = "transcoder" in architecture
    place = _place(config, "hook_name", location, layer)
    _check_axes(config, name, place[0])
    writes_to = _place(config, "hook_name_out", None, None) if transcodes else None
    file = read_safetensors(folder / WEIGHTS)
    encoder, decoder, bias = file.matrix("W_enc"), file.matrix("W_dec"), file.take("b_dec")
    _check_width(config, encoder)
    subtracted = config.get("apply_b_dec_to_input", not transcodes)
    if subtracted and transcodes:
        raise unsupported_autoencoder(
            name,
            "apply_b_dec_to_input is set, and a transcoder's output bias belongs to another place",
            "Set it to false if that is how it was trained.",
        )
    decoder = _finetuned(config, file, name, decoder)
    latent_bias, activation = _activation(config, file, name, architecture, encoder)
    skip = file.matrix("W_skip").T.contiguous() if "skip" in architecture else None
    if file.others:
        raise malformed_file(
            file.path, f"holds tensors that {architecture!r} has no use for: {file.others}"
        )
    return Autoencoder(
        name=name,
        location=place[0],
        layer=place[1],
        encoder=encoder,
        decoder=decoder,
        latent_bias=latent_bias,
        input_bias=bias if subtracted else encoder.new_zeros(encoder.shape[0]),
        output_bias=bias,
        activation=activation,
        normalisation=_normalisation(config, name),
        rescale_acts_by_decoder_norm=_rescaled(config, name, architecture),
        writes_to=writes_to,
        skip=skip,
        source_format=f"saelens {config.get('sae_lens_version', 'before 6')}",
    )


def _architecture(config: _Config, name: str) -> str:
    architecture = config.text("architecture", "standard")
    function = config.text("activation_fn", "relu")
    if function == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise unsupported_autoencoder(
            name,
            f"its architecture is {architecture!r}",
            f"Architectures that are read: {', '.join(ARCHITECTURES)}.",
        )
    if function not in ("relu", "topk"):
        raise unsupported_autoencoder(
            name,
            f"its activation function is {function!r}",
            "Activation functions that are read: relu, topk, and those of the architectures.",
        )
    return architecture


def _place(
    config: _Config, key: str, location: ActivationLocationType | None, layer: int | None
) -> Place:
    hook = config.text(key)
    named: int | None = None
    if location is None:
        advice = "location=" if key == "hook_name" else f"{key} in it"
        try:
            location, named = parse_location(hook)
        except InvalidInput as error:
            raise InvalidInput(
                f"{config.path} says {key} {hook!r}, which is no known location. "
                f"Name one by {advice}.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            ) from error
    elif layer is None:
        try:
            named = parse_location(hook)[1]
        except InvalidInput:
            named = None
    if not location.has_layers:
        return location, layer
    for number in (layer, named, config.get("hook_layer")):
        if number is not None:
            return location, number
    raise InvalidInput(
        f"{config.path} does not say which layer of {location}. Pass layer=.",
        kind=ErrorKind.UNKNOWN_LAYER,
    )


def _check_axes(config: _Config, name: str, location: ActivationLocationType) -> None:
    head = config.get("hook_head_index")
    if head is not None:
        raise unsupported_autoencoder(
            name, f"it reads head {head} alone", "Use one that reads all heads."
        )
    shape = config.text("reshape_activations") or (
        "hook_z" if "hook_z" in config.text("hook_name") else "none"
    )
    if Dimension.HEAD_CHANNEL in location.axes and shape != "hook_z":
        raise unsupported_autoencoder(
            name,
            f"it reads each head of {location} by itself (reshape_activations {shape!r})",
            "Use one that reads all heads as one row (hook_z).",
        )


def _check_width(config: _Config, encoder: "Tensor") -> None:
    for key, axis in (("d_in", 0), ("d_sae", 1)):
        stated = config.get(key, encoder.shape[axis])
        if stated != encoder.shape[axis]:
            raise malformed_file(
                config.path,
                f"says {key} {stated!r}, where W_enc has shape {tuple(encoder.shape)}",
            )


def _finetuned(config: _Config, file: TensorFile, name: str, decoder: "Tensor") -> "Tensor":
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        if key not in file:
            continue
        factor = file.take(key)
        # Written by default for a while, as ones and without a meaning.
        if bool((factor == 1).all()):
            continue
        if not config.get("finetuning_scaling_factor", False):
            raise unsupported_autoencoder(
                name,
                f"its weights hold a {key} that its config does not use",
                "Set finetuning_scaling_factor in cfg.json if latents are to be multiplied "
                "by it before decoding, or remove the tensor.",
            )
        if factor.shape != decoder.shape[:1]:
            raise malformed_file(file.path, f"has {key!r} of shape {tuple(factor.shape)}")
        decoder = decoder * factor[:, None]
    return decoder


def _activation(
    config: _Config, file: TensorFile, name: str, architecture: str, encoder: "Tensor"
) -> "tuple[Tensor, Activation]":
    if architecture == "gated":
        gated = Gated(file.take("b_gate"), file.take("r_mag"), file.take("b_mag"))
        return encoder.new_zeros(encoder.shape[1]), gated
    latent_bias = file.take("b_enc")
    if architecture == "topk":
        kwargs = config.get("activation_fn_kwargs", {})
        k = config.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
        if isinstance(k, float) and k.is_integer():
            k = int(k)
        if not isinstance(k, int):
            raise unsupported_autoencoder(
                name, f"its k is {k!r}", "Set k in cfg.json to the number of latents it keeps."
            )
        return latent_bias, TopK(k)
    if "jumprelu" in architecture:
        return latent_bias, JumpReLU(file.take("threshold"))
    return latent_bias, ReLU()


def _normalisation(config: _Config, name: str) -> Normalisation:
    stated = config.get("normalize_activations", "none")
    if isinstance(stated, bool):
        stated = "expected_average_only_in" if stated else "none"
    if stated in tuple(Normalisation):
        return Normalisation(stated)
    if stated in ("expected_average_only_in", "covariance_whitening"):
        raise unsupported_autoencoder(
            name,
            f"its inputs are to be normalised by {stated!r}, whose statistics of the training "
            "data are not in the file",
            "Fold them into its weights and save it again, then normalize_activations is none "
            "(SAELens: fold_activation_norm_scaling_factor or fold_activation_whitening).",
        )
    raise unsupported_autoencoder(
        name,
        f"its inputs are to be normalised by {stated!r}",
        f"Normalisations that are read: {', '.join(Normalisation)}.",
    )


def _rescaled(config: _Config, name: str, architecture: str) -> bool:
    rescaled = bool(config.get("rescale_acts_by_decoder_norm", False))
    if rescaled and architecture != "topk":
        raise unsupported_autoencoder(
            name,
            f"rescale_acts_by_decoder_norm is set on a {architecture!r} architecture",
            "It has a meaning for topk alone: remove it.",
        )
    return rescaled
