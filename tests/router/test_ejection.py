"""A replica that is not well gets nothing; one that is well again gets a little first."""

from __future__ import annotations

from collections.abc import Callable

from helpers import until
from router.conftest import RouterUnderTest
from router.fake_replica import FakeReplica

from vllm_kvpool.router.health import FAILURES

MakeRouter = Callable[..., RouterUnderTest]


def shares(router: RouterUnderTest, count: int) -> dict[str, int]:
    """Requests by replica."""
    counts: dict[str, int] = {}
    for number in range(count):
        replica = router.chat(f"session {number}", {"X-Session-ID": str(number)}).replica
        counts[replica] = counts.get(replica, 0) + 1
    return counts


def test_out_when_its_health_says_so_and_back_again(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    router = make_router(*replicas)
    ill = replicas[0]
    ill.well = False
    router.wait_state(ill.id, "out")
    assert ill.id not in shares(router, 20)
    assert router.metric("replica_ejections_total", replica=ill.id) == 1
    ill.well = True
    router.wait_state(ill.id, "accepting")
    assert set(shares(router, 60)) == {replica.id for replica in replicas}


def test_metrics_that_do_not_come_eject_nobody(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    replica.metrics = "vllm:num_requests_waiting 3\n"
    router = make_router(replica, options=("--connect-timeout-s", "3"))
    until(lambda: router.metric("replica_waiting_requests") == 3)
    replica.metrics = None
    replica.looks = 0
    until(lambda: replica.looks > FAILURES)
    assert router.state(replica.id) == "accepting"
    assert router.metric("replica_ejections_total") == 0
    assert router.metric("replica_waiting_requests") == 3, "what it said last"


def test_dead_and_back(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    router = make_router(*replicas)
    replicas[0].die()
    router.wait_state(replicas[0].id, "out")
    replicas[0].open()
    router.wait_state(replicas[0].id, "accepting")


def test_a_worker_takes_back_what_it_suspected(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    """The parent finds it well again while the worker still leaves it alone, and says so once."""
    router = make_router(replica)
    replica.die()
    assert router.chat().status in {502, 503}
    replica.open()
    until(lambda: router.chat().status == 200)


def test_half_open_a_small_share_first(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    router = make_router(*replicas, options=("--warmup-s", "1000", "--policy", "session"))
    assert router.metric("replica_share", replica=replicas[0].id) == 1, "there from the start"
    before = shares(router, 60)[replicas[0].id]
    replicas[0].die()
    router.wait_state(replicas[0].id, "out")
    replicas[0].open()
    router.wait_state(replicas[0].id, "accepting")
    assert router.metric("replica_share", replica=replicas[0].id) < 0.2
    assert shares(router, 60).get(replicas[0].id, 0) < before / 2
    # one failure is enough now
    replicas[0].well = False
    router.wait_state(replicas[0].id, "out")
    assert router.metric("replica_ejections_total", replica=replicas[0].id) == 2


def test_warm_up_ends(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    router = make_router(*replicas, options=("--warmup-s", "1"))
    replicas[0].die()
    router.wait_state(replicas[0].id, "out")
    replicas[0].open()
    router.wait_state(replicas[0].id, "accepting")
    until(lambda: router.metric("replica_share", replica=replicas[0].id) == 1)


def test_its_sessions_spread_over_all_others_and_come_back(
    make_router: MakeRouter, make_replica: Callable[..., FakeReplica]
) -> None:
    many = [make_replica() for _ in range(5)]
    named = [f"r{number}={replica.url}" for number, replica in enumerate(many)]
    router = make_router(*named, options=("--policy", "session"))

    def homes() -> dict[int, str]:
        names = ((number, {"X-Session-ID": str(number)}) for number in range(100))
        return {
            number: router.ask("/route", {"prompt": "x"}, name).json["replica"]
            for number, name in names
        }

    before = homes()
    many[0].die()
    router.wait_state("r0", "out")
    without = homes()
    moved = [number for number in before if before[number] != without[number]]
    assert moved == [number for number in before if before[number] == "r0"]
    assert len({without[number] for number in moved}) == 4
    many[0].open()
    router.wait_state("r0", "accepting")
    assert homes() == before
