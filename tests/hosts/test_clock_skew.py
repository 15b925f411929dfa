"""Clocks an hour apart, or jumping by an hour: no host and no Redis takes another's word for the time."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Daemon, check_bytes, keys_of, prepare, store, until, write_blocks
from hosts.conftest import Host, wait_listed
from redis_server import RedisServer

from vllm_kvpool.pool.directory import BLOCK_TTL_S, HOST_TTL_S

MakeHost = Callable[..., Host]
HOUR_S = 3_600
SHIM = Path(__file__).with_name("shifted_clock.c")


class WallClock:
    """Of the processes that are started with `prefix`."""

    def __init__(self, folder: Path) -> None:
        self._file, library = folder / "shift", folder / "shifted_clock.so"
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("the clock's shim is C: install gcc")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
        self.prefix = ["env", f"LD_PRELOAD={library}", f"SHIFT_FILE={self._file}"]
        self.set(0)

    def set(self, seconds: int) -> None:
        """In place: processes have the file mapped."""
        if not self._file.exists():
            self._file.write_bytes(bytes(8))
        with open(self._file, "r+b") as file:
            file.write(struct.pack("<q", seconds))
        shown = [*self.prefix, sys.executable, "-c", "import time; print(time.time())"]
        shift = float(subprocess.check_output(shown)) - time.time()
        assert abs(shift - seconds) < 60

    def daemon(self, *arguments: object, **named: object) -> Daemon:
        made = Daemon(*arguments, **named)  # type: ignore[arg-type]
        made.command = [*self.prefix, *made.command]
        return made

    def redis(self, folder: Path) -> RedisServer:
        return _RedisElsewhere(folder, self.prefix).start()


class _RedisElsewhere(RedisServer):
    def __init__(self, folder: Path, prefix: list[str]) -> None:
        super().__init__(folder)
        self._prefix = prefix

    def command(self) -> list[str]:
        return [*self._prefix, *super().command()]


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


def check_pull(source: Host, sink: Host, seed: str) -> None:
    keys = keys_of(seed, 20)
    store(source.client, keys)
    wait_listed(source, keys)
    until(lambda: sink.pull(keys).blocks == 20, f"pull of {seed}")
    check_bytes(sink.client, keys, sink.client.match_prefix(keys))


def check_entries(server: RedisServer) -> None:
    """All that expires does so after our times, whatever the clock says."""
    client = server.client
    for pattern, longest in (
        (b"kvpool:*:{hosts}:*", HOST_TTL_S),
        (b"kvpool:*:{[0-9a-f]*", BLOCK_TTL_S),
    ):
        found = client.keys(pattern)
        assert found
        assert all(0 <= client.ttl(key) <= longest for key in found)


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_two_hosts_an_hour_apart(
    make_host: MakeHost, redis_server: RedisServer, clock: WallClock, seconds: int
) -> None:
    clock.set(seconds)
    a, b = make_host(), make_host(daemon=clock.daemon)
    check_pull(a, b, "there")
    check_pull(b, a, "and back")
    check_entries(redis_server)


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_redis_an_hour_off(
    make_host: MakeHost, clock: WallClock, tmp_path: Path, seconds: int
) -> None:
    clock.set(seconds)
    server = clock.redis(tmp_path)
    try:
        assert abs(server.client.time()[0] - time.time() - seconds) < 60
        a, b = make_host(server=server), make_host(server=server)
        check_pull(a, b, "there")
        check_entries(server)
    finally:
        server.kill()


def test_a_hosts_clock_jumps(make_host: MakeHost, clock: WallClock) -> None:
    """Forth and back, under stores and leases that are under way."""
    a, b = make_host(), make_host(daemon=clock.daemon)
    check_pull(a, b, "before")
    held = b.client.match_prefix(keys_of("before", 20))
    b.client.lease(held)
    for seconds in (HOUR_S, -HOUR_S):
        keys = keys_of(f"during {seconds}", 10)
        grant = prepare(b.client, keys)
        clock.set(seconds)
        time.sleep(1.5)  # some turns of the daemon's housekeeping, which is where time counts
        write_blocks(b.client, keys, grant.refs or b"")
        b.client.complete_store(grant.request_id)
        until(
            lambda keys=keys: (b.client.poll(), len(b.client.match_prefix(keys)) == 80)[1], "ready"
        )
        check_pull(b, a, f"b {seconds}")
        check_pull(a, b, f"a {seconds}")
    assert b.client.match_prefix(keys_of("before", 20)) == held
    leases = {client["client_id"]: client["leases"] for client in b.daemon.stats()["clients"]}
    assert leases[b.client.client_id] == 20
    b.client.release(held)


def test_the_clock_of_redis_jumps(make_host: MakeHost, clock: WallClock, tmp_path: Path) -> None:
    """Forth: everything in it expires, and is told again. Back: nothing does for an hour."""
    server = clock.redis(tmp_path)
    try:
        a, b = make_host(server=server), make_host(server=server)
        store(a.client, keys_of("old", 20))
        wait_listed(a, keys_of("old", 20))
        for seconds in (HOUR_S, -HOUR_S):
            clock.set(seconds)
            check_pull(a, b, f"new {seconds}")
        until(lambda: b.pull(keys_of("old", 20)).blocks == 20, "what was there before")
    finally:
        server.kill()


class DaemonOfAnOlderHost(Daemon):
    """Its host has been up for an hour longer: a time namespace of its own, which only root can make."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        hour = str(HOUR_S)
        space = ["unshare", "--fork", "--time", "--monotonic", hour, "--boottime", hour]
        shown = [*space, sys.executable, "-c", "import time; print(time.monotonic())"]
        done = subprocess.run(shown, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no time namespaces here: {done.stderr.strip()}")
        assert abs(float(done.stdout) - time.monotonic() - HOUR_S) < 60
        self.command = [*space, *self.command]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """`unshare` passes no signal on, but the daemon's status."""
        os.kill(int(self.stats()["pool"]["pid"]), number)
        return self._end()


def test_hosts_that_started_an_hour_apart(make_host: MakeHost, redis_server: RedisServer) -> None:
    """Deadlines and heartbeats count from a host's start, and no two hosts have the same."""
    a, b = make_host(), make_host(daemon=DaemonOfAnOlderHost)
    check_pull(a, b, "there")
    check_pull(b, a, "and back")
    check_entries(redis_server)
