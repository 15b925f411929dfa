"""Whoever holds most of the prompt, by the approximate tree, as long as its load allows.

Prompts that nobody holds go to the lightest of a few. Good where sessions have no name and prompts
share prefixes in ways that a system message does not tell.
"""

from __future__ import annotations

from vllm_kvpool.router.affinity import Affinity, worth
from vllm_kvpool.router.bounds import Bound, lightest
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.types import Decision, RouteRequest


class CacheAware(Affinity):
    name = "cache_aware"

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        order = self._rendezvous.order(request.session, fleet)
        candidates = self._candidates(request, order)
        if not candidates:
            return None
        above = worth(request, 0)
        best = self._best_holder(request, fleet, candidates, Bound(fleet), above)
        if best is None:
            member = lightest(candidates)
            best = member, "load", self._hit_tokens(request, member.replica.id)
        return self._decision(request, *best, candidates)
