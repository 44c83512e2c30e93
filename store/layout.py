"""Shapes, chunks, shards and paths of the arrays: the layout that makes reads fast.

Everything follows from an :class:`ArraySpec`, so a reader finds a byte by arithmetic:

* Arrays with a node axis (neurons, heads) have inner chunks of 1 layer x up to 4096
  tokens x 32 columns (one head). A column read touches 1/32 of a column-major ideal's
  neighbours, a row range inside a chunk is contiguous.
* Residual-like arrays are read by row: 1 layer x 256 tokens x all columns.
* A shard is one segment of tokens, all columns, and as many layers as stay under 256 MiB.
* The inner codec is ``bytes`` alone, so chunks have a fixed size and place. Pair-shaped
  arrays, stored on request only, are the exception: zstd, 64 tokens x one head.

The numbers behind these choices are in ``docs/decisions/001-layout.md``.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.compression import MISSING_CHUNK, ZSTD_LEVEL
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.records import canonical_json
from actstore.store.unit_grid import PAGE_ROWS, UnitGrid
from actstore.store.vocabulary import ActivationLocationType, Dimension, PassType

__all__ = [
    "PAGE_ROWS",
    "ArraySpec",
    "StoredDtype",
    "array_metadata",
    "group_metadata",
    "token_id_metadata",
]

_COLUMN_CHUNK = 32
_NODE_CHUNK_ROWS = 4096
_RESIDUAL_CHUNK_ROWS = 256
_PAIR_CHUNK_ROWS = 64
_CHECKSUM_BYTES = 4096
_CHECKSUM_ROWS = 64
_SHARD_BYTES = 256 * 2**20
_ZSTD = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}

TOKEN_ID_FILL = -1
"""``token_id`` of rows that no sequence fills."""


class StoredDtype(StrEnum):
    """How values lie on disk; bfloat16 as uint16 bits with ``logical_dtype``."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy dtype of the bytes."""
        return np.dtype({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[self.value])

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer dtype of the same size."""
        return np.dtype(f"<u{self.storage.itemsize}")

    @property
    def keys(self) -> np.dtype[Any]:
        """The signed integer dtype of the same size, used for ordered keys."""
        return np.dtype(f"<i{self.storage.itemsize}")

    @property
    def fill(self) -> Any:
        """NaN, in the storage dtype."""
        return (
            self.storage.type(0x7FC0) if self is StoredDtype.BFLOAT16 else self.storage.type("nan")
        )

    def to_float32(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Exact float32 values of stored ones."""
        if self is StoredDtype.BFLOAT16:
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values.astype(np.float32)


@dataclass(frozen=True)
class ArraySpec(UnitGrid):
    """One array of the store, ``(layer, token, *unit_shape)``.

    Attributes:
        location: the place in the forward pass.
        pass_type: forward or backward.
        layers: number of layers, or None for a place outside the blocks.
        unit_shape: sizes of the axes after the token axis.
        dtype: how values are stored.
        segment_rows: S, token rows of a segment; a multiple of 512.
        variant: name of the set, where another set has an array of the same place; gradients
            outside the base set always have it.
        objective: name of what a backward array is the gradient of; None of a forward one.
        copy_of: key of the array whose values these are, by column: chunks of one column and all
            rows of a segment; None of an array of its own.
    """

    location: ActivationLocationType
    pass_type: PassType
    layers: int | None
    unit_shape: tuple[int, ...]
    dtype: StoredDtype
    segment_rows: int
    variant: str = ""
    objective: str | None = None
    copy_of: str | None = None

    def __post_init__(self) -> None:
        if self.objective is not None and self.pass_type is not PassType.BACKWARD:
            raise InvalidInput(
                f"{self.location}/{self.pass_type} has the objective {self.objective!r}; only a "
                "backward array has one.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if self.segment_rows <= 0 or self.segment_rows % PAGE_ROWS:
            raise InvalidInput(
                f"segment_rows is {self.segment_rows}; it must be a multiple of {PAGE_ROWS}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if self.segment_rows > 65536:
            raise InvalidInput(
                f"segment_rows is {self.segment_rows}; it must be at most 65536.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        if (self.layers is None) == self.location.has_layers or len(self.unit_shape) != len(
            self.location.axes
        ):
            raise InvalidInput(
                f"{self.location} does not have layers={self.layers} and unit axes "
                f"{self.unit_shape}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )

    @property
    def label(self) -> str:
        """The location's name."""
        return self.location.label

    @cached_property
    def key(self) -> str:
        """``<location>/<pass>[@<variant>]``: the path below ``arrays/`` and ``zones/``."""
        variant = f"@{self.variant}" if self.variant else ""
        return f"{self.location}/{self.pass_type}{variant}"

    @cached_property
    def has_zones(self) -> bool:
        """Whether units are columns that people rank: neurons and head channels."""
        return self.location.is_ranked_by_unit and self.copy_of is None

    @cached_property
    def is_compressed(self) -> bool:
        """Whether inner chunks are compressed: pair-shaped arrays, of which half is empty."""
        return self.location.is_pair_shaped

    @cached_property
    def chunk_rows(self) -> int:
        """Token rows of an inner chunk; divides ``segment_rows``."""
        if self.copy_of is not None:
            return self.segment_rows
        if self.location.is_pair_shaped:
            return _PAIR_CHUNK_ROWS
        by_row = self.location.axes[-1] in (Dimension.CHANNEL, Dimension.VOCABULARY)
        return math.gcd(self.segment_rows, _RESIDUAL_CHUNK_ROWS if by_row else _NODE_CHUNK_ROWS)

    @cached_property
    def chunk_width(self) -> int:
        """Columns of an inner chunk."""
        if self.copy_of is not None:
            return 1
        if len(self.unit_shape) > 1:
            return self.unit_shape[-1]
        return _COLUMN_CHUNK if self.has_zones else self.columns

    @cached_property
    def chunk_bytes(self) -> int:
        """Size of an inner chunk."""
        return self.chunk_rows * self.chunk_width * self.dtype.storage.itemsize

    @cached_property
    def checksum_rows(self) -> int:
        """Rows of a chunk under one checksum: about 4 KiB, at most 64 but in a single column."""
        row = self.chunk_width * self.dtype.storage.itemsize
        if self.copy_of is not None:
            return math.gcd(self.segment_rows, _CHECKSUM_BYTES // row)
        fitting = max(1, _CHECKSUM_BYTES // row)
        return min(_CHECKSUM_ROWS, 1 << (fitting.bit_length() - 1))

    @cached_property
    def layers_per_shard(self) -> int:
        """Layers of one shard: as many as keep it within 256 MiB."""
        per_layer = self.row_chunks * self.column_chunks * self.chunk_bytes
        return min(self.layer_count, max(1, _SHARD_BYTES // per_layer))

    @property
    def shards(self) -> int:
        """Shards of one segment."""
        return -(-self.layer_count // self.layers_per_shard)

    def shard_layers(self, shard: int) -> range:
        """The layers in shard number ``shard`` of a segment."""
        first = shard * self.layers_per_shard
        return range(first, min(first + self.layers_per_shard, self.layer_count))

    def shard_path(self, shard: int, segment: int) -> str:
        """The shard's path inside the store, as Zarr's default keys with ``.`` spell it."""
        layer = [] if self.layers is None else [shard]
        indices = [*layer, segment, *(0 for _ in self.unit_shape)]
        return f"arrays/{self.key}/c.{'.'.join(map(str, indices))}"

    def shard_bytes(self, shard: int, rows: int) -> int:
        """Size of a shard file with ``rows`` filled rows; the most it can be if compressed."""
        chunks = len(self.shard_layers(shard)) * self.present_row_chunks(rows) * self.column_chunks
        return chunks * self.chunk_bytes + self.index_bytes

    @property
    def index_shape(self) -> tuple[int, int, int]:
        """Inner chunks of a whole shard along layers, rows and columns."""
        return self.layers_per_shard, self.row_chunks, self.column_chunks

    @property
    def index_bytes(self) -> int:
        """Size of the index at the end of a shard, its checksum included."""
        return 16 * math.prod(self.index_shape) + 4

    def shard_index(self, shard: int, rows: int) -> npt.NDArray[np.uint64]:
        """Zarr's shard index: (offset, length) of every inner chunk in C order.

        Returns:
            uint64 ``(layers_per_shard * row_chunks * column_chunks, 2)``.
        """
        present = self.present_row_chunks(rows)
        index = np.full((*self.index_shape, 2), MISSING_CHUNK, np.uint64)
        layers = len(self.shard_layers(shard))
        count = layers * present * self.column_chunks
        offsets = np.arange(count, dtype=np.uint64) * np.uint64(self.chunk_bytes)
        index[:layers, :present, :, 0] = offsets.reshape(layers, present, self.column_chunks)
        index[:layers, :present, :, 1] = self.chunk_bytes
        return index.reshape(-1, 2)

    def to_json(self) -> dict[str, Any]:
        """The members of a set record that describe this array."""
        fields: dict[str, Any] = {
            "location": self.location.label,
            "pass": self.pass_type.value,
            "layers": self.layers,
            "unit_shape": list(self.unit_shape),
            "dtype": self.dtype.value,
            "variant": self.variant,
        }
        if self.objective is not None:
            fields["objective"] = self.objective
        if self.copy_of is not None:
            fields["copy_of"] = self.copy_of
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any], segment_rows: int) -> "ArraySpec":
        """The spec that :meth:`to_json` described."""
        return cls(
            location=ActivationLocationType[fields["location"].upper()],
            pass_type=PassType(fields["pass"]),
            layers=fields["layers"],
            unit_shape=tuple(fields["unit_shape"]),
            dtype=StoredDtype(fields["dtype"]),
            segment_rows=segment_rows,
            variant=fields["variant"],
            objective=fields.get("objective"),
            copy_of=fields.get("copy_of"),
        )


def group_metadata() -> bytes:
    """``arrays/zarr.json``: a Zarr v3 group."""
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}}) + b"\n"


def array_metadata(spec: ArraySpec, segments: int) -> bytes:
    """``zarr.json`` of an array that holds ``segments`` segments."""
    leading = [] if spec.layers is None else [spec.layers]
    shard_leading = [] if spec.layers is None else [spec.layers_per_shard]
    one_head = len(spec.unit_shape) > 1
    inner_units = [1, spec.chunk_width] if one_head else [spec.chunk_width]
    # Zarr wants the shard to be a whole number of chunks; the array's edge cuts it.
    shard_units = list(spec.unit_shape) if one_head else [spec.column_chunks * spec.chunk_width]
    names = [] if spec.layers is None else [Dimension.LAYER]
    is_bfloat16 = spec.dtype is StoredDtype.BFLOAT16
    return _metadata(
        shape=[*leading, segments * spec.segment_rows, *spec.unit_shape],
        shard=[*shard_leading, spec.segment_rows, *shard_units],
        chunk=[*(1 for _ in leading), spec.chunk_rows, *inner_units],
        dtype="uint16" if is_bfloat16 else spec.dtype.value,
        fill=0x7FC0 if is_bfloat16 else "NaN",
        compression=_ZSTD if spec.is_compressed else None,
        dimensions=[*names, Dimension.TOKEN, *spec.location.axes],
        attributes={
            "location": spec.location.label,
            "pass": spec.pass_type.value,
            "logical_dtype": spec.dtype.value,
            "meaning": spec.location.meaning,
            **({} if spec.objective is None else {"objective": spec.objective}),
            **({} if spec.copy_of is None else {"copy_of": spec.copy_of}),
        },
    )


def token_id_metadata(segment_rows: int, segments: int) -> bytes:
    """``zarr.json`` of ``arrays/token_id``."""
    chunk = math.gcd(segment_rows, _NODE_CHUNK_ROWS)
    return _metadata(
        shape=[segments * segment_rows],
        shard=[segment_rows],
        chunk=[chunk],
        dtype="int32",
        fill=TOKEN_ID_FILL,
        dimensions=[Dimension.TOKEN],
        attributes={"meaning": "the vocabulary's number of every row's token"},
    )


def _axis_name(dimension: Dimension) -> str:
    # The heads of keys and values have gone by this name on disk since format 1.
    return str(Dimension.HEAD if dimension is Dimension.KV_HEAD else dimension)


def _metadata(
    *,
    shape: list[int],
    shard: list[int],
    chunk: list[int],
    dtype: str,
    fill: object,
    compression: dict[str, Any] | None = None,
    dimensions: list[Dimension],
    attributes: dict[str, Any],
) -> bytes:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    return (
        canonical_json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": shape,
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": fill,
                "codecs": [
                    {
                        "name": "sharding_indexed",
                        "configuration": {
                            "chunk_shape": chunk,
                            "codecs": [little] if compression is None else [little, compression],
                            "index_codecs": [little, {"name": "crc32c"}],
                            "index_location": "end",
                        },
                    }
                ],
                "dimension_names": [_axis_name(name) for name in dimensions],
                "attributes": attributes,
                "storage_transformers": [],
            }
        )
        + b"\n"
    )
