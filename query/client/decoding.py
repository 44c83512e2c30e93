"""Answers of a server as the results that an open store gives."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.query.comparison import Comparison
from actstore.query.examples import Example, Examples
from actstore.query.inventory import LatentSetInfo, LocationInfo, StoreInfo
from actstore.query.results import Answer, Cells, Certificate, TopK
from actstore.query.rows import Rows
from actstore.query.tensors import LabelledTensor
from actstore.query.thresholds import Counts
from actstore.store.histograms import BINS, Histogram, bins_of

__all__ = [
    "cells_of",
    "comparison_of",
    "counts_of",
    "examples_of",
    "histogram_of",
    "info_of",
    "joined",
    "read_table",
    "tensor_of",
    "topk_of",
]

_METADATA = b"actstore"
_A = TypeVar("_A", bound=Answer)


def read_table(body: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """A table, and what stands beside its rows."""
    table = pa.ipc.open_stream(body).read_all()
    beside = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    return table.replace_schema_metadata(None), beside


def topk_of(body: bytes) -> TopK:
    """The answers of a ranking."""
    return _answer(TopK, body)


def cells_of(body: bytes) -> Cells:
    """The values in an interval."""
    return _answer(Cells, body)


def _answer(kind: type[_A], body: bytes) -> _A:
    table, beside = read_table(body)
    texts = table.column("text").to_pylist()
    return kind(table.drop_columns("text"), _certificate(beside), partial(list, texts))


def counts_of(body: bytes) -> Counts:
    """How many values of each unit lie in an interval."""
    table, beside = read_table(body)
    return Counts(table, _certificate(beside))


def comparison_of(body: bytes) -> Comparison:
    """Several scalars side by side."""
    table, beside = read_table(body)
    found = {name: Certificate(**one) for name, one in beside["certificates"].items()}
    return Comparison(table, found)


def histogram_of(body: bytes) -> Histogram:
    """How the values of a unit are spread."""
    table, beside = read_table(body)
    low = table.column("low").to_numpy()
    high = table.column("high").to_numpy()
    counts = np.zeros(BINS, np.int64)
    counts[bins_of(low)] = table.column("count").to_numpy()
    # The outermost bins are cut at the unit's own extremes.
    ends = (float(low[0]), float(high[-1])) if len(low) else (np.nan, np.nan)
    return Histogram(counts, int(beside["nan"]), *ends)


def examples_of(body: bytes) -> Examples:
    """The contexts of a unit."""
    table, beside = read_table(body)
    rows = tuple(
        Example(
            token=row["token"],
            sequence=row["sequence"],
            position=row["position"],
            value=row["value"],
            quantile=row["quantile"],
            first_token=row["first_token"],
            texts=tuple(row["texts"]),
            values=tuple(row["values"]),
        )
        for row in table.to_pylist()
    )
    return Examples(tuple(beside["unit"]), beside["kind"], rows, _certificate(beside))


def _certificate(beside: Mapping[str, Any]) -> Certificate:
    return Certificate(**beside["certificate"])


def tensor_of(body: bytes) -> LabelledTensor:
    """Values with their labels."""
    import torch

    table, beside = read_table(body)
    dims = tuple(beside["dims"])
    shape = tuple(beside["shape"])
    layers = beside["layers"]
    values = table.column("values").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    count = shape[0 if layers is None else 1]

    def places(name: str) -> npt.NDArray[np.int64]:
        # Layers come one after another, each with the same rows.
        column: npt.NDArray[np.int64] = table.column(name)[:count].to_numpy().astype(np.int64)
        return column

    return LabelledTensor(
        name=beside["name"],
        values=torch.from_numpy(np.array(values).reshape(shape)),
        dims=dims,
        layers=None if layers is None else tuple(layers),
        rows=Rows(places("token"), places("sequence"), places("position")),
        source=beside["source"],
        attended=places("attended") if "attended" in table.column_names else None,
    )


def joined(parts: Sequence[LabelledTensor]) -> LabelledTensor:
    """Tensors of the same values at different rows as one, in their order.

    Attended axes become as long as the longest; NaN fills the others.
    """
    import torch

    first = parts[0]
    if len(parts) == 1:
        return first
    axis = 0 if first.layers is None else 1
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    filled = []
    for part in parts:
        wanted = [*shape]
        wanted[axis] = part.shape[axis]
        values = part.values
        if list(values.shape) != wanted:
            wider = values.new_full(wanted, torch.nan)
            wider[tuple(slice(size) for size in values.shape)] = values
            values = wider
        filled.append(values)
    rows = [
        np.concatenate([getattr(part.rows, name) for part in parts])
        for name in ("token", "sequence", "position")
    ]
    attended = [part.attended for part in parts if part.attended is not None]
    return LabelledTensor(
        name=first.name,
        values=torch.cat(filled, axis),
        dims=first.dims,
        layers=first.layers,
        rows=Rows(*rows),
        source=first.source,
        attended=np.concatenate(attended) if attended else None,
    )


def info_of(found: Mapping[str, Any], url: str) -> StoreInfo:
    """What a store holds; its path is the server's address."""
    locations = {
        name: LocationInfo(**{**entry, "axes": tuple(entry["axes"])})
        for name, entry in found["locations"].items()
    }
    latents = {
        name: LatentSetInfo(
            **{
                **entry,
                "autoencoders": _numbered(entry["autoencoders"]),
                "latents": _numbered(entry["latents"]),
            }
        )
        for name, entry in found["latents"].items()
    }
    members = {
        name: found[name]
        for name in StoreInfo.__dataclass_fields__
        if name not in ("path", "missing", "locations", "latents")
    }
    return StoreInfo(
        path=url,
        missing=tuple((first, last) for first, last in found["missing"]),
        latents=latents,
        locations=locations,
        **members,
    )


def _numbered(members: Mapping[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in members.items()}
