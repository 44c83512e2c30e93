"""The rows of a query that a server answered."""

from typing import Any

import pyarrow as pa

from actstore.query.columnar import Columnar

__all__ = ["RemoteRows"]


class RemoteRows(Columnar):
    """The rows of a query.

    Attributes:
        table: the rows.
        truncated: the query has more rows than these.
        seconds: time that the query took.
    """

    def __init__(self, table: pa.Table, *, truncated: bool, seconds: float) -> None:
        self.table = table
        self.truncated = truncated
        self.seconds = seconds

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def to_arrow_table(self) -> pa.Table:
        """The rows as an Arrow table, by the name that DuckDB's relations give it."""
        return self.table

    def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows as tuples."""
        columns = [column.to_pylist() for column in self.table.columns]
        return list(zip(*columns, strict=True))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        more = ", and there are more" if self.truncated else ""
        return f"<RemoteRows: {len(self)} rows of {', '.join(self.table.column_names)}{more}>"
