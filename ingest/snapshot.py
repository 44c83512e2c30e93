"""A loaded model as the files that a store keeps of it."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crc32c import crc32c
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actstore.ingest.model import LoadedModel
from actstore.ingest.parameters import dtype_name
from actstore.store.blobs import Part
from actstore.store.model.dimensions import unsupported_model
from actstore.store.model.pieces import TOKENIZER_KEY
from actstore.store.model.readout import READOUT_KEY, compute_readout
from actstore.store.model.weights import (
    CONFIG_KEY,
    FOLDER,
    PARAMETERS_KEY,
    SNAPSHOT_KEY,
    FileCheck,
    ModelSnapshot,
)
from actstore.store.sections import encode_sections

__all__ = ["snapshot_files"]

_CONFIG_LEFT_OUT = ("_name_or_path", "transformers_version")
_TOKENIZER_LEFT_OUT = ("is_local", "local_files_only", "name_or_path")


def snapshot_files(loaded: LoadedModel) -> dict[str, Iterable[Part]]:
    """The files that a store keeps of a model, each as parts ready to publish.

    Args:
        loaded: the model.

    Returns:
        key -> parts, which can be iterated any number of times; publish them in this
        order, since the record that names the others with their checksums comes last.
        The same model gives the same bytes, wherever it lay.

    Raises:
        InvalidInput: the tokenizer has no ``tokenizer.json`` form.
    """
    files: dict[str, Iterable[Part]] = {
        CONFIG_KEY: [_config(loaded.model, dtype_name(loaded.stored_dtype))],
        PARAMETERS_KEY: loaded.parameters,
        READOUT_KEY: list(encode_sections(compute_readout(loaded.weights()))),
    }
    if loaded.tokenizer is not None:
        files.update(
            {f"{FOLDER}/{name}": [data] for name, data in _tokenizer(loaded.tokenizer).items()}
        )
        if TOKENIZER_KEY not in files:
            raise unsupported_model(
                f"its {type(loaded.tokenizer).__name__} cannot be written as tokenizer.json"
            )
    snapshot = ModelSnapshot(
        name=loaded.name,
        revision=loaded.revision,
        architecture=loaded.architecture.name,
        fingerprint=loaded.fingerprint,
        run_dtype=dtype_name(loaded.dtype),
        stored_dtype=dtype_name(loaded.stored_dtype),
        files={key: _check(parts) for key, parts in files.items()},
    )
    return {**files, SNAPSHOT_KEY: [snapshot.encode()]}


def _check(parts: Iterable[Part]) -> FileCheck:
    size, checksum = 0, 0
    for part in parts:
        size += len(part)
        checksum = crc32c(part, checksum)
    return FileCheck(size, f"{checksum:08x}")


def _config(model: PreTrainedModel, dtype: str) -> bytes:
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    for key in _CONFIG_LEFT_OUT:
        config.pop(key, None)
    return _json(dict(sorted({**config, "dtype": dtype}.items())))


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    # What a tokenizer remembers of its last calls, or of where it lay, is no part of the model.
    _rewrite(files, "tokenizer.json", {"truncation": None, "padding": None})
    _rewrite(files, "tokenizer_config.json", dict.fromkeys(_TOKENIZER_LEFT_OUT), remove=True)
    return files


def _rewrite(
    files: dict[str, bytes], name: str, members: dict[str, None], *, remove: bool = False
) -> None:
    if name in files:
        value: dict[str, Any] = json.loads(files[name])
        value = {key: member for key, member in value.items() if key not in members}
        files[name] = _json(value if remove else value | members)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
