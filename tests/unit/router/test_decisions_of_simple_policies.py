"""round_robin, least_load and session choose as they say, and change nothing by deciding."""

from __future__ import annotations

import pytest

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.keys import route_request
from vllm_kvpool.router.policies import POLICIES, make_policy
from vllm_kvpool.router.types import Replica, ReplicaState, RouteRequest


def fleet_of(n: int) -> Fleet:
    return Fleet(tuple(Replica(f"r{i}", f"http://r{i}:8000") for i in range(n)))


def request_of(session: str, text: str = "hello") -> RouteRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return route_request(body, {"X-Session-ID": session})


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="round_robin"):
        make_policy("fastest")


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_to_choose_is_an_answer(name: str) -> None:
    assert make_policy(name).decide(request_of("s"), Fleet(), 0.0) is None
    fleet = fleet_of(2)
    for member in fleet:
        fleet.set_state(member.replica.id, ReplicaState.OUT)
    assert make_policy(name).decide(request_of("s"), fleet, 0.0) is None


@pytest.mark.parametrize("name", POLICIES)
def test_deciding_changes_nothing(name: str) -> None:
    policy, fleet = make_policy(name), fleet_of(5)
    decisions = [policy.decide(request_of("s"), fleet, 0.0) for _ in range(3)]
    assert decisions[0] is not None
    assert decisions[0] == decisions[1] == decisions[2]
    fallbacks = [replica.id for replica in decisions[0].fallbacks]
    assert sorted([*fallbacks, decisions[0].replica.id]) == [m.replica.id for m in fleet]


def test_round_robin_takes_turns() -> None:
    policy, fleet = make_policy("round_robin"), fleet_of(3)
    seen = []
    for _ in range(6):
        decision = policy.decide(request_of("s"), fleet, 0.0)
        assert decision is not None
        seen.append(decision.replica.id)
        policy.dispatched(request_of("s"), decision.replica.id, 0.0)
    assert seen == ["r0", "r1", "r2"] * 2


def test_least_load_goes_by_tokens_and_share() -> None:
    policy, fleet = make_policy("least_load"), fleet_of(3)
    for replica_id, tokens in (("r0", 300), ("r1", 100), ("r2", 80)):
        fleet.add_load(replica_id, tokens)
    fleet.set_share("r2", 0.5)
    decision = policy.decide(request_of("s"), fleet, 0.0)
    assert decision is not None
    assert decision.replica.id == "r1"
    assert [replica.id for replica in decision.fallbacks] == ["r2", "r0"]


def test_a_session_stays_until_its_replica_carries_too_much() -> None:
    policy, fleet = make_policy("session"), fleet_of(4)
    first = policy.decide(request_of("s"), fleet, 0.0)
    assert first is not None
    assert first.reason == "session"
    loads = [fleet.add_load(first.replica.id, 1_000) for _ in range(20)]
    moved = policy.decide(request_of("s"), fleet, 0.0)
    assert moved is not None
    assert (moved.replica, moved.reason) == (first.fallbacks[0], "overflow")
    for load in loads:
        fleet.release_load(load)
    assert policy.decide(request_of("s"), fleet, 0.0) == first


def test_a_draining_replica_keeps_its_sessions_and_takes_no_new_ones() -> None:
    policy, fleet = make_policy("session"), fleet_of(4)
    first = policy.decide(request_of("s"), fleet, 0.0)
    assert first is not None
    policy.dispatched(request_of("s"), first.replica.id, 0.0)
    fleet.set_state(first.replica.id, ReplicaState.DRAINING)
    assert policy.decide(request_of("s"), fleet, 0.0) == first
    for number in range(50):
        other = policy.decide(request_of(f"new {number}"), fleet, 0.0)
        assert other is not None
        assert other.replica != first.replica
        assert first.replica not in other.fallbacks
