"""The model that a store keeps, and its weights in the orientation of the derived scalars.

Below ``model/`` lie the model's own files (``config.json``, the tokenizer's, and
``model.safetensors``), the readout (``readout.sections``) and ``snapshot.json``, a
record that names them all with size and crc32c. The first loads in transformers as
any model does.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import missing_file
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged, Unavailable
from actstore.store.model.architecture import Architecture, WeightSource, architecture_of
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.parameters import ParameterFile, ParameterSource
from actstore.store.records import decode_record, encode_record, well_formed
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = [
    "CONFIG_KEY",
    "FOLDER",
    "PARAMETERS_KEY",
    "SNAPSHOT_KEY",
    "FileCheck",
    "ModelSnapshot",
    "ModelWeights",
    "open_model",
]

FOLDER = "model"
CONFIG_KEY = f"{FOLDER}/config.json"
PARAMETERS_KEY = f"{FOLDER}/model.safetensors"
SNAPSHOT_KEY = f"{FOLDER}/snapshot.json"

FloatDtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class FileCheck:
    """What a file must be: bytes and crc32c (eight hexadecimal digits)."""

    size: int
    crc32c: str


@dataclass(frozen=True)
class ModelSnapshot:
    """The record of the model that a store was made with.

    Attributes:
        name: hub id or folder name, as given at ingest; never a path.
        revision: the hub's commit, if it came from there.
        architecture: name of the architecture's row.
        fingerprint: sha256 over the stored parameters.
        run_dtype: dtype of the parameters during ingest.
        stored_dtype: dtype of the parameters on disk; holds the ones that ran exactly.
        files: key -> check of every file of the snapshot but this record.
    """

    name: str
    revision: str | None
    architecture: str
    fingerprint: str
    run_dtype: str
    stored_dtype: str
    files: Mapping[str, FileCheck] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The bytes of ``model/snapshot.json``."""
        return encode_record(asdict(self))

    @classmethod
    def read(cls, root: Path) -> "ModelSnapshot":
        """Read and verify the record of the store at ``root``.

        Raises:
            StoreDamaged: it is missing, fails its checksum, or is a record of another sort.
        """
        path = root / SNAPSHOT_KEY
        if not path.is_file():
            raise missing_file(SNAPSHOT_KEY)
        fields = decode_record(path.read_bytes(), SNAPSHOT_KEY)
        with well_formed(SNAPSHOT_KEY):
            files = {key: FileCheck(**check) for key, check in fields.pop("files").items()}
            return cls(**fields, files=files)

    def read_file(self, root: Path, key: str) -> bytes:
        """The whole of one of the snapshot's files, verified.

        Raises:
            StoreDamaged: it is missing, or not what was written.
        """
        path = root / key
        if not path.is_file():
            raise missing_file(key)
        data = path.read_bytes()
        check = self.files[key]
        if FileCheck(len(data), f"{crc32c(data):08x}") != check:
            raise StoreDamaged(
                f"{key} fails its checksum {check.crc32c}. Run `actstore verify`.",
                kind=ErrorKind.CHECKSUM_MISMATCH,
            )
        return data


class ModelWeights:
    """A model's weights by location, read when asked for.

    Args:
        architecture: the row that says where they are.
        dimensions: the model's sizes.
        source: the tensors of the state dict.
    """

    def __init__(
        self, architecture: Architecture, dimensions: ModelDimensions, source: ParameterSource
    ) -> None:
        self.architecture = architecture
        self.dimensions = dimensions
        self._source = source

    def weight(
        self, location: WeightLocationType, layer: int | None = None, dtype: FloatDtype = "float64"
    ) -> npt.NDArray[np.float32] | npt.NDArray[np.float64]:
        """A weight, in the orientation of spec/derived_scalars.md a.6.

        Args:
            location: the weight: query, key and value maps are (head, channel,
                head_channel), the output map (head, head_channel, channel), the MLP's
                (channel, neuron) and (neuron, channel), the unembedding (channel,
                vocabulary), the embeddings (row, channel), biases and gains (unit,).
            layer: the layer, for the weights that have one.
            dtype: ``float64`` or ``float32``; both hold float16, bfloat16 and float32.

        Returns:
            A C-contiguous array of its own. A bias that models of the family may lack is
            zeros where this one does; keys and values have as many heads as the model shares.

        Raises:
            InvalidInput: no such layer, or another dtype.
            Unavailable: models of this architecture have no such weight.
            StoreDamaged: the stored bytes fail their checksum.
        """
        self._check_layer(str(location), layer, location.has_layers)
        source = self.architecture.weights.get(location)
        expected = self.dimensions.weight_shape(location)
        return self._read(str(location), source, layer, dtype, expected)

    def attention_bias(
        self, location: ActivationLocationType, layer: int, dtype: FloatDtype = "float64"
    ) -> npt.NDArray[np.float32] | npt.NDArray[np.float64]:
        """The bias that queries, keys or values contain.

        Args:
            location: ``ATTN_QUERY``, ``ATTN_KEY`` or ``ATTN_VALUE``.
            layer: the layer.
            dtype: ``float64`` or ``float32``.

        Returns:
            (head, head_channel); zeros where the model has no such bias.

        Raises:
            InvalidInput: no such layer, or another dtype.
            Unavailable: this location has no bias of its own.
        """
        self._check_layer(f"{location}'s bias", layer, True)
        source = self.architecture.attention_biases.get(location)
        is_query = location is ActivationLocationType.ATTN_QUERY
        heads = self.dimensions.n_heads if is_query else self.dimensions.kv_heads
        expected = (heads, self.dimensions.d_head)
        return self._read(f"{location}'s bias", source, layer, dtype, expected)

    def _check_layer(self, what: str, layer: int | None, has_layers: bool) -> None:
        last = self.dimensions.n_layers - 1
        if has_layers and (layer is None or not 0 <= layer <= last):
            raise InvalidInput(
                f"Layer {layer} of {what}: the model has layers 0 to {last}. Name one of them.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        if not has_layers and layer is not None:
            raise InvalidInput(
                f"Layer {layer} of {what}: it belongs to no layer. Leave the layer out.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )

    def _read(
        self,
        what: str,
        source: WeightSource | None,
        layer: int | None,
        dtype: FloatDtype,
        expected: tuple[int, ...],
    ) -> npt.NDArray[Any]:
        if dtype not in ("float32", "float64"):
            raise InvalidInput(
                f"dtype {dtype!r} of {what}: weights are given as float32 or float64.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        name = source.name.format(layer=layer) if source else ""
        if source is not None and source.is_optional and name not in self._source:
            return np.zeros(expected, dtype)
        if source is None or name not in self._source:
            raise Unavailable(
                f"A {self.architecture.name} model as stored here has no {what}. "
                "Ask for something that does not need it.",
                kind=ErrorKind.NOT_STORED,
            )
        # The head axis is the first one.
        array = source.arrange(self._source.array(name), expected[0])
        if array.shape != expected:
            raise StoreDamaged(
                f"{name} has shape {array.shape}, where the config says {expected}. "
                "Run `actstore verify`.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return np.array(array, dtype=dtype, order="C")


def open_model(root: Path) -> ModelWeights:
    """Open the weights of the store at ``root``; reads the config, and no tensor yet.

    Raises:
        StoreDamaged: a file is missing or fails its checksum.
        InvalidInput: the architecture is not one that this version knows.
    """
    snapshot = ModelSnapshot.read(root)
    config = json.loads(snapshot.read_file(root, CONFIG_KEY))
    architecture = architecture_of(config)
    source = ParameterFile(root / PARAMETERS_KEY, PARAMETERS_KEY)
    dimensions = architecture.dimensions(config, snapshot.run_dtype)
    return ModelWeights(architecture, dimensions, source)
