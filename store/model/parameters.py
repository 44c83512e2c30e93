"""A model's parameters as one safetensors file in which every tensor is checked.

The file is ordinary safetensors, so that any tool loads it. Its metadata adds what a
verified lazy read needs::

    "crc32c"    JSON: tensor name -> crc32c of [name, dtype, shape] and the tensor's bytes
    "tied"      JSON: further name -> the name under which its tensor is kept
    "checksum"  crc32c of the header without this member
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import missing_file
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.records import canonical_json

__all__ = ["EncodedParameters", "Parameter", "ParameterFile", "ParameterSource", "decode_values"]

_LENGTH = 8
_ALIGNMENT = 8
_MOST_HEADER = 100_000_000  # the limit of the safetensors format

_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: the bits
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def decode_values(data: memoryview | bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A tensor's bytes as an array; bfloat16 becomes the float32 of the same value.

    Args:
        data: little-endian values in C order.
        dtype: safetensors' name of the dtype.
        shape: the tensor's shape.
    """
    values: npt.NDArray[Any] = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


class ParameterSource(Protocol):
    """Tensors of a state dict by name."""

    def __contains__(self, name: object) -> bool: ...

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of a tensor, read-only; bfloat16 as float32."""
        ...


@dataclass(frozen=True)
class Parameter:
    """One tensor on its way to disk.

    Attributes:
        dtype: safetensors' name of the dtype.
        shape: the tensor's shape.
        read: makes the little-endian bytes in C order; called once per pass.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], memoryview]

    def __post_init__(self) -> None:
        if self.dtype not in _NUMPY:
            raise ValueError(f"no parameter dtype {self.dtype!r}; known: {', '.join(_NUMPY)}")

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _NUMPY[self.dtype].itemsize


class EncodedParameters:
    """The parameters of a model as they are stored; iterating yields the file's parts.

    Args:
        parameters: name -> tensor, tied ones once.
        tied: further names -> a name in ``parameters``.

    Attributes:
        fingerprint: sha256 over names, dtypes, shapes and bytes, and over what is tied.
    """

    def __init__(self, parameters: Mapping[str, Parameter], tied: Mapping[str, str]) -> None:
        self._parameters = dict(parameters)
        self._tied = dict(tied)
        digest = hashlib.sha256(canonical_json(sorted(self._tied.items())))
        checksums = {}
        for name, parameter in sorted(self._parameters.items()):
            heading = _heading(name, parameter.dtype, parameter.shape)
            data = parameter.read()
            digest.update(heading)
            digest.update(data)
            checksums[name] = crc32c(data, crc32c(heading))
        self.fingerprint = digest.hexdigest()
        self._header = self._encode_header(checksums)

    def _order(self) -> list[str]:
        # Wide dtypes first, so that every tensor starts at a multiple of its item size.
        return sorted(
            self._parameters,
            key=lambda name: (-_NUMPY[self._parameters[name].dtype].itemsize, name),
        )

    def _encode_header(self, checksums: Mapping[str, int]) -> bytes:
        entries: dict[str, Any] = {}
        offset = 0
        for name in self._order():
            parameter = self._parameters[name]
            end = offset + parameter.size
            entries[name] = {
                "dtype": parameter.dtype,
                "shape": list(parameter.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        metadata = {
            "format": "pt",
            "crc32c": canonical_json(
                {name: f"{value:08x}" for name, value in checksums.items()}
            ).decode(),
            "tied": canonical_json(self._tied).decode(),
        }
        entries["__metadata__"] = metadata
        metadata["checksum"] = _header_checksum(entries)
        header = canonical_json(entries)
        return header + b" " * (-len(header) % _ALIGNMENT)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield len(self._header).to_bytes(_LENGTH, "little") + self._header
        for name in self._order():
            yield self._parameters[name].read()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _LENGTH + len(self._header) + sum(one.size for one in self._parameters.values())

    def __contains__(self, name: object) -> bool:
        return name in self._parameters or name in self._tied

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of a tensor, read-only; bfloat16 as float32."""
        parameter = self._parameters[self._tied.get(name, name)]
        return decode_values(parameter.read(), parameter.dtype, parameter.shape)


class ParameterFile:
    """A parameter file opened for verified lazy reads.

    Args:
        path: the file.
        name: its key inside the store, for messages.

    Raises:
        StoreDamaged: the file is missing or its header is bad.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.name = name
        self._path = Path(path)
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(_LENGTH), "little")
                header = file.read(min(length, _MOST_HEADER))
        except FileNotFoundError as error:
            raise missing_file(name) from error
        if len(header) != length:
            raise self._damaged("has an impossible header", ErrorKind.MALFORMED_FILE)
        try:
            entries = json.loads(header)
            metadata = entries["__metadata__"]
            checksum = metadata.pop("checksum")
            if checksum != _header_checksum(entries):
                raise self._damaged("fails the checksum of its header", ErrorKind.CHECKSUM_MISMATCH)
            del entries["__metadata__"]
            self._checksums: dict[str, str] = json.loads(metadata["crc32c"])
            self._tied: dict[str, str] = json.loads(metadata["tied"])
            self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {
                key: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for key, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged("has a malformed header", ErrorKind.MALFORMED_FILE) from error
        self._data_start = _LENGTH + length

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._tied

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of a tensor, verified, read-only; bfloat16 as float32.

        Raises:
            StoreDamaged: the tensor's bytes fail their checksum.
        """
        name = self._tied.get(name, name)
        dtype, shape, start, end = self._entries[name]
        with open(self._path, "rb") as file:
            file.seek(self._data_start + start)
            data = file.read(end - start)
        if f"{crc32c(data, crc32c(_heading(name, dtype, shape))):08x}" != self._checksums[name]:
            raise self._damaged(f"fails the checksum of {name}", ErrorKind.CHECKSUM_MISMATCH)
        return decode_values(data, dtype, shape)

    def _damaged(self, what: str, kind: ErrorKind) -> StoreDamaged:
        return StoreDamaged(f"{self.name} {what}. Run `actstore verify`.", kind=kind)


def _heading(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return canonical_json([name, dtype, list(shape)])


def _header_checksum(entries: Mapping[str, Any]) -> str:
    return f"{crc32c(canonical_json(entries)):08x}"
