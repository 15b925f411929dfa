"""Bounded load (Mirrokni, Thorup and Zadimoghaddam, 2016): nobody carries much more than the mean.

A member may take one more request while what it has in flight is within FACTOR times its part of the
fleet's load plus a margin of one request: in requests it fits short prompts and long ones, and an idle
fleet moves nobody for nothing. A member that holds some of the prompt may exceed this, since another
would compute that again.

The numbers are the best of a few on a conversation trace (`benchmarks/bench_affinity.py`): new
sessions go where there is room, and old ones are not torn away.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kvpool.router.fleet import Fleet, Member

FACTOR = 1.25
MARGIN_REQUESTS = 1
"""Of the mean size of those in flight."""
HIT_WEIGHT = 3
"""Tokens in excess for each token held: a session that moves is computed again, and pushes as much out
of the other cache."""


class Bound:
    """For one decision."""

    def __init__(self, fleet: Fleet) -> None:
        self._mean = fleet.total_tokens / max(fleet.accepting_share, 1e-9)
        self._margin = MARGIN_REQUESTS * fleet.total_tokens / max(fleet.total_requests, 1)

    def allows(self, member: Member, hit_tokens: int = 0) -> bool:
        limit = FACTOR * self._mean * member.share + self._margin
        return member.tokens <= limit + HIT_WEIGHT * hit_tokens


def lightest(members: Sequence[Member]) -> Member:
    """The one with the least load for its share; of equals the first."""
    return min(members, key=lambda member: member.tokens / member.share)
