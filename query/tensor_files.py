"""Tensors in memory as one safetensors file, with a description and a checksum of each.

Any tool that reads safetensors loads the tensors; nothing is pickled. The metadata adds::

    "actstore"   JSON: {"format": 1, "content": what the caller says, "crc32c": {name: crc}}
    "checksum"   crc32c of the above

where ``crc`` is over [name, dtype, shape] and the tensor's bytes.
"""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crc32c import crc32c

from actstore.query.containers import ActivationsAndMetadata
from actstore.store.blobs import TEMPORARY_MARK, write_failed
from actstore.store.errors import ErrorKind, InvalidInput, NotAStore, StoreDamaged, WriteFailed
from actstore.store.records import canonical_json
from actstore.store.vocabulary import PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_activations", "read_tensors", "save_activations", "write_tensors"]

_FORMAT = 1


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, "Tensor"], content: Mapping[str, Any]
) -> None:
    """Write a file, whole or not at all; one that is there is replaced.

    Args:
        path: the file.
        tensors: on any device, of any layout.
        content: JSON values that :func:`read_tensors` gives back.

    Raises:
        InvalidInput: a tensor's dtype is not one of safetensors.
        WriteFailed: the disk is full, read-only or failing.
    """
    from safetensors.torch import save

    # A copy each, because safetensors refuses views and shared memory.
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    target = Path(path)
    try:
        checksums = {name: _checksum(name, tensor) for name, tensor in held.items()}
        body = canonical_json({"format": _FORMAT, "content": content, "crc32c": checksums})
        data = save(held, {"actstore": body.decode(), "checksum": f"{crc32c(body):08x}"})
    except KeyError as error:
        raise InvalidInput(
            f"safetensors cannot hold {error}. Convert the tensor to a real dtype first.",
            kind=ErrorKind.INVALID_ARGUMENT,
        ) from error
    partial = target.with_name(f"{target.name}{TEMPORARY_MARK}{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise WriteFailed(
            f"Cannot write {target}: {error.strerror or error}. What was there before is as it "
            "was; choose another path or make room.",
            kind=write_failed(target, error).kind,
        ) from error


def read_tensors(
    path: str | os.PathLike[str], device: str = "cpu"
) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read and verify what :func:`write_tensors` wrote.

    Returns:
        The tensors, bit for bit, on ``device``; and the content.

    Raises:
        NotAStore: there is no such file, or it has a newer format.
        StoreDamaged: the file is cut, altered or no such file at all.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise NotAStore(f"There is no file {source}.", kind=ErrorKind.MISSING_FILE)
    try:
        with safe_open(source, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError) as error:
        raise _damaged(source, f"is no sound safetensors file ({error})") from error
    record = _record(source, metadata)
    if set(record["crc32c"]) != set(tensors):
        raise _damaged(source, "does not hold the tensors that its header lists")
    for name, tensor in tensors.items():
        if record["crc32c"][name] != _checksum(name, tensor):
            raise StoreDamaged(
                f"{source} fails the checksum of {name}. Restore the file, or derive it anew.",
                kind=ErrorKind.CHECKSUM_MISMATCH,
            )
    return {name: tensor.to(device) for name, tensor in tensors.items()}, record["content"]


def save_activations(
    path: str | os.PathLike[str], kind: str, activations: Iterable[ActivationsAndMetadata]
) -> None:
    """Write the tensors of a container, named ``<dst>/<pass>/<layer or none>``."""
    held = list(activations)
    tensors = {
        f"{one.dst}/{one.pass_type}/{'none' if at is None else at}": tensor
        for one in held
        for at, tensor in one.activations_by_layer_index.items()
    }
    listed = [
        {"dst": one.dst, "pass_type": str(one.pass_type), "layers": one.layer_indices}
        for one in held
    ]
    write_tensors(path, tensors, {"kind": kind, "activations": listed})


def load_activations(
    path: str | os.PathLike[str], kind: str, device: str
) -> list[ActivationsAndMetadata]:
    """Read what :func:`save_activations` wrote.

    Raises:
        NotAStore: there is no such file, or it has a newer format.
        StoreDamaged: the file is damaged, or of another kind.
    """
    tensors, content = read_tensors(path, device)
    if content.get("kind") != kind:
        raise StoreDamaged(
            f"{os.fspath(path)} holds a {content.get('kind')}, not a {kind}. Load it as that.",
            kind=ErrorKind.MALFORMED_FILE,
        )
    entries: list[dict[str, Any]] = content["activations"]
    return [
        ActivationsAndMetadata(
            entry["dst"],
            PassType(entry["pass_type"]),
            {
                at: tensors[f"{entry['dst']}/{entry['pass_type']}/{'none' if at is None else at}"]
                for at in entry["layers"]
            },
        )
        for entry in entries
    ]


def _record(source: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "actstore" not in metadata or "checksum" not in metadata:
        raise _damaged(source, "has no description of its tensors")
    body = metadata["actstore"].encode()
    if f"{crc32c(body):08x}" != metadata["checksum"]:
        raise StoreDamaged(
            f"{source} fails the checksum of its header. Restore the file, or derive it anew.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    record: dict[str, Any] = json.loads(body)
    if record["format"] > _FORMAT:
        raise NotAStore(
            f"{source} has format {record['format']}; this version reads up to {_FORMAT}. "
            "Upgrade actstore.",
            kind=ErrorKind.NEWER_FORMAT,
        )
    return record


def _checksum(name: str, tensor: "Tensor") -> str:
    import torch

    heading = canonical_json([name, str(tensor.dtype), list(tensor.shape)])
    # An empty tensor may have strides that no other dtype can view.
    data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return f"{crc32c(data, crc32c(heading)):08x}"


def _damaged(source: Path, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"{source} {what}. Restore the file, or derive it anew.", kind=ErrorKind.MALFORMED_FILE
    )
