"""How many requests may be sent a second time.

the replica is full or not ready    a share of all requests: a fleet in trouble is not given a
                                    multiple of its load
it was lost                         each request `LOST_MOVES` times: no more are moved than were in
                                    flight there, and one that kills replicas ends soon
"""

from __future__ import annotations

BURST = 16.0
"""Retries that a router may make before it has seen any requests."""
LOST_MOVES = 2


class RetryBudget:
    """State: 0 <= `_tokens` <= BURST. Each request adds `share` of a token, each retry takes one."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._tokens = BURST if share else 0.0

    def earn(self) -> None:
        self._tokens = min(BURST, self._tokens + self._share)

    def spend(self) -> bool:
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def tokens(self) -> float:
        return self._tokens

    @property
    def available(self) -> bool:
        return self._tokens >= 1
