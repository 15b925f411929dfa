"""The least tokens in flight, measured by share. Evens load out and ignores caches."""

from __future__ import annotations

from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.policy import NO_HITS, Policy, fallbacks, weight
from vllm_kvpool.router.rendezvous import MAX_CANDIDATES, Rendezvous
from vllm_kvpool.router.types import Decision, ReplicaState, RouteRequest


class LeastLoad(Policy):
    name = "least_load"

    def __init__(self, seed: int = 0) -> None:
        self._rendezvous = Rendezvous(seed)

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        """Of equals the request's rendezvous decides, so that idle routers do not all name the
        first."""
        tokens = weight(request)

        def load(member: Member) -> float:
            """What waits in the engine may be other routers': it weighs as much as this one."""
            return (member.tokens + (member.waiting or 0) * tokens) / member.share

        members = self._rendezvous.order(request.session, fleet)
        order = sorted((m for m in members if m.state is ReplicaState.ACCEPTING), key=load)
        if not order:
            return None
        others = fallbacks(order[:MAX_CANDIDATES], order[0])
        return Decision(order[0].replica, "load", NO_HITS, tokens, others)
