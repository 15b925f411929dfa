"""Whether a replica may be sent requests, from probes and from what workers met. Pure: time is an
argument, in seconds.

    NEW --ok--> WELL --refused, or two failures--> EJECTED --ok--> WARMING --warmup_s--> WELL
                                                     ^------ refused, or a failure --'

EJECTED is probed again after a pause that doubles each time; an answer half-opens it: it warms up
with a small share of the requests, and the first failure there ejects it again at once.
"""

from __future__ import annotations

from enum import Enum

FAILURES = 2
"""One probe may be lost in a hiccup."""
FIRST_SHARE = 0.1
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 15.0


class Condition(Enum):
    NEW = "new"
    WELL = "well"
    WARMING = "warming"
    EJECTED = "ejected"


class Health:
    """State: `condition`, since when, and the pause of the next ejection."""

    def __init__(self, warmup_s: float, *, warm: bool, pause_scale: float = 1.0) -> None:
        """`warm`: it was there before the router, so it need not warm up. `pause_scale`: of FIRST_PAUSE_S
        and LAST_PAUSE_S."""
        self.condition = Condition.NEW
        self.ejections = 0
        self.error = ""
        self._warmup_s = warmup_s
        self._warm = warm
        self._since = 0.0
        self._failures = 0
        self._pause_scale = pause_scale
        self._pause_s = FIRST_PAUSE_S
        self._probe_at = 0.0

    def ok(self, now: float) -> None:
        """It answered a probe."""
        self._failures = 0
        new = self.condition is Condition.NEW
        if self.condition is Condition.EJECTED or (new and not self._warm):
            self.condition, self._since = Condition.WARMING, now
        elif new:
            self.condition = Condition.WELL
        elif self.condition is Condition.WARMING and now - self._since >= self._warmup_s:
            self.condition, self._pause_s = Condition.WELL, FIRST_PAUSE_S

    def failed(self, now: float, error: str, *, refused: bool) -> None:
        """A probe or a request failed; `refused`: it cannot be reached at all. Before the next probe
        is due it is one more report of the same failure, and changes nothing."""
        if not self.probe_due(now):
            return
        self.error = error
        self._failures += 1
        on_trial = self.condition in {Condition.EJECTED, Condition.WARMING}
        if on_trial or refused or self._failures >= FAILURES:
            self._eject(now)

    def _eject(self, now: float) -> None:
        if self.condition not in {Condition.EJECTED, Condition.NEW}:
            self.ejections += 1
        self.condition = Condition.EJECTED
        self._probe_at = now + self._pause_scale * self._pause_s
        self._pause_s = min(LAST_PAUSE_S, 2 * self._pause_s)

    def probe_due(self, now: float) -> bool:
        return self.condition is not Condition.EJECTED or now >= self._probe_at

    @property
    def usable(self) -> bool:
        return self.condition in {Condition.WELL, Condition.WARMING}

    def share(self, now: float) -> float:
        if self.condition is not Condition.WARMING or self._warmup_s <= 0:
            return 1.0
        return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * (now - self._since) / self._warmup_s)
