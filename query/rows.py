"""Rows: which sequence, position, token and document stand at a global row.

The plans say it, so nothing is read from the catalog. Rows that no committed segment
holds are refused here, with what is missing, before a reader meets them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.model.pieces import Vocabulary, read_vocabulary
from actstore.store.plan import SegmentPlan
from actstore.store.reader import StoreReader

__all__ = ["RowMap", "Rows", "SequenceRows"]


_FEW_ROWS = 256
"""Rows whose places and token ids are read by themselves: an answer's, not a tensor's."""


@dataclass(frozen=True)
class SequenceRows:
    """Where one sequence lies.

    Attributes:
        sequence, document, segment: global numbers.
        first_token: global row of its first token.
        length: tokens.
    """

    sequence: int
    document: int
    segment: int
    first_token: int
    length: int


@dataclass(frozen=True, eq=False)
class Rows:
    """Committed rows in the order they were asked for; arrays are int64 ``(row,)``.

    Attributes:
        token: global rows.
        sequence: the sequence of each.
        position: the position in that sequence.
    """

    token: npt.NDArray[np.int64]
    sequence: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.token)

    def by_sequence(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Each sequence once, ascending, with the places of its rows among these."""
        order = np.argsort(self.sequence, kind="stable")
        numbers, starts = np.unique(self.sequence[order], return_index=True)
        yield from zip(numbers.tolist(), np.split(order, starts[1:]), strict=False)


class RowMap:
    """The rows of an open store.

    Args:
        reader: the store.
        max_rows: most rows that one question may name.
    """

    def __init__(self, reader: StoreReader, max_rows: int) -> None:
        self._reader = reader
        self._max_rows = max_rows
        self._committed = set(reader.segments)

    @cached_property
    def n_sequences(self) -> int:
        """Sequences of all plans."""
        return sum(plan.counts.sequences for plan in self._reader.plans)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return self._column("first_token")

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return self._column("length")

    @cached_property
    def _documents(self) -> npt.NDArray[np.int64]:
        return self._column("document")

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        parts = [plan.sequences()[name].astype(np.int64) for plan in self._reader.plans]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @cached_property
    def committed_sequences(self) -> npt.NDArray[np.int64]:
        """Sequences of committed segments, ascending."""
        segments = self._starts // self._reader.segment_rows
        return np.flatnonzero(np.isin(segments, self._reader.segments))

    @cached_property
    def n_committed_documents(self) -> int:
        """Documents with a committed sequence at least."""
        return len(np.unique(self._documents[self.committed_sequences]))

    def sequence(self, number: int) -> SequenceRows:
        """Where a committed sequence lies.

        Raises:
            InvalidInput: no plan has such a sequence.
            Unavailable: its segment is not committed.
        """
        self._check(np.array([number]), self.n_sequences, "sequence")
        first = int(self._starts[number])
        segment = first // self._reader.segment_rows
        if segment not in self._committed:
            raise self._uncommitted(f"Sequence {number}", segment)
        return SequenceRows(
            sequence=int(number),
            document=int(self._documents[number]),
            segment=segment,
            first_token=first,
            length=int(self._lengths[number]),
        )

    def of_sequences(self, numbers: int | Iterable[int]) -> Rows:
        """All rows of sequences, sequence after sequence as given.

        Raises:
            InvalidInput: no plan has such a sequence.
            Unavailable: a sequence is not committed.
        """
        wanted = _numbers(numbers, "sequence")
        self._check(wanted, self.n_sequences, "sequence")
        first, length = self._starts[wanted], self._lengths[wanted]
        segment = first // self._reader.segment_rows
        missing = np.flatnonzero(~np.isin(segment, self._reader.segments))
        if len(missing):
            at = int(missing[0])
            raise self._uncommitted(f"Sequence {int(wanted[at])}", int(segment[at]))
        self._limit(int(length.sum()))
        position = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        return Rows(np.repeat(first, length) + position, np.repeat(wanted, length), position)

    def of_tokens(self, tokens: int | Iterable[int]) -> Rows:
        """Rows by their global numbers, in the order given, repeats allowed.

        Raises:
            InvalidInput: no sequence of any plan fills such a row.
            Unavailable: a row's segment is not committed.
        """
        wanted = _numbers(tokens, "token")
        self._limit(len(wanted))
        size = self._reader.segment_rows
        self._check(wanted, self._reader.planned_segments * size, "token")
        if len(wanted) <= _FEW_ROWS and self._are_filled(wanted):
            return self._few(wanted)
        index = np.searchsorted(self._starts, wanted, side="right") - 1
        position = wanted - self._starts[index]
        unfilled = wanted[position >= self._lengths[index]]
        if len(unfilled):
            raise InvalidInput(
                f"Row {int(unfilled[0])} holds no token: the sequences of its segment end before "
                "it. Take rows from the `token` column of the tokens table.",
                kind=ErrorKind.UNKNOWN_ROW,
            )
        missing = np.flatnonzero(~np.isin(wanted // size, self._reader.segments))
        if len(missing):
            row = int(wanted[missing[0]])
            raise self._uncommitted(f"Row {row}", row // size)
        return Rows(wanted, index.astype(np.int64), position)

    def _are_filled(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether committed segments hold all of some rows; their records say so."""
        base, size = self._reader.commits.get("base", {}), self._reader.segment_rows
        return all(
            segment in base and offset < base[segment].rows
            for segment, offset in (divmod(row, size) for row in rows.tolist())
        )

    def _few(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Committed rows, from the plans' blocks about their segments alone."""
        sequence, position = np.empty((2, len(rows)), np.int64)
        size = self._reader.segment_rows
        for plan in self._reader.plans:
            inside = (rows // size) - plan.first_segment
            chosen = (inside >= 0) & (inside < plan.n_segments)
            if chosen.any():
                sequence[chosen], position[chosen] = plan.places_of(rows[chosen])
        return Rows(rows, sequence, position)

    def all(self) -> Rows:
        """Every committed row, ascending."""
        return self.of_sequences(self.committed_sequences)

    def groups(self, kind: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First rows, ascending, and the labels of the groups that begin there.

        Args:
            kind: ``sequence`` or ``document``; a document may begin several times.
        """
        if kind == "sequence":
            return self._starts, np.arange(self.n_sequences)
        return self._starts, self._documents

    def special(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether each row is special: position 0 or a special token."""
        found: npt.NDArray[np.bool_] = self._gather(rows, lambda plan: plan.special)
        return found

    def token_ids(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The vocabulary's number of each row's token."""
        if len(rows) > _FEW_ROWS:
            return self._gather(rows, lambda plan: plan.token_ids).astype(np.int64)
        ids = np.empty(len(rows), np.int64)
        for plan in self._reader.plans:
            inside = rows.sequence - plan.record.sequence_base
            chosen = (inside >= 0) & (inside < plan.counts.sequences)
            if chosen.any():
                ids[chosen] = plan.tokens_at(rows.sequence[chosen], rows.position[chosen])
        return ids

    def _gather(
        self, rows: Rows, column: Callable[[SegmentPlan], npt.NDArray[Any]]
    ) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = np.empty(len(rows), np.int64)
        size = self._reader.segment_rows
        segments = rows.token // size
        for segment in np.unique(segments).tolist():
            values = column(self._reader.segment(segment))
            result = result.astype(values.dtype, copy=False)
            chosen = segments == segment
            result[chosen] = values[rows.token[chosen] - segment * size]
        return result

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        return read_vocabulary(self._reader.blobs, self._reader.manifest.files)

    def texts(self, token_ids: Iterable[int]) -> list[str | None]:
        """The decoded piece of each token id; None for one that the tokenizer does not have."""
        vocabulary = self._vocabulary
        if vocabulary is None:
            return [None for _ in token_ids]
        return [vocabulary.text(int(token_id)) for token_id in token_ids]

    @cached_property
    def _document_tables(self) -> list[pa.Table]:
        return [plan.documents() for plan in self._reader.plans]

    def document_column(self, name: str) -> pa.Array:
        """A column of the documents, by document number; names differ by more than case.

        Plans may bring different columns: what one lacks is null, whole and other numbers
        meet as floats, anything else that differs as text.

        Raises:
            InvalidInput: no plan has such a column.
        """
        found = []
        for table in self._document_tables:
            spelled = [own for own in table.column_names if own.casefold() == name.casefold()]
            found.append(table.column(spelled[0]) if spelled else pa.nulls(table.num_rows))
        types = {part.type for part in found if not pa.types.is_null(part.type)}
        if not types:
            known = dict.fromkeys(n for table in self._document_tables for n in table.column_names)
            raise InvalidInput(
                f"Documents have no column {name!r}; they have {', '.join(known)}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        common = types.pop()
        if types:
            numeric = all(
                pa.types.is_integer(one) or pa.types.is_floating(one) for one in (common, *types)
            )
            common = pa.float64() if numeric else pa.string()
        chunks = [chunk for part in found for chunk in _chunks(part.cast(common))]
        return pa.concat_arrays(chunks)

    def table(self, rows: Rows, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of the tokens table, joined with columns of their documents.

        Args:
            rows: which, in which order.
            columns: columns of ``documents`` to join; None for none.

        Returns:
            ``token, sequence, position, token_id, text, special, document`` and ``columns``.

        Raises:
            InvalidInput: the documents have no such column.
        """
        token_ids = self.token_ids(rows)
        document = self._documents[rows.sequence]
        found = {
            "token": pa.array(rows.token, pa.int64()),
            "sequence": pa.array(rows.sequence, pa.int64()),
            "position": pa.array(rows.position, pa.int32()),
            "token_id": pa.array(token_ids, pa.int32()),
            "text": pa.array(self.texts(token_ids.tolist()), pa.string()),
            "special": pa.array(self.special(rows), pa.bool_()),
            "document": pa.array(document, pa.int64()),
        }
        for name in columns or ():
            if name in found:
                continue
            found[name] = self.document_column(name).take(pa.array(document))
        return pa.table(found)

    def _check(self, wanted: npt.NDArray[np.int64], size: int, noun: str) -> None:
        outside = wanted[(wanted < 0) | (wanted >= size)]
        if len(outside):
            valid = f"0 to {size - 1}" if size else "none"
            raise InvalidInput(
                f"There is no {noun} {int(outside[0])}; this store has {valid}.",
                kind=ErrorKind.UNKNOWN_ROW,
            )

    def _limit(self, count: int) -> None:
        if count > self._max_rows:
            raise InvalidInput(
                f"{count:,} rows are asked for; one call returns {self._max_rows:,} at most. Ask "
                "for fewer, go through all of them with `batches`, or open the store with a "
                "greater `max_result_bytes`.",
                kind=ErrorKind.TOO_LARGE,
            )

    def _uncommitted(self, what: str, segment: int) -> Unavailable:
        return Unavailable(
            f"{what} is planned but not ingested yet: segment {segment} is not committed "
            f"({len(self._committed)} of {self._reader.planned_segments} are). Run the same "
            "`actstore ingest` again to finish it.",
            kind=ErrorKind.NOT_STORED,
        )


def _numbers(values: int | Iterable[int], noun: str) -> npt.NDArray[np.int64]:
    given = [values] if isinstance(values, int | np.integer) else values
    array = np.asarray(given if isinstance(given, np.ndarray | Sequence) else list(given))
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInput(
            f"{noun}s are {values!r}; give whole numbers, as a list or a one-dimensional array.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return array.astype(np.int64)


def _chunks(column: "pa.Array | pa.ChunkedArray") -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
