"""Brings a worker's `Fleet` up to what the parent says, and tells policy and ledger what happened."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.metrics import Metrics
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.prediction_ledger import PredictionLedger
from vllm_kvpool.router.roster import ReplicaStatus
from vllm_kvpool.router.types import ReplicaState


class Mirror:
    """`suspects`: out, because this worker could not reach them, until the parent has looked
    or their time is over."""

    def __init__(
        self, fleet: Fleet, policy: Policy, ledger: PredictionLedger, metrics: Metrics
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._ledger = ledger
        self._metrics = metrics
        self._restarts: dict[str, int] = {}
        self._cache_tokens: dict[str, int] = {}
        self._states: dict[str, ReplicaState] = {}
        """What the parent said last."""
        self._suspects: dict[str, float] = {}

    def suspect(self, replica_id: str, until: float) -> None:
        """Nothing more is sent there before `until`, unless the parent says otherwise after it."""
        if replica_id in self._fleet:
            self._suspects[replica_id] = until
            self._fleet.set_state(replica_id, ReplicaState.OUT)

    def end_suspicions(self, now: float) -> None:
        """Of those whose time is over: the parent's last word holds, which it does not repeat."""
        for name, until in list(self._suspects.items()):
            if now >= until:
                del self._suspects[name]
                self._fleet.set_state(name, self._states[name])

    def apply(self, statuses: Iterable[ReplicaStatus], now: float) -> None:
        wanted = {status.replica.id: status for status in statuses}
        for member in list(self._fleet):
            status = wanted.get(member.replica.id)
            if status is None or status.replica != member.replica:
                self._remove(member.replica.id, now)
        for status in wanted.values():
            self._apply_one(status, now)

    def _apply_one(self, status: ReplicaStatus, now: float) -> None:
        name = status.replica.id
        member = self._fleet.get(name)
        if member is None:
            member = self._fleet.add(status.replica)
            self._restarts[name] = status.restarts
            self._ledger.noted("add", name, now)
        if self._restarts[name] != status.restarts:
            self._restarts[name] = status.restarts
            self._policy.forget(name)
            self._cache_tokens.pop(name, None)  # forgotten with the rest: to be told again
            self._ledger.noted("restart", name, now)
        if status.state is ReplicaState.DRAINING and member.state is ReplicaState.ACCEPTING:
            self._ledger.noted("drain", name, now)
        self._resize(name, status.gauges.cache_tokens)
        self._states[name] = status.state
        suspected = now < self._suspects.get(name, 0.0)
        self._fleet.set_state(name, ReplicaState.OUT if suspected else status.state)
        self._fleet.set_share(name, status.share)
        member.waiting = status.gauges.waiting
        member.cache_usage = status.gauges.cache_usage

    def _resize(self, replica_id: str, cache_tokens: int | None) -> None:
        if cache_tokens is not None and self._cache_tokens.get(replica_id) != cache_tokens:
            self._cache_tokens[replica_id] = cache_tokens
            self._policy.resize(replica_id, cache_tokens)

    def _remove(self, replica_id: str, now: float) -> None:
        self._fleet.remove(replica_id)
        self._policy.forget(replica_id)
        self._ledger.noted("remove", replica_id, now)
        self._ledger.forget(replica_id)
        self._metrics.forget(replica_id)
        self._restarts.pop(replica_id, None)
        self._cache_tokens.pop(replica_id, None)
        self._states.pop(replica_id, None)
        self._suspects.pop(replica_id, None)
