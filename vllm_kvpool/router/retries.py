"""How many requests may be sent a second time: a share of all requests, so that a fleet in trouble is
not given a multiple of its load."""

from __future__ import annotations

BURST = 16.0
"""Retries that a router may make before it has seen any requests: a replica of a quiet fleet dies."""


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
    def available(self) -> bool:
        return self._tokens >= 1
