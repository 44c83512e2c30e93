"""Pages of many units in another tool's schema, below one directory."""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.query.derived import DerivedScalar
from actstore.query.exports import neuron_viewer, neuronpedia
from actstore.query.exports.files import new_file, refuse_existing
from actstore.query.exports.tables import json_ready
from actstore.query.exports.unit_record import ExportChoice, UnitReader
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["NeuronExport", "NeuronSchema", "export_neurons"]

Units = str | Sequence[tuple[int, int]]


class NeuronSchema(StrEnum):
    """Schemas of neuron pages."""

    NEURON_VIEWER = "neuron_viewer"
    NEURONPEDIA = "neuronpedia"


@dataclass(frozen=True)
class NeuronExport:
    """What was written.

    Attributes:
        directory: below which the files are.
        files: their paths relative to it.
        units: number of units.
    """

    directory: Path
    files: tuple[str, ...]
    units: int


def export_neurons(
    store: "Store",
    units: Units,
    directory: str | PathLike[str],
    schema: str = "neuron_viewer",
    *,
    scalar: str | DerivedScalar = "mlp_post_act",
    choice: ExportChoice | None = None,
    creator: str = "actstore",
    release: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NeuronExport:
    """Write units with their statistics and contexts for another viewer.

    A file is there whole or not at all; an export that stops leaves the files it finished.

    Args:
        store: the open store.
        units: (layer, unit) pairs, or a SQL predicate over ``neurons`` (``heads``,
            ``latents``) such as ``layer = 3 AND kurtosis > 10``.
        directory: below which the files go.
        schema: ``neuron_viewer`` for a ``NeuronRecord`` per unit, or ``neuronpedia`` for a
            directory per layer in the layout of its exports.
        scalar: whose values are shown, with one unit axis.
        choice: how many contexts of which kind.
        creator: Neuronpedia's id of the user to whom rows belong.
        release: Neuronpedia's name of the release; from model and scalar by default.
        force: replace files that are there.
        progress: called with units done and units in all.

    Raises:
        InvalidInput: an unknown schema, scalar or unit, no unit at all, or a file exists.
        Unavailable: the store cannot derive the scalar.
        WriteFailed: the disk is full, read-only or failing.
    """
    try:
        chosen = NeuronSchema(schema)
    except ValueError:
        raise _invalid(f"schema is {schema!r}; use {', '.join(NeuronSchema)}.") from None
    declared = store.scalar(scalar)
    if len(declared.axes) != 1 or not declared.has_layers:
        raise _invalid(
            f"{declared.name} has no single unit axis per layer; neuron pages are of neurons, "
            "heads or latents."
        )
    store.require_committed()
    pairs = _pairs(store, declared, units)
    root = Path(directory).expanduser()
    job = _Job(store, declared, choice or ExportChoice(), root, force, progress, len(pairs))
    if chosen is NeuronSchema.NEURON_VIEWER:
        files = job.neuron_viewer(pairs)
    else:
        files = job.neuronpedia(pairs, creator, release)
    return NeuronExport(root, tuple(files), len(pairs))


@dataclass
class _Job:
    store: "Store"
    declared: DerivedScalar
    choice: ExportChoice
    root: Path
    force: bool
    progress: Callable[[int, int], None] | None
    total: int
    done: int = 0

    def neuron_viewer(self, pairs: list[tuple[int, int]]) -> list[str]:
        """One record per unit."""
        paths = [neuron_viewer.record_path(layer, unit) for layer, unit in pairs]
        self._refuse(paths)
        reader = UnitReader(self.store, self.declared, self.choice)
        for path, (layer, unit) in zip(paths, pairs, strict=True):
            record = reader.read(layer, unit, neuron_viewer.KINDS)
            self._write(path, [neuron_viewer.neuron_record(record)])
            self._tick()
        return paths

    def neuronpedia(
        self, pairs: list[tuple[int, int]], creator: str, release: str | None
    ) -> list[str]:
        """A directory per layer; batches are cut by the unit's number, as its export does."""
        name = self.declared.name
        layers: list[tuple[neuronpedia.NeuronpediaSource, dict[int, list[int]]]] = []
        paths: list[str] = []
        for layer, members in groupby(pairs, key=lambda pair: pair[0]):
            source = neuronpedia.NeuronpediaSource.of_store(
                self.store, name, layer, creator=creator, release=release
            )
            batches: dict[int, list[int]] = {}
            for _, unit in members:
                batches.setdefault(unit // neuronpedia.BATCH_UNITS, []).append(unit)
            layers.append((source, batches))
            paths += [f"{source.folder}/{file}" for file in source.rows(self.store)]
            paths += [_batch_path(source, table, n) for n in batches for table in _BATCH_TABLES]
        self._refuse(paths)
        reader = UnitReader(self.store, self.declared, self.choice)
        for source, batches in layers:
            for file, row in source.rows(self.store).items():
                self._write(f"{source.folder}/{file}", [row])
            for number, members_of in batches.items():
                features, activations = [], []
                for unit in members_of:
                    record = reader.read(source.layer, unit, neuronpedia.KINDS)
                    features.append(neuronpedia.feature_row(source, record))
                    activations += list(neuronpedia.activation_rows(source, record))
                    self._tick()
                for table, rows in zip(_BATCH_TABLES, (features, activations), strict=True):
                    self._write(_batch_path(source, table, number), rows)
        return paths

    def _refuse(self, paths: list[str]) -> None:
        if not self.force:
            refuse_existing([self.root / path for path in paths])

    def _write(self, path: str, rows: Iterable[Any]) -> None:
        lines = [json.dumps(json_ready(row), allow_nan=False, ensure_ascii=False) for row in rows]
        data = "".join(f"{line}\n" for line in lines).encode()
        with new_file(self.root / path, force=self.force) as temporary:
            # Without a time in the header, so that the same rows give the same bytes.
            temporary.write_bytes(gzip.compress(data, mtime=0) if path.endswith(".gz") else data)

    def _tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


_BATCH_TABLES = ("features", "activations")


def _batch_path(source: neuronpedia.NeuronpediaSource, table: str, number: int) -> str:
    return f"{source.folder}/{table}/batch-{number}.jsonl.gz"


def _pairs(store: "Store", declared: DerivedScalar, units: Units) -> list[tuple[int, int]]:
    if isinstance(units, str):
        table = f"{declared.axes[0].value}s"
        found = store.units_where(units, table, store.latent_set_names(declared))
    else:
        found = sorted({_pair(unit) for unit in units})
    if not found:
        raise InvalidInput(
            "No unit is chosen; name units as (layer, unit), or widen the predicate.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )
    known = set(store.layers_of(declared))
    (size,) = store.unit_shape(declared)
    for layer, unit in found:
        if layer not in known or not 0 <= unit < size:
            raise InvalidInput(
                f"There is no unit {(layer, unit)} of {declared.name}; layers are "
                f"{sorted(known)}, units 0 to {size - 1}.",
                kind=ErrorKind.UNKNOWN_UNIT,
            )
    return found


def _pair(unit: Any) -> tuple[int, int]:
    if (
        isinstance(unit, Sequence)
        and len(unit) == 2
        and all(isinstance(number, int | np.integer) for number in unit)
    ):
        return int(unit[0]), int(unit[1])
    raise InvalidInput(
        f"A unit is {unit!r}; give (layer, unit), such as (3, 712).",
        kind=ErrorKind.UNKNOWN_UNIT,
    )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
