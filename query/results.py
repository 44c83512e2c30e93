"""Columnar answers with their certificate."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import pyarrow as pa

from actstore.query.columnar import Columnar

__all__ = ["Answer", "Cells", "Certificate", "TopK"]


@dataclass(frozen=True)
class Certificate:
    """How an answer was found, and what it covers.

    Attributes:
        scalar: the derived scalar's name.
        plan: ``lists``, ``column``, ``rows``, ``lists+bounds``, ``bounds`` or ``scan``.
        source: where the values came from: ``stored``, ``reconstructed``.
        bounded_by: what told where values can be: a zone map, an index, an interval, nothing.
        pages_read: pages of 512 rows x one unit that were read; of kept latents, latents of
            one segment.
        pages_pruned: pages that their bounds ruled out.
        cells_scanned: values looked at by a scan.
        bound: the score nothing unread can pass; None for a scan or fewer than k answers.
        segments: committed segments searched.
        segments_planned: segments of all plans; more than ``segments`` while ingest runs.
        rows: rows that could answer.
        rows_excluded: reason -> rows left out.
    """

    scalar: str
    plan: str
    source: str
    bounded_by: str
    pages_read: int
    pages_pruned: int
    cells_scanned: int
    bound: float | None
    segments: int
    segments_planned: int
    rows: int
    rows_excluded: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON values."""
        return asdict(self)


class Answer(Columnar):
    """Values at places, in order.

    Token ids and vocabulary are read when the text is looked at: that may take longer than
    finding the answer did.

    Args:
        found: the rows without their text.
        certificate: how the answer was found.
        texts: gives the text of each row; raises StoreDamaged where a file that it reads is
            missing or fails its checksum.

    Attributes:
        certificate: how the answer was found.
    """

    def __init__(
        self, found: pa.Table, certificate: Certificate, texts: Callable[[], list[str]]
    ) -> None:
        self._found = found
        self.certificate = certificate
        self._texts = texts

    @cached_property
    def table(self) -> pa.Table:
        """Columns ``layer, token, neuron`` (or ``head`` …), ``value, sequence, position, text``."""
        return self._found.append_column("text", pa.array(self._texts(), pa.string()))

    def __reduce__(self) -> tuple[object, ...]:
        # The open store stays here; its texts go along.
        texts = self.table.column("text").to_pylist()
        return type(self), (self._found, self.certificate, partial(list, texts))

    def __len__(self) -> int:
        return int(self._found.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows()[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.certificate.scalar}, {len(self)} rows, plan={self.certificate.plan})"

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        table = self._found if name in self._found.column_names else self.table
        values: list[Any] = table.column(name).to_pylist()
        return values

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def to_json(self) -> dict[str, Any]:
        """``{"rows": [...], "certificate": {...}}``."""
        return {"rows": self.rows(), "certificate": self.certificate.to_json()}


class TopK(Answer):
    """The k best values, in order."""

    def _repr_html_(self) -> str | None:
        from actstore.query.notebooks import topk_html

        return topk_html(self)


class Cells(Answer):
    """The values in an interval, by layer, token and unit."""
