"""Run a transformer once, keep its activations on disk, and ask anything later.

    import actstore

    store = actstore.ingest("gpt2", "corpus/*.txt", "runs/gpt2")
    store = actstore.open("runs/gpt2")
    store.topk("mlp_write_norm", k=20)

Importing this package is cheap: torch and transformers are imported when a model is run
or a tensor is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

from actstore.names import LAZY as _LAZY
from actstore.store.errors import (
    ActstoreError,
    ErrorKind,
    IngestStopped,
    InvalidInput,
    NotAStore,
    StoreConflict,
    StoreDamaged,
    Unavailable,
    WriteFailed,
)

if TYPE_CHECKING:
    from pathlib import Path

    from actstore.ingest.estimate import Estimate
    from actstore.ingest.objectives import Objective
    from actstore.ingest.preparation import Corpus
    from actstore.prompt import Prompt, RawActivationStore
    from actstore.query.client import RemoteStore, connect
    from actstore.query.derived.config import DstConfig
    from actstore.query.derived.declaration import DerivedScalar
    from actstore.query.derived.loading import load_scalars
    from actstore.query.derived.naming import derived_scalar
    from actstore.query.derived.registry import (
        register_scalar,
        temporary_scalars,
        unregister_scalar,
    )
    from actstore.query.exports.neurons import export_neurons
    from actstore.query.exports.tables import export_table
    from actstore.query.notebooks import view
    from actstore.query.session import Store
    from actstore.store.model.autoencoder_families import Autoencoders
    from actstore.store.model.autoencoder_formats import load_autoencoder
    from actstore.store.model.autoencoders import Autoencoder
    from actstore.store.nodes import (
        Ablation,
        ActivationIndex,
        AttentionTraceType,
        AttnSubNodeIndex,
        NodeIndex,
        PreOrPostAct,
        TraceConfig,
    )
    from actstore.store.vocabulary import NodeType

__all__ = [
    "Ablation",
    "ActivationIndex",
    "ActstoreError",
    "AttentionTraceType",
    "AttnSubNodeIndex",
    "Autoencoder",
    "Autoencoders",
    "DerivedScalar",
    "DstConfig",
    "ErrorKind",
    "Estimate",
    "IngestStopped",
    "InvalidInput",
    "NodeIndex",
    "NodeType",
    "NotAStore",
    "PreOrPostAct",
    "Prompt",
    "RawActivationStore",
    "RemoteStore",
    "Store",
    "StoreConflict",
    "StoreDamaged",
    "TraceConfig",
    "Unavailable",
    "WriteFailed",
    "__version__",
    "connect",
    "derived_scalar",
    "estimate",
    "export_neurons",
    "export_table",
    "ingest",
    "load_autoencoder",
    "load_scalars",
    "open",
    "register_scalar",
    "temporary_scalars",
    "unregister_scalar",
    "view",
]

__version__ = version("actstore")

StorePath = str | PathLike[str]
Progress = Callable[[str, int, int], None]


def ingest(
    model: Any,
    corpus: Any,
    out: StorePath,
    *,
    locations: str | Sequence[str] | None = None,
    keep: Mapping[str, str] | None = None,
    objective: "Objective | str | None" = None,
    gradients: str | Sequence[str] | None = None,
    limit_tokens: int | None = None,
    max_bytes: int | None = None,
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    bos: str = "auto",
    context: int | None = None,
    stride: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    device: str = "auto",
    segment_rows: int | None = None,
    batch_tokens: int | None = None,
    shuffle: int | None = None,
    append: bool = False,
    set_name: str = "base",
    index: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> "Store":
    """Run a model over a corpus and keep its activations.

    What is committed is never touched again: a run that was killed, stopped or out of disk
    is finished by the same call, and repeating a finished one changes nothing.

    Args:
        model: a hub id, a folder, ``"demo"`` (the shipped model), or ``(model, tokenizer)``
            in memory, where the tokenizer may be None.
        corpus: paths or globs of text, JSONL or Parquet files; an iterable of texts, of
            records, or of lists of token ids; or a ``datasets.Dataset``.
        out: the store's directory.
        locations: presets (``minimal``, ``neurons``, ``attention``, ``full``) and names of
            locations, as a list or separated by commas, or ``none``. None is ``neurons``, and
            no location in a further set with an objective.
        keep: location -> ``raw`` or ``none``, added to the locations.
        objective: what a backward pass differentiates for each sequence: its name, such as
            ``next_token_log_prob`` or ``logit_diff(answer, distractor)`` with token ids or the
            corpus' own columns, or one of :mod:`actstore.ingest.objectives`; None for no
            backward pass.
        gradients: locations whose gradients are kept, as float32, named like ``locations``;
            by default the residual stream after the embedding, attention and the MLP, neurons
            after the activation function, and the weighted values: all others follow from these.
        limit_tokens: plan no sequence that would pass so many tokens.
        max_bytes: refuse to write more.
        columns: the corpus' columns to keep per document; all by default.
        text_column: where records and tables have their text.
        bos: BOS before each ``document`` or ``sequence``, ``none``, or ``auto``: before
            documents if the tokenizer has one.
        context: tokens of a sequence at most; the model's own limit by default.
        stride: tokens between the starts of sequences; ``context`` by default.
        dtype: of the stored values: ``auto`` or a dtype, with ``location=dtype`` exceptions;
            gradients are float32 whatever it says.
        revision: branch, tag or commit of a hub model.
        device: where to run a model that is loaded here.
        segment_rows: rows of a segment, a multiple of 512.
        batch_tokens: padded tokens of one forward pass.
        shuffle: seed of a permutation of the sequences.
        append: add this corpus to a store that holds another.
        set_name: a name of its own adds locations, or the gradients of a further objective,
            to a store that has its base set; with None for the corpus, over everything that
            the store holds.
        index: derived scalars to index once everything is stored, such as
            ``mlp_act_times_grad``; see ``Store.index``.
        progress: called with phase, tokens done and tokens in all (0 if unknown).

    Returns:
        The store, open.

    Raises:
        InvalidInput: the model, the corpus or a setting cannot be used.
        StoreConflict: the path holds a store of another model, config or corpus.
        IngestStopped: too little space, a value too large for its dtype, or a failing disk.
        KeyboardInterrupt: Ctrl-C, once what was at hand is written; the store is sound.
    """
    from actstore.ingest.settings import IngestSettings

    settings = IngestSettings(
        locations=_names(locations),
        keep=dict(keep or {}),
        objective=objective,
        gradients=_names(gradients),
        context=context,
        stride=stride,
        bos=bos,
        dtype=dtype,
        segment_rows=segment_rows,
        batch_tokens=batch_tokens,
        limit_tokens=limit_tokens,
        shuffle=shuffle,
        max_bytes=max_bytes,
        append=append,
        set_name=set_name,
    )
    from actstore.ingest import pipeline
    from actstore.ingest.model import load_model
    from actstore.query.derived import scalar

    indexed = [index] if isinstance(index, str) else list(index or ())
    for name in indexed:
        # A name that nobody knows is better refused before the model has run.
        scalar(name)
    loaded = load_model(model, device=device, revision=revision)
    report = pipeline.ingest(
        loaded, _corpus(corpus, text_column, columns), _path(out), settings, progress
    )
    if report.interrupted:
        raise KeyboardInterrupt(
            f"{report.stored:,} of {report.planned:,} tokens are stored; the same call goes on."
        )
    store = open(out)
    return store.index(indexed, progress=progress) if indexed else store


def open(path: StorePath, *, objective: str | None = None) -> "Store":
    """Open a store for reading: what is committed at this moment.

    Args:
        path: the store's directory.
        objective: whose gradients are read, where sets of several objectives are stored;
            the base set's by default.

    Raises:
        NotAStore: the path holds no store, or one of a newer format.
        StoreDamaged: a record fails its checksum.
    """
    from actstore.query.session import Store

    return Store(_path(path), objective=objective)


def estimate(
    model: Any,
    corpus: Any,
    out: StorePath | None = None,
    *,
    locations: str | Sequence[str] | None = None,
    keep: Mapping[str, str] | None = None,
    objective: "Objective | str | None" = None,
    gradients: str | Sequence[str] | None = None,
    limit_tokens: int | None = None,
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    bos: str = "auto",
    context: int | None = None,
    stride: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    device: str = "auto",
    segment_rows: int | None = None,
    batch_tokens: int | None = None,
    shuffle: int | None = None,
    append: bool = False,
    measure: bool = True,
    progress: Progress | None = None,
) -> "Estimate":
    """Say what :func:`ingest` would write and take, and write nothing.

    Args:
        model: as for :func:`ingest`.
        corpus: as for :func:`ingest`; read once.
        out: the store's directory; what it holds already is not counted again.
        locations: as for :func:`ingest`.
        keep: as for :func:`ingest`.
        objective: as for :func:`ingest`.
        gradients: as for :func:`ingest`.
        limit_tokens: as for :func:`ingest`.
        columns: as for :func:`ingest`.
        text_column: as for :func:`ingest`.
        bos: as for :func:`ingest`.
        context: as for :func:`ingest`.
        stride: as for :func:`ingest`.
        dtype: as for :func:`ingest`.
        revision: as for :func:`ingest`.
        device: as for :func:`ingest`.
        segment_rows: as for :func:`ingest`.
        batch_tokens: as for :func:`ingest`.
        shuffle: as for :func:`ingest`.
        append: as for :func:`ingest`.
        measure: run a sample for the times; without it they are None.
        progress: called with phase, tokens done and tokens in all (0 if unknown).

    Returns:
        Bytes by array, files, seconds, and seconds of the forward passes alone, which is
        what a further question costs without a store.

    Raises:
        InvalidInput: the model, the corpus or a setting cannot be used.
        StoreConflict: the path holds a store of another model, config or corpus.
    """
    from actstore.ingest.settings import IngestSettings

    settings = IngestSettings(
        locations=_names(locations),
        keep=dict(keep or {}),
        objective=objective,
        gradients=_names(gradients),
        context=context,
        stride=stride,
        bos=bos,
        dtype=dtype,
        segment_rows=segment_rows,
        batch_tokens=batch_tokens,
        limit_tokens=limit_tokens,
        shuffle=shuffle,
        append=append,
    )
    from actstore.ingest.model import load_model
    from actstore.ingest.preview import preview

    loaded = load_model(model, device=device, revision=revision)
    return preview(
        loaded,
        _corpus(corpus, text_column, columns),
        None if out is None else _path(out),
        settings,
        progress,
        measure=measure,
    ).estimate


def _corpus(source: Any, text_column: str, columns: Sequence[str] | None) -> "Corpus":
    from actstore.ingest.preparation import Corpus

    names = (columns,) if isinstance(columns, str) else columns
    return Corpus(source, text_column, None if names is None else tuple(names))


def _names(locations: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return locations if locations is None or isinstance(locations, str) else tuple(locations)


def _path(path: StorePath) -> "Path":
    from pathlib import Path

    return Path(path).expanduser()


class _CallableRoom(ModuleType):
    """The package `actstore.ingest`, which is the function of that name as well.

    Python puts a package into its parent under its own name, in place of what stood there.
    So the package answers calls, and `actstore.ingest.pipeline` is found as ever.
    """

    def __call__(self, *arguments: Any, **choices: Any) -> "Store":
        return _ingest(*arguments, **choices)


_ingest = ingest
_room = import_module("actstore.ingest")
_room.__class__ = _CallableRoom
_room.__dict__["__signature__"] = signature(_ingest)
globals()["ingest"] = _room


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
