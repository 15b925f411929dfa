"""Several processes, one router."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
from helpers import run_cli, until
from router.conftest import RouterUnderTest, receive_until
from router.fake_replica import FakeReplica, answer, stream

from vllm_kvpool.router import control
from vllm_kvpool.router.retries import BURST

MakeRouter = Callable[..., RouterUnderTest]


def decisions(router: RouterUnderTest, count: int = 60) -> list[str]:
    bodies = ({"messages": [{"role": "user", "content": f"session {n}"}]} for n in range(count))
    return [router.ask("/route", body).json["replica"] for body in bodies]


def refused(router: RouterUnderTest) -> bool:
    try:
        router.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_two_routers_decide_the_same(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    """Told of the replicas in different orders."""
    one, two = make_router(*replicas), make_router(*reversed(replicas))
    assert decisions(one) == decisions(two)
    assert len(set(decisions(one))) == 3
    for number in range(20):
        session = {"X-Session-ID": str(number)}
        assert one.chat(headers=session).replica == two.chat(headers=session).replica


def test_workers_decide_the_same_and_count_together(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    """Each request is a connection, and the kernel gives it to any worker."""
    router = make_router(*replicas, options=("--workers", "3", "--policy", "session"))
    assert len(router.workers()) == 3
    homes = [
        {router.chat(headers={"X-Session-ID": str(number)}).replica for _ in range(10)}
        for number in range(10)
    ]
    assert all(len(home) == 1 for home in homes)
    assert router.metric("requests_total") == 100
    router.wait_idle()


def test_a_worker_that_dies_is_replaced(make_router: MakeRouter, replica: FakeReplica) -> None:
    router = make_router(replica, options=("--workers", "2"))
    old = router.workers()
    os.kill(old[0], signal.SIGKILL)
    until(lambda: len(set(router.workers()) - set(old)) == 1)

    def served() -> bool:
        try:
            return all(router.chat().status == 200 for _ in range(10))
        except OSError:  # it went to the one that died
            return False

    until(served)
    assert router.metric("worker_restarts_total") == 1


def test_the_port_is_kept_while_no_worker_listens(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    router = make_router(replica)

    def killed_and_refused() -> bool:
        """Those that took the place of others, too."""
        for pid in router.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return refused(router)

    until(killed_and_refused)
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", router.port))


def test_counters_do_not_fall_with_a_worker(make_router: MakeRouter, replica: FakeReplica) -> None:
    router = make_router(replica, options=("--workers", "2"))
    old = router.workers()
    for _ in range(20):
        router.chat()
    assert router.metric("requests_total") == 20
    assert router.metric("first_byte_seconds_count") == 20
    for pid in old:  # whichever took them
        os.kill(pid, signal.SIGKILL)

    def restarted() -> bool:
        try:
            return router.metric("worker_restarts_total") == 2
        except OSError:  # it went to one that died
            return False

    until(restarted)
    assert router.metric("requests_total") == 20
    assert router.metric("first_byte_seconds_count") == 20
    assert router.metric("first_byte_seconds_bucket", le="+Inf") == 20
    router.wait_idle()


def test_each_worker_says_what_it_has_in_flight_and_remembers(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    """While a request is under way, and when all are over."""
    go_on = replica.hold()
    router = make_router(replica, options=("--workers", "2", "--retry-share", "0.5"))

    def gauges() -> list[dict[str, float]]:
        with urlopen(f"http://{router.admin}/admin/workers", timeout=30) as response:
            return sorted(json.load(response), key=lambda worker: -worker["in_flight_requests"])

    with router.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
        )
        until(lambda: replica.in_flight == 1)
        busy, idle = gauges()
        assert {busy["pid"], idle["pid"]} == set(router.workers())
        assert busy["in_flight_requests"] == busy["client_connections"] == 1
        assert busy["in_flight_tokens"] > 0
        assert idle["in_flight_requests"] == idle["in_flight_tokens"] == 0
        assert router.metric("replica_connections", state="active") == 1
        go_on()
        assert receive_until(connection, b"0\r\n\r\n")
    router.wait_idle()
    replica.behave = answer()
    for number in range(20):
        router.chat(headers={"X-Session-ID": str(number)})
    assert router.metric("table_entries", table="sessions") == 21
    assert router.metric("retry_budget") == 2 * BURST


def test_a_worker_that_does_not_answer_counts_as_before(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    router = make_router(replica, options=("--workers", "2"))
    for _ in range(20):
        router.chat()
    assert router.metric("requests_total") == 20
    stopped = router.workers()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        with urlopen(f"http://{router.admin}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    counted = [line for line in lines if line.startswith("kvpool_router_requests_total{")]
    assert [line.rpartition(" ")[2] for line in counted] == ["20"]


def test_a_message_that_breaks_off_is_the_end() -> None:
    async def messages() -> list[object]:
        ours, theirs = socket.socketpair()
        channel = await control.Channel.over(ours)
        theirs.sendall(b'{"type":"ready"}\n{"type":"fail')
        theirs.close()
        try:
            return [message async for message in channel]
        finally:
            channel.close()

    assert asyncio.run(messages()) == [control.Ready()]


def test_workers_end_with_their_parent(make_router: MakeRouter, replica: FakeReplica) -> None:
    router = make_router(replica, options=("--workers", "2"))
    workers = router.workers()
    os.kill(router.pid, signal.SIGKILL)
    router.wait()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


def test_an_orderly_end_finishes_what_is_under_way(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    go_on = replica.hold()
    router = make_router(replica, options=("--drain-s", "30"))
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(router.chat, stream=True) for _ in range(4)]
        until(lambda: replica.in_flight == 4)
        os.kill(router.pid, signal.SIGTERM)
        until(lambda: refused(router), "the end to begin")
        go_on()
        assert all(answer.result().body.endswith(b"[DONE]\n\n") for answer in answers)
    assert router.wait() == 0


def test_an_end_does_not_wait_for_ever(make_router: MakeRouter, replica: FakeReplica) -> None:
    replica.behave = stream(100_000, 0.01)
    router = make_router(replica, options=("--drain-s", "0.5"))
    with router.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
        )
        until(lambda: replica.in_flight == 1)
        assert router.stop() == 0, "it had to be killed"
    until(lambda: replica.gone == 1)


def test_a_port_that_is_taken_is_an_error(router: RouterUnderTest, replica: FakeReplica) -> None:
    for option in ("--listen", "--admin"):
        taken = f"127.0.0.1:{router.port}" if option == "--listen" else router.admin
        other = ("--admin", "") if option == "--listen" else ("--listen", "127.0.0.1:0")
        done = run_cli("route", replica.url, option, taken, *other)
        assert done.returncode == 1
        assert "in use" in done.stderr
        assert "Traceback" not in done.stderr


def test_bad_configuration_is_refused(replica: FakeReplica) -> None:
    refusals = {
        (): "name the replicas",
        ("x",): "http://host:port",
        ("http://engine..svc:8000",): "1 to 63 characters",
        (replica.url, replica.url): "another replica",
        (replica.url, "--policy", "best"): "choose one of",
        (replica.url, "--listen", "8080"): "127.0.0.1:8080",
        (replica.url, "--max-body", "5%"): "32MiB",
        (replica.url, "--workers", "0"): "1 or more",
    }
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda arguments: run_cli("route", *arguments), refusals)
    for done, text in zip(ends, refusals.values(), strict=True):
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr
