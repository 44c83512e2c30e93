"""The sequences of a store, a page at a time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from actstore.query.views.tables import fetch_rows, literal

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["SequenceEntry", "SequenceList"]

_SIZE = 40
_BEGINNING = 24


@dataclass(frozen=True)
class SequenceEntry:
    """A sequence in the list.

    Attributes:
        sequence, document, length: which it is.
        source: the document's name.
        texts: its first tokens.
    """

    sequence: int
    document: int
    length: int
    source: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class SequenceList:
    """A page of sequences.

    Attributes:
        rows: the sequences.
        total: how many there are.
        page: from 1.
        find: part of the documents' names that are shown; empty for all.
        sql: the query that it was made from.
    """

    rows: tuple[SequenceEntry, ...]
    total: int
    page: int
    find: str
    sql: str

    @classmethod
    def of(cls, store: "Store", *, page: int = 1, find: str = "") -> Self:
        """A page of an open store's committed sequences.

        Args:
            store: the store.
            page: from 1.
            find: part of the document's name.
        """
        where = f"WHERE contains(lower(source), {literal(find.lower())})\n" if find else ""
        joined = "FROM sequences JOIN documents USING (document)\n"
        sql = (
            f"SELECT sequence, document, length, source\n{joined}{where}ORDER BY sequence\n"
            f"LIMIT {_SIZE} OFFSET {(page - 1) * _SIZE}"
        )
        total = int(fetch_rows(store, f"SELECT count(*) AS n {joined}{where}")[0]["n"])
        rows = []
        for row in fetch_rows(store, sql):
            place = store.row_map.sequence(int(row["sequence"]))
            first = place.first_token
            begin = store.row_map.of_tokens(range(first, first + min(place.length, _BEGINNING)))
            rows.append(
                SequenceEntry(
                    sequence=place.sequence,
                    document=place.document,
                    length=place.length,
                    source=str(row["source"]),
                    texts=tuple(store.row_texts(begin)),
                )
            )
        return cls(tuple(rows), total, page, find, sql)

    @property
    def pages(self) -> int:
        """How many pages there are, one at least."""
        return max(1, -(-self.total // _SIZE))
