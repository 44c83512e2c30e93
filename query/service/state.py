"""The store that a service answers from, and its replacement by a newer opening of it.

Handlers find it at ``app.state.store``. With ``reload`` the store is opened again when it
has grown; requests that are at work keep what they began with, and an opening is closed
once every request that may have seen it is done.
"""

import hashlib
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self, cast

import pyarrow as pa
from fastapi import FastAPI

from actstore.query.derived import SCALARS
from actstore.query.service.identity import StoreIdentity
from actstore.query.service.problems import HttpKind, ServiceError
from actstore.query.service.settings import ServerSettings
from actstore.query.session import Store
from actstore.query.sql import Parameters, Sql
from actstore.store.coverage import Coverage
from actstore.store.errors import ActstoreError

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

    from actstore.query.service.sql_worker import SqlService

__all__ = ["Opening", "ServedStore", "StoreHolder"]

_LOG = logging.getLogger("actstore.service")
_DERIVED_FOLDERS = ("index", "catalog")


class ServedStore(Store):
    """An open store whose predicates come from strangers.

    ``where`` and ``units`` are SQL: they run in the worker process under its limits, as all
    SQL of a request does. ``sql`` is for the service's own queries.
    """

    _predicates: "_WorkerSql"
    max_answer_bytes: int

    @classmethod
    def over(cls, store: Store, service: "_LazySql", max_result_bytes: int) -> Self:
        """The same open store; it shares the reader, which the one given goes on owning."""
        served = object.__new__(cls)
        served.__dict__.update(store.__dict__)
        served.__dict__.pop("_tensors", None)
        served._predicates = _WorkerSql(service)
        served.max_answer_bytes = min(max_result_bytes, store.max_result_bytes)
        return served

    @cached_property
    def answering(self) -> Store:
        """The same store, but no tensor of it is larger than one answer may be."""
        bounded = object.__new__(type(self))
        bounded.__dict__.update(self.__dict__)
        bounded.__dict__.pop("_tensors", None)
        bounded.max_result_bytes = self.max_answer_bytes
        return bounded

    def rows_where(self, where: str) -> Any:
        """Ascending global rows that a predicate allows, found in the worker."""
        return self._predicates.rows_where(where)

    def units_where(
        self, units: str, table: str = "neurons", sets: Sequence[str] = ()
    ) -> list[tuple[int, int]]:
        """(layer, unit) pairs that a predicate allows, found in the worker."""
        return self._predicates.units_where(units, table, sets)

    def fetch(self, query: str, parameters: Parameters = None) -> pa.Table:
        """The rows of one of the service's own queries.

        Raises:
            StoreDamaged: a block of the snapshot fails its checksum.
        """
        return self._sql.fetch(query, parameters)


class _WorkerSql(Sql):
    """Predicates by the worker: the queries of :class:`Sql`, run elsewhere."""

    def __init__(self, service: "_LazySql") -> None:
        self._service = service

    def relation(self, query: str, parameters: Parameters = None) -> "DuckDBPyRelation":
        """The rows of a query, with what :class:`Sql` asks of a relation."""
        # One row, so that the worker's limit on rows, which is for people, leaves it whole.
        packed = f"SELECT list(found) AS found FROM (\n{query}\n) AS found"
        answer = self._service.get().run(packed, cast("Any", parameters), max_rows=1)
        return cast("DuckDBPyRelation", _Fetched(answer.table.column("found").chunk(0)))


class _Fetched:
    """A list of structs in the two forms of a relation that predicates are read in."""

    def __init__(self, found: pa.ListArray) -> None:
        rows = found.flatten()
        self._columns = {
            rows.type.field(place).name: column for place, column in enumerate(rows.flatten())
        }

    def fetchnumpy(self) -> dict[str, Any]:
        return {name: column.to_numpy() for name, column in self._columns.items()}

    def fetchall(self) -> list[tuple[Any, ...]]:
        columns = [column.to_pylist() for column in self._columns.values()]
        return list(zip(*columns, strict=True))


class _LazySql:
    """The SQL worker, started when it is first needed."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self._path = store.path
        self._objective = store.reader.objective
        self._limits = settings.sql
        self._lock = Lock()
        self._service: SqlService | None = None
        self._is_closed = False

    def get(self) -> "SqlService":
        """The worker of this opening."""
        with self._lock:
            if self._is_closed:
                raise ServiceError(HttpKind.BUSY, "The server is stopping, or renews the store.")
            if self._service is None:
                from actstore.query.service.sql_worker import SqlService

                self._service = SqlService(self._path, self._limits, self._objective)
            return self._service

    def close(self) -> None:
        """End the worker, if there is one; there will be no other."""
        with self._lock:
            self._is_closed = True
            if self._service is not None:
                self._service.close()
                self._service = None


class Opening:
    """One opening of the store: what was committed then.

    Args:
        store: the open store.
        settings: the server's.

    Attributes:
        store: as handlers see it.
        identity: whether it is still there.
        tag: names everything that an answer follows from, but for the request.
    """

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self._given = store
        self._lazy_sql = _LazySql(store, settings)
        self.store = ServedStore.over(store, self._lazy_sql, settings.max_result_bytes)
        self.identity = StoreIdentity(store.reader)
        self.tag = _state_tag(store)

    @property
    def sql(self) -> "SqlService":
        """The SQL worker of this opening."""
        return self._lazy_sql.get()

    def release(self) -> None:
        """End the worker and the service's own SQL; the store given stays open."""
        self._lazy_sql.close()
        own = self.store.__dict__.pop("_sql", None)
        if own is not None and own is not self._given.__dict__.get("_sql"):
            own.close()

    def close(self) -> None:
        """Release everything, the store included."""
        self.release()
        self._given.close()


def _state_tag(store: Store) -> str:
    """Names what answers follow from: code, model, records, derived files, own scalars."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    parts: list[Iterable[str]] = [
        [version("actstore"), store.reader.manifest.id, str(store.reader.objective)],
        [Coverage.of_sets(store.reader.commits).hash],
        # A certificate names the plan, which hangs on the indexes that are there.
        *(_names(store.path / folder) for folder in _DERIVED_FOLDERS),
    ]
    if any(declared.origin is not None for declared in SCALARS.values()):
        # A user's own function may change while its name stays.
        parts.append([secrets.token_hex(8)])
    for part in parts:
        digest.update("\0".join(part).encode() + b"\1")
    return digest.hexdigest()[:32]


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


class StoreHolder:
    """The current opening, and those that requests may still be reading.

    Args:
        app: whose ``state.store`` and ``state.roots`` follow the opening.
        store: the open store.
        settings: the server's.
    """

    def __init__(self, app: FastAPI, store: Store, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._lock = Lock()
        self._number = 0
        self._at_work: Counter[int] = Counter()
        self._retired: list[tuple[int, Opening]] = []
        self._first = store
        self._show(Opening(store, settings))

    def _show(self, opening: Opening) -> None:
        self.current = opening
        root = opening.store.path
        self._app.state.store = opening.store
        self._app.state.roots = tuple(dict.fromkeys([root, root.absolute(), root.resolve()]))

    def begin(self) -> int:
        """A request begins; what it may see stays open until :meth:`end`."""
        with self._lock:
            self._at_work[self._number] += 1
            return self._number

    def end(self, number: int) -> None:
        """A request that began as ``number`` is done."""
        with self._lock:
            self._at_work[number] -= 1
            if not self._at_work[number]:
                del self._at_work[number]
        self._close_unseen()

    def renew(self) -> bool:
        """Open the store again if it has grown or was replaced; whether it was.

        A store that cannot be opened leaves the current one, which goes on refusing.
        """
        identity = self.current.identity
        if not (identity.has_changed or identity.has_grown):
            return False
        old = self._first
        try:
            opening = Opening(Store(old.path, objective=old.reader.objective), self._settings)
        except (ActstoreError, OSError, ServiceError) as error:
            _LOG.warning("the store could not be opened again: %s", error)
            return False
        with self._lock:
            self._retired.append((self._number, self.current))
            self._number += 1
            self._show(opening)
        self._close_unseen()
        return True

    def _close_unseen(self) -> None:
        with self._lock:
            # A request that began earlier may have met any opening since.
            oldest = min(self._at_work, default=self._number + 1)
            unseen = [opening for number, opening in self._retired if number < oldest]
            self._retired = [entry for entry in self._retired if entry[0] >= oldest]
        for opening in unseen:
            self._drop(opening)

    def _drop(self, opening: Opening) -> None:
        # Who gave the first store closes it.
        if opening.store.reader is self._first.reader:
            opening.release()
        else:
            opening.close()

    def close(self) -> None:
        """Release every opening; the store that was given stays open."""
        with self._lock:
            openings = [opening for _, opening in self._retired] + [self.current]
            self._retired = []
        for opening in openings:
            self._drop(opening)
