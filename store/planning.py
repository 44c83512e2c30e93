"""How a plan is made: read the corpus, compare it with the store's, arrange, publish.

A rolling digest of the corpus is kept with every sequence, so a further run knows
whether it brings the corpus of the store, more of it, or another one, and from which
sequence on. Another corpus is refused while it is read, not after.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actstore.store.arrangement import PlanSections, arrange
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, InvalidInput, StoreConflict, StoreDamaged
from actstore.store.plan import (
    DOCUMENT_FILE,
    SECTION_FILE,
    TOKENS_PER_SECTION,
    Plan,
    following,
)
from actstore.store.plan_publication import Approval, publish_plan
from actstore.store.plan_record import (
    PLAN_FOLDER,
    ChainMark,
    PlanConfig,
    PlanCounts,
    PlanRecord,
)
from actstore.store.sections import encode_sections
from actstore.store.token_stream import TokenizedDocument, TokenStream

__all__ = ["PlanOutcome", "Progress", "build_plan"]

Progress = Callable[[int, int], None]
"""Called now and then with the documents and tokens planned so far."""

_EMPTY = "empty"
"""Why a document without tokens of its own is dropped."""

_BEGINNING = ChainMark(sequences=0, documents=0, tokens=0, dropped={}, last_document=-1, digest="")


@dataclass(frozen=True)
class PlanOutcome:
    """What planning did.

    Attributes:
        plans: every plan of the store now, in order.
        created: the plan that this run wrote; None if all of it was there.
        documents: documents of the corpus, up to the limit and without dropped ones.
        sequences: its sequences.
        tokens: its tokens.
        dropped: documents left out, by reason.
        limited: whether ``limit_tokens`` ended the reading.
    """

    plans: tuple[Plan, ...]
    created: Plan | None
    documents: int
    sequences: int
    tokens: int
    dropped: Mapping[str, int]
    limited: bool


def build_plan(
    blobs: LocalBlobs,
    config: PlanConfig,
    documents: Iterable[TokenizedDocument],
    existing: Sequence[Plan],
    *,
    append: bool,
    progress: Progress | None = None,
    approve: Approval | None = None,
) -> PlanOutcome:
    """Plan a corpus, or find that the store has planned it already.

    ============================================  ========================================
    the corpus                                    what happens
    ============================================  ========================================
    is the store's first                          plan 0 is written
    equals one that is planned                    nothing is written: the run resumes
    begins with all of one, and has more          the rest becomes a plan that continues it
    ends inside one                               refused
    differs                                       a plan of its own with ``append``, else
                                                  refused
    ============================================  ========================================

    With ``limit_tokens`` reading ends before the sequence that would pass the limit, but
    after one sequence at least. Sequences are never cut for it, so a larger limit of the
    same corpus continues the plan. A shuffled corpus is never continued: its sequences
    are permuted over the whole plan.

    Args:
        blobs: the store.
        config: how to split and arrange; must be that of ``existing``.
        documents: the corpus; read once, lazily, and not past the limit.
        existing: the store's plans, from :func:`actstore.store.plan.load_plans`.
        append: add a corpus that differs from those in the store.
        progress: told how far the reading is.
        approve: given a plan that is new, complete and not published yet. When it raises,
            the plan is not published, and its error is passed on.

    Raises:
        StoreConflict: the config or the corpus is not the store's; says what differs.
        InvalidInput: the corpus has no non-empty document, or a column's name is not free.
        WriteFailed: the disk is full, read-only or failing.
    """
    if existing:
        config.require_same(existing[0].config)
    chains = _chains(existing, config.shuffle)
    stream = TokenStream(
        blobs.path(PLAN_FOLDER), config, {chain.mark.sequences for chain in chains}
    )
    try:
        for _ in stream.consume(documents):
            if progress is not None:
                progress(stream.rows.count, stream.tokens)
            _compare(stream, chains, append=append)
        if not stream.sequences:
            empty = f"; {stream.dropped} documents are empty" if stream.dropped else ""
            raise InvalidInput(
                f"The corpus has no document with a token{empty}. Check the path and the text "
                "column.",
                kind=ErrorKind.EMPTY_CORPUS,
            )
        if progress is not None:
            progress(stream.rows.count, stream.tokens)
        _compare(stream, chains, append=append)
        chain = _continued(config, stream, chains, append=append)
        added: list[Plan] = []
        is_new = False
        if chain is None or chain.mark.sequences < stream.sequences:
            continued = chain.plans[-1] if chain else None
            plan, is_new = _write_plan(blobs, config, stream, existing, continued, approve)
            added = [plan]
    finally:
        stream.close()
    return PlanOutcome(
        plans=(*existing, *added),
        created=added[0] if is_new else None,
        documents=stream.rows.count,
        sequences=stream.sequences,
        tokens=stream.tokens,
        dropped=_dropped(stream.dropped),
        limited=stream.limited,
    )


class _Chain:
    """A planned corpus: a plan that continues none, and those that continue it."""

    def __init__(self, plans: list[Plan], *, comparable: bool) -> None:
        self.plans = plans
        self.mark = plans[-1].record.chain
        self.rolling = np.concatenate([plan.chain_digests() for plan in plans])
        self.comparable = comparable
        self.alive = comparable
        self.common = 0

    def compare(self, stream: TokenStream) -> None:
        """Find how far the stream agrees; ``alive`` while it has not differed."""
        stop = min(stream.sequences, len(self.rolling))
        theirs = np.array(stream.rolling[self.common : stop], np.uint64)
        differing = np.flatnonzero(theirs != self.rolling[self.common : stop])
        self.common = self.common + int(differing[0]) if len(differing) else stop
        self.alive = not len(differing)

    def holds_beginning_of(self, stream: TokenStream) -> bool:
        """Whether all of this chain is the stream's beginning."""
        return self.alive and stream.digests.get(self.mark.sequences) == self.mark.digest


def _chains(existing: Sequence[Plan], shuffle: int | None) -> list[_Chain]:
    groups: list[list[Plan]] = []
    for plan in existing:
        continued = plan.record.continues
        if continued is None:
            groups.append([plan])
            continue
        group = next((group for group in groups if group[-1].hash == continued), None)
        if group is None:
            raise StoreDamaged(
                f"{plan.record_path} continues a plan that is not there: {continued[:12]}. "
                "Run `actstore verify`.",
                kind=ErrorKind.MISSING_FILE,
            )
        group.append(plan)
    return [_Chain(group, comparable=group[0].config.shuffle == shuffle) for group in groups]


def _compare(stream: TokenStream, chains: list[_Chain], *, append: bool) -> None:
    for chain in chains:
        if chain.alive:
            chain.compare(stream)
    if chains and not append and not any(chain.alive for chain in chains):
        raise _conflict(stream, chains)


def _continued(
    config: PlanConfig, stream: TokenStream, chains: list[_Chain], *, append: bool
) -> _Chain | None:
    """The planned corpus that the stream is or goes on with; None for a corpus of its own."""
    for chain in chains:
        if chain.mark.sequences == stream.sequences and chain.holds_beginning_of(stream):
            return chain
    for chain in chains:
        if chain.alive and stream.sequences < chain.mark.sequences:
            raise StoreConflict(
                f"All {stream.sequences} sequences ({stream.tokens} tokens) of this corpus are in "
                f"the store already, as the beginning of {_describe(chain)}. A plan never "
                "shrinks: repeat the limit it was made with, give a larger one, or ingest into "
                "another path.",
                kind=ErrorKind.CORPUS_CONFLICT,
            )
    if config.shuffle is None:
        for chain in chains:
            if chain.holds_beginning_of(stream):
                return chain
    if chains and not append:
        raise _conflict(stream, chains)
    return None


def _conflict(stream: TokenStream, chains: list[_Chain]) -> StoreConflict:
    found = "; ".join(f"{_describe(chain)}: {_difference(chain)}" for chain in chains)
    return StoreConflict(
        f"The store holds another corpus: {found}. This one has {stream.sequences} sequences "
        f"({stream.tokens} tokens) read so far. Repeat the store's corpus to resume it, add "
        "this one with --append, or ingest into another path.",
        kind=ErrorKind.CORPUS_CONFLICT,
    )


def _describe(chain: _Chain) -> str:
    mark = chain.mark
    return (
        f"plan {chain.plans[0].number} ({mark.documents} documents, {mark.sequences} sequences, "
        f"{mark.tokens} tokens)"
    )


def _difference(chain: _Chain) -> str:
    if not chain.comparable:
        return f"its shuffle is {chain.plans[0].config.shuffle}"
    if chain.alive:
        return "this one goes on where it ends, but a shuffled plan cannot be continued"
    agreeing = f"the first {chain.common} sequences agree, " if chain.common else ""
    return f"{agreeing}sequence {chain.common} or its document's columns differ"


def _write_plan(
    blobs: LocalBlobs,
    config: PlanConfig,
    stream: TokenStream,
    existing: Sequence[Plan],
    continued: Plan | None,
    approve: Approval | None,
) -> tuple[Plan, bool]:
    mark = continued.record.chain if continued else _BEGINNING
    first_segment, sequence_base, document_base = (
        following(existing[-1].record) if existing else (0, 0, 0)
    )
    lengths = np.array(stream.lengths[mark.sequences :], np.int32)
    arrangement = arrange(lengths, config, first_segment)
    summary = stream.rows.summarise(mark.documents)
    record = PlanRecord(
        number=len(existing),
        config=config,
        counts=PlanCounts(
            documents=summary.count,
            sequences=len(lengths),
            tokens=stream.tokens - mark.tokens,
            segments=arrangement.segments,
            batches=len(arrangement.batch_padded_length),
            padded_tokens=arrangement.padded_tokens,
            # A continued corpus may have lost empty documents since; less than none is none.
            dropped=_dropped(max(0, stream.dropped - mark.dropped.get(_EMPTY, 0))),
        ),
        first_segment=first_segment,
        sequence_base=sequence_base,
        document_base=document_base,
        continues=continued.hash if continued else None,
        chain=ChainMark(
            sequences=stream.sequences,
            documents=stream.rows.count,
            tokens=stream.tokens,
            dropped=_dropped(stream.dropped),
            last_document=(
                document_base + summary.count - 1 if summary.count else mark.last_document
            ),
            digest=stream.digest,
        ),
        sources=summary.sources,
    )
    document = np.array(stream.documents[mark.sequences :], np.int64)
    # The first document may be one that the limit of the continued plan had cut.
    document = np.where(
        document < mark.documents, mark.last_document, document - mark.documents + document_base
    )
    sections = PlanSections(
        arrangement,
        {
            "document": document[arrangement.order],
            "start": np.array(stream.starts[mark.sequences :], np.int32)[arrangement.order],
            "rolling": np.array(stream.rolling[mark.sequences :], np.uint64),
        },
        ids=stream.ids,
        first_id=mark.tokens,
        lengths=lengths,
        section_tokens=TOKENS_PER_SECTION,
    )
    attributes = {"plan": record.hash, "section_tokens": TOKENS_PER_SECTION}
    section_key, document_key = (
        f"{record.folder}/{name}" for name in (SECTION_FILE, DOCUMENT_FILE)
    )

    def publish_files() -> dict[str, bool]:
        made = {section_key: blobs.publish(section_key, encode_sections(sections, attributes))}
        table = stream.rows.encode(summary, mark.documents, document_base)
        try:
            made[document_key] = blobs.publish(document_key, table.parts())
        finally:
            table.close()
        return made

    return publish_plan(blobs, record, publish_files, existing, approve)


def _dropped(count: int) -> dict[str, int]:
    return {_EMPTY: count} if count else {}
