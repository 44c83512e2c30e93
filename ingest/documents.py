"""A document: a text or its token ids, where it came from, and the caller's columns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.document_table import RESERVED_COLUMNS, Scalar
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["Document", "RecordFields", "as_token_ids"]

TOKEN_COLUMN = "token_ids"
"""The member of a record that holds token ids in place of a text."""


@dataclass(frozen=True, eq=False)
class Document:
    """One document of a corpus.

    Attributes:
        text: the text, or None.
        token_ids: int64 ``(token,)``, or None. Exactly one of the two is given.
        source: file (and line or row, both from 1), or ``memory:<n>`` (from 0).
        columns: the caller's other values.
    """

    text: str | None
    token_ids: npt.NDArray[np.int64] | None
    source: str
    columns: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise invalid_corpus(f"{self.source} needs either a text or token ids.")
        if self.text is not None:
            _require_encodable(self.text, self.source)


@dataclass(frozen=True)
class RecordFields:
    """Which members of a record are what.

    Attributes:
        text_column: the member that holds the text; ``token_ids`` may stand in its place,
            and is chosen where both are there by naming it here.
        columns: members to keep, or None for all but those two.
    """

    text_column: str = "text"
    columns: tuple[str, ...] | None = None

    def document(self, record: Mapping[Any, Any], source: str) -> Document:
        """Make a document of a record.

        Where the text or the ids are None, the document is empty. A column named like one of the store's own
        (``document``, ``source``, ``n_tokens``) is kept with an underscore after its name.

        Raises:
            InvalidInput: the record has neither or both of text and token ids, one of the
                wrong type, or column names that cannot be told apart.
        """
        self.require_content(record.keys(), source)
        by_ids = self.text_column == TOKEN_COLUMN
        text = None if by_ids else record.get(self.text_column)
        ids = record.get(TOKEN_COLUMN)
        if text is not None and ids is not None:
            raise invalid_corpus(
                f"{source} has both {self.text_column!r} and {TOKEN_COLUMN!r}. Keep one of them, "
                f"or choose the ids with text_column={TOKEN_COLUMN!r}."
            )
        if text is not None and not isinstance(text, str):
            raise invalid_corpus(
                f"{source} has a {type(text).__name__} as {self.text_column!r}; it must be text."
            )
        if ids is None and (by_ids or self.text_column not in record):
            ids = []
        return Document(
            text=(text or "") if ids is None else None,
            token_ids=None if ids is None else as_token_ids(ids, source),
            source=source,
            columns=self._columns(record, source),
        )

    def require_content(self, names: Any, source: str) -> None:
        """Refuse records that have neither a text nor token ids.

        Raises:
            InvalidInput: lists the members there are.
        """
        if self.text_column not in names and TOKEN_COLUMN not in names:
            found = ", ".join(sorted(map(repr, names))) or "none"
            raise invalid_corpus(
                f"{source} has no column {self.text_column!r}. Its columns: {found}. Name the one "
                "with the text (`text_column`)."
            )

    def kept(self, names: Sequence[Any]) -> list[Any]:
        """The names, of those given, that are kept as columns."""
        if self.columns is not None:
            return [name for name in self.columns if name in names]
        return [name for name in names if name not in (self.text_column, TOKEN_COLUMN)]

    def _columns(self, record: Mapping[Any, Any], source: str) -> dict[str, Scalar]:
        columns: dict[str, Scalar] = {}
        for name in self.kept(list(record)):
            if not isinstance(name, str) or not name:
                raise invalid_corpus(f"{source} has a column named {name!r}; names must be text.")
            own = f"{name}_" if name.lower() in RESERVED_COLUMNS else name
            if own in columns or (own != name and own in record):
                raise invalid_corpus(
                    f"{source} has columns {name!r} and {own!r}; {name!r} is a name of the "
                    f"store's own and is kept as {own!r}. Rename one of them."
                )
            _require_encodable(own, source)
            columns[own] = _scalar(record[name], name, source)
        return columns


def as_token_ids(value: Any, source: str) -> npt.NDArray[np.int64]:
    """Token ids as an array, int64 ``(token,)``.

    Raises:
        InvalidInput: the value is not a list of whole numbers.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise invalid_corpus(f"{source} does not have a list of token ids: {error}") from error
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max:
        raise invalid_corpus(
            f"{source} has token ids of type {array.dtype} and shape {array.shape}; they must be "
            "a flat list of whole numbers."
        )
    return array.astype(np.int64)


def invalid_corpus(message: str) -> InvalidInput:
    """The error for a corpus that cannot be read as given."""
    return InvalidInput(message, kind=ErrorKind.INVALID_CORPUS)


def _scalar(value: Any, name: str, source: str) -> Scalar:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if not isinstance(value, str):
        try:
            nested = isinstance(value, list | tuple | Mapping | np.ndarray)
            value = (
                json.dumps(value, default=_plain, ensure_ascii=False) if nested else _plain(value)
            )
        except (TypeError, ValueError) as error:
            raise invalid_corpus(
                f"Column {name!r} of {source} cannot be kept: {error}. Leave it out with `columns`."
            ) from error
    _require_encodable(value, source)
    return str(value)


def _plain(value: Any) -> Any:
    """A JSON value for what JSON does not know."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray):
        return value.hex()
    # Dates and times, whose str() is not the standard spelling.
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _require_encodable(text: str, source: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid_corpus(
            f"{source} has half a surrogate pair at character {error.start}; that is no text. "
            "Decode the data properly, or drop the document."
        ) from error
