"""The catalog's Parquet parts: what every row of a committed segment is.

One small file per segment, written before the segment's commit. Anything that reads
Parquet can answer which token, sequence and document a row belongs to; the snapshot
is built from the same rows.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from actstore.store.plan import SegmentPlan

__all__ = ["PART_SCHEMA", "encode_part", "part_path", "part_rows"]

PART_SCHEMA = pa.schema(
    [
        pa.field("token", pa.int64(), nullable=False),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
        pa.field("document", pa.int64(), nullable=False),
    ]
)
"""Columns of a part; ``token`` is the global row, ``token_id`` the vocabulary's number."""

_ROW_GROUP = 65536


def part_path(segment: int) -> str:
    """The part's path inside the store."""
    return f"catalog/parts/{segment:06d}.parquet"


def part_rows(segment: SegmentPlan) -> dict[str, npt.NDArray[np.generic]]:
    """The rows of a segment, column by column, as ``PART_SCHEMA`` names them."""
    sequence = segment.row_sequence
    return {
        "token": np.arange(segment.first_row, segment.first_row + segment.n_rows),
        "sequence": segment.first_sequence + sequence,
        "position": segment.positions,
        "token_id": segment.token_ids,
        "special": segment.special,
        "document": segment.document[sequence],
    }


def encode_part(segment: SegmentPlan) -> bytes:
    """The bytes of a segment's part: the same for every writer of the segment."""
    rows = part_rows(segment)
    table = pa.table([pa.array(rows[field.name], field.type) for field in PART_SCHEMA], PART_SCHEMA)
    sink = pa.BufferOutputStream()
    parquet.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=_ROW_GROUP,
        # The Arrow schema would repeat what Parquet's own types say.
        store_schema=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data
