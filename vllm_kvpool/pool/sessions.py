"""Who said hello on which connection. Pure: no I/O, no clock.

One live connection a client, and the newest Hello wins: requests that an earlier connection left in
some queue are answered with Error("hello") and change nothing, however late they come.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MAX_SESSIONS = 4_096
"""Connections remembered; admin connections come and go without a word. The one idle longest has to
say hello again."""


NO_NAMESPACE = -1
"""Of an admin client."""


class Session(NamedTuple):
    client: int
    """Index in the pool's client table; protocol.NO_CLIENT for an admin client."""
    client_id: str
    hello_ms: int
    """Hello.now_ms: the client's clock."""
    offset_ms: int
    """Our clock minus the client's, at most: a Hello that waited in a queue makes it look
    larger."""
    namespace: int = NO_NAMESPACE
    """Index in the pool's namespace table."""
    digest: bytes = b""
    """Of the namespace."""
    public_key: bytes = b""
    """Of another host, in Z85; empty where there are no keys."""


class Sessions:
    def __init__(self) -> None:
        self._by_connection: OrderedDict[bytes, Session] = OrderedDict()
        self._connections: dict[str, bytes] = {}

    def get(self, connection: bytes) -> Session | None:
        session = self._by_connection.get(connection)
        if session is not None:
            self._by_connection.move_to_end(connection)
        return session

    def is_stale(self, client_id: str, hello_ms: int) -> bool:
        """Whether this client has said a newer Hello already."""
        newest = self._of_client(client_id)
        return newest is not None and hello_ms < newest.hello_ms

    def add(self, connection: bytes, session: Session) -> None:
        earlier = self._of_client(session.client_id)
        if earlier is not None:
            session = session._replace(offset_ms=min(session.offset_ms, earlier.offset_ms))
            self.forget_client(session.client_id)
        self._forget(connection)
        self._by_connection[connection] = session
        if session.client_id:
            self._connections[session.client_id] = connection
        if len(self._by_connection) > MAX_SESSIONS:
            self._forget(next(iter(self._by_connection)))

    def forget_client(self, client_id: str) -> None:
        connection = self._connections.get(client_id)
        if connection is not None:
            self._forget(connection)

    def _forget(self, connection: bytes) -> None:
        session = self._by_connection.pop(connection, None)
        if session is not None:
            self._connections.pop(session.client_id, None)

    def _of_client(self, client_id: str) -> Session | None:
        connection = self._connections.get(client_id)
        return None if connection is None else self._by_connection[connection]

    def check_integrity(self) -> None:
        clients = {s.client_id: c for c, s in self._by_connection.items() if s.client_id}
        assert clients == self._connections
