"""The default: a group of replicas for each task, and in it a replica for each session.

Tier 1, the stable prefix (system message and tools) chooses the group: the first few replicas in its
rendezvous order, more of them the larger its part of the load. Its prefix is computed once on each of
these and no others. Tier 2, the session chooses in the group, by rendezvous with bounded load. Both
need no state that routers would have to share. The tree has a word where a session's blocks lie
elsewhere than its hashes say: after an overflow, a change of the fleet or of the group.
"""

from __future__ import annotations

from vllm_kvpool.router.affinity import Affinity, worth
from vllm_kvpool.router.bounds import Bound, lightest
from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.groups import Groups
from vllm_kvpool.router.policy import weight
from vllm_kvpool.router.types import Decision, RouteRequest


class Task(Affinity):
    name = "task"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._groups = Groups()

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        candidates = self._candidates(request, self._order(request, fleet))
        if not candidates:
            return None
        bound = Bound(fleet)
        member, reason = candidates[0], "session"
        hit_tokens = self._hit_tokens(request, member.replica.id)
        above = worth(request, hit_tokens)
        if not bound.allows(member, hit_tokens):
            allowed = (member for member in candidates if bound.allows(member))
            member, reason = next(allowed, None) or lightest(candidates), "overflow"
            hit_tokens = self._hit_tokens(request, member.replica.id)
            above = worth(request, 0)
        # tier 1 does not count: where it is to be computed is what the group says
        above = max(above, request.stable_tokens)
        best = self._best_holder(request, fleet, candidates, bound, above)
        return self._decision(request, *(best or (member, reason, hit_tokens)), candidates)

    def _order(self, request: RouteRequest, fleet: Fleet) -> tuple[Member, ...]:
        if not request.stable_tokens:  # nothing to keep together
            return self._rendezvous.order(request.session, fleet)
        size = self._groups.size(request.stable, len(fleet))
        return self._rendezvous.order_in_group(request.session, request.stable, size, fleet)

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:
        if request.stable_tokens:
            hit_tokens = min(self._hit_tokens(request, replica_id), request.prompt_tokens)
            tokens = weight(request) - hit_tokens
            self._groups.count(request.stable, tokens, now)
        super().dispatched(request, replica_id, now)

    def tables(self) -> dict[str, int]:
        return {**super().tables(), "tasks": len(self._groups)}

    def check_integrity(self) -> None:
        super().check_integrity()
        self._groups.check_integrity()
