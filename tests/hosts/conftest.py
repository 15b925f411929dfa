"""Several hosts on this machine: each has a shared-memory folder of its own and a real daemon."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Daemon, connect, until
from hosts.fault_proxy import FaultProxy
from redis_server import RedisServer

from benchmarks.processes import free_port
from vllm_kvpool.client import PoolClient
from vllm_kvpool.protocol import Pulled
from vllm_kvpool.types import BlockKeys, split_keys

PULL_MS = 20_000
"""For pulls that end before: a machine may pause."""


def patient(daemon: Daemon) -> Daemon:
    """That somebody takes long is no reason for it to do without."""
    return daemon.tuned(
        redis_url__TIMEOUT_S=10.0, directory__TIMEOUT_S=10.0, exchange__STOP_TIMEOUT_S=15.0,
        pulls__LOOK_UP_MS=10_000, pulls__LANDING_MS=10_000, peer_door__CONNECT_MS=10_000,
        spaces__STORE_TIMEOUT_MS=20_000, pushes__STALL_MS=20_000,
    )  # fmt: skip


class Host:
    """One host's daemon, and a fake engine beside it."""

    def __init__(self, daemon: Daemon, port: int, server: RedisServer | None = None) -> None:
        """`server`: where its directory is, if it knows one."""
        self.daemon = daemon
        self.port = port
        self.server = server
        self._client: PoolClient | None = None

    @property
    def client(self) -> PoolClient:
        if self._client is None:
            self._client = connect(self.daemon.paths)
        return self._client

    def start_pull(self, keys: BlockKeys, within_ms: int = PULL_MS) -> int:
        pull_id = self.client.pull(keys, b"", within_ms)
        assert pull_id is not None, dict(self.client.skipped)
        return pull_id

    def wait_pulls(self, *pull_ids: int) -> list[Pulled]:
        """In the order of their ends."""
        answers: list[Pulled] = []

        def all_there() -> bool:
            self.client.poll()
            answers.extend(self.client.take_pulled())
            return {answer.id for answer in answers} >= set(pull_ids)

        until(all_there, "the end of pulls")
        return answers

    def pull(self, keys: BlockKeys, within_ms: int = PULL_MS) -> Pulled:
        return self.wait_pulls(self.start_pull(keys, within_ms))[0]

    def counter(self, name: str) -> int:
        return self.daemon.counter(name)

    @property
    def id(self) -> bytes:
        return bytes.fromhex(self.daemon.stats()["pool"]["pool_id"])

    @property
    def leases(self) -> int:
        """Of all clients."""
        return sum(client["leases"] for client in self.daemon.stats()["clients"])

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self.daemon.process is not None:
            self.daemon.resume()
            assert self.daemon.stop() == 0, self.daemon.errors()
            assert "Traceback" not in self.daemon.errors(), self.daemon.errors()


MakeHost = Callable[..., Host]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path).start()
    yield server
    server.kill()


@pytest.fixture
def make_host(shm_dir: Path, redis_server: RedisServer) -> Iterator[Callable[..., Host]]:
    with contextlib.ExitStack() as hosts:

        def make(
            *options: str,
            size: str = "64MiB",
            port: int = 0,
            server: RedisServer = redis_server,
            url: str = "",
            daemon: Callable[..., Daemon] = Daemon,
            tune: Callable[[Daemon], Daemon] = patient,
        ) -> Host:
            """`url`: where `server` is not reached, or not by its own URL. Else, and if it runs, the host is
            a member by now."""
            folder = Path(tempfile.mkdtemp(prefix="host", dir=shm_dir))
            port = port or free_port()
            common = ["--listen", f"tcp://127.0.0.1:{port}", "--directory", url or server.url]
            made = tune(daemon(folder, *common, *options, size=size)).start()
            hosts.callback((host := Host(made, port, server)).close)
            if server.process is not None and not url:
                wait_member(host, server)
            return host

        yield make


def wait_member(host: Host, server: RedisServer) -> None:
    """Until it has found the directory."""
    record = b"kvpool:1:test:{hosts}:" + host.id
    until(lambda: server.client.exists(record), "the host in the directory")


def wait_listed(host: Host, keys: BlockKeys) -> None:
    """Until the directory says of all these blocks that `host` has them."""
    assert host.server is not None
    client, host_id = host.server.client, host.id

    def listed() -> bool:
        pipe = client.pipeline(transaction=False)
        for key in split_keys(keys):
            pipe.sismember(b"kvpool:1:test:{%02x}:" % key[0] + key, host_id)
        return all(pipe.execute())

    until(listed, "the directory")


@pytest.fixture
def make(shm_dir: Path) -> Iterator[MakeHost]:
    """Daemons that know no directory."""
    with contextlib.ExitStack() as hosts:

        def make(
            *options: str,
            size: str = "64MiB",
            port: int = 0,
            tune: Callable[[Daemon], Daemon] = patient,
        ) -> Host:
            folder = Path(tempfile.mkdtemp(prefix="host", dir=shm_dir))
            made = tune(Daemon(folder, *options, size=size)).start()
            hosts.callback((host := Host(made, port)).close)
            return host

        yield make


def make_upstream(make: MakeHost, *options: str, port: int = 0, **named: Any) -> Host:
    port = port or free_port()
    return make("--listen", f"tcp://127.0.0.1:{port}", *options, port=port, **named)


def make_front(make: MakeHost, port: int, *options: str, **named: Any) -> Host:
    return make("--upstream", f"tcp://127.0.0.1:{port}", *options, **named)


@pytest.fixture
def upstream(make: MakeHost) -> Host:
    return make_upstream(make)


@pytest.fixture
def front(make: MakeHost, upstream: Host) -> Host:
    return make_front(make, upstream.port)


@pytest.fixture
def proxied(make: MakeHost) -> Iterator[tuple[Host, Host, FaultProxy]]:
    """The pool in front reaches the upstream through the proxy only."""
    upstream = make_upstream(make)
    with FaultProxy(upstream.port) as proxy:
        yield upstream, make_front(make, proxy.port), proxy
