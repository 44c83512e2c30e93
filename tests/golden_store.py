"""A store with the reference values of a tiny GPT-2, and the reference outputs beside it.

The reference is data/tdb_tiny_a: weights in float32, outputs in float64, two prompts
of 17 and 23 tokens. The store holds the outputs rounded once to the stored dtype.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import store_builder
from crc32c import crc32c
from safetensors.numpy import load_file

from actstore.store.blobs import LocalBlobs
from actstore.store.manifest import FileEntry, read_manifest
from actstore.store.model.architecture import architecture_of
from actstore.store.model.parameters import EncodedParameters, Parameter
from actstore.store.model.readout import READOUT_KEY, compute_readout
from actstore.store.model.weights import (
    CONFIG_KEY,
    PARAMETERS_KEY,
    SNAPSHOT_KEY,
    FileCheck,
    ModelSnapshot,
    ModelWeights,
)
from actstore.store.sections import encode_sections
from actstore.store.vocabulary import ActivationLocationType

DATA = Path(__file__).parent / "data" / "tdb_tiny_a"
PROMPTS = ("p0", "p1")
LENGTHS = (17, 23)
LAYERS = 3

_L = ActivationLocationType
_UNSCALED = (_L.ATTN_QUERY, _L.ATTN_KEY)


def load(kind: str, prompt: str, name: str) -> npt.NDArray[np.float64]:
    """A reference tensor in the store's axis order.

    Args:
        kind: ``raw`` or ``dst``.
        prompt: ``p0`` or ``p1``.
        name: the location's or scalar's name.

    Returns:
        ``(layer, token, *unit)``, without layers where the reference has none; pair-shaped
        ones as (token, head, attended).
    """
    with np.load(DATA / kind / "logit_diff" / prompt / f"{name.upper()}.FORWARD.npz") as file:
        if "layer_none" in file:
            return np.asarray(file["layer_none"])
        stacked = np.stack([file[f"layer_{layer}"] for layer in range(len(file.files))])
    if name.lower() in ("attn_qk_logits", "attn_qk_probs"):
        stacked = stacked.swapaxes(2, 3)
    return stacked


def location_values(location: ActivationLocationType, prompt: str) -> npt.NDArray[np.float64]:
    """A location's reference values as the attention function received them."""
    values = load("raw", prompt, location.name)
    # The reference carries d_head^(-1/4) in queries and keys; the store does not.
    return values / 8**-0.25 if location in _UNSCALED else values


def build_golden_store(
    path: Path, locations: Iterable[ActivationLocationType], dtype: str = "float32"
) -> Path:
    """A store of the reference model that keeps ``locations``; pair-shaped ones excepted."""
    values = {}
    for location in locations:
        parts = [location_values(location, prompt) for prompt in PROMPTS]
        values[location.label] = np.concatenate(parts, axis=int(location.has_layers))
    prompts = json.loads((DATA / "prompts.json").read_text())
    config = json.loads((DATA / "hf_model" / "config.json").read_text())
    with patch.object(store_builder, "VOCABULARY", config["vocab_size"]):
        root = store_builder.build_store(
            path,
            values,
            LENGTHS,
            dtype=dtype,
            token_ids=[prompt["token_ids"] for prompt in prompts],
            columns=[{"label": prompt["id"]} for prompt in prompts],
        )
    _replace_model(root, config)
    return root


def _replace_model(root: Path, config: dict[str, Any]) -> None:
    tensors = load_file(DATA / "hf_model" / "model.safetensors")
    names = {
        name if name.startswith("transformer.") else f"transformer.{name}": array
        for name, array in tensors.items()
        if name != "lm_head.weight"
    }
    parameters = EncodedParameters(
        {name: _parameter(array) for name, array in names.items()},
        {"lm_head.weight": "transformer.wte.weight"},
    )
    architecture = architecture_of(config)
    dimensions = architecture.dimensions(config)
    readout = compute_readout(ModelWeights(architecture, dimensions, parameters))
    files = {
        CONFIG_KEY: json.dumps(config).encode(),
        PARAMETERS_KEY: b"".join(bytes(part) for part in parameters),
        READOUT_KEY: b"".join(bytes(part) for part in encode_sections(readout)),
    }
    old = ModelSnapshot.read(root)
    checks = {key: FileCheck(len(data), f"{crc32c(data):08x}") for key, data in files.items()}
    snapshot = replace(old, fingerprint=parameters.fingerprint, files={**old.files, **checks})
    files[SNAPSHOT_KEY] = snapshot.encode()
    for key, data in files.items():
        (root / key).write_bytes(data)
    manifest = read_manifest(LocalBlobs(root))
    manifest = replace(
        manifest,
        model={
            **manifest.model,
            "dimensions": asdict(dimensions),
            "fingerprint": parameters.fingerprint,
        },
        files=tuple(
            FileEntry(entry.path, len(files[entry.path]), crc32c(files[entry.path]))
            if entry.path in files
            else entry
            for entry in manifest.files
        ),
    )
    (root / "store.json").write_bytes(manifest.encode())


def _parameter(array: npt.NDArray[Any]) -> Parameter:
    data = np.ascontiguousarray(array, "<f4").tobytes()
    return Parameter("F32", tuple(array.shape), lambda: memoryview(data))


def first_row(prompt: str) -> int:
    """Global row of a prompt's first token."""
    return sum(LENGTHS[: PROMPTS.index(prompt)])
