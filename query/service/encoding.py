"""Answers as bytes: tables and tensors in each form that they can take."""

import csv
import io
import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from actstore.query.service.negotiation import Format
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = [
    "METADATA_KEY",
    "encode_json",
    "encode_table",
    "encode_tensor",
    "json_value",
    "tensor_fields",
    "tensor_table",
]

METADATA_KEY = "actstore"
"""Of an Arrow schema: JSON of what stands beside the rows (certificate, dims, source …)."""

_ROW_LABELS = ("layer", "token", "sequence", "position", "attended")


def json_value(value: Any) -> Any:
    r"""The nearest JSON value: NaN and infinities become null, dates and the like text.

    >>> json_value({"a": float("nan"), "b": (1, None, b"\x01")})
    {'a': None, 'b': [1, None, '01']}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return json_value(int(value) if value == value.to_integral_value() else float(value))
    if isinstance(value, Mapping):
        return {str(key): json_value(member) for key, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(member) for member in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, np.generic):
        return json_value(value.item())
    return str(value)


def encode_json(value: Any) -> bytes:
    """Strict JSON in UTF-8."""
    # A lone half of a character is no UTF-8; JSON's own escape can say it.
    try:
        return _dump(value, ascii_only=False).encode()
    except UnicodeEncodeError:
        return _dump(value, ascii_only=True).encode()


def _dump(value: Any, *, ascii_only: bool) -> str:
    return json.dumps(
        json_value(value), ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":")
    )


def encode_table(table: pa.Table, form: Format, beside: Mapping[str, Any], **names: str) -> bytes:
    """A table in one of its forms.

    Args:
        table: the rows.
        form: JSON, Arrow or CSV.
        beside: what an object holds besides ``rows``, such as the certificate; of Arrow the
            schema's metadata, of CSV nothing.
        names: ``rows="arrays"`` for rows without names, where names may repeat.
    """
    if form is Format.ARROW:
        return _arrow(table, beside)
    if form is Format.CSV:
        return _csv(table)
    if names.get("rows") == "arrays":
        columns = [column.to_pylist() for column in table.columns]
        rows: list[Any] = [list(row) for row in zip(*columns, strict=True)]
        return encode_json({**beside, "rows": rows})
    return encode_json({**beside, "rows": table.to_pylist()})


def _arrow(table: pa.Table, beside: Mapping[str, Any]) -> bytes:
    metadata = {METADATA_KEY: encode_json(beside)}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table.replace_schema_metadata(metadata))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _csv(table: pa.Table) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(table.column_names)
    columns = [column.to_pylist() for column in table.columns]
    for row in zip(*columns, strict=True):
        writer.writerow([_csv_cell(value) for value in row])
    return buffer.getvalue().encode(errors="surrogatepass")


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict | tuple):
        return encode_json(value).decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | str):
        return str(value)
    return str(json_value(value))


def tensor_fields(found: LabelledTensor) -> dict[str, Any]:
    """What a tensor's values mean: name, dims, shape, layers, source."""
    return {
        "name": found.name,
        "dims": list(found.dims),
        "shape": list(found.shape),
        "dtype": str(found.values.dtype).removeprefix("torch."),
        "layers": None if found.layers is None else list(found.layers),
        "source": found.source,
    }


def encode_tensor(found: LabelledTensor, form: Format, max_json_values: int) -> bytes:
    """A tensor in one of its forms; the values are exact in Arrow and npy.

    Args:
        found: the tensor.
        form: JSON, Arrow or npy.
        max_json_values: refuse more in JSON.

    Raises:
        InvalidInput: too many values for JSON.
    """
    if form is Format.NPY:
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(found.numpy()), allow_pickle=False)
        return buffer.getvalue()
    if form is Format.ARROW:
        return _arrow(tensor_table(found), tensor_fields(found))
    values = found.numpy()
    if values.size > max_json_values:
        raise InvalidInput(
            f"{found.name} here is {values.size:,} values; JSON holds {max_json_values:,} at most. "
            "Ask for fewer layers or rows, or for format=arrow or format=npy.",
            kind=ErrorKind.TOO_LARGE,
        )
    labels = {name: place.tolist() for name, place in found.coordinates.items() if name != "layer"}
    head = encode_json({**tensor_fields(found), **labels})
    # Numbers alone, so the three words that JSON lacks can be replaced in the text.
    numbers = json.dumps(values.tolist(), separators=(",", ":"))
    for word in ("-Infinity", "Infinity", "NaN"):
        numbers = numbers.replace(word, "null")
    return head[:-1] + b',"values":' + numbers.encode() + b"}"


def tensor_table(found: LabelledTensor) -> pa.Table:
    """A tensor as a table: a row per layer and token (or pair), the units as one list.

    Columns ``layer`` (where there are layers), ``token``, ``sequence``, ``position``,
    ``attended`` (of pairs) and ``values``, a fixed-size list over the unit axes in C order.
    """
    values = np.ascontiguousarray(found.numpy())
    places = found.coordinates
    rows = len(places["token"])
    layers = 1 if found.layers is None else len(found.layers)
    width = int(np.prod(values.shape[(0 if found.layers is None else 1) + 1 :], dtype=np.int64))
    columns: dict[str, pa.Array] = {}
    if found.layers is not None:
        columns["layer"] = pa.array(np.repeat(places["layer"], rows), pa.int32())
    for name in _ROW_LABELS[1:]:
        if name in places:
            columns[name] = pa.array(np.tile(places[name], layers), pa.int64())
    flat = pa.array(values.reshape(-1))
    columns["values"] = pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.table(columns)
