"""Published autoencoders, read from where they were downloaded to.

Four layouts are told apart by what a path holds:

* a SAELens folder: ``cfg.json`` and ``sae_weights.safetensors``
  (:mod:`actstore.store.model.saelens_format`);
* OpenAI's: a torch state dict per layer, ``.pt``. Its TopK autoencoders layer-normalise
  their inputs, its others do not; the file does not say so;
* Gemma Scope's: ``params.npz``, JumpReLU;
* the layout of the reference outputs: ``saes.json`` beside safetensors with OpenAI's tensor
  names, nothing normalised.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.location_names import parse_location
from actstore.store.model.autoencoder_files import (
    TensorFile,
    malformed_file,
    missing_path,
    read_json,
    read_npz,
    read_safetensors,
    read_torch,
)
from actstore.store.model.autoencoder_functions import (
    Activation,
    Identity,
    JumpReLU,
    Normalisation,
    ReLU,
    TopK,
    unsupported_autoencoder,
)
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.model.saelens_format import CONFIG, WEIGHTS, load_saelens
from actstore.store.vocabulary import ActivationLocationType

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["autoencoder_names", "load_autoencoder", "load_autoencoders"]

_GEMMA = "params.npz"
_LIST = "saes.json"
_KNOWN = (
    f"a SAELens folder ({CONFIG} and {WEIGHTS}), OpenAI's .pt, Gemma Scope's {_GEMMA}; "
    f"a folder with {_LIST} is for load_autoencoders"
)
# .../resid_delta_mlp_v5_32k/autoencoders/3.pt, as OpenAI publishes them
_OPENAI_PATH = re.compile(r"([a-z_]+?)(?:_v\d+\w*)?/autoencoders/(\d+)\.pt")
_LAYER = re.compile(r"layer_?(\d+)\.")


def load_autoencoder(
    path: "str | os.PathLike[str]",
    *,
    location: ActivationLocationType | str | None = None,
    layer: int | None = None,
) -> Autoencoder:
    """Read one published autoencoder; the path's content tells the format.

    Args:
        path: a SAELens folder, a ``.pt`` file of OpenAI's, or Gemma Scope's ``params.npz``
            or its folder.
        location: what it reads, by any name; goes before what the files say. Gemma Scope
            needs it, and OpenAI's unless the path ends as it is published.
        layer: its layer, likewise.

    Returns:
        The autoencoder on the CPU, in the dtype of the file.

    Raises:
        InvalidInput: nothing known is there; a file is missing, damaged or has numbers that
            are not finite; the place is not known; the architecture or a setting is not
            supported.
    """
    path = Path(path)
    if isinstance(location, str):
        location, named = parse_location(location)
        layer = named if layer is None else layer
    if (path / CONFIG).is_file() or path.name in (CONFIG, WEIGHTS):
        folder = path if path.is_dir() else path.parent
        return load_saelens(folder.absolute(), location, layer)
    if (path / _GEMMA).is_file():
        path = path / _GEMMA
    if path.is_file() and path.suffix == ".npz":
        return _load_gemma_scope(path, location, layer)
    if path.is_file() and path.suffix in (".pt", ".pth", ".bin"):
        return _load_openai(path, location, layer)
    raise missing_path(path, _KNOWN)


def autoencoder_names(path: "str | os.PathLike[str]") -> list[str]:
    """The names that a ``saes.json`` lists.

    Args:
        path: the file, or its folder.

    Raises:
        InvalidInput: there is no such file, or it is malformed.
    """
    return [name for name in read_json(_list_file(path)) if not name.startswith("_")]


def load_autoencoders(path: "str | os.PathLike[str]", name: str) -> list[Autoencoder]:
    """Read the autoencoders of one name of a ``saes.json``, one per layer.

    Each file holds ``pre_bias`` (channel,), ``encoder.weight`` (latent, channel),
    ``latent_bias`` (latent,) and ``decoder.weight`` (channel, latent); the files lie beside
    the list, and their names end in ``.layerN.safetensors``.

    Args:
        path: the file, or its folder.
        name: which autoencoders.

    Raises:
        InvalidInput: as :func:`load_autoencoder`, or no such name.
    """
    listing = _list_file(path)
    entries = read_json(listing)
    entry = entries.get(name)
    if name.startswith("_") or entry is None:
        raise InvalidInput(
            f"No autoencoders {name!r} in {listing}. Names: {', '.join(autoencoder_names(path))}.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    try:
        location = parse_location(str(entry["input_dst"]))[0]
        files = [listing.parent / Path(str(file)).name for file in entry["files"]]
        activation = _named_activation(name, entry["activation"], entry)
    except (KeyError, TypeError) as error:
        raise malformed_file(listing, f"has a malformed entry {name!r} ({error!r})") from error
    loaded = []
    for file in files:
        numbered = _LAYER.search(file.name)
        if numbered is None:
            raise malformed_file(listing, f"names a file without a layer: {file.name!r}")
        tensors = read_safetensors(file)
        layer = int(numbered[1])
        loaded.append(_from_linear(file.stem, location, layer, tensors, activation, "plain"))
    return loaded


def _list_file(path: "str | os.PathLike[str]") -> Path:
    path = Path(path)
    return path / _LIST if path.is_dir() else path


def _load_gemma_scope(
    path: Path, location: ActivationLocationType | None, layer: int | None
) -> Autoencoder:
    location = _given(path, location, layer)
    file = read_npz(path)
    encoder, decoder = _named(file, "W_enc"), _named(file, "W_dec")
    return Autoencoder(
        name=_folder_name(path),
        location=location,
        layer=layer,
        encoder=file.matrix(encoder),
        decoder=file.matrix(decoder),
        latent_bias=file.take("b_enc"),
        input_bias=(bias := file.take("b_dec")).new_zeros(bias.shape),
        output_bias=bias,
        activation=JumpReLU(file.take("threshold")),
        source_format="gemma scope",
    )


def _named(file: TensorFile, name: str) -> str:
    return name if name in file else name.lower()


def _folder_name(path: Path) -> str:
    # Published as layer_20/width_16k/average_l0_71/params.npz
    return "/".join(path.absolute().parts[1:-1][-3:])


def _load_openai(
    path: Path, location: ActivationLocationType | None, layer: int | None
) -> Autoencoder:
    published = _OPENAI_PATH.search(path.absolute().as_posix())
    if published is not None:
        if location is None:
            with suppress(InvalidInput):
                location = parse_location(published[1])[0]
        layer = int(published[2]) if layer is None else layer
    location = _given(path, location, layer)
    file, plain = read_torch(path)
    name = "/".join(path.absolute().parts[1:][-3:])
    kind = str(plain.get("activation", "ReLU"))
    parameters = plain.get("activation_state_dict") or {}
    if not hasattr(parameters, "get"):
        raise malformed_file(path, f"has {parameters!r} for its activation_state_dict")
    activation = _named_activation(name, kind, parameters)
    return _from_linear(name, location, layer, file, activation, "openai", kind == "TopK")


def _given(
    path: Path, location: ActivationLocationType | None, layer: int | None
) -> ActivationLocationType:
    if location is None:
        raise InvalidInput(
            f"{path} does not say what its autoencoder reads. Pass location=, for example "
            "location='resid_post_mlp', and layer=.",
            kind=ErrorKind.UNKNOWN_LOCATION,
        )
    if location.has_layers and layer is None:
        raise InvalidInput(
            f"{path} does not say which layer of {location}. Pass layer=.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    return location


def _named_activation(name: str, kind: str, parameters: "Mapping[str, Any]") -> Activation:
    if kind == "ReLU":
        return ReLU()
    if kind == "Identity":
        return Identity()
    after = str(parameters.get("postact_fn", "ReLU"))
    if kind != "TopK" or after not in ("ReLU", "Identity"):
        raise unsupported_autoencoder(
            name,
            f"its activation is {kind!r}" + (f" with {after!r}" if kind == "TopK" else ""),
            "Activations that are read: ReLU, Identity, TopK with ReLU or Identity.",
        )
    k = parameters.get("k")
    try:
        number = int(k)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise unsupported_autoencoder(
            name, f"its k is {k!r}", "It must be how many latents it keeps."
        ) from error
    return TopK(number, rectified=after == "ReLU")


def _from_linear(
    name: str,
    location: ActivationLocationType,
    layer: int | None,
    file: TensorFile,
    activation: Activation,
    source_format: str,
    normalised: bool = False,
) -> Autoencoder:
    encoder = file.matrix("encoder.weight")
    tied = "decoder.weight" not in file
    decoder = encoder if tied else file.matrix("decoder.weight").T.contiguous()
    bias = file.take("pre_bias")
    return Autoencoder(
        name=name,
        location=location,
        layer=layer,
        encoder=encoder.T.contiguous(),
        decoder=decoder,
        latent_bias=file.take("latent_bias"),
        input_bias=bias,
        output_bias=bias,
        activation=activation,
        normalisation=Normalisation.LAYER_NORM if normalised else Normalisation.NONE,
        source_format=source_format,
    )
