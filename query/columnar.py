"""Answers that are tables: their rows in the forms that people work with."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = ["Columnar"]


class Columnar(ABC):
    """An answer with a row per finding."""

    @abstractmethod
    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict per row."""
        rows: list[dict[str, Any]] = self.to_arrow().to_pylist()
        return rows

    def df(self) -> "pandas.DataFrame":
        """The rows as a pandas data frame; needs pandas."""
        frame: pandas.DataFrame = self.to_arrow().to_pandas()
        return frame

    def pl(self) -> "polars.DataFrame":
        """The rows as a polars data frame; needs polars."""
        import polars

        frame = polars.from_arrow(self.to_arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame
