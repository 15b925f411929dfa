"""The least tokens in flight, measured by share. Evens load out and ignores caches."""

from __future__ import annotations

from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.policy import NO_HITS, Policy, fallbacks, weight
from vllm_kvpool.router.rendezvous import MAX_CANDIDATES
from vllm_kvpool.router.types import Decision, ReplicaState, RouteRequest


class LeastLoad(Policy):
    name = "least_load"

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        """Of equals, the session tells where to begin: idle routers must not all name the first."""
        tokens = weight(request)

        def load(member: Member) -> float:
            """What waits in the engine may be other routers': it weighs as much as this one."""
            return (member.tokens + (member.waiting or 0) * tokens) / member.share

        members = [member for member in fleet if member.state is ReplicaState.ACCEPTING]
        if not members:
            return None
        first = request.session % len(members)
        order = sorted(members[first:] + members[:first], key=load)[:MAX_CANDIDATES]
        others = fallbacks(order, order[0])
        return Decision(order[0].replica, "load", NO_HITS, tokens, others)
