"""What the policies that follow caches have in common: the tree, and what it says of a prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from vllm_kvpool.router.bindings import Bindings
from vllm_kvpool.router.bounds import Bound, lightest
from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.keys import TEXT_BLOCK_TOKENS
from vllm_kvpool.router.policy import Policy, fallbacks, weight
from vllm_kvpool.router.rendezvous import MAX_CANDIDATES, Rendezvous
from vllm_kvpool.router.tree import CacheTree
from vllm_kvpool.router.types import Decision, Hits, ReplicaState, RouteRequest

MIN_GAIN_TOKENS = 512
MIN_GAIN_SHARE = 8
"""A holder is preferred for so many tokens, and for one in so many of the prompt's: less is not
worth a session's move."""


class Affinity(Policy):
    def __init__(self, seed: int = 0) -> None:
        self._rendezvous = Rendezvous(seed)
        self._bindings = Bindings()
        self._tree = CacheTree()

    # what is cached where: `KvEvents` knows better ---------------------------------------------------

    def _hit_tokens(self, request: RouteRequest, replica_id: str) -> int:
        """Of the prompt, on the replica."""
        return self._tree.depth(request.blocks, replica_id) * TEXT_BLOCK_TOKENS

    def _holders(
        self, request: RouteRequest, above: int
    ) -> Iterator[tuple[int, Collection[str], str]]:
        """Hit tokens, replicas and reason, the most first, as far as they are more than `above`."""
        for depth, ids in self._tree.depths(request.blocks, above // TEXT_BLOCK_TOKENS):
            yield depth * TEXT_BLOCK_TOKENS, ids, "tree"

    # parts of decisions -----------------------------------------------------------------------------

    def _candidates(self, request: RouteRequest, order: tuple[Member, ...]) -> list[Member]:
        bound_to = self._bindings[request.session]
        return self._rendezvous.candidates(order, request.session, bound_to)

    def _best_holder(
        self,
        request: RouteRequest,
        fleet: Fleet,
        candidates: Sequence[Member],
        bound: Bound,
        above: int,
    ) -> tuple[Member, str, int] | None:
        """The lightest of those that hold the most, more than `above`, and may take it; with the reason
        and the tokens. Where there are many (of a prefix that all of the fleet has), only candidates
        are looked at."""
        for hit_tokens, ids, reason in self._holders(request, above):
            if len(ids) > MAX_CANDIDATES:
                able = [member for member in candidates if member.replica.id in ids]
            else:
                able = [m for m in map(fleet.get, ids) if m and self._may_take(request, m)]
            allowed = [member for member in able if bound.allows(member, hit_tokens)]
            if allowed:
                return lightest(allowed), reason, hit_tokens
        return None

    def _may_take(self, request: RouteRequest, member: Member) -> bool:
        if member.state is ReplicaState.ACCEPTING:
            return True
        bound = self._bindings[request.session] == member.replica.id
        return bound and member.state is ReplicaState.DRAINING

    def _decision(
        self,
        request: RouteRequest,
        chosen: Member,
        reason: str,
        hit_tokens: int,
        candidates: Sequence[Member],
    ) -> Decision:
        cached = min(hit_tokens, request.prompt_tokens)
        stable = min(cached, request.stable_tokens)
        hits = Hits(stable, cached - stable)
        others = fallbacks(candidates, chosen)
        return Decision(chosen.replica, reason, hits, weight(request) - cached, others)

    # what it learns ---------------------------------------------------------------------------------

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:
        self._bindings.bind(request.session, replica_id)
        self._tree.touch(replica_id, request.blocks)

    def resize(self, replica_id: str, cache_tokens: int) -> None:
        self._tree.resize(replica_id, cache_tokens // TEXT_BLOCK_TOKENS)

    def forget(self, replica_id: str) -> None:
        self._bindings.forget(replica_id)
        self._tree.forget(replica_id)

    def tables(self) -> dict[str, int]:
        return {
            "sessions": len(self._bindings),
            "orders": len(self._rendezvous),
            "blocks": len(self._tree),
        }

    def check_integrity(self) -> None:
        self._rendezvous.check_integrity()
        self._bindings.check_integrity()
        self._tree.check_integrity()


def worth(request: RouteRequest, hit_tokens: int) -> int:
    """What another replica must exceed to be preferred to one that has `hit_tokens`."""
    return hit_tokens + max(MIN_GAIN_TOKENS, request.prompt_tokens // MIN_GAIN_SHARE) - 1
