"""Who belongs to the fleet: each source says for itself, and the last word is an operator's."""

from __future__ import annotations

import pytest

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router.address import DnsName, make_replica, parse_address
from vllm_kvpool.router.health import Health
from vllm_kvpool.router.metrics import Metrics, metrics_text
from vllm_kvpool.router.retries import BURST, RetryBudget
from vllm_kvpool.router.roster import Gauges, Roster
from vllm_kvpool.router.scrape import parse_gauges
from vllm_kvpool.router.types import Replica, ReplicaState

A, B, C = (make_replica("10.0.0.1", port, None) for port in (1, 2, 3))


def roster_of(*replicas: Replica) -> Roster:
    roster = Roster(lambda: Health(0, warm=True), drain_s=10)
    roster.update("static", replicas)
    for replica in replicas:
        roster.ok(replica.id, Gauges(), 0)
    return roster


def ids(roster: Roster) -> set[str]:
    return {entry.replica.id for entry in roster}


def test_addresses() -> None:
    assert parse_address("x", "http://h:8000") == Replica("h:8000", "http://h:8000")
    assert parse_address("x", "http://h:8000@3") == Replica("h:8000@3", "http://h:8000", 3)
    assert parse_address("x", "a=http://h:8000/") == Replica("a", "http://h:8000")
    assert parse_address("x", "http://[::1]:80") == Replica("[::1]:80", "http://[::1]:80")
    assert parse_address("x", "dns://h:80@1") == DnsName("h", 80, 1)
    assert parse_address("x", "dns://a.b.:80") == DnsName("a.b.", 80, None)
    for text in ("", "h:80", "https://h:80", "http://h", "http://h:0", "http://h:70000",
                 "http://h:80/path", "http://h:80@x", "http://a..b:80",
                 "dns://.a:80", f"dns://{'x' * 64}.a:80", "a=dns://h:80", "http://h:80@1@2"):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_address("x", text)


def test_each_source_speaks_for_itself() -> None:
    roster = roster_of(A)
    roster.update("dns:x", (A, B))
    assert ids(roster) == {A.id, B.id}
    roster.update("dns:x", (C,))
    assert ids(roster) == {A.id, C.id}
    roster.update("static", ())
    assert ids(roster) == {C.id}


def test_what_was_removed_by_hand_stays_away() -> None:
    roster = roster_of(A, B)
    assert roster.remove(A.id)
    assert not roster.remove(A.id)
    roster.update("static", (A, B))
    assert ids(roster) == {B.id}
    roster.add(A)
    roster.update("static", (B,))
    assert ids(roster) == {A.id, B.id}


def test_who_was_never_there_may_come() -> None:
    roster = roster_of(A)
    assert not roster.remove(B.id)
    roster.update("file", (B,))
    assert ids(roster) == {A.id, B.id}


def test_the_same_name_elsewhere_is_a_new_replica() -> None:
    roster = roster_of(A)
    roster.update("static", (Replica(A.id, "http://10.0.0.9:1"),))
    (status,) = roster.statuses(0)
    assert status.replica.url == "http://10.0.0.9:1"
    assert status.state is ReplicaState.OUT, "nobody has looked at it yet"


def test_drain() -> None:
    roster = roster_of(A)
    assert roster.drain(A.id, 5)
    assert not roster.drain(B.id, 5)
    assert [roster.statuses(now)[0].state.value for now in (5, 14, 15)] == ["draining"] * 2 + [
        "out"
    ]
    roster.add(A)
    assert roster.statuses(20)[0].state is ReplicaState.ACCEPTING


def test_restarts() -> None:
    """By the engine's start time; where it tells none, by having been away."""
    roster = roster_of(A)
    for started_at, restarts in ((1.0, 0), (1.0, 0), (2.0, 1)):
        roster.ok(A.id, Gauges(started_at=started_at), 0)
        assert roster.statuses(0)[0].restarts == restarts
    roster.failed(A.id, "refused", 1, refused=True)
    roster.ok(A.id, Gauges(started_at=2.0), 2)
    assert roster.statuses(2)[0].restarts == 1, "only the network was away"
    roster.ok(A.id, Gauges(), 2)
    roster.failed(A.id, "refused", 3, refused=True)
    roster.ok(A.id, Gauges(), 4)
    assert roster.statuses(4)[0].restarts == 2


VLLM = """# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="500"} 1.0
process_start_time_seconds 1.7e+09
"""


def test_gauges_of_an_engine_and_of_its_ranks() -> None:
    assert parse_gauges(VLLM, None) == Gauges(7, 0.5, 24_000, 1.7e9)
    assert parse_gauges(VLLM, 1) == Gauges(5, 0.25, 8_000, 1.7e9)
    assert parse_gauges("sglang:num_queue_reqs 5", None) == Gauges()


def test_what_is_no_number_is_no_gauge() -> None:
    text = VLLM.replace(" 2.0", " oops").replace(" 0.5", " NaN").replace("1.7e+09", "1.7e+09x")
    assert parse_gauges(text, None) == Gauges(5, 0.25, 24_000, None)
    assert parse_gauges("vllm:num_requests_waiting oops", None) == Gauges()
    assert parse_gauges(VLLM.replace('"1000"', f'"{"9" * 5_000}"'), 0).cache_tokens is None


def test_metrics_of_workers_are_added_up() -> None:
    one, two = Metrics(), Metrics()
    for metrics, seconds in ((one, 0.003), (two, 0.003), (two, 1_000)):
        metrics.count("requests_total", 'a"b', "200")
        metrics.observe(seconds, "first_byte_seconds", "a")
    lines = metrics_text([*one.samples(), *two.samples()]).splitlines()
    assert 'kvpool_router_requests_total{replica="a\\"b",status="200"} 3' in lines
    buckets = 'kvpool_router_first_byte_seconds_bucket{replica="a",le='
    assert [line.rpartition(" ")[2] for line in lines if line.startswith(buckets)] == [
        "0", "0", *["2"] * 13, "3"
    ]  # fmt: skip
    assert 'kvpool_router_first_byte_seconds_count{replica="a"} 3' in lines


def test_budget_of_retries() -> None:
    budget = RetryBudget(0.5)
    assert [budget.spend() for _ in range(int(BURST) + 1)] == [True] * int(BURST) + [False]
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.available
    assert budget.spend()
    assert not RetryBudget(0).spend()
