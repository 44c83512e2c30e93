"""The documents' own targets: an objective's columns as token ids, sequence by sequence."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from actstore.ingest.objectives import Objective, resolve_target
from actstore.ingest.tokenization import Tokenizer
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.plan import Plan, SegmentPlan

__all__ = ["DocumentTargets"]


class DocumentTargets:
    """What an objective reads of the documents of a store.

    Args:
        objective: names the columns.
        plans: all plans of the store; the first sequence of a plan may go on with a document
            of the one before it.
        tokenizer: for columns of text; None where the corpus brings token ids.
        vocabulary_size: rows of the model's embedding.
    """

    def __init__(
        self,
        objective: Objective,
        plans: Sequence[Plan],
        tokenizer: Tokenizer | None,
        vocabulary_size: int,
    ) -> None:
        self._names = objective.columns
        self._objective = objective
        self._plans = plans
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._tables: dict[int, pa.Table] = {}
        self._resolved: dict[tuple[str, object], tuple[int, ...]] = {}

    def check(self) -> None:
        """Refuse an objective or a document without a target, before the model is run.

        Raises:
            InvalidInput: names the document and its value, or the id that the vocabulary lacks.
        """
        # The objective knows its own ids; a sequence of nothing is enough to ask it.
        logits = torch.zeros(1, 2, self._vocabulary_size)
        columns = [dict.fromkeys(self._names, 0)]
        self._objective(logits, torch.zeros(1, 2, dtype=torch.int64), [2], columns)
        for number in range(len(self._plans) if self._names else 0):
            table = self._table(number)
            for name in self._names:
                first: dict[object, int] = {}
                for row, value in enumerate(table[name].to_pylist()):
                    first.setdefault(value, row)
                for row in first.values():
                    self._target(table, row, name)

    def of(
        self, segment: SegmentPlan, members: Sequence[int]
    ) -> list[Mapping[str, tuple[int, ...]]] | None:
        """The columns of some sequences of a segment, in their order.

        Args:
            segment: the segment.
            members: sequences as indices into the segment's.

        Returns:
            Column -> token ids for each sequence; None where the objective reads no column.

        Raises:
            InvalidInput: a document has no target.
        """
        if not self._names:
            return None
        found: list[Mapping[str, tuple[int, ...]]] = []
        for member in members:
            document = int(segment.document[member])
            bases = [plan.record.document_base for plan in self._plans]
            number = int(np.searchsorted(bases, document, side="right")) - 1
            table, row = self._table(number), document - bases[number]
            found.append({name: self._target(table, row, name) for name in self._names})
        return found

    def _table(self, number: int) -> pa.Table:
        if number not in self._tables:
            table = self._plans[number].documents()
            missing = [name for name in self._names if name not in table.column_names]
            if missing:
                raise InvalidInput(
                    f"The objective {self._objective.name} reads the column {missing[0]!r}; the "
                    f"documents have {', '.join(table.column_names)}. Ingest a corpus that has "
                    "it, or name token ids.",
                    kind=ErrorKind.INVALID_ARGUMENT,
                )
            self._tables[number] = table.select(["document", "source", *self._names])
        return self._tables[number]

    def _target(self, table: pa.Table, row: int, name: str) -> tuple[int, ...]:
        value = table[name][row].as_py()
        key = (name, value)
        if key not in self._resolved:
            place = f"document {table['document'][row].as_py()} ({table['source'][row].as_py()})"
            what = f"Column {name!r} of {place}"
            self._resolved[key] = resolve_target(
                value, self._tokenizer, self._vocabulary_size, what
            )
        return self._resolved[key]
