"""Before the first byte another replica takes over; after it none does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import until
from router.conftest import CHAT, RouterUnderTest
from router.fake_replica import FakeReplica, answer, raw, silent

from vllm_kvpool.router.retries import BURST, LOST_MOVES

MakeRouter = Callable[..., RouterUnderTest]
TURNS = ("--policy", "round_robin", "--probe-interval-s", "60")
"""Each replica in turn, and only requests find out what is wrong with it."""


def outcomes(router: RouterUnderTest, count: int) -> set[int]:
    return {router.chat(str(number)).status for number in range(count)}


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_engine_hands_on(
    make_router: MakeRouter, replicas: list[FakeReplica], status: int
) -> None:
    replicas[0].behave = answer(status, "retry-after: 7")
    router = make_router(*replicas, options=TURNS)
    answers = [router.chat(str(number)) for number in range(6)]
    assert {got.status for got in answers} == {200}
    assert replicas[0].id not in {got.replica for got in answers}
    retried = [got for got in answers if "x-kvpool-retries" in got.headers]
    assert [got.headers["x-kvpool-reason"] for got in retried] == ["retry"] * len(retried)
    assert router.metric("retries_total", replica=replicas[0].id, cause="busy") == len(retried)
    assert len(retried) == len(replicas[0].requests) >= 2
    assert router.state(replicas[0].id) == "accepting"
    router.wait_idle()


def test_when_all_are_busy_the_client_learns_so(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    for replica in replicas:
        replica.behave = answer(429, "retry-after: 7")
    router = make_router(*replicas, options=TURNS)
    got = router.chat()
    assert (got.status, got.headers["retry-after"]) == (429, "7")
    assert [len(replica.requests) for replica in replicas] == [1, 1, 1]
    router.wait_idle()


@pytest.mark.parametrize(
    "behave",
    [
        raw(b"", close=True),
        raw(b"HTTP/1.1 200", close=True),
        raw(b"SMTP ready\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000),
    ],
)
def test_what_comes_instead_of_an_answer(
    make_router: MakeRouter, replicas: list[FakeReplica], behave: object
) -> None:
    replicas[0].behave = behave
    router = make_router(*replicas, options=TURNS)
    assert outcomes(router, 6) == {200}
    assert router.metric("retries_total", replica=replicas[0].id, cause="unreachable") >= 1
    router.wait_idle()


def test_a_dead_replica_costs_no_request(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    router = make_router(*replicas, options=TURNS)
    assert outcomes(router, 3) == {200}
    replicas[0].die()
    assert outcomes(router, 6) == {200}
    router.wait_state(replicas[0].id, "out")
    assert router.metric("retries_total") <= 2, "it is out after the first"


def test_killing_a_replica_loses_no_request_without_a_first_byte(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    replicas[0].behave = silent
    router = make_router(*replicas, options=TURNS)
    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(router.chat, str(number)) for number in range(64)]
        until(lambda: replicas[0].in_flight > BURST)
        waiting = replicas[0].in_flight
        replicas[0].die()
        got = [answer.result() for answer in answers]
    assert [answer.status for answer in got] == [200] * 64, router.log.read_text()
    assert router.metric("retries_total") >= waiting
    router.wait_idle()


def test_the_ranks_of_a_dead_engine_cost_no_request(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    """More of them than a request may move, and the next in turn."""
    dead, well = replicas[:2]
    ranks = [f"a{rank}={dead.url}@{rank}" for rank in range(LOST_MOVES + 2)]
    router = make_router(*ranks, f"b={well.url}", options=TURNS)
    dead.die()
    assert outcomes(router, LOST_MOVES + 3) == {200}
    router.wait_idle()


def test_a_request_that_kills_replicas_ends(
    make_router: MakeRouter, make_replica: Callable[..., FakeReplica]
) -> None:
    many = [make_replica(behave=raw(b"", close=True)) for _ in range(5)]
    router = make_router(*many, options=TURNS)
    assert router.chat().status == 502
    assert sum(len(replica.requests) for replica in many) == 1 + LOST_MOVES
    assert router.metric("retries_refused_total") == 1
    router.wait_idle()


def test_a_kept_connection_that_the_engine_has_closed_is_no_failure(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    """As at uvicorn's idle timeout: the request goes out again on a new connection. No probe may come while the engine
    is away."""
    router = make_router(replica, options=("--retry-share", "0", "--probe-interval-s", "60"))
    for _ in range(5):
        assert router.chat().status == 200
        replica.die()
        replica.open()
    assert router.metric("retries_total") == 0
    assert router.metric("replica_ejections_total") == 0


def test_the_budget_ends(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    """16 retries at once, then one for each ten requests."""
    replicas[0].behave = replicas[1].behave = answer(503)
    router = make_router(*replicas, options=(*TURNS, "--retry-share", "0.1"))
    statuses = [router.chat(str(number)).status for number in range(90)]
    assert set(statuses) == {200, 503}
    assert 16 <= router.metric("retries_total") <= 16 + 90 * 0.1
    sent = sum(len(replica.requests) for replica in replicas)
    assert sent == 90 + router.metric("retries_total")


def test_no_retries_at_all(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    replicas[0].behave = answer(503)
    router = make_router(*replicas, options=(*TURNS, "--retry-share", "0"))
    assert sorted(router.chat(str(number)).status for number in range(3)) == [200, 200, 503]


def test_nobody_there_at_all(make_router: MakeRouter) -> None:
    router = make_router("http://127.0.0.1:1")
    assert router.ask(CHAT, {"prompt": "x"}).status == 503


def test_a_busy_engine_is_the_answer_when_the_others_are_out(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    replicas[0].behave = answer(429)
    for replica in replicas[1:]:
        replica.die()
    router = make_router(*replicas, options=TURNS)
    assert router.chat().status == 429
    assert router.metric("retries_total") == 0
