"""Reading the tensors and settings of an autoencoder's files, and keeping one in a store.

Nothing here runs code out of a file: safetensors, npz without pickled objects, and torch
files restricted to tensors and plain values. Every tensor is a copy, so that changing the
file later changes nothing.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged
from actstore.store.location_names import parse_location
from actstore.store.model.autoencoder_functions import Normalisation, activation_from
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.records import well_formed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "TensorFile",
    "malformed_file",
    "missing_path",
    "read_autoencoder",
    "read_json",
    "read_npz",
    "read_safetensors",
    "read_torch",
    "write_autoencoder",
]

_FORMAT = 1
_ACTIVATION = "activation."


def malformed_file(path: Path, reason: str) -> InvalidInput:
    """The error for a caller's file that is not what its name says."""
    return InvalidInput(
        f"{path} {reason}. Fetch or export the autoencoder again.", kind=ErrorKind.MALFORMED_FILE
    )


def missing_path(path: Path, known: str) -> InvalidInput:
    """The error for a path that holds nothing, or nothing known."""
    return InvalidInput(
        f"{path} holds no autoencoder that this version reads. Known: {known}.",
        kind=ErrorKind.MISSING_FILE,
    )


class TensorFile:
    """Tensors of one file by name, all of one floating-point dtype.

    Args:
        path: the file, for messages.
        tensors: its tensors.
    """

    def __init__(self, path: Path, tensors: "Mapping[str, Tensor]") -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._names = ", ".join(sorted(tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> "Tensor":
        """The tensor of a name, once: it no longer counts among the others.

        Raises:
            InvalidInput: the file lacks it.
        """
        if name not in self._tensors:
            raise malformed_file(self.path, f"lacks the tensor {name!r} (it holds {self._names})")
        return self._tensors.pop(name)

    def matrix(self, name: str) -> "Tensor":
        """The tensor of a name, once, if it has two axes.

        Raises:
            InvalidInput: the file lacks it, or it has another number of axes.
        """
        tensor = self.take(name)
        if tensor.ndim != 2:
            raise malformed_file(self.path, f"has {name!r} of shape {tuple(tensor.shape)}")
        return tensor

    @property
    def others(self) -> list[str]:
        """Names that were not taken, sorted."""
        return sorted(self._tensors)


def read_safetensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file.

    Raises:
        InvalidInput: there is no such file, or it is malformed.
    """
    from safetensors import SafetensorError, safe_open

    _require(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return _uniform(path, {name: file.get_tensor(name).clone() for name in names})
    except (SafetensorError, ValueError, OSError) as error:
        raise malformed_file(path, f"is no whole safetensors file ({error})") from error


def read_npz(path: Path) -> TensorFile:
    """The arrays of an npz file as tensors.

    Raises:
        InvalidInput: there is no such file, it is malformed, or it holds pickled objects.
    """
    import torch

    _require(path)
    try:
        # Opened here, because numpy leaves a file that it cannot read open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # a damaged file fails wherever its bytes lead the reader
        raise malformed_file(path, f"is no whole npz file of numbers ({error})") from error
    return _uniform(path, tensors)


def read_torch(path: Path) -> tuple[TensorFile, dict[str, Any]]:
    """The tensors of a torch file, and what else it holds.

    Raises:
        InvalidInput: there is no such file, it is malformed, or it holds objects other than
            tensors and plain values.
    """
    import torch

    _require(path)
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise malformed_file(
            path, "holds objects other than tensors and plain values, which are never run"
        ) from error
    except Exception as error:  # a damaged file fails wherever its bytes lead the reader
        raise malformed_file(path, f"is no whole torch file ({error})") from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise malformed_file(path, "is no state dict")
    tensors = {
        name: value.detach().clone()
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    plain = {name: value for name, value in content.items() if name not in tensors}
    return _uniform(path, tensors), plain


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        InvalidInput: there is no such file, or it holds no JSON object.
    """
    _require(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise malformed_file(path, f"is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise malformed_file(path, "is no JSON object")
    return content


def _require(path: Path) -> None:
    if not path.is_file():
        raise InvalidInput(
            f"There is no file {path}, which this autoencoder needs. Fetch or export it again.",
            kind=ErrorKind.MISSING_FILE,
        )


def _uniform(path: Path, tensors: "dict[str, Tensor]") -> TensorFile:
    import torch

    dtype: torch.dtype | None = None
    for tensor in tensors.values():
        if tensor.is_floating_point():
            if tensor.element_size() < 2:
                raise malformed_file(path, f"holds {tensor.dtype}; needed are 16 bits or more")
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    if dtype is None:
        raise malformed_file(path, "holds no tensor of floating-point numbers")
    return TensorFile(path, {name: _as(tensor, dtype) for name, tensor in tensors.items()})


def _as(tensor: "Tensor", dtype: "torch.dtype") -> "Tensor":
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_autoencoder(autoencoder: Autoencoder) -> tuple[bytes, dict[str, Any]]:
    """An autoencoder as it is kept inside a store.

    Returns:
        A safetensors file, and JSON values that :func:`read_autoencoder` takes with it.
    """
    from safetensors.torch import save

    # Cloned, because tied tensors share their memory and safetensors refuses that.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in autoencoder.tensors.items()
    }
    settings = {
        "format": _FORMAT,
        "name": autoencoder.name,
        "source_format": autoencoder.source_format,
        **autoencoder.settings,
        "fingerprint": autoencoder.fingerprint,
    }
    return save(tensors), settings


def read_autoencoder(data: bytes, settings: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder that :func:`write_autoencoder` wrote, bit for bit, on the CPU.

    Raises:
        StoreDamaged: the bytes or settings are not what was written.
        InvalidInput: a newer version wrote them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if settings.get("format", 0) > _FORMAT:
        raise InvalidInput(
            f"This autoencoder is kept in format {settings['format']}; this version reads "
            f"{_FORMAT}. Update actstore.",
            kind=ErrorKind.NEWER_FORMAT,
        )
    with well_formed(f"autoencoder {settings.get('name')!r}"):
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        further = {
            name.removeprefix(_ACTIVATION): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_ACTIVATION)
        }
        numbers = dict(settings["activation"])
        kind = numbers.pop("kind")
        writes_to = settings["writes_to"]
        autoencoder = Autoencoder(
            name=settings["name"],
            location=parse_location(settings["location"])[0],
            layer=settings["layer"],
            activation=activation_from(kind, numbers, further),
            normalisation=Normalisation(settings["normalisation"]),
            rescale_acts_by_decoder_norm=settings["rescale_acts_by_decoder_norm"],
            writes_to=writes_to and (parse_location(writes_to[0])[0], writes_to[1]),
            source_format=settings["source_format"],
            **tensors,
        )
        stated = settings["fingerprint"]
    if autoencoder.fingerprint != stated:
        raise StoreDamaged(
            f"The autoencoder {autoencoder.name!r} fails its fingerprint {stated}. "
            "Run `actstore verify`.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    return autoencoder
