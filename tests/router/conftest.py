from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import until
from router.fake_replica import FakeReplica

from benchmarks.processes import Router
from vllm_kvpool.router.fleet_commands import FleetCommands

CHAT = "/v1/chat/completions"
PATIENT = ("--connect-timeout-s", "10")
"""A replica, or the router itself, may stand still for seconds, and nobody is to be found ill for it."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def replica(self) -> str:
        return self.headers["x-kvpool-replica"]


class RouterUnderTest(Router):
    def ask(
        self,
        path: str = CHAT,
        body: object = None,
        headers: dict[str, str] | None = None,
        *,
        method: str | None = None,
        timeout_s: float = 30,
    ) -> Answer:
        """`body`: bytes as they are, other values as JSON."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout_s)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("POST" if body else "GET"), path, data, headers or {})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())

    def chat(
        self, text: str = "hello", headers: dict[str, str] | None = None, **more: Any
    ) -> Answer:
        return self.ask(CHAT, chat_body(text, **more), headers)

    def connect(self) -> socket.socket:
        """For what no HTTP library sends."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series that carry `labels`."""
        total = 0.0
        for line in self.ask("/metrics").body.decode().splitlines():
            series, _, value = line.rpartition(" ")
            found, _, rest = series.partition("{")
            if found == f"kvpool_router_{name}" and all(
                f'{key}="{text}"' in rest for key, text in labels.items()
            ):
                total += float(value)
        return total

    def state(self, replica_id: str) -> str:
        metrics = self.ask("/metrics").body.decode()
        for line in metrics.splitlines():
            if line.startswith(f'kvpool_router_replica_state{{replica="{replica_id}"'):
                return line.split('state="')[1].split('"')[0]
        return "none"

    def wait_state(self, replica_id: str, state: str) -> None:
        until(lambda: self.state(replica_id) == state, f"{replica_id} being {state}")

    def used(self, count: int = 40) -> set[str]:
        """The replicas that so many sessions come to."""
        return {self.chat(headers={"X-Session-ID": str(n)}).replica for n in range(count)}

    @property
    def fleet(self) -> FleetCommands:
        return FleetCommands(self.admin)

    def replicas(self) -> dict[str, dict[str, Any]]:
        """By id, as the admin endpoint lists them."""
        return {replica["id"]: replica for replica in self.fleet.replicas()}

    def wait_idle(self) -> None:
        """All loads are back at zero."""
        until(lambda: self.metric("in_flight_requests") == 0, "no request in flight")
        assert self.metric("in_flight_tokens") == 0


def chat_body(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def receive(connection: socket.socket, timeout_s: float = 30) -> bytes:
    """All bytes until the other side closes."""
    connection.settimeout(timeout_s)
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            data += part
    return bytes(data)


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    data = bytearray()
    give_up = time.monotonic() + 30
    while end not in data:
        assert time.monotonic() < give_up, bytes(data)
        part = connection.recv(65_536)
        assert part, f"closed before {end!r}: {bytes(data)!r}"
        data += part
    return bytes(data)


@pytest.fixture
def make_replica() -> Iterator[Callable[..., FakeReplica]]:
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(FakeReplica(*args, **options))


@pytest.fixture
def make_router(tmp_path: Path) -> Iterator[Callable[..., RouterUnderTest]]:
    """Routers that look at their replicas often."""
    routers: list[RouterUnderTest] = []
    with contextlib.ExitStack() as stack:

        def make(
            *replicas: FakeReplica | str,
            options: tuple[str, ...] = (),
            prefix: tuple[str, ...] = (),
        ) -> RouterUnderTest:
            addresses = [r if isinstance(r, str) else r.url for r in replicas]
            quick = ("--probe-interval-s", "0.2", "--drain-s", "5", "--warmup-s", "0")
            log = tmp_path / f"router-{len(routers)}.log"
            router = RouterUnderTest(log, *PATIENT, *quick, *options, *addresses, prefix=prefix)
            routers.append(router)
            return stack.enter_context(router)

        yield make
        for router in routers:
            assert "Traceback" not in router.log.read_text(), router.log.read_text()


@pytest.fixture
def replica(make_replica: Callable[..., FakeReplica]) -> FakeReplica:
    return make_replica()


@pytest.fixture
def replicas(make_replica: Callable[..., FakeReplica]) -> list[FakeReplica]:
    return [make_replica() for _ in range(3)]


@pytest.fixture
def router(replica: FakeReplica, make_router: Callable[..., RouterUnderTest]) -> RouterUnderTest:
    """With one replica."""
    return make_router(replica)
