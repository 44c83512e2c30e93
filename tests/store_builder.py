"""Builds small stores from chosen values, without torch and without a model run.

Everything is written by the code that ingest uses, in its order: model files, manifest,
plan, set record, Zarr metadata, then each segment's shards, zone files, token ids, part
and commit record. So a test chooses the values and gets a store that is real.

    path = build_store(tmp_path / "store", {"mlp_post_act": values}, lengths=[100, 37])

``values`` arrays are ``(layer, token, *unit)``, or ``(token, *unit)`` for a place outside
the blocks; the token axis runs over the corpus' tokens in order. ``stored_rows(path)``
says which global row each of them became.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actstore.store.blobs import LocalBlobs, Part
from actstore.store.commits import CommitRecord, read_commits
from actstore.store.layout import ArraySpec, StoredDtype
from actstore.store.location_names import parse_location
from actstore.store.manifest import FileEntry, SetRecord, StoreManifest, read_manifest, read_sets
from actstore.store.model.architecture import architecture_of
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.parameters import EncodedParameters, Parameter
from actstore.store.model.pieces import TOKENIZER_KEY
from actstore.store.model.readout import READOUT_KEY, compute_readout
from actstore.store.model.weights import (
    CONFIG_KEY,
    PARAMETERS_KEY,
    SNAPSHOT_KEY,
    FileCheck,
    ModelSnapshot,
    ModelWeights,
)
from actstore.store.plan import load_plans
from actstore.store.plan_record import PlanConfig
from actstore.store.planning import build_plan
from actstore.store.publishing import publish_metadata, publish_segment
from actstore.store.sections import encode_sections
from actstore.store.shards import SegmentBuffer
from actstore.store.token_stream import TokenizedDocument
from actstore.store.vocabulary import Dimension, PassType

__all__ = ["append_plan", "build_store", "commit_segments", "stored_rows", "to_stored"]

VOCABULARY = 48

Values = Mapping[str, npt.ArrayLike]


def build_store(
    path: str | Path,
    values: Values,
    lengths: Sequence[int],
    *,
    dtype: str | Mapping[str, str] = "float16",
    segment_rows: int = 512,
    special_token_ids: Iterable[int] = (),
    token_ids: Sequence[Sequence[int]] | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    sources: Sequence[str] | None = None,
    commit: Literal["all"] | Sequence[int] = "all",
    context: int | None = None,
    shuffle: int | None = None,
    seed: int = 0,
) -> Path:
    """Build a store on disk.

    Args:
        path: the directory to make.
        values: location label, or ``label/backward`` -> values, float.
        lengths: tokens of each document; one document is one sequence unless ``context``
            is shorter.
        dtype: of all arrays, or label -> dtype.
        segment_rows: S; a multiple of 512 and at least 4 contexts.
        special_token_ids: the tokenizer's special tokens.
        token_ids: every document's token ids; random over the vocabulary of 48 by default.
        columns: the caller's columns of every document.
        sources: every document's source; ``doc-<n>.txt`` by default.
        commit: segments to commit; the others stay planned.
        context: longest sequence; the longest document by default.
        shuffle: seed of a permutation of the sequences.
        seed: of the token ids and the weights.
    """
    root = Path(path)
    blobs = LocalBlobs(root)
    arrays = {name: np.asarray(array) for name, array in values.items()}
    rng = np.random.default_rng(seed)
    special = tuple(sorted(special_token_ids))
    dimensions = _dimensions(arrays, max(lengths))
    model_files, fingerprint = _publish_model(blobs, dimensions, special, rng)
    manifest = StoreManifest(
        model={
            "name": "tiny",
            "revision": None,
            "architecture": "gpt2",
            "dimensions": asdict(dimensions),
            "fingerprint": fingerprint,
            "weights": "snapshot",
        },
        tokenizer={
            "fingerprint": f"{VOCABULARY}-{special}",
            "vocabulary_size": VOCABULARY,
            "special_token_ids": list(special),
            "bos_token_id": None,
        },
        config={
            "context": context or max(lengths),
            "stride": context or max(lengths),
            "bos": "none",
            "segment_rows": segment_rows,
            "batch_tokens": 4 * (context or max(lengths)),
            "dtype": "auto",
            "objective": None,
        },
        environment={"device": "cpu"},
        files=tuple(model_files),
    )
    blobs.publish("store.json", [manifest.encode()])
    documents = _documents(lengths, rng, token_ids, columns, sources)
    config = PlanConfig(
        context=context or max(lengths),
        vocabulary_size=VOCABULARY,
        segment_rows=segment_rows,
        batch_tokens=4 * (context or max(lengths)),
        special_token_ids=special,
        shuffle=shuffle,
    )
    build_plan(blobs, config, documents, load_plans(root), append=False)
    specs = tuple(
        _spec(name, array, dtype if isinstance(dtype, str) else dtype[name], segment_rows)
        for name, array in arrays.items()
    )
    record = SetRecord("base", specs, {spec.location.label: "raw" for spec in specs})
    blobs.publish(record.path, [record.encode()])
    commit_segments(root, values, commit)
    return root


def append_plan(
    path: str | Path,
    lengths: Sequence[int],
    *,
    columns: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 1,
) -> None:
    """Plan a further corpus; commit it with values for the tokens of all plans.

    Args:
        path: a store that :func:`build_store` made.
        lengths: tokens of each further document.
        columns: the caller's columns of each.
        seed: of the token ids.
    """
    root = Path(path)
    plans = load_plans(root)
    documents = _documents(lengths, np.random.default_rng(seed), None, columns, None)
    build_plan(LocalBlobs(root), plans[0].config, documents, plans, append=True)


def commit_segments(
    path: str | Path, values: Values, segments: Literal["all"] | Sequence[int] = "all"
) -> list[CommitRecord]:
    """Commit planned segments of a store that :func:`build_store` made.

    Args:
        path: the store.
        values: the values it was built with.
        segments: which; those that are committed already are left alone.
    """
    root = Path(path)
    blobs = LocalBlobs(root)
    manifest = read_manifest(blobs)
    set_record = read_sets(blobs, manifest.segment_rows)["base"]
    plans = load_plans(root)
    publish_metadata(blobs, set_record, sum(plan.n_segments for plan in plans))
    places = np.argsort(stored_rows(root), kind="stable")
    ordered = stored_rows(root)[places]
    done = read_commits(blobs, "base")
    records = []
    for plan in plans:
        for number in range(plan.first_segment, plan.first_segment + plan.n_segments):
            if number in done or (segments != "all" and number not in segments):
                continue
            segment = plan.segment(number)
            low, high = np.searchsorted(
                ordered, [segment.first_row, segment.first_row + segment.n_rows]
            )
            tokens = places[low:high]
            buffers = {}
            for spec in set_record.arrays:
                array = np.asarray(values[_name(spec, values)])
                layered = array if spec.layers is not None else array[None]
                buffer = SegmentBuffer(spec, segment.n_rows)
                for layer in range(spec.layer_count):
                    buffer.put(layer, 0, to_stored(layered[layer][tokens], spec.dtype))
                buffers[spec.key] = buffer
            records.append(publish_segment(blobs, set_record, plan.hash, segment, buffers))
    return records


def stored_rows(path: str | Path) -> npt.NDArray[np.int64]:
    """The global row of every token of the corpus, in the corpus' order, ``(token,)``."""
    rows: list[npt.NDArray[np.int64]] = []
    for plan in load_plans(Path(path)):
        sequences = plan.sequences()
        order = np.lexsort((sequences["start"], sequences["document"]))
        rows += [
            np.arange(first, first + length, dtype=np.int64)
            for first, length in zip(
                sequences["first_token"][order], sequences["length"][order], strict=True
            )
        ]
    return np.concatenate(rows)


def to_stored(values: npt.ArrayLike, dtype: StoredDtype) -> npt.NDArray[Any]:
    """Values in the storage dtype; bfloat16 by truncation, overflow becomes infinite."""
    if dtype is StoredDtype.BFLOAT16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return (bits >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype.storage)


def _documents(
    lengths: Sequence[int],
    rng: np.random.Generator,
    token_ids: Sequence[Sequence[int]] | None,
    columns: Sequence[Mapping[str, Any]] | None,
    sources: Sequence[str] | None,
) -> list[TokenizedDocument]:
    return [
        TokenizedDocument(
            np.array(token_ids[number], np.int32)
            if token_ids is not None
            else rng.integers(0, VOCABULARY, length).astype(np.int32),
            sources[number] if sources else f"doc-{number}.txt",
            dict(columns[number]) if columns else {},
        )
        for number, length in enumerate(lengths)
    ]


def _name(spec: ArraySpec, values: Values) -> str:
    return next(
        name
        for name in (spec.key, spec.location.label)
        if name in values and _spec_key(name) == spec.key
    )


def _spec_key(name: str) -> str:
    return name if "/" in name else f"{name}/{PassType.FORWARD}"


def _spec(name: str, array: npt.NDArray[Any], dtype: str, segment_rows: int) -> ArraySpec:
    label, _, pass_type = _spec_key(name).partition("/")
    location = parse_location(label)[0]
    layers = len(array) if location.has_layers else None
    return ArraySpec(
        location=location,
        pass_type=PassType(pass_type),
        layers=layers,
        unit_shape=array.shape[1 if layers is None else 2 :],
        dtype=StoredDtype(dtype),
        segment_rows=segment_rows,
    )


def _dimensions(arrays: Mapping[str, npt.NDArray[Any]], context: int) -> ModelDimensions:
    """Sizes of a GPT-2 that fits the arrays."""
    sizes: dict[Dimension, int] = {}
    for name, array in arrays.items():
        location = parse_location(name.partition("/")[0])[0]
        axes = [*([Dimension.LAYER] if location.has_layers else []), Dimension.TOKEN]
        sizes.update(zip([*axes, *location.axes], array.shape, strict=True))
    heads = sizes.get(Dimension.HEAD, 2)
    d_model = sizes.get(Dimension.CHANNEL, heads * sizes.get(Dimension.HEAD_CHANNEL, 4))
    config = {
        "model_type": "gpt2",
        "n_layer": sizes.get(Dimension.LAYER, 1),
        "n_embd": d_model,
        "n_head": heads if d_model % heads == 0 else 1,
        "n_inner": sizes.get(Dimension.NEURON, 4 * d_model),
        "vocab_size": VOCABULARY,
        "n_positions": context,
    }
    return architecture_of(config).dimensions(config)


def _publish_model(
    blobs: LocalBlobs,
    dimensions: ModelDimensions,
    special: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[list[FileEntry], str]:
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": dimensions.n_layers,
        "n_embd": dimensions.d_model,
        "n_head": dimensions.n_heads,
        "n_inner": dimensions.d_mlp,
        "vocab_size": dimensions.vocabulary_size,
        "n_positions": dimensions.n_positions,
        "dtype": "float32",
    }
    parameters = EncodedParameters(
        {name: _parameter(rng, shape) for name, shape in _shapes(dimensions).items()},
        {"lm_head.weight": "transformer.wte.weight"},
    )
    weights = ModelWeights(architecture_of(config), dimensions, parameters)
    files: dict[str, list[Part]] = {
        CONFIG_KEY: [json.dumps(config).encode()],
        PARAMETERS_KEY: list(parameters),
        READOUT_KEY: list(encode_sections(compute_readout(weights))),
        TOKENIZER_KEY: [json.dumps(_tokenizer(special)).encode()],
    }
    entries = {key: _entry(key, parts) for key, parts in files.items()}
    snapshot = ModelSnapshot(
        name="tiny",
        revision=None,
        architecture="gpt2",
        fingerprint=parameters.fingerprint,
        run_dtype="float32",
        stored_dtype="float32",
        files={key: FileCheck(e.size, f"{e.crc32c:08x}") for key, e in entries.items()},
    )
    files[SNAPSHOT_KEY] = [snapshot.encode()]
    for key, parts in files.items():
        blobs.publish(key, parts)
    return [_entry(key, parts) for key, parts in files.items()], parameters.fingerprint


def _entry(key: str, parts: Iterable[Part]) -> FileEntry:
    data = b"".join(bytes(part) for part in parts)
    return FileEntry(key, len(data), crc32c(data))


def _parameter(rng: np.random.Generator, shape: tuple[int, ...]) -> Parameter:
    data = rng.normal(size=shape).astype("<f4").tobytes()
    return Parameter("F32", shape, lambda: memoryview(data))


def _shapes(d: ModelDimensions) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (d.vocabulary_size, d.d_model),
        "transformer.wpe.weight": (d.n_positions, d.d_model),
        "transformer.ln_f.weight": (d.d_model,),
        "transformer.ln_f.bias": (d.d_model,),
    }
    for layer in range(d.n_layers):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (d.d_model,)
        for module, rows, columns in (
            ("attn.c_attn", d.d_model, 3 * d.d_model),
            ("attn.c_proj", d.d_model, d.d_model),
            ("mlp.c_fc", d.d_model, d.d_mlp),
            ("mlp.c_proj", d.d_mlp, d.d_model),
        ):
            shapes[f"{block}.{module}.weight"] = (rows, columns)
            shapes[f"{block}.{module}.bias"] = (columns,)
    return shapes


def _tokenizer(special: tuple[int, ...]) -> dict[str, Any]:
    """A byte-level vocabulary: letters, pairs with a space before, and one broken byte."""
    pieces = [chr(ord("a") + number) for number in range(24)]
    pieces += [f"Ġ{chr(ord('a') + number)}" for number in range(VOCABULARY - 26)]
    pieces += ["Ċ", "Â"]
    for number in special:
        pieces[number] = f"<|special-{number}|>"
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": pieces[number], "special": True} for number in special
        ],
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {p: n for n, p in enumerate(pieces)}, "merges": []},
    }
