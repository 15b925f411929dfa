"""Bounded load (Mirrokni, Thorup and Zadimoghaddam, 2016): nobody carries much more than the mean.

A member may take one more request while what it has in flight is within FACTOR times its part of the
fleet's load plus a margin of some requests. The margin keeps an idle fleet from moving sessions for
nothing; as a number of requests it fits short prompts and long ones. A member that holds some of the
prompt may exceed this by as much: so many tokens another would compute again.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kvpool.router.fleet import Fleet, Member

FACTOR = 1.25
MARGIN_REQUESTS = 3
"""Of the mean size of those in flight."""


class Bound:
    """For one decision."""

    def __init__(self, fleet: Fleet) -> None:
        self._mean = fleet.total_tokens / max(fleet.accepting_share, 1e-9)
        self._margin = MARGIN_REQUESTS * fleet.total_tokens / max(fleet.total_requests, 1)

    def allows(self, member: Member, hit_tokens: int = 0) -> bool:
        limit = FACTOR * self._mean * member.share + self._margin + hit_tokens
        return member.tokens <= limit


def lightest(members: Sequence[Member]) -> Member:
    """The one with the least load for its share; of equals the first."""
    return min(members, key=lambda member: member.tokens / member.share)
