"""Bounded load (Mirrokni, Thorup and Zadimoghaddam, 2016): nobody carries much more than the mean.

A member may take a request while its load, with the request, stays within FACTOR times its part of
the fleet's load plus a margin. The margin keeps an idle fleet from moving sessions for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kvpool.router.fleet import Member

FACTOR = 1.25
MARGIN_TOKENS = 8_192
"""About one long prompt."""


class Bound:
    """The limit of each of `members` for one request of `tokens`."""

    def __init__(self, members: Sequence[Member], tokens: int) -> None:
        shares = loads = 0.0
        for member in members:
            shares += member.share
            loads += member.tokens
        self._tokens = tokens
        self._mean = (loads + tokens) / shares if shares else 0.0

    def allows(self, member: Member) -> bool:
        limit = FACTOR * self._mean * member.share + MARGIN_TOKENS
        return member.tokens + self._tokens <= max(limit, self._tokens)


def lightest(members: Sequence[Member]) -> Member:
    """The one with the least load for its share; of equals the first."""
    return min(members, key=lambda member: member.tokens / member.share)
