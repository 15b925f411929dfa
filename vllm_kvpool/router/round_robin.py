"""The baseline: one after the other. With N replicas a prefix meets its cache one time in N."""

from __future__ import annotations

from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.policy import NO_HITS, Policy, fallbacks, weight
from vllm_kvpool.router.rendezvous import MAX_CANDIDATES
from vllm_kvpool.router.types import Decision, ReplicaState, RouteRequest


class RoundRobin(Policy):
    name = "round_robin"

    def __init__(self, seed: int = 0) -> None:
        self._turn = seed

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        members = [member for member in fleet if member.state is ReplicaState.ACCEPTING]
        if not members:
            return None
        first = self._turn % len(members)
        order = (members[first:] + members[:first])[:MAX_CANDIDATES]
        others = fallbacks(order, order[0])
        return Decision(order[0].replica, "turn", NO_HITS, weight(request), others)

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:
        self._turn += 1
