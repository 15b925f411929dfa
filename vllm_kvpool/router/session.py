"""Each session on a replica of its own choice: rendezvous hashing with bounded load."""

from __future__ import annotations

from vllm_kvpool.router.bindings import Bindings
from vllm_kvpool.router.bounds import Bound, lightest
from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.policy import NO_HITS, Policy, fallbacks, weight
from vllm_kvpool.router.rendezvous import Rendezvous
from vllm_kvpool.router.types import Decision, RouteRequest


class Session(Policy):
    name = "session"

    def __init__(self, seed: int = 0) -> None:
        self._rendezvous = Rendezvous(seed)
        self._bindings = Bindings()

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        order = self._rendezvous.order(request.session, fleet)
        bound_to = self._bindings[request.session]
        candidates = self._rendezvous.candidates(order, request.session, bound_to)
        if not candidates:
            return None
        bound = Bound(fleet)

        def allowed(member: Member) -> bool:
            """Where its last turn was, most of this one may be cached."""
            was_here = member.replica.id == bound_to
            return bound.allows(member, request.prompt_tokens if was_here else 0)

        chosen = next(filter(allowed, candidates), None) or lightest(candidates)
        reason = "session" if chosen is candidates[0] else "overflow"
        others = fallbacks(candidates, chosen)
        return Decision(chosen.replica, reason, NO_HITS, weight(request), others)

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:
        self._bindings.bind(request.session, replica_id)

    def forget(self, replica_id: str) -> None:
        self._bindings.forget(replica_id)

    def tables(self) -> dict[str, int]:
        return {"sessions": len(self._bindings), "orders": len(self._rendezvous)}

    def check_integrity(self) -> None:
        self._rendezvous.check_integrity()
        self._bindings.check_integrity()
