"""A store that another process serves, asked as if it were open here."""

from actstore.query.client.remote_rows import RemoteRows
from actstore.query.client.remote_store import RemoteStore, connect
from actstore.query.client.transport import ServerRefusal, ServerUnreachable

__all__ = ["RemoteRows", "RemoteStore", "ServerRefusal", "ServerUnreachable", "connect"]
