"""The two clocks, both the same for all processes of a host."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Deadlines: milliseconds that never jump."""
    return time.monotonic_ns() // 1_000_000


def pool_time_ms() -> int:
    """Block expiry and heartbeat: CLOCK_BOOTTIME also counts while the host sleeps, and starts anew
    only when the host does, as the pool's memory does."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def pool_time_s() -> int:
    return pool_time_ms() // 1_000
