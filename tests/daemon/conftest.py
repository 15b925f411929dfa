from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Daemon, EngineProcess, connect
from raw_client import RawClient

from vllm_kvpool.client import PoolClient


@pytest.fixture
def make_daemon(shm_dir: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons. Those that still run at the end are ended cleanly, which checks their
    pools."""
    daemons: list[Daemon] = []

    def make(*options: str, **named: str) -> Daemon:
        daemons.append(Daemon(shm_dir, *options, **named))
        return daemons[-1].start()

    yield make
    for daemon in daemons:
        if daemon.process is not None:
            daemon.resume()
            assert daemon.stop() == 0, daemon.errors()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon()


@pytest.fixture
def make_client(daemon: Daemon) -> Iterator[Callable[..., PoolClient]]:
    """Connected clients in this process."""
    clients: list[PoolClient] = []

    def make(*arguments: object, **named: object) -> PoolClient:
        clients.append(connect(daemon.paths, *arguments, **named))  # type: ignore[arg-type]
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client: Callable[..., PoolClient]) -> PoolClient:
    return make_client()


@pytest.fixture
def make_engine(daemon: Daemon) -> Iterator[Callable[..., EngineProcess]]:
    """Fake engines in processes of their own."""
    engines: list[EngineProcess] = []

    def make(namespace: str = "a") -> EngineProcess:
        engines.append(EngineProcess(daemon.paths, namespace))
        return engines[-1]

    yield make
    for engine in engines:
        engine.end()


@pytest.fixture
def make_raw(daemon: Daemon) -> Iterator[Callable[[], RawClient]]:
    """Bare connections, all of the same client."""
    clients: list[RawClient] = []

    def make() -> RawClient:
        clients.append(RawClient(daemon))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def raw(make_raw: Callable[[], RawClient]) -> RawClient:
    return make_raw()
