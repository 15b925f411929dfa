"""An hour's worth of trouble for a router, as fast as it goes; then nothing of it may be left.

    python -m benchmarks.chaos [--hours 1] [--policy task] [--seed 1] [--json FILE]

`HOUR` is what a router that gets ten requests a second meets in an hour: so many visits of each kind, so many faults of
replicas, so many acts of operators. They come in random order, by CLIENTS clients, to one real router of two workers
before three mock replicas of two ranks each. The replicas are a hundred times as fast as engines, and the router's
times are configured to be about as much shorter.

In the end it asks what the router still counts, and how large its processes are beside a third of the way: all that it
remembers is as full as it gets by then, so what the other two thirds left behind would show. `Report.wrong` lists what
is not as it should be; tests/router/test_chaos.py asserts that nothing is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from benchmarks.chaos_clients import SESSIONS, TASKS, VISITS, Client, Clients
from benchmarks.chaos_troubles import Troubles
from benchmarks.processes import MockEngine, Router
from benchmarks.report import write_json
from vllm_kvpool.router.retries import BURST

HOUR = {
    # 36,000 visits of clients
    "ask": 24_696,
    "stream": 9_000,
    "leave before the answer": 720,
    "leave in a stream": 720,
    "reset in a stream": 288,
    "half a request": 360,
    "nonsense": 180,
    "too slow": 36,
    # faults of answers and of probes
    "status 429": 360,
    "status 503": 360,
    "status 500": 360,
    "close": 60,
    "close in a stream": 180,
    "stall": 36,
    "unhealthy": 60,
    # what is done to processes and to the fleet
    "replica killed": 12,
    "replica frozen": 6,
    "replica drained": 30,
    "replica removed": 30,
    "worker killed": 3,
}
MET = 0.95
"""Of the faults: those that are met or told of while their replica is being killed are not counted."""
CLIENTS = 32
REPLICAS, RANKS, WORKERS = 3, 2, 2
MOCK = ("--speed", "100", "--dp-ranks", str(RANKS))
TIMES = (
    "--probe-interval-s", "0.1", "--connect-timeout-s", "1", "--response-timeout-s", "1",
    "--client-timeout-s", "1", "--warmup-s", "0.3", "--drain-s", "1",
)  # fmt: skip
QUIET_S = 30.0
"""For all that is under way to end; idle connections to replicas are kept for 3 s."""
TICK_S, STANDSTILL_S = 0.1, 0.5
"""Who takes so long for a tick, or for the least of answers, stood still for a good part of the router's times."""
AFTERWARDS = 200
"""Ordinary requests when all is over. They also fill the budgets of retries again."""
MAX_STANDSTILLS = 20
"""Each excuses an answer for every client."""
SAMPLES = 30
GROWTH_KIB = 3_072
"""What a process may grow in two thirds of an hour: 130 bytes a request."""
OPEN_FILES = 40


@dataclass
class Report:
    wanted: dict[str, int]
    counts: Counter[str] = field(default_factory=Counter)
    """What happened, by kind."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """See `Clients`."""
    afterwards: Counter[str] = field(default_factory=Counter)
    """The same of the last requests."""
    standstills: int = 0
    """Of the machine or of one process: of them no router can make anything. Those at one time are one."""
    seconds: float = 0.0
    memory_kib: list[dict[str, int]] = field(default_factory=list)
    """Of the parent and of the oldest worker, at equal steps of the way."""
    workers: list[dict[str, float]] = field(default_factory=list)
    """Each one's gauges in the end."""
    tables: dict[str, float] = field(default_factory=dict)
    open_files: int = 0
    """Of the oldest worker."""

    def wrong(self) -> list[str]:
        found = [
            f"{kind}: {self.counts[kind]} of {number}"
            for kind, number in self.wanted.items()
            if self.counts[kind] < int(MET * number)
        ]
        found += [
            f"worker {worker['pid']} still counts {name} = {worker[name]}"
            for worker in self.workers
            for name in COUNTS_OF_WORK
            if worker[name]
        ]
        found += [
            f"worker {worker['pid']} has {worker['retry_budget']} retries, not {BURST}"
            for worker in self.workers
            if worker["retry_budget"] != BURST
        ]
        found += [
            f"{table}: {self.tables[table]:g} entries"
            for table, bound in TABLES.items()
            if not 0 < self.tables[table] <= WORKERS * bound
        ]
        found += [
            f"{process} grew by {kib} KiB"
            for process, kib in self.growth_kib().items()
            if kib > GROWTH_KIB
        ]
        if self.open_files > OPEN_FILES:
            found.append(f"{self.open_files} open files")
        if self.afterwards != {"200": AFTERWARDS}:
            found.append(f"afterwards: {dict(self.afterwards)}")
        if self.standstills > MAX_STANDSTILLS:
            found.append(f"{self.standstills} standstills: this machine can tell nothing")
        return found + self._unexplained()

    def _unexplained(self) -> list[str]:
        """Answers that no fault accounts for. Whatever hits a process, or all of them, hits at most all clients; while
        others are out as well, a death or a refusal may leave nobody to go on to."""
        count, stood_still = self.counts, CLIENTS * self.standstills
        allowed = {
            "200": sum(count[kind] for kind in ("ask", "stream")),
            "400": count["nonsense"],
            "408": count["too slow"] + stood_still,
            "429": count["status 429"],
            "500": count["status 500"],
            "502": CLIENTS * count["replica killed"],
            "503": count["status 503"] + CLIENTS * count["replica killed"] + stood_still,
            "504": count["stall"] + CLIENTS * count["replica frozen"] + stood_still,
            "cut": count["close in a stream"]
            + CLIENTS * (count["replica killed"] + count["worker killed"]),
            "lost": CLIENTS * count["worker killed"] + stood_still,
        }
        return [
            f"{number} x {outcome}"
            for outcome, number in self.outcomes.items()
            if number > allowed.get(outcome, 0)
        ]

    def growth_kib(self) -> dict[str, int]:
        third, end = self.memory_kib[SAMPLES // 3], self.memory_kib[-1]
        return {process: end[process] - third[process] for process in end}


COUNTS_OF_WORK = (
    "in_flight_requests", "in_flight_tokens", "client_connections", "replica_connections"
)  # fmt: skip
TABLES = {
    "sessions": SESSIONS,
    "prompts": SESSIONS,
    "tasks": TASKS,
    "orders": 16_384,
    "blocks": REPLICAS * RANKS * 4_096,
}
"""No worker remembers more than there were, or than `Rendezvous` and `CacheTree` ever keep."""


class Hour:
    """One run. `scale`: of the numbers in HOUR."""

    def __init__(self, router: Router, replicas: list[MockEngine], scale: float, seed: int) -> None:
        wanted = {kind: max(1, round(scale * number)) for kind, number in HOUR.items()}
        self.report = Report(wanted)
        self._router = router
        self._clients = Clients(router.port, seed)
        self._troubles = Troubles(router, replicas, RANKS, seed)
        self._processes = {"parent": router.pid, "worker": router.workers()[0]}
        self._events = [kind for kind, number in wanted.items() for _ in range(number)]
        random.Random(seed).shuffle(self._events)
        self._steps = [len(self._events) * step // SAMPLES for step in range(SAMPLES, 0, -1)]
        self._happened = 0
        self._still_until = 0.0
        self._replicas = replicas

    async def run(self) -> Report:
        watches = [asyncio.create_task(self._watch(replica)) for replica in self._replicas]
        watches.append(asyncio.create_task(self._watch_router()))
        try:
            return await self._run()
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch(self, replica: MockEngine) -> None:
        while True:
            begun, trouble = time.monotonic(), self._troubles.of(replica)
            await asyncio.sleep(TICK_S)
            with contextlib.suppress(OSError, HTTPException):  # whatever it says
                await asyncio.to_thread(
                    lambda: urllib.request.urlopen(replica.url, timeout=30).close()
                )
            if trouble is not None and self._troubles.of(replica) == trouble:
                self._time(begun + TICK_S)

    async def _watch_router(self) -> None:
        """And ourselves. That it answers late is no excuse, only that its processes got no processor."""
        waited: dict[int, float] = {}
        while True:
            begun = time.monotonic()
            await asyncio.sleep(TICK_S)
            self._time(begun + TICK_S)
            pids = [self._router.pid, *self._router.workers()]
            now = {pid: waited_for_processor_s(pid) for pid in pids}
            longest = max(now[pid] - waited.get(pid, now[pid]) for pid in pids)
            self._time(time.monotonic() - longest)
            waited = now

    def _time(self, begun: float) -> None:
        """What began then, and ought to have ended at once, has ended now."""
        now = time.monotonic()
        if now - begun > STANDSTILL_S:
            self.report.standstills += begun > self._still_until
            self._still_until = now

    async def _run(self) -> Report:
        report, begun = self.report, time.monotonic()
        self._sample()
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(number))
        await self._meet_the_rest()
        report.seconds = time.monotonic() - begun
        report.outcomes = self._clients.outcomes
        report.counts = self._clients.done + await asyncio.to_thread(self._troubles.counts)
        await self._quiet()
        await self._afterwards()
        await self._quiet()
        self._sample()
        report.tables = self._tables()
        report.open_files = len(os.listdir(f"/proc/{self._processes['worker']}/fd"))
        return report

    async def _client(self, number: int) -> None:
        """Takes the next event until there is none; some are not a client's, but somebody has to see to it."""
        client = Client(self._clients, number)
        while self._events:
            kind = self._events.pop()
            if kind in VISITS:
                await client.visit(kind)
            else:
                await self._troubles.cause(kind)
            self._happened += 1
            if self._happened >= self._steps[-1]:
                self._steps.pop()
                self._sample()
        await client.close()

    async def _meet_the_rest(self) -> None:
        """Faults that no request has met yet: there are no more than one for each."""
        give_up = time.monotonic() + QUIET_S
        client = Client(self._clients, CLIENTS)
        while await self._troubles.waiting() and time.monotonic() < give_up:
            await client.visit("stream")
            self.report.wanted["stream"] += 1
        await client.close()

    async def _quiet(self) -> None:
        """Until the workers are idle, or ought to be. The list is what they said last."""
        give_up = time.monotonic() + QUIET_S
        while True:
            text = await asyncio.to_thread(self._ask, "/admin/workers")
            self.report.workers = json.loads(text)
            idle = not any(
                worker[name] for worker in self.report.workers for name in COUNTS_OF_WORK
            )
            if (idle and len(self.report.workers) == WORKERS) or time.monotonic() > give_up:
                return
            await asyncio.sleep(0.05)

    async def _afterwards(self) -> None:
        """On a connection each, for all workers to have some. Once more if the machine stood still meanwhile."""
        give_up, before = time.monotonic() + QUIET_S, -1
        while before != self.report.standstills and time.monotonic() < give_up:
            before = self.report.standstills
            last = Clients(self._router.port, seed=-1)
            client = Client(last, 0)
            for _ in range(AFTERWARDS):
                await client.visit("ask")
                await client.close()
            self.report.afterwards = last.outcomes

    def _ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self._router.admin}{path}", timeout=30) as response:
            return str(response.read().decode())

    def _tables(self) -> dict[str, float]:
        name = 'kvpool_router_table_entries{table="'
        rows = [row for row in self._ask("/metrics").splitlines() if row.startswith(name)]
        return {row.split('"')[1]: float(row.split()[-1]) for row in rows}

    def _sample(self) -> None:
        memory = {name: resident_kib(pid) for name, pid in self._processes.items()}
        self.report.memory_kib.append(memory)


def waited_for_processor_s(pid: int) -> float:
    """In all, by the thread with its event loop. 0: it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def chaos(folder: Path, hours: float, policy: str, seed: int) -> Report:
    with ExitStack() as stack:
        mocks = [MockEngine(folder / f"mock-{n}.log", *MOCK) for n in range(REPLICAS)]
        pool = stack.enter_context(ThreadPoolExecutor(REPLICAS))
        replicas = list(pool.map(stack.enter_context, mocks))
        addresses = [f"{mock.url}@{rank}" for mock in replicas for rank in range(RANKS)]
        options = ("--policy", policy, "--workers", str(WORKERS), *TIMES)
        router = stack.enter_context(Router(folder / "router.log", *options, *addresses))
        return asyncio.run(Hour(router, replicas, hours, seed).run())


def text_of(report: Report) -> str:
    rows = [f"{kind:<24} {report.counts[kind]:>7,}" for kind in report.wanted]
    how_long = f"in {report.seconds:.0f} s, {report.standstills} standstills"
    outcomes = ", ".join(f"{name}: {n:,}" for name, n in sorted(report.outcomes.items()))
    samples = report.memory_kib
    memory = [
        f"{name}: {samples[SAMPLES // 3][name]:,} KiB after a third, {samples[-1][name]:,} in the end"
        for name in samples[-1]
    ]
    tables = ", ".join(f"{name} {size:,.0f}" for name, size in report.tables.items())
    return "\n".join(
        [
            *rows, f"{how_long}. Answers: {outcomes}", *memory, f"tables: {tables}",
            f"wrong: {'; '.join(report.wrong()) or 'nothing'}",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--policy", default="task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        report = chaos(Path(folder), args.hours, args.policy, args.seed)
    print(text_of(report))
    if args.json:
        write_json(args.json, vars(report))
    if report.wrong():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
