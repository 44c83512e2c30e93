"""Columnar answers with their certificate."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = ["Certificate", "TopK"]


@dataclass(frozen=True)
class Certificate:
    """How an answer was found, and what it covers.

    Attributes:
        scalar: the derived scalar's name.
        plan: ``lists``, ``lists+bounds``, ``bounds`` or ``scan``.
        source: where the values came from: ``stored``, ``reconstructed``.
        pages_read: pages of 512 rows x one unit that were read.
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


class TopK:
    """The k best values, in order.

    Attributes:
        table: columns ``layer, token, neuron`` (or ``head``, ``channel`` …), ``value``,
            ``sequence, position, text``.
        certificate: how the answer was found.
    """

    def __init__(self, table: pa.Table, certificate: Certificate) -> None:
        self.table = table
        self.certificate = certificate

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows()[index]

    def __repr__(self) -> str:
        return f"TopK({self.certificate.scalar}, {len(self)} rows, plan={self.certificate.plan})"

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def rows(self) -> list[dict[str, Any]]:
        """One dict per row."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def df(self) -> "pandas.DataFrame":
        """The rows as a pandas data frame; needs pandas."""
        frame: pandas.DataFrame = self.table.to_pandas()
        return frame

    def pl(self) -> "polars.DataFrame":
        """The rows as a polars data frame; needs polars."""
        import polars

        frame = polars.from_arrow(self.table)
        assert isinstance(frame, polars.DataFrame)
        return frame

    def to_json(self) -> dict[str, Any]:
        """``{"rows": [...], "certificate": {...}}``."""
        return {"rows": self.rows(), "certificate": self.certificate.to_json()}
