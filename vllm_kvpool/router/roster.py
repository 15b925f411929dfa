"""Who belongs to the fleet, and what is known of each. The parent's; workers get `statuses`. Pure.

Replicas come from the configuration ("static"), the fleet file ("file"), DNS ("dns:host:port[@rank]")
and the admin endpoint ("admin"). Each source says who it has; who no source has is gone. What was
removed by hand stays away until it is added by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from vllm_kvpool.router.health import Condition, Health
from vllm_kvpool.router.types import Replica, ReplicaState

ADMIN = "admin"


class Gauges(msgspec.Struct, frozen=True):
    """What an engine says of itself in its /metrics; None: it does not."""

    waiting: float | None = None
    cache_usage: float | None = None
    cache_tokens: int | None = None
    """What its KV memory holds."""
    started_at: float | None = None
    """Unix time of its process: another one, and its cache is another."""


class ReplicaStatus(msgspec.Struct, frozen=True):
    """One replica as workers need it."""

    replica: Replica
    state: ReplicaState
    share: float
    restarts: int
    """Grows when the replica's cache was lost."""
    gauges: Gauges


class Entry:
    """One replica of the roster."""

    def __init__(self, replica: Replica, health: Health) -> None:
        self.replica = replica
        self.health = health
        self.sources: set[str] = set()
        self.gauges = Gauges()
        self.restarts = 0
        self.draining_since: float | None = None

    def state(self, now: float, drain_s: float) -> ReplicaState:
        if not self.health.usable:
            return ReplicaState.OUT
        if self.draining_since is None:
            return ReplicaState.ACCEPTING
        return ReplicaState.DRAINING if now - self.draining_since < drain_s else ReplicaState.OUT


class Roster:
    def __init__(self, make_health: Callable[[], Health], drain_s: float) -> None:
        self._make_health = make_health
        self._drain_s = drain_s
        self._entries: dict[str, Entry] = {}
        self._removed: set[str] = set()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, replica_id: str) -> Entry | None:
        return self._entries.get(replica_id)

    # membership -----------------------------------------------------------------------------------

    def update(self, source: str, replicas: Iterable[Replica]) -> None:
        """`source` has these, and no others."""
        wanted = {r.id: r for r in replicas if r.id not in self._removed}
        for replica in wanted.values():
            self._put(source, replica)
        for entry in list(self._entries.values()):
            if entry.replica.id not in wanted:
                entry.sources.discard(source)
            if not entry.sources:
                del self._entries[entry.replica.id]

    def _put(self, source: str, replica: Replica) -> None:
        entry = self._entries.get(replica.id)
        if entry is None or entry.replica != replica:  # the same name at another place: a new one
            sources = entry.sources if entry else set()
            entry = self._entries[replica.id] = Entry(replica, self._make_health())
            entry.sources |= sources
        entry.sources.add(source)

    def add(self, replica: Replica) -> None:
        """By hand; one that drains takes requests again."""
        self._removed.discard(replica.id)
        self._put(ADMIN, replica)
        self._entries[replica.id].draining_since = None

    def remove(self, replica_id: str) -> bool:
        if self._entries.pop(replica_id, None) is None:
            return False
        self._removed.add(replica_id)
        return True

    def drain(self, replica_id: str, now: float) -> bool:
        entry = self._entries.get(replica_id)
        if entry is None:
            return False
        if entry.draining_since is None:
            entry.draining_since = now
        return True

    # health ---------------------------------------------------------------------------------------

    def ok(self, replica_id: str, gauges: Gauges, now: float) -> None:
        entry = self._entries.get(replica_id)
        if entry is None:
            return
        was_out = entry.health.condition is Condition.EJECTED
        before, after = entry.gauges.started_at, gauges.started_at
        if before != after if None not in {before, after} else was_out:
            entry.restarts += 1
        entry.gauges = gauges
        entry.health.ok(now)

    def failed(self, replica_id: str, error: str, now: float, *, refused: bool) -> None:
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.health.failed(now, error, refused=refused)

    def statuses(self, now: float) -> tuple[ReplicaStatus, ...]:
        return tuple(
            ReplicaStatus(
                entry.replica,
                entry.state(now, self._drain_s),
                round(entry.health.share(now), 2),
                entry.restarts,
                entry.gauges,
            )
            for entry in self._entries.values()
        )
