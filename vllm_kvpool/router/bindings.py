"""Which replica a session was last sent to: what a draining replica goes on serving."""

from __future__ import annotations

from collections import OrderedDict


class Bindings:
    """The last `capacity` sessions."""

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._session_to_replica: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._session_to_replica)

    def __getitem__(self, session: int) -> str | None:
        return self._session_to_replica.get(session)

    def bind(self, session: int, replica_id: str) -> None:
        self._session_to_replica[session] = replica_id
        self._session_to_replica.move_to_end(session)
        if len(self._session_to_replica) > self._capacity:
            self._session_to_replica.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        bound = [s for s, owner in self._session_to_replica.items() if owner == replica_id]
        for session in bound:
            del self._session_to_replica[session]

    def check_integrity(self) -> None:
        assert len(self._session_to_replica) <= self._capacity
