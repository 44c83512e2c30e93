"""Plans: every token in its own row, the same bytes every time, resumed or extended safely."""

import errno
import fcntl
import json
import pickle
import shutil
import threading
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.store import planning, spool
from actstore.store.blobs import LocalBlobs, Part
from actstore.store.errors import (
    ErrorKind,
    InvalidInput,
    NotAStore,
    StoreConflict,
    StoreDamaged,
    WriteFailed,
)
from actstore.store.plan import Plan, PlanConfig, load_plans
from actstore.store.plan_record import BosPolicy
from actstore.store.planning import PlanOutcome, build_plan
from actstore.store.records import canonical_json, decode_record, encode_record
from actstore.store.token_stream import TokenizedDocument, split_document

VOCABULARY = 64
CONFIG = PlanConfig(context=16, vocabulary_size=VOCABULARY, segment_rows=512, batch_tokens=96)

Columns = dict[str, Any]


def document(ids: Sequence[int], number: int = 0, **columns: Any) -> TokenizedDocument:
    return TokenizedDocument(np.array(ids, np.int32), f"doc-{number}", columns)


def corpus(lengths: Iterable[int], seed: int = 0) -> list[TokenizedDocument]:
    rng = np.random.default_rng(seed)
    return [
        document(rng.integers(0, VOCABULARY, length).tolist(), number, label=f"l{number % 3}")
        for number, length in enumerate(lengths)
    ]


def plan(
    root: Path,
    documents: Iterable[TokenizedDocument],
    config: PlanConfig = CONFIG,
    *,
    append: bool = False,
) -> PlanOutcome:
    return build_plan(LocalBlobs(root), config, documents, load_plans(root), append=append)


def first_plan(root: Path, documents: Iterable[TokenizedDocument], config: PlanConfig) -> Plan:
    created = plan(root, documents, config).created
    assert created is not None
    return created


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def rows_of(plans: Iterable[Plan]) -> dict[int, tuple[int, int, int]]:
    """Global row -> (document, offset in the document's stream, token id), from segments."""
    rows: dict[int, tuple[int, int, int]] = {}
    for one in plans:
        own_bos = one.config.bos == "sequence"
        for number in range(one.first_segment, one.first_segment + one.n_segments):
            segment = one.segment(number)
            for index in range(segment.n_sequences):
                for position, token_id in enumerate(segment.sequence_token_ids(index)):
                    row = int(segment.first_token[index]) + position
                    assert row not in rows
                    offset = int(segment.start[index]) + position - own_bos
                    rows[row] = (int(segment.document[index]), offset, int(token_id))
    return rows


def stream_of(ids: Sequence[int], config: PlanConfig) -> list[int]:
    """The document's stream, written as plainly as can be."""
    own = [int(one) for one in ids]
    if config.bos == "none":
        return own
    if own[:1] == [config.bos_token_id]:
        own = own[1:]
    return [int(config.bos_token_id or 0), *own] if own and config.bos == "document" else own


policies: st.SearchStrategy[BosPolicy] = st.sampled_from(get_args(BosPolicy))


@st.composite
def configs(draw: st.DrawFn, *, overlap: bool = True) -> PlanConfig:
    bos = draw(policies)
    context = draw(st.integers(2, 40))
    window = context - (bos == "sequence")
    return PlanConfig(
        context=context,
        vocabulary_size=VOCABULARY,
        segment_rows=512,
        batch_tokens=draw(st.integers(1, 300)),
        bos=bos,
        bos_token_id=None if bos == "none" else draw(st.integers(0, 3)),
        special_token_ids=tuple(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=3))),
        stride=draw(st.integers(1, window)) if overlap else 0,
        shuffle=draw(st.none() | st.integers(0, 99)),
    )


lengths = st.lists(st.integers(0, 90), min_size=1, max_size=40).filter(lambda sizes: max(sizes) > 1)


@settings(max_examples=40, deadline=None)
@given(
    config=configs(overlap=False), sizes=lengths, seed=st.integers(0, 9), section=st.integers(1, 99)
)
def test_every_token_is_in_exactly_one_row(
    config: PlanConfig,
    sizes: list[int],
    seed: int,
    section: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("plan")
    documents = corpus(sizes, seed)
    with pytest.MonkeyPatch.context() as patch:
        # Small sections and spools, so that both span several.
        patch.setattr(planning, "TOKENS_PER_SECTION", section)
        patch.setattr(spool, "BUFFER_BYTES", 64)
        made = first_plan(root, documents, config)
    rows = rows_of([made])
    kept = [stream_of(one.token_ids.tolist(), config) for one in documents]
    kept = [stream for stream in kept if stream]
    made.verify()
    check_arrangement(made)
    check_streams(made, kept)
    counted = made.counts
    assert counted.documents == len(kept)
    assert counted.tokens == len(rows)
    assert counted.dropped.get("empty", 0) == len(documents) - len(kept)
    table = made.documents()
    assert table["n_tokens"].to_pylist() == [len(stream) for stream in kept]


def check_streams(made: Plan, streams: list[list[int]]) -> None:
    """Put every document together again from its sequences alone."""
    config = made.config
    pieces: dict[int, dict[int, list[int]]] = {}
    for number in range(made.first_segment, made.first_segment + made.n_segments):
        segment = made.segment(number)
        for index in range(segment.n_sequences):
            ids = segment.sequence_token_ids(index).tolist()
            if config.bos == "sequence":
                assert ids[0] == config.bos_token_id
                ids = ids[1:]
            own = pieces.setdefault(int(segment.document[index]), {})
            assert int(segment.start[index]) not in own
            own[int(segment.start[index])] = ids
    assert len(pieces) == len(streams)
    for number, stream in enumerate(streams):
        joined: list[int] = []
        for start, ids in sorted(pieces[number].items()):
            assert start == len(joined)
            joined += ids
        assert joined == stream


def check_arrangement(made: Plan) -> None:
    """Whole sequences and batches in every segment; rows back to back from its start."""
    config, columns = made.config, made.sequences()
    assert made.filled_rows().sum() == made.counts.tokens
    batches = padded_tokens = 0
    next_sequence = made.record.sequence_base
    for number in range(made.first_segment, made.first_segment + made.n_segments):
        segment = made.segment(number)
        assert segment.first_sequence == next_sequence
        next_sequence += segment.n_sequences
        assert segment.first_row == number * config.segment_rows
        assert segment.n_rows == made.filled_rows()[number - made.first_segment]
        assert 0 < segment.n_rows <= config.segment_rows
        stops = np.cumsum(segment.length)
        np.testing.assert_array_equal(
            segment.first_token, segment.first_row + stops - segment.length
        )
        assert stops[-1] == segment.n_rows == len(segment.token_ids)
        assert segment.length.max() <= config.context
        members = np.concatenate([batch.members for batch in segment.batches])
        assert sorted(members) == list(range(segment.n_sequences))
        ordered = [(-int(segment.length[one]), int(one)) for one in members]
        assert ordered == sorted(ordered)
        for position, batch in enumerate(segment.batches):
            assert (segment.batch[batch.members] == position).all()
            longest = int(segment.length[batch.members].max())
            assert longest <= batch.padded_length <= config.context
            assert batch.padded_length % 8 == 0 or batch.padded_length == config.context
            assert batch.padded_length - longest < 8
            size = len(batch.members) * batch.padded_length
            assert size <= config.batch_tokens or len(batch.members) == 1
            padded_tokens += size
        batches += len(segment.batches)
        expected = np.concatenate([np.arange(length) for length in segment.length])
        np.testing.assert_array_equal(segment.positions, expected)
        special = (expected == 0) | np.isin(segment.token_ids, config.special_token_ids)
        np.testing.assert_array_equal(segment.special, special)
        np.testing.assert_array_equal(
            segment.document[segment.row_sequence],
            np.repeat(segment.document, segment.length),
        )
        inside = columns["segment"] == number
        for name in ("document", "first_token", "length", "start", "batch"):
            np.testing.assert_array_equal(columns[name][inside], getattr(segment, name))
    assert (batches, padded_tokens) == (made.counts.batches, made.counts.padded_tokens)
    # A sequence goes to the next segment only where it does not fit.
    firsts = np.flatnonzero(np.diff(columns["segment"])) + 1
    rows = made.filled_rows()[:-1]
    assert (rows + columns["length"][firsts] > config.segment_rows).all()
    size = (made.first_segment + made.n_segments) * config.segment_rows
    by_row = np.full(size + 3, -1)
    for sequence, first, length in zip(
        columns["sequence"], columns["first_token"], columns["length"], strict=True
    ):
        by_row[first : first + length] = sequence
    np.testing.assert_array_equal(made.sequence_of_row(np.arange(size + 3)), by_row)


@settings(max_examples=40, deadline=None)
@given(config=configs(), size=st.integers(0, 200), seed=st.integers(0, 9))
def test_windows_cover_a_document_and_end_with_it(config: PlanConfig, size: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, size).astype(np.int32)
    stream = stream_of(ids.tolist(), config)
    covered: set[int] = set()
    pieces = list(split_document(ids, config))
    for number, (start, piece) in enumerate(pieces):
        own = piece[config.bos == "sequence" :].tolist()
        assert start == number * config.stride
        assert own == stream[start : start + config.window]
        assert len(set(range(start, start + len(own))) - covered) > 0
        covered |= set(range(start, start + len(own)))
    assert covered == set(range(len(stream)))


@pytest.mark.parametrize("small", [0, 8192], ids=["by segments", "whole columns"])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_places_and_tokens_of_rows_equal_the_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: int | None, small: int
) -> None:
    monkeypatch.setattr("actstore.store.plan._SMALL_PLAN", small)
    monkeypatch.setattr("actstore.store.planning.TOKENS_PER_SECTION", 500)
    config = replace(CONFIG, shuffle=shuffle)
    plan(tmp_path, corpus([70, 1, 33, 5] * 20), config)
    plan(tmp_path, corpus([9, 40, 16] * 30, seed=1), config, append=True)
    plans = load_plans(tmp_path)
    rng = np.random.default_rng(0)
    for made in plans:
        assert made.n_segments > 2
        rows, expected = [], []
        for number in range(made.first_segment, made.first_segment + made.n_segments):
            segment = made.segment(number)
            rows.append(segment.first_row + np.arange(segment.n_rows))
            sequence = segment.first_sequence + segment.row_sequence
            expected.append(np.stack([sequence, segment.positions, segment.token_ids]))
        wanted = rng.integers(0, made.counts.tokens, 90)
        row, (sequence, position, token_id) = (
            np.concatenate(rows)[wanted],
            np.concatenate(expected, axis=1)[:, wanted],
        )
        found = made.places_of(row)
        np.testing.assert_array_equal(found[0], sequence)
        np.testing.assert_array_equal(found[1], position)
        np.testing.assert_array_equal(made.tokens_at(*found), token_id)


def test_a_shuffle_is_of_sequences_over_the_whole_plan(tmp_path: Path) -> None:
    documents = corpus([40] * 60)
    ordered = first_plan(tmp_path / "a", documents, CONFIG)
    shuffled = first_plan(tmp_path / "b", documents, replace(CONFIG, shuffle=7))
    key = ("document", "start", "length")
    before = list(zip(*(ordered.sequences()[name].tolist() for name in key), strict=True))
    after = list(zip(*(shuffled.sequences()[name].tolist() for name in key), strict=True))
    assert before != after
    assert sorted(before) == sorted(after)
    assert len({number for number, _, _ in after[:20]}) > 10
    assert shuffled.hash != ordered.hash


def test_a_leading_bos_is_not_doubled() -> None:
    config = replace(CONFIG, bos="document", bos_token_id=1)
    for ids in ([1, 5, 6], [5, 6]):
        assert [piece.tolist() for _, piece in split_document(np.array(ids, np.int32), config)] == [
            [1, 5, 6]
        ]
    per_sequence = replace(CONFIG, context=4, bos="sequence", bos_token_id=1, stride=0)
    pieces = split_document(np.array([1, 5, 6, 7, 8], np.int32), per_sequence)
    assert [(start, ids.tolist()) for start, ids in pieces] == [(0, [1, 5, 6, 7]), (3, [1, 8])]
    assert not list(split_document(np.array([1], np.int32), config))


@pytest.mark.parametrize("shuffle", [None, 3])
def test_one_corpus_gives_one_set_of_bytes(tmp_path: Path, shuffle: int | None) -> None:
    config = replace(CONFIG, shuffle=shuffle)
    plan(tmp_path / "a", corpus([30, 0, 500, 7] * 9), config)
    plan(tmp_path / "b", iter(corpus([30, 0, 500, 7] * 9)), config)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_hash_covers_config_ids_boundaries_columns_and_sources(tmp_path: Path) -> None:
    base = [document([1, 2, 3, 4], 0, a=1), document([5, 6], 1, a=2)]
    variants: list[tuple[list[TokenizedDocument], PlanConfig]] = [
        (base, CONFIG),
        (base, replace(CONFIG, batch_tokens=95)),
        ([document([1, 2, 3, 9], 0, a=1), base[1]], CONFIG),
        ([document([1, 2, 3], 0, a=1), document([4, 5, 6], 1, a=2)], CONFIG),
        ([document([1, 2, 3, 4], 0, a=1.0), base[1]], CONFIG),
        ([document([1, 2, 3, 4], 0, a="1"), base[1]], CONFIG),
        ([document([1, 2, 3, 4], 0, a=True), base[1]], CONFIG),
        ([document([1, 2, 3, 4], 7, a=1), base[1]], CONFIG),
    ]
    hashes = {
        first_plan(tmp_path / str(number), documents, config).hash
        for number, (documents, config) in enumerate(variants)
    }
    assert len(hashes) == len(variants)


# --- Resuming, extending, appending, refusing --------------------------------------------


def test_the_same_corpus_writes_nothing(tmp_path: Path) -> None:
    documents = corpus([50] * 30)
    first = plan(tmp_path, documents)
    before = files_of(tmp_path)
    again = plan(tmp_path, documents, replace(CONFIG, limit_tokens=10**6), append=True)
    assert again.created is None
    assert [one.hash for one in again.plans] == [one.hash for one in first.plans]
    assert (again.documents, again.sequences, again.tokens) == (30, 120, 1500)
    assert files_of(tmp_path) == before


def test_a_moved_corpus_is_the_same_corpus(tmp_path: Path) -> None:
    documents = corpus([50] * 3)
    plan(tmp_path, documents)
    moved = [
        TokenizedDocument(one.token_ids, f"else/{one.source}", one.columns) for one in documents
    ]
    assert plan(tmp_path, moved).created is None


@settings(max_examples=30, deadline=None)
@given(
    sizes=lengths,
    limits=st.lists(st.integers(1, 1500), min_size=1, max_size=4, unique=True),
    config=configs().map(lambda config: replace(config, shuffle=None)),
)
def test_a_larger_limit_continues_the_plan(
    sizes: list[int],
    limits: list[int],
    config: PlanConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("plan")
    documents = corpus(sizes, 1)
    outcomes = [
        plan(root, documents, replace(config, limit_tokens=limit)) for limit in sorted(limits)
    ]
    outcomes.append(plan(root, documents, config))
    assert not outcomes[-1].limited
    whole = first_plan(tmp_path_factory.mktemp("whole"), documents, config)
    plans = load_plans(root)
    for before, after in pairwise(plans):
        assert after.record.continues == before.hash
    assert plans[-1].record.chain.digest == whole.record.chain.digest
    expected = whole.sequences()
    for name in ("sequence", "document", "start", "length"):
        joined = np.concatenate([one.sequences()[name] for one in plans])
        np.testing.assert_array_equal(joined, expected[name])
    tables = pa.concat_tables([one.documents() for one in plans], promote_options="default")
    assert tables.to_pylist() == whole.documents().to_pylist()
    dropped = sum(one.counts.dropped.get("empty", 0) for one in plans)
    assert dropped == whole.counts.dropped.get("empty", 0)
    ids = [one.token_ids(0, one.counts.tokens) for one in plans]
    np.testing.assert_array_equal(np.concatenate(ids), whole.token_ids(0, whole.counts.tokens))
    for outcome, limit in zip(outcomes, sorted(limits), strict=False):
        assert outcome.tokens <= limit or outcome.sequences == 1


def test_a_limit_stops_before_the_sequence_that_passes_it(tmp_path: Path) -> None:
    documents = corpus([40, 40])
    outcome = plan(tmp_path / "a", documents, replace(CONFIG, limit_tokens=47))
    assert (outcome.tokens, outcome.sequences, outcome.limited) == (40, 3, True)
    table = outcome.plans[0].documents()
    assert table.num_rows == 1
    # The document was cut, and its row says how long it is all the same.
    cut = plan(tmp_path / "b", documents, replace(CONFIG, limit_tokens=17))
    assert cut.tokens == 16
    assert cut.plans[0].documents()["n_tokens"].to_pylist() == [40]
    least = plan(tmp_path / "c", documents, replace(CONFIG, limit_tokens=1))
    assert least.tokens == 16


def test_reading_ends_at_the_limit(tmp_path: Path) -> None:
    taken: list[None] = []

    def endless() -> Iterator[TokenizedDocument]:
        while True:
            taken.append(None)
            yield document([len(taken) % VOCABULARY] * 10)

    outcome = plan(tmp_path, endless(), replace(CONFIG, limit_tokens=100))
    assert (outcome.tokens, len(taken)) == (100, 10)


def test_a_smaller_limit_is_refused(tmp_path: Path) -> None:
    documents = corpus([50] * 30)
    plan(tmp_path, documents)
    for append in (False, True):
        with pytest.raises(StoreConflict, match="in the store already") as caught:
            plan(tmp_path, documents, replace(CONFIG, limit_tokens=700), append=append)
        assert caught.value.kind is ErrorKind.CORPUS_CONFLICT
    with pytest.raises(StoreConflict, match="never shrinks"):
        plan(tmp_path, documents[:-1])


def test_another_corpus_needs_append(tmp_path: Path) -> None:
    documents = corpus([50] * 30)
    plan(tmp_path, documents)
    other = [*documents[:20], *corpus([50] * 10, seed=5)]
    with pytest.raises(StoreConflict, match=r"first 80 sequences agree, sequence 80 .*--append"):
        plan(tmp_path, other)
    before = files_of(tmp_path)
    outcome = plan(tmp_path, other, append=True)
    assert outcome.created is not None
    first, second = outcome.plans
    assert second.record.continues is None
    assert second.first_segment == first.n_segments
    assert second.record.sequence_base == first.counts.sequences
    assert second.record.document_base == first.counts.documents
    assert second.segment(second.first_segment).document[0] == 30
    assert second.documents()["document"].to_pylist() == list(range(30, 60))
    check_arrangement(second)
    assert len(rows_of(load_plans(tmp_path))) == 3000
    assert before.items() <= files_of(tmp_path).items()
    # Either corpus can be resumed, and either continued.
    assert plan(tmp_path, documents).created is None
    assert plan(tmp_path, other).created is None
    more = plan(tmp_path, [*documents, *corpus([9], seed=8)]).created
    assert more is not None
    assert more.record.continues == first.hash
    assert more.documents()["document"].to_pylist() == [60]
    assert plan(tmp_path, [*documents, *corpus([9], seed=8)]).created is None


def test_a_sequence_that_fits_exactly_fills_its_segment(tmp_path: Path) -> None:
    made = first_plan(tmp_path, corpus([512, 512, 3]), CONFIG)
    assert made.filled_rows().tolist() == [512, 512, 3]
    check_arrangement(made)


def test_an_appended_corpus_that_was_cut_keeps_its_numbers(tmp_path: Path) -> None:
    plan(tmp_path, corpus([20, 20, 20], seed=3))
    long = corpus([7, 100])
    for limit in (30, 60, 10**6):
        plan(tmp_path, long, replace(CONFIG, limit_tokens=limit), append=True)
    plans = load_plans(tmp_path)
    assert [one.counts.documents for one in plans] == [3, 2, 0, 0]
    numbers = [one.sequences()["document"].tolist() for one in plans]
    assert numbers == [[0, 0, 1, 1, 2, 2], [3, 4], [4, 4], [4, 4, 4, 4]]
    assert sorted(rows_of(plans).values())[-100:] == [
        (4, offset, token_id) for offset, token_id in enumerate(long[1].token_ids.tolist())
    ]


def test_a_document_cut_by_the_limit_keeps_its_number(tmp_path: Path) -> None:
    long = corpus([100])
    plan(tmp_path, long, replace(CONFIG, limit_tokens=40))
    plan(tmp_path, corpus([20], seed=3), append=True)
    rest = plan(tmp_path, [*long, *corpus([5], seed=4)]).created
    assert rest is not None
    assert rest.sequences()["document"].tolist() == [0, 0, 0, 0, 0, 2]
    assert rest.sequences()["start"].tolist() == [32, 48, 64, 80, 96, 0]
    assert rest.documents()["document"].to_pylist() == [2]


@pytest.mark.parametrize(
    "changed",
    [
        document([1, 2, 3], 0, label="y"),
        document([1, 2, 4], 0, label="x"),
        document([1, 2, 3], 0),
        document([1, 2, 3, 3], 0, label="x"),
    ],
)
def test_a_changed_document_is_a_conflict(tmp_path: Path, changed: TokenizedDocument) -> None:
    rest = corpus([10])
    plan(tmp_path, [document([1, 2, 3], 0, label="x"), *rest])
    with pytest.raises(StoreConflict, match="sequence 0 "):
        plan(tmp_path, [changed, *rest])


def test_another_corpus_is_refused_before_it_is_read_to_the_end(tmp_path: Path) -> None:
    plan(tmp_path, corpus([9] * 10))
    taken = 0

    def endless() -> Iterator[TokenizedDocument]:
        nonlocal taken
        while True:
            taken += 1
            yield document([5, 5])

    with pytest.raises(StoreConflict):
        plan(tmp_path, endless())
    assert taken < 10_000


def test_a_shuffled_corpus_is_resumed_and_never_continued(tmp_path: Path) -> None:
    config = replace(CONFIG, shuffle=1)
    documents = corpus([50] * 10)
    plan(tmp_path, documents, config)
    assert plan(tmp_path, documents, config).created is None
    with pytest.raises(StoreConflict, match="shuffle is 1"):
        plan(tmp_path, documents, replace(CONFIG, shuffle=2))
    with pytest.raises(StoreConflict, match="shuffled plan cannot be continued"):
        plan(tmp_path, [*documents, document([1])], config)
    appended = plan(tmp_path, [*documents, document([1])], config, append=True).created
    assert appended is not None
    assert appended.record.continues is None


def test_another_config_is_refused_by_name(tmp_path: Path) -> None:
    plan(tmp_path, corpus([50]))
    other = replace(CONFIG, context=32, stride=0, special_token_ids=(3,))
    with pytest.raises(StoreConflict) as caught:
        plan(tmp_path, corpus([50]), other, append=True)
    assert caught.value.kind is ErrorKind.CONFIG_CONFLICT
    message = str(caught.value)
    assert "context: the store has 16, this run 32" in message
    assert "special_token_ids: the store has (), this run (3,)" in message
    assert "segment_rows" not in message


@pytest.mark.parametrize("documents", [[], [document([])], [document([])] * 3])
def test_an_empty_corpus_is_refused_and_leaves_nothing(
    tmp_path: Path, documents: list[TokenizedDocument]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        plan(tmp_path / "store", documents)
    assert caught.value.kind is ErrorKind.EMPTY_CORPUS
    assert not (tmp_path / "store").exists()


def test_a_failing_source_leaves_no_plan(tmp_path: Path) -> None:
    def failing() -> Iterator[TokenizedDocument]:
        yield document([1, 2])
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        plan(tmp_path, failing())
    assert load_plans(tmp_path) == []


def test_a_plan_that_was_not_finished_is_none(tmp_path: Path) -> None:
    documents = corpus([30] * 5)
    plan(tmp_path / "whole", documents)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (record,) = (tmp_path / "killed").rglob("plan.json")
    record.unlink()
    assert load_plans(tmp_path / "killed") == []
    plan(tmp_path / "killed", documents)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_two_runs_at_once_do_not_both_add_a_plan(tmp_path: Path) -> None:
    def interrupted() -> Iterator[TokenizedDocument]:
        yield document([1, 2, 3])
        plan(tmp_path, corpus([20], seed=2))

    with pytest.raises(StoreConflict, match="Another run"):
        plan(tmp_path, interrupted())
    assert len(load_plans(tmp_path)) == 1


def appended_at_once(root: Path, patch: pytest.MonkeyPatch, held: str) -> list[Exception]:
    """Append two corpora from two threads that meet, if they can, before ``held``.

    Returns:
        what was raised.
    """
    plan(root, corpus([20]))
    plans = load_plans(root)
    meeting = threading.Barrier(2)
    publish = LocalBlobs.publish
    raised: list[Exception] = []

    def publish_together(blobs: LocalBlobs, key: str, parts: Iterable[Part]) -> bool:
        if key.endswith(held):
            with suppress(threading.BrokenBarrierError):
                meeting.wait(0.5)
        return publish(blobs, key, parts)

    def run(seed: int) -> None:
        try:
            build_plan(LocalBlobs(root), CONFIG, corpus([30] * 9, seed), plans, append=True)
        except StoreConflict as error:
            raised.append(error)

    patch.setattr(LocalBlobs, "publish", publish_together)
    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_of_two_plans_appended_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (error,) = appended_at_once(tmp_path, monkeypatch, "documents.parquet")
    assert "Another run added a plan" in str(error)
    assert [one.number for one in load_plans(tmp_path)] == [0, 1]
    # What was refused has left nothing.
    assert len(list((tmp_path / "plan").iterdir())) == 2


def test_without_locks_one_of_two_plans_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr("actstore.store.plan_publication._RIVAL_SECONDS", 1)
    (error,) = appended_at_once(tmp_path, monkeypatch, "plan.json")
    assert "Another run added a plan" in str(error)
    kept = [one.record.folder for one in load_plans(tmp_path)]
    written = sorted(f"plan/{path.name}" for path in (tmp_path / "plan").iterdir())
    assert len(written) == 3
    # The lesser name, but where the other's writer had looked before it was there.
    assert kept[0] == written[0]
    assert kept[1:] in ([written[1]], [written[2]])


def test_a_plan_of_another_run_that_stays_is_given_way_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer looked before ours was there, and is at work."""
    made = [first_plan(tmp_path / str(seed), corpus([30], seed), CONFIG) for seed in (1, 2)]
    lesser, greater = sorted(made, key=lambda one: one.hash)
    root = tmp_path / "s"
    shutil.copytree(greater.root / "plan", root / "plan")
    monkeypatch.setattr("actstore.store.plan_publication._RIVAL_SECONDS", 0.1)
    # As a file system without locks may show it: not there before, and there afterwards.
    monkeypatch.setattr(
        "actstore.store.plan_publication._require_no_other", lambda root, known: None
    )
    seed = 1 + made.index(lesser)
    with pytest.raises(StoreConflict, match="Another run"):
        build_plan(LocalBlobs(root), CONFIG, corpus([30], seed), [], append=False)
    assert [one.hash for one in load_plans(root)] == [greater.hash]


class Refused(Exception):
    pass


def refuse(made: Plan) -> None:
    """Refuse a plan, which is whole by then."""
    assert made.segment(made.first_segment).n_rows > 0
    assert not (made.root / made.record_path).exists()
    raise Refused


def test_a_refused_plan_leaves_nothing_that_was_not_there(tmp_path: Path) -> None:
    documents = corpus([30] * 5)
    with pytest.raises(Refused):
        build_plan(
            LocalBlobs(tmp_path / "new"), CONFIG, documents, [], append=False, approve=refuse
        )
    assert not (tmp_path / "new").exists()
    plan(tmp_path / "s", documents)
    before = files_of(tmp_path / "s")
    # Another worker of the same corpus published it meanwhile: nobody is asked.
    outcome = build_plan(
        LocalBlobs(tmp_path / "s"), CONFIG, documents, [], append=False, approve=refuse
    )
    assert outcome.created is None
    assert len(outcome.plans) == 1
    # Another one is about to: its files stay.
    (record,) = (tmp_path / "s").rglob("plan.json")
    published = record.read_bytes()
    record.unlink()
    with pytest.raises(Refused):
        build_plan(LocalBlobs(tmp_path / "s"), CONFIG, documents, [], append=False, approve=refuse)
    record.write_bytes(published)
    assert files_of(tmp_path / "s") == before


def test_progress_and_outcome_count_the_corpus(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    outcome = build_plan(
        LocalBlobs(tmp_path),
        CONFIG,
        corpus([1, 0] * 5000),
        [],
        append=False,
        progress=lambda documents, tokens: seen.append((documents, tokens)),
    )
    assert seen == [(4096, 4096), (5000, 5000)]
    assert outcome.dropped == {"empty": 5000}


# --- Damage --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    plan(root, corpus([50, 0, 7] * 20))
    return root


def everything(root: Path) -> list[Any]:
    """All that can be read of a store's plans."""
    plans = load_plans(root)
    values: list[Any] = [one.documents().to_pylist() for one in plans]
    for one in plans:
        values += [one.record, rows_of([one]), one.chain_digests().tolist()]
        values += [one.filled_rows().tolist(), one.sequence_of_row(np.arange(600)).tolist()]
        values += [column.tolist() for column in one.sequences().values()]
        for number in range(one.n_segments):
            values += [
                (batch.members.tolist(), batch.padded_length)
                for batch in one.segment(number).batches
            ]
    return values


def verify(root: Path) -> None:
    for one in load_plans(root):
        one.verify()


@pytest.mark.parametrize("name", ["plan.json", "plan.sections", "documents.parquet"])
def test_a_flipped_byte_is_found_and_never_read_as_numbers(
    pristine: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(pristine, tmp_path / "store")
    (path,) = (tmp_path / "store").rglob(name)
    data, expected = path.read_bytes(), everything(pristine)
    places = np.random.default_rng(0).integers(0, len(data), 40).tolist()
    for place in [0, len(data) - 1, *places]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises((StoreDamaged, NotAStore)):
            verify(tmp_path / "store")
        try:
            assert everything(tmp_path / "store") == expected
        except (StoreDamaged, NotAStore):
            continue


@pytest.mark.parametrize("name", ["plan.sections", "documents.parquet"])
def test_a_missing_or_cut_file_is_damage(pristine: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(pristine, tmp_path / "store")
    (path,) = (tmp_path / "store").rglob(name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreDamaged, match=name):
        load_plans(tmp_path / "store")
    path.unlink()
    with pytest.raises(StoreDamaged, match=name) as caught:
        load_plans(tmp_path / "store")
    assert caught.value.kind is ErrorKind.MISSING_FILE


def test_files_of_another_plan_are_found(tmp_path: Path) -> None:
    mine = first_plan(tmp_path / "a", corpus([50, 20]), CONFIG)
    other = first_plan(tmp_path / "b", corpus([50, 20], seed=1), CONFIG)
    (tmp_path / "a" / mine.files[0].path).write_bytes(
        (tmp_path / "b" / other.files[0].path).read_bytes()
    )
    with pytest.raises(StoreDamaged, match="another plan"):
        load_plans(tmp_path / "a")[0].segment(0)
    (tmp_path / "a" / mine.record_path).write_bytes(
        (tmp_path / "b" / other.record_path).read_bytes()
    )
    with pytest.raises(StoreDamaged, match="another plan"):
        load_plans(tmp_path / "a")


def test_a_missing_plan_is_found(tmp_path: Path) -> None:
    documents = corpus([50] * 4)
    plan(tmp_path, documents[:2])
    plan(tmp_path, documents)
    first, second = load_plans(tmp_path)
    with pytest.raises(StoreDamaged, match="not there"):
        build_plan(LocalBlobs(tmp_path), CONFIG, documents, [second], append=False)
    shutil.rmtree(tmp_path / first.record.folder)
    with pytest.raises(StoreDamaged, match="a plan is missing"):
        load_plans(tmp_path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    made = first_plan(tmp_path, corpus([50]), CONFIG)
    path = tmp_path / made.record_path
    fields = decode_record(path.read_bytes(), made.record_path)
    path.write_bytes(encode_record({**fields, "format": 2}))
    with pytest.raises(NotAStore, match="format 2") as caught:
        load_plans(tmp_path)
    assert caught.value.kind is ErrorKind.NEWER_FORMAT


def test_a_record_that_is_no_plan_is_malformed(tmp_path: Path) -> None:
    made = first_plan(tmp_path, corpus([50]), CONFIG)
    path = tmp_path / made.record_path
    fields = decode_record(path.read_bytes(), made.record_path)
    del fields["counts"]
    path.write_bytes(encode_record(fields))
    with pytest.raises(StoreDamaged, match="not a record of this format"):
        load_plans(tmp_path)


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(spool, "BUFFER_BYTES", 16)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(WriteFailed) as caught:
        plan(tmp_path, corpus([50]))
    assert caught.value.kind is ErrorKind.DISK_FULL


def test_a_read_only_target_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed):
        plan(tmp_path / "file" / "store", corpus([50]))


# --- Memory, records, values ---------------------------------------------------------------


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "TOKENS_PER_SECTION", 2**15)
    monkeypatch.setattr(spool, "BUFFER_BYTES", 2**15)
    config = replace(CONFIG, context=1024, stride=0, segment_rows=4096)

    def peak(documents: int) -> int:
        ids = np.arange(2048, dtype=np.int32) % VOCABULARY
        stream = (TokenizedDocument(ids, f"d{n}", {"n": n}) for n in range(documents))
        tracemalloc.start()
        try:
            plan(tmp_path / str(documents), stream, config)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)
    small, large = peak(50), peak(450)
    # 400 more documents are 3.3 MB of ids; 800 sequences and 400 rows in flight are less.
    assert large - small < 1_000_000


def test_a_plan_survives_pickling(pristine: Path) -> None:
    (one,) = load_plans(pristine)
    expected = one.segment(1).token_ids
    copy = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(copy.segment(1).token_ids, expected)


def test_arrays_of_a_segment_cannot_be_written(pristine: Path) -> None:
    segment = load_plans(pristine)[0].segment(0)
    for name in ("token_ids", "positions", "special", "first_token", "length", "document"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(segment, name)[0] = 0


@pytest.mark.parametrize("number", [-1, 99])
def test_an_unknown_segment_is_refused(pristine: Path, number: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_plans(pristine)[0].segment(number)
    assert caught.value.kind is ErrorKind.UNKNOWN_ROW


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": True}, "context is True"),
        ({"context": 200}, "segment_rows is 512"),
        ({"segment_rows": 600}, "multiple of 512"),
        ({"stride": 17}, "stride is 17"),
        ({"stride": -1}, "stride is -1"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"limit_tokens": 0}, "limit_tokens is 0"),
        ({"shuffle": -1}, "shuffle is -1"),
        ({"bos": "both"}, "bos is 'both'"),
        ({"bos": "document"}, "bos_token_id is None"),
        ({"bos_token_id": 1}, "bos_token_id is 1"),
        ({"bos": "sequence", "bos_token_id": 1, "stride": 16}, "stride is 16"),
        ({"bos": "sequence", "bos_token_id": 1, "context": 1, "stride": 0}, "context is 1"),
        ({"bos": "document", "bos_token_id": 64}, "bos_token_id is 64"),
        ({"special_token_ids": (64,)}, "special_token_ids is 64"),
        ({"vocabulary_size": 0}, "vocabulary_size is 0"),
    ],
)
def test_an_invalid_config_cannot_exist(change: Columns, named: str) -> None:
    with pytest.raises(InvalidInput, match=named) as caught:
        replace(CONFIG, **{"stride": 0, **change})
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@settings(deadline=None)
@given(config=configs())
def test_a_config_survives_its_record(config: PlanConfig) -> None:
    assert PlanConfig.from_json(json.loads(canonical_json(config.to_json()))) == config


def test_column_types_are_decided_over_the_plan(tmp_path: Path) -> None:
    values: dict[str, list[Any]] = {
        "whole": [1, None, -(2**60)],
        "real": [0.5, float("nan"), 2.0],
        "both": [1, 2.5, None],
        "far": [2**60, 0.5, 1],
        "huge": [2**70, 1, None],
        "flag": [True, None, False],
        "flag_or_number": [True, 1, 0],
        "words": ["a", None, "é"],
        "mixed": ["a", 1, 1.5],
        "nothing": [None, None, None],
    }
    documents = [
        document([1, 2], number, **{name: column[number] for name, column in values.items()})
        for number in range(3)
    ]
    documents.append(document([3], 3, late=4))
    table = first_plan(tmp_path, documents, CONFIG).documents()
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        "document": "int64",
        "source": "string",
        "n_tokens": "int64",
        "whole": "int64",
        "real": "double",
        "both": "double",
        "far": "string",
        "huge": "string",
        "flag": "bool",
        "flag_or_number": "string",
        "words": "string",
        "mixed": "string",
        "nothing": "string",
        "late": "int64",
    }
    rows = table.to_pylist()
    assert rows[2]["whole"] == -(2**60)
    assert np.isnan(rows[1]["real"])
    assert [row["both"] for row in rows] == [1.0, 2.5, None, None]
    assert [row["far"] for row in rows] == [str(2**60), "0.5", "1", None]
    assert [row["huge"] for row in rows] == [str(2**70), "1", None, None]
    assert [row["flag_or_number"] for row in rows] == ["true", "1", "0", None]
    assert [row["mixed"] for row in rows] == ["a", "1", "1.5", None]
    assert [row["late"] for row in rows] == [None, None, None, 4]


@pytest.mark.parametrize("name", ["source", "Document", "N_TOKENS"])
def test_a_reserved_column_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="the store's own") as caught:
        plan(tmp_path, [document([1], 0, **{name: 1})])
    assert caught.value.kind is ErrorKind.INVALID_CORPUS


def test_columns_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="only in case"):
        plan(tmp_path, [document([1], 0, label=1), document([1], 1, Label=1)])
