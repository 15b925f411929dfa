"""How many replicas a task has: as many as its part of the load needs.

The load of a task (a stable prefix) is the tokens that were computed for it, halved every
HALF_LIFE_S. Its group is `part of the load x replicas x HEADROOM`, rounded up: so no replica gets
much more than its own part of the load from one task. A group grows at once. It shrinks to its
highest need of the last HOLD_S, and only when that is clearly lower: each change moves sessions.

Counts are kept forward-decayed (Cormode et al., 2009): newer tokens weigh more instead of older ones
less, so that only the touched entry is written. The least recently counted tasks are forgotten; one
that matters is counted too often to be among them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import ceil

HALF_LIFE_S = 60.0
HOLD_S = 120.0
HEADROOM = 1.25
SHRINK_BELOW = 0.8
"""Of what was granted."""
IDLE_TOKENS = 65_536
"""Load that a single replica bears with ease: no task gets more than its part of this."""
CAPACITY = 4_096
_RESCALE = 2.0**40


@dataclass(slots=True)
class _Task:
    weight: float = 0.0
    granted: float = 0.0
    """The part of the load that its group is made for."""
    peak: float = 0.0
    """The largest part since `since_s`; never above `granted`."""
    since_s: float = 0.0


class Groups:
    """At most CAPACITY tasks. Written by `count` alone."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[int, _Task] = OrderedDict()
        self._total = 0.0
        self._epoch_s: float | None = None
        """When a token weighs 1."""

    def __len__(self) -> int:
        return len(self._tasks)

    def size(self, stable: int, replicas: int) -> int:
        """Replicas of the task's group, of a fleet of so many; 1 for a task that is not known. Those
        that are out count: a group must not change because of one that is back in a minute."""
        task = self._tasks.get(stable)
        wanted = ceil(task.granted * replicas * HEADROOM) if task else 1
        return max(1, min(wanted, replicas))

    def count(self, stable: int, tokens: int, now_s: float) -> None:
        """So many tokens were sent for the task."""
        scale = self._scale(now_s)
        task = self._tasks.setdefault(stable, _Task(since_s=now_s))
        self._tasks.move_to_end(stable)
        task.weight += tokens * scale
        self._total += tokens * scale
        _grant(task, task.weight / max(self._total, IDLE_TOKENS * scale), now_s)
        while len(self._tasks) > CAPACITY:
            self._total -= self._tasks.popitem(last=False)[1].weight

    def _scale(self, now_s: float) -> float:
        """What a token weighs now."""
        if self._epoch_s is None:
            self._epoch_s = now_s
        scale: float = 2.0 ** min((now_s - self._epoch_s) / HALF_LIFE_S, 1000.0)
        if scale > _RESCALE:
            for task in self._tasks.values():
                task.weight /= scale
            self._total = sum(task.weight for task in self._tasks.values())
            self._epoch_s, scale = now_s, 1.0
        return scale

    def check_integrity(self) -> None:
        assert len(self._tasks) <= CAPACITY
        total = sum(task.weight for task in self._tasks.values())
        assert abs(total - self._total) <= 1e-6 * max(total, 1.0)
        assert all(0 <= task.peak <= task.granted <= 1.000001 for task in self._tasks.values())


def _grant(task: _Task, part: float, now_s: float) -> None:
    if part >= task.granted:
        task.granted = task.peak = part
        task.since_s = now_s
        return
    task.peak = max(task.peak, part)
    if now_s - task.since_s >= HOLD_S:
        if task.peak < SHRINK_BELOW * task.granted:
            task.granted = task.peak
        task.peak = part
        task.since_s = now_s
