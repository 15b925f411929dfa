"""What befalls mock replicas and their router: faults of answers, deaths, acts of operators. For `chaos`."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from benchmarks.processes import MockEngine, Router
from vllm_kvpool.router.fleet_commands import FleetCommands

FAULTS: dict[str, dict[str, Any]] = {
    "status 429": {"kind": "status", "status": 429},
    "status 503": {"kind": "status", "status": 503},
    "status 500": {"kind": "status", "status": 500},
    "close": {"kind": "close"},
    "close in a stream": {"kind": "close", "after_parts": 1},
    "stall": {"kind": "stall", "seconds": 3},
    "unhealthy": {"kind": "unhealthy"},
}
"""What a mock replica is told."""
FROZEN_S = 1.5
AWAY_S = 0.1
"""Between an operator's act and its end."""


class Troubles:
    def __init__(self, router: Router, replicas: list[MockEngine], ranks: int, seed: int) -> None:
        self._router = router
        self._fleet = FleetCommands(router.admin)
        self._replicas = replicas
        self._ranks = ranks
        self._draw = random.Random(seed)
        self._acting = asyncio.Lock()
        """One process or replica at a time: of three, two are always there."""
        self._down: MockEngine | None = None
        self._downs: Counter[str] = Counter()
        """By URL."""
        self._spared = router.workers()[0]
        """The worker whose memory is looked at."""
        self._done: Counter[str] = Counter()
        self._met: Counter[str] = Counter()
        """Faults of replicas that are no more."""
        self._acts: dict[str, Callable[[], None]] = {
            "replica killed": self._kill,
            "replica frozen": self._freeze,
            "replica drained": self._drain,
            "replica removed": self._remove,
            "worker killed": self._kill_worker,
        }

    async def cause(self, kind: str) -> None:
        """Returns when it is over; a fault's request may still be to come."""
        if kind in FAULTS:
            await asyncio.to_thread(self._tell, FAULTS[kind])
            return
        async with self._acting:
            await asyncio.to_thread(self._acts[kind])
        self._done[kind] += 1

    def of(self, replica: MockEngine | None) -> int | None:
        """How often it was taken down; None while it is."""
        if replica is None:
            return 0
        return None if replica is self._down else self._downs[replica.url]

    async def waiting(self) -> int:
        """Faults that nobody has met yet."""
        told = [await asyncio.to_thread(r.ask, "/mock/faults") for r in self._replicas]
        return sum(len(faults["waiting"]) for faults in told)

    def counts(self) -> Counter[str]:
        """Acts, and the faults that requests and probes met."""
        counts = self._done + self._met
        for replica in self._replicas:
            counts.update(replica.ask("/mock/faults")["met"])
        return counts

    def _tell(self, fault: dict[str, Any]) -> None:
        """One replica; another, if that is killed just then."""
        while True:
            replica = self._upright()
            trouble = self.of(replica)
            try:
                replica.ask("/mock/faults", fault)
                return
            except (OSError, HTTPException):
                if trouble is not None and self.of(replica) == trouble:
                    raise

    def _take_down(self) -> MockEngine:
        replica = self._down = self._upright()
        self._downs[replica.url] += 1
        return replica

    def _upright(self) -> MockEngine:
        return self._draw.choice([r for r in self._replicas if r is not self._down])

    # acts, in threads -------------------------------------------------------------------------------

    def _kill(self) -> None:
        """And start it again. What has to be met there still has to be afterwards."""
        replica = self._take_down()
        faults = replica.ask("/mock/faults")
        replica.kill()
        self._met.update(faults["met"])
        replica.start()
        for fault in faults["waiting"]:
            replica.ask("/mock/faults", fault)
        self._down = None

    def _freeze(self) -> None:
        replica = self._take_down()
        replica.signal(signal.SIGSTOP)
        time.sleep(FROZEN_S)
        replica.signal(signal.SIGCONT)
        self._down = None

    def _drain(self) -> None:
        name = self._a_rank()
        self._fleet.drain(name)
        time.sleep(AWAY_S)
        self._fleet.add(f"http://{name}")

    def _remove(self) -> None:
        name = self._a_rank()
        self._fleet.remove(name)
        time.sleep(AWAY_S)
        self._fleet.add(f"http://{name}")

    def _kill_worker(self) -> None:
        workers = self._router.workers()
        victims = [pid for pid in workers if pid != self._spared]
        if victims:
            os.kill(self._draw.choice(victims), signal.SIGKILL)

    def _a_rank(self) -> str:
        return f"{self._upright().url.removeprefix('http://')}@{self._draw.randrange(self._ranks)}"
