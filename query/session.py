"""The public face of an open store: everything that can be asked of it.

Opening reads records and plans alone. Torch is imported when a tensor is asked for, so
metadata, top-k over stored arrays and SQL cost no more than they need.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actstore.query.derived import DerivedScalar
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import PLAIN
from actstore.query.inventory import LocationInfo, StoreInfo, list_locations, summarise
from actstore.query.latent_sets import Latents, read_latents
from actstore.query.store_tensors import Numbers, ScalarName
from actstore.query.store_units import StoreUnits
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from os import PathLike

    from duckdb import DuckDBPyRelation
    from torch import Tensor

    from actstore.query.cache import ActivationCache, LogitAttribution
    from actstore.query.comparison import Comparison
    from actstore.query.examples import Examples
    from actstore.query.explanation import Explanation
    from actstore.query.results import Cells, TopK
    from actstore.query.sql import Parameters
    from actstore.query.thresholds import Counts
    from actstore.store.model.autoencoder_families import Autoencoders
    from actstore.store.model.autoencoders import Autoencoder
    from actstore.store.nodes import NodeIndex
    from actstore.store.verification import VerifyReport

__all__ = ["Store"]


class Store(StoreUnits):
    """An open store: the committed segments at the moment of opening, and nothing else.

    Args:
        path: the store's directory.
        objective: whose gradients are read, of several; the base set's by default.
        max_result_bytes: greatest tensor that one call may return.

    Raises:
        NotAStore: the path holds no store, or one of a newer format.
        StoreDamaged: a record fails its checksum.
    """

    def __repr__(self) -> str:
        info = self.info()
        stored = [f"{name} {entry.dtype}" for name, entry in info.locations.items() if entry.dtype]
        return (
            f"<Store {str(self.path)!r}: {info.model}, {info.layers} layers; {info.tokens:,} tokens "
            f"in {info.sequences:,} sequences of {info.documents:,} documents; "
            f"{info.segments_committed} of {info.segments_planned} segments; "
            f"stored: {', '.join(stored)}>"
        )

    def _repr_html_(self) -> str | None:
        from actstore.query.notebooks import store_html

        return store_html(self)

    # What it holds

    @property
    def model_name(self) -> str:
        """The model's name as given at ingest."""
        return str(self.reader.manifest.model["name"])

    @property
    def n_sequences(self) -> int:
        """Sequences of all plans, committed or not."""
        return self.row_map.n_sequences

    @property
    def n_tokens(self) -> int:
        """Committed token rows."""
        return sum(record.rows for record in self.reader.commits.get("base", {}).values())

    def info(self) -> StoreInfo:
        """What the store holds, and what it does not hold yet."""
        return summarise(self.reader, self.row_map, self.sources)

    @cached_property
    def locations(self) -> Mapping[str, LocationInfo]:
        """Every location of the forward pass, and every stored gradient: where it comes from."""
        return MappingProxyType(list_locations(self.reader, self.sources))

    # Latents of autoencoders

    def add_saes(
        self,
        autoencoders: "Iterable[Autoencoder | str | PathLike[str]]",
        *,
        name: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> "Store":
        """Compute the latents of every committed row and keep them; see ``add_autoencoders``.

        Args:
            autoencoders: at most one per location and layer; a path is loaded.
            name: of the set; by default ``sae-`` and digits that follow from the autoencoders.
            progress: called with ``encode``, tokens done and tokens in all.

        Returns:
            The store, opened again: this one goes on seeing what it saw.

        Raises:
            InvalidInput: an autoencoder does not fit the model, or two are of one place.
            StoreConflict: the name is that of a set of something else.
            Unavailable: what an autoencoder reads cannot be had from the store.
            IngestStopped: a latent is not finite, or the disk is full, read-only or failing.
        """
        from actstore.query.latent_ingest import add_autoencoders

        add_autoencoders(self.path, autoencoders, name=name, progress=progress)
        return type(self)(self.path, max_result_bytes=self.max_result_bytes)

    def autoencoders(self, of: str | None = None) -> "Autoencoders":
        """The autoencoders of a set of latents, as the store keeps them.

        Args:
            of: the set's name, or what its autoencoders read; the only set by default.

        Raises:
            Unavailable: there is no such set.
            InvalidInput: several would do.
            StoreDamaged: a file of theirs fails its checksum.
        """
        from actstore.store.model.autoencoder_families import Autoencoders

        return Autoencoders(self.kept_latents.named(of).autoencoders)

    def latents(
        self,
        of: str | None = None,
        *,
        layer: int | None = None,
        sequences: Numbers = None,
        tokens: Numbers = None,
        latents: Numbers = None,
    ) -> Latents:
        """The kept latents that are not zero, by token; of some latents, by latent.

        Args:
            of: a set's name, or what its autoencoders read; the only set by default.
            layer: the layer; the only one by default.
            sequences: whole sequences, in this order.
            tokens: global rows, in this order; instead of ``sequences``; all by default.
            latents: only these; their rows are found without reading others' values.

        Returns:
            The entries in the order of the rows, then of the latents, with a table and a
            sparse tensor of them.

        Raises:
            InvalidInput: an unknown layer, latent or row, or more entries than fit the limit.
            Unavailable: there is no such set, or it lacks a row's segment.
            StoreDamaged: a block fails its checksum.
        """
        found = self.kept_latents.named(of)
        known = tuple(found.layers)
        if layer is None and len(known) == 1:
            layer = known[0]
        if layer not in found.layers:
            raise InvalidInput(
                f"Set {found.name!r} has no latents of layer {layer}; it has those of layers "
                f"{', '.join(map(str, known))}.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        rows = self._rows(sequences, tokens)
        return read_latents(found.layers[layer], rows, latents, self.max_result_bytes)

    def postprocess(
        self,
        name: str,
        nodes: "NodeIndex | Sequence[NodeIndex]",
        *,
        sequence: int,
        config: DstConfig = PLAIN,
    ) -> "Tensor":
        """What nodes of a sequence write and read; see :mod:`actstore.query.postprocess`.

        Args:
            name: ``residual_write``, ``token_write``, ``residual_read``, ``token_read`` or
                ``token_pair_attribution``.
            nodes: one node or several, of that sequence.
            sequence: the sequence.
            config: the autoencoders, for latents.

        Returns:
            float64 ``(node, channel)``, ``(node, vocabulary)`` or ``(node, attended)``; without
            the first axis for one node.

        Raises:
            InvalidInput: an unknown postprocessor, or a node that it is not defined for.
            Unavailable: the sequence is not committed, or a raw value cannot be had.
        """
        from actstore.query.postprocess import postprocess

        self.require_committed()
        values = self.sources.sequence(self.row_map.sequence(sequence))
        return postprocess(name, nodes, values, config)

    # The activation cache

    def cache(
        self, sequences: Numbers = None, *, dtype: str = "float32", compat: str | None = None
    ) -> "ActivationCache":
        """Whole sequences as an activation cache; see :class:`actstore.query.cache.ActivationCache`.

        Args:
            sequences: rows of the batch, in this order; all committed ones by default.
            dtype: of its results.
            compat: ``transformer_lens`` to answer as TransformerLens does.

        Raises:
            InvalidInput: an unknown sequence, or another dtype or ``compat``.
            Unavailable: a sequence is not committed.
        """
        from actstore.query.cache import ActivationCache, StoredBatch, View

        self.require_committed()
        if sequences is None:
            numbers: list[int] = self.row_map.committed_sequences.tolist()
        else:
            numbers = list(sequences) if isinstance(sequences, Iterable) else [sequences]
        batch = StoredBatch(self.sources, self.row_map, numbers, self.max_result_bytes)
        return ActivationCache(View.whole(batch, dtype), compat)

    def direct_logit_attribution(
        self,
        target: Any,
        against: Any = None,
        *,
        by: str = "head",
        position: Any = -1,
        sequences: Numbers = None,
    ) -> "LogitAttribution":
        """What each component adds to a token's logit, as a tidy table.

        See :meth:`actstore.query.cache.ActivationCache.direct_logit_attribution`.
        """
        cache = self.cache(sequences)
        return cache.direct_logit_attribution(target, against, by=by, position=position)

    # Rankings, SQL, upkeep

    def topk(self, name: ScalarName, **options: Any) -> "TopK":
        """The k best values of a derived scalar, exactly; see :func:`actstore.query.topk.topk`."""
        from actstore.query.topk import topk

        return topk(self, name, **options)

    def explain(self, name: ScalarName, **options: Any) -> "Explanation":
        """How ``topk`` would answer; see :func:`actstore.query.explanation.explain`."""
        from actstore.query.explanation import explain

        return explain(self, name, **options)

    def compare(self, names: "Sequence[ScalarName]", **options: Any) -> "Comparison":
        """Several scalars side by side; see :func:`actstore.query.comparison.compare`."""
        from actstore.query.comparison import compare

        return compare(self, names, **options)

    def filter(self, name: ScalarName, **options: Any) -> "Cells":
        """All values in an interval; see :func:`actstore.query.thresholds.filter_cells`."""
        from actstore.query.thresholds import filter_cells

        return filter_cells(self, name, **options)

    def count(self, name: ScalarName, **options: Any) -> "Counts":
        """How many values lie in an interval; see :func:`actstore.query.thresholds.count`."""
        from actstore.query.thresholds import count

        return count(self, name, **options)

    def index(
        self,
        scalars: "ScalarName | Sequence[ScalarName]",
        *,
        parts: "Sequence[str] | None" = None,
        pass_type: str = "forward",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> "Store":
        """Index derived scalars, so that ranking them reads little; see ``build_indexes``.

        Args:
            scalars: one or several.
            parts: ``zones``, ``histogram`` or both; what is missing by default.
            pass_type: ``backward`` for the gradient of the objective with respect to them.
            progress: called with ``index``, values done and values in all.

        Returns:
            The store, opened again: this one goes on seeing what it saw.

        Raises:
            InvalidInput: an unknown scalar, one over pairs of tokens, or one about a node.
            Unavailable: the store cannot derive a scalar.
            IngestStopped: the disk is full, read-only or failing.
        """
        from actstore.query.index_building import build_indexes

        wanted = [scalars] if isinstance(scalars, str | DerivedScalar) else list(scalars)
        declared = [self.scalar(name) for name in wanted]
        build_indexes(
            self.path,
            declared,
            parts=parts,
            pass_type=pass_type,
            objective=self.reader.objective,
            progress=progress,
        )
        return type(self)(
            self.path, objective=self.reader.objective, max_result_bytes=self.max_result_bytes
        )

    def examples(self, name: ScalarName, unit: tuple[int, ...], **options: Any) -> "Examples":
        """Contexts of one unit; see :func:`actstore.query.examples.examples`."""
        from actstore.query.examples import examples

        return examples(self, name, unit, **options)

    def verify(self) -> "VerifyReport":
        """Check every byte of the store; see :func:`actstore.store.verification.verify_store`."""
        from actstore.store.verification import verify_store

        return verify_store(self.path)

    def sql(self, query: str, parameters: "Parameters" = None) -> "DuckDBPyRelation":
        """The result of one SQL query over the metadata; see :class:`actstore.query.sql.Sql`."""
        return self._sql.relation(query, parameters)
