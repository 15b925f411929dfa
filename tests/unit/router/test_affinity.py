"""task, cache_aware and session: sessions stay on their caches, and few move when the fleet changes."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.router.values import decided, fleet_of, request_of, sent
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.keys import TEXT_BLOCK_TOKENS
from vllm_kvpool.router.policies import POLICIES, make_policy
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.types import Replica, ReplicaState

FOLLOWERS = ["task", "session", "cache_aware", "kv_events"]
SESSIONS = [f"session {i}" for i in range(400)]


def placed(policy: Policy, fleet: Fleet, now: float = 0.0) -> dict[str, str]:
    """Where each session goes now, one after the other, nothing in flight meanwhile."""
    return {s: sent(policy, request_of(s), fleet, now).replica.id for s in SESSIONS}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_session_comes_back_to_its_replica(name: str) -> None:
    policy, fleet = make_policy(name), fleet_of(8)
    assert placed(policy, fleet) == placed(policy, fleet)
    policy.check_integrity()


@pytest.mark.parametrize("name", FOLLOWERS)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_one_more_moves_no_more_than_its_part(name: str, n: int) -> None:
    policy, fleet = make_policy(name), fleet_of(n)
    before = placed(policy, fleet)
    fleet.add(Replica("new", "http://new"))
    after = placed(policy, fleet)
    moved = sum(before[s] != after[s] for s in SESSIONS)
    assert moved / len(SESSIONS) <= 1 / (n + 1) + 0.05


@pytest.mark.parametrize("name", FOLLOWERS)
@pytest.mark.parametrize("n", [3, 4, 8])
def test_one_less_moves_no_others(name: str, n: int) -> None:
    policy, fleet = make_policy(name), fleet_of(n)
    before = placed(policy, fleet)
    fleet.remove("r1")
    policy.forget("r1")
    after = placed(policy, fleet)
    assert not [s for s in SESSIONS if before[s] != "r1" and before[s] != after[s]]


@pytest.mark.parametrize("name", ["task", "session", "kv_events"])
def test_the_sessions_of_a_dead_replica_spread_over_the_whole_group(name: str) -> None:
    """And a router that has never seen them sends them to the same places."""
    policy, fleet = make_policy(name), fleet_of(6)
    sessions = [f"{i}" for i in range(2_000)]
    for session in sessions:  # a task with all of the load: its group is the fleet
        sent(policy, request_of(session, blocks=8), fleet)
    homes = {s: decided(policy, request_of(s, blocks=8), fleet).replica.id for s in sessions}
    fleet.set_state("r2", ReplicaState.OUT)
    policy.forget("r2")
    orphans = [s for s in sessions if homes[s] == "r2"]
    new_homes = Counter(decided(policy, request_of(s, blocks=8), fleet).replica.id for s in orphans)
    assert len(orphans) > 200
    assert set(new_homes) == {"r0", "r1", "r3", "r4", "r5"}
    assert max(new_homes.values()) < 1.6 * len(orphans) / 5


@pytest.mark.parametrize("name", POLICIES)
def test_two_routers_decide_alike(name: str) -> None:
    """Two that were told the same."""
    routers = [(make_policy(name), fleet_of(7)) for _ in range(2)]
    for session in SESSIONS[:100]:
        decisions = [sent(policy, request_of(session), fleet) for policy, fleet in routers]
        assert decisions[0] == decisions[1]


@pytest.mark.parametrize("name", ["task", "session"])
def test_routers_that_share_nothing_agree_on_sessions(name: str) -> None:
    """One has seen everything, the other nothing."""
    fleet, told = fleet_of(7), make_policy(name)
    for session in SESSIONS:
        sent(told, request_of(session, stable=0), fleet)
    for session in SESSIONS:
        request = request_of(session, stable=0)
        fresh = decided(make_policy(name), request, fleet_of(7))
        assert fresh.replica == decided(told, request, fleet).replica


@pytest.mark.parametrize("name", ["task", "cache_aware", "kv_events"])
def test_hits_are_predicted_by_tier(name: str) -> None:
    policy, fleet = make_policy(name), fleet_of(4)
    first = sent(policy, request_of("s", blocks=20, stable=4), fleet)
    assert (first.hits.stable, first.hits.session) == (0, 0)
    again = sent(policy, request_of("s", blocks=24, stable=4), fleet)
    assert again.hits.stable == 4 * TEXT_BLOCK_TOKENS
    assert again.hits.session == 16 * TEXT_BLOCK_TOKENS
    assert again.load_tokens < first.load_tokens


def test_a_task_that_is_not_hot_stays_together() -> None:
    policy, fleet = make_policy("task"), fleet_of(8)
    for session in range(10):
        for number in range(30):  # thirty tasks share the load
            sent(
                policy, request_of(f"{number} {session}", task=f"t{number}"), fleet, float(session)
            )
    for number in range(30):
        homes = {
            decided(policy, request_of(f"{number} new {i}", task=f"t{number}"), fleet).replica.id
            for i in range(50)
        }
        assert len(homes) <= 2


def test_a_hot_task_gets_more_replicas_instead_of_drowning_one() -> None:
    policy, fleet = make_policy("task"), fleet_of(8)
    for number in range(1_000):
        task = "hot" if number % 2 else f"cold {number % 40}"
        sent(policy, request_of(f"{number}", task=task), fleet, number / 10)
    homes = {
        decided(policy, request_of(f"new {i}", task="hot"), fleet).replica.id for i in range(200)
    }
    assert 4 <= len(homes) <= 7


def test_a_session_that_overflowed_is_found_again() -> None:
    """Its next turn goes where its blocks are, not where its hash says."""
    policy, fleet = make_policy("task"), fleet_of(4)
    home = decided(policy, request_of("s", stable=0), fleet).replica.id
    loads = [fleet.add_load(home, 10_000) for _ in range(10)]
    moved = sent(policy, request_of("s", stable=0), fleet)
    assert moved.reason == "overflow"
    assert moved.replica.id != home
    for load in loads:
        fleet.release_load(load)
    back = decided(policy, request_of("s", blocks=24, stable=0), fleet)
    assert (back.replica, back.reason) == (moved.replica, "tree")


@pytest.mark.parametrize("name", ["task", "cache_aware"])
def test_a_restarted_replica_is_believed_to_hold_nothing(name: str) -> None:
    policy, fleet = make_policy(name), fleet_of(3)
    home = sent(policy, request_of("s"), fleet).replica.id
    policy.forget(home)
    assert decided(policy, request_of("s"), fleet).hits.total == 0
    policy.check_integrity()


@pytest.mark.parametrize("name", ["task", "cache_aware"])
def test_a_holder_with_too_much_to_do_is_passed_over(name: str) -> None:
    policy, fleet = make_policy(name), fleet_of(4)
    home = sent(policy, request_of("s"), fleet).replica.id
    for _ in range(20):
        fleet.add_load(home, 50_000)
    assert decided(policy, request_of("s"), fleet).replica.id != home


@pytest.mark.parametrize("name", FOLLOWERS)
def test_memory_is_bounded(name: str) -> None:
    policy, fleet = make_policy(name), fleet_of(3)
    for member in fleet:
        policy.resize(member.replica.id, 100 * TEXT_BLOCK_TOKENS)
    for number in range(3_000):
        sent(policy, request_of(f"{number}", task=f"{number}"), fleet, float(number))
    policy.check_integrity()
