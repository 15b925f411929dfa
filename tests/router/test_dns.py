"""Each address of a name is a replica, as long as the name has it.

The router's process has /etc/hosts and /etc/resolv.conf of its own, in a mount namespace: it resolves
as it does everywhere, and the test says what a name's addresses are.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import WAIT_S, until
from router.conftest import RouterUnderTest
from router.fake_replica import FakeReplica

MakeRouter = Callable[..., RouterUnderTest]
MakeReplica = Callable[..., FakeReplica]
NAME = "engines.test"
SILENT_SERVER = "127.0.0.53"


class Names:
    """Skips the test where no mount namespace can be made."""

    def __init__(self, folder: Path, name_server: str) -> None:
        self._hosts = folder / "hosts"
        self._hosts.touch()
        (folder / "resolv.conf").write_text(
            f"nameserver {name_server}\noptions timeout:{WAIT_S:.0f}\n"
        )
        mounts = [f"mount --bind {folder / name} /etc/{name}" for name in ("hosts", "resolv.conf")]
        shell = " && ".join([*mounts, 'exec "$@"'])
        self.prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", shell, "sh")
        """For the router's command."""
        try:
            done = subprocess.run(
                [*self.prefix, "true"], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            pytest.skip("there is no `unshare` (util-linux)")
        if done.returncode:
            pytest.skip(f"this kernel or container makes no mount namespace: {done.stderr}")

    def set(self, *addresses: str) -> None:
        self._hosts.write_text("".join(f"{address} {NAME}\n" for address in addresses))


@pytest.fixture
def names(tmp_path: Path) -> Names:
    return Names(tmp_path, "127.0.0.1")


@pytest.fixture
def two(make_replica: MakeReplica) -> list[FakeReplica]:
    """On two addresses, at one port."""
    first = make_replica(host="127.0.0.2")
    return [first, make_replica(first.port, host="127.0.0.3")]


def test_addresses_come_and_go(
    names: Names, make_router: MakeRouter, two: list[FakeReplica]
) -> None:
    one, other = two
    names.set(one.host)
    router = make_router(f"dns://{NAME}:{one.port}", prefix=names.prefix)
    assert router.used() == {one.id}
    names.set(one.host, other.host)
    router.wait_state(other.id, "accepting")
    assert router.used() == {one.id, other.id}
    names.set(other.host)
    until(lambda: set(router.replicas()) == {other.id})
    assert router.used() == {other.id}
    assert one.id not in router.ask("/metrics").body.decode(), "its series go with it"
    names.set()
    until(lambda: "stay as they are" in router.log.read_text(), "the name to be unknown")
    assert router.used(5) == {other.id}
    names.set(one.host)
    until(lambda: set(router.replicas()) == {one.id})
    router.wait_state(one.id, "accepting")
    assert router.used() == {one.id}
    router.wait_idle()


def test_an_answer_outlives_its_address(
    names: Names, make_router: MakeRouter, two: list[FakeReplica]
) -> None:
    """And leaves nothing behind: no series of a replica that has gone."""
    one, other = two
    go_on = one.hold()
    names.set(one.host)
    router = make_router(f"dns://{NAME}:{one.port}", prefix=names.prefix)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(router.chat, stream=True)
        until(lambda: one.in_flight)
        names.set(other.host)
        until(lambda: set(router.replicas()) == {other.id})
        assert one.in_flight, "it is still under way"
        go_on()
        assert answer.result().body.endswith(b"[DONE]\n\n")
    router.wait_state(other.id, "accepting")
    assert router.used(5) == {other.id}
    assert one.id not in router.ask("/metrics").body.decode()


def test_a_name_server_that_does_not_answer_delays_nobody(
    tmp_path: Path, make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    """Each question waits for it for half a minute or more. Probes go on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.settimeout(WAIT_S)
        try:
            server.bind((SILENT_SERVER, 53))
        except OSError as error:
            pytest.skip(f"no name server can be put at {SILENT_SERVER}:53: {error}")
        names = Names(tmp_path, SILENT_SERVER)
        options = ("--connect-timeout-s", "0.5")
        router = make_router(*replicas, f"dns://{NAME}:8000", options=options, prefix=names.prefix)
        first = server.recvfrom(512)
        replicas[0].well = False
        router.wait_state(replicas[0].id, "out")
        assert NAME not in router.log.read_text(), "the question has not been given up yet"
        server.settimeout(0.1)
        say_no(server, first)
    until(lambda: NAME in router.log.read_text())


def say_no(server: socket.socket, first: tuple[bytes, object]) -> None:
    """To all that was asked: there is no such name. Then nothing waits for an answer any more."""
    asked = [first]
    with contextlib.suppress(TimeoutError):
        while True:
            asked.append(server.recvfrom(512))
    for question, asker in asked:
        server.sendto(question[:2] + b"\x81\x83" + question[4:], asker)


def test_dns(make_router: MakeRouter, replica: FakeReplica) -> None:
    router = make_router(f"dns://localhost:{replica.port}")
    router.wait_state(replica.id, "accepting")
    assert router.chat().status == 200
    assert router.replicas()[replica.id]["sources"] == [f"dns:localhost:{replica.port}"]


def test_dns_with_ranks(make_router: MakeRouter, replica: FakeReplica) -> None:
    """Each rank of a name stays from one look to the next."""
    names = [f"dns://localhost:{replica.port}@{rank}" for rank in (0, 1)]
    router = make_router(*names, options=("--warmup-s", "1000"))
    ranks = [f"{replica.id}@{rank}" for rank in (0, 1)]
    for _ in range(20):
        shares = [router.metric("replica_share", replica=rank) for rank in ranks]
        assert shares == [1, 1], "there from the start, and never new"
        time.sleep(0.05)
    assert [router.replicas()[rank]["sources"] for rank in ranks] == [
        [f"dns:localhost:{replica.port}@{rank}"] for rank in (0, 1)
    ]


def test_a_name_that_is_not_known_hurts_nobody(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    router = make_router(replica, "dns://replicas.invalid:8000")
    assert router.chat().status == 200
    assert set(router.replicas()) == {replica.id}
