"""Each session on a replica of its own choice: rendezvous hashing with bounded load."""

from __future__ import annotations

from vllm_kvpool.router.bindings import Bindings
from vllm_kvpool.router.bounds import Bound, lightest
from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.policy import NO_HITS, Policy, fallbacks, weight
from vllm_kvpool.router.rendezvous import Rendezvous
from vllm_kvpool.router.types import Decision, ReplicaState, RouteRequest


class Session(Policy):
    name = "session"

    def __init__(self, seed: int = 0) -> None:
        self._rendezvous = Rendezvous(seed)
        self._bindings = Bindings()

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        order = self._rendezvous.order(request.session, fleet)
        usable = self._usable(request.session, order)
        if not usable:
            return None
        tokens = weight(request)
        wanted = [m for m in usable if self._rendezvous.has_part(request.session, m)] or usable
        bound = Bound(usable, tokens)
        chosen = next((member for member in wanted if bound.allows(member)), None)
        if chosen is None:
            chosen = lightest(wanted)
        reason = "session" if chosen is wanted[0] else "overflow"
        return Decision(chosen.replica, reason, NO_HITS, tokens, fallbacks(usable, chosen))

    def _usable(self, session: int, order: tuple[Member, ...]) -> list[Member]:
        """Those that accept; and the one that drains, where the session is bound to it."""
        bound = self._bindings[session]
        return [
            member
            for member in order
            if member.state is ReplicaState.ACCEPTING
            or (member.state is ReplicaState.DRAINING and member.replica.id == bound)
        ]

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:
        self._bindings.bind(request.session, replica_id)

    def forget(self, replica_id: str) -> None:
        self._bindings.forget(replica_id)

    def check_integrity(self) -> None:
        self._rendezvous.check_integrity()
        self._bindings.check_integrity()
