"""All policies through adds, crashes and drains, in simulated time: nothing leaks, affinity pays, and equal runs are
equal. `benchmarks/bench_affinity.py` is the same with a real trace."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.bench_affinity import Ideal, hit_rate, hotspot, simulate
from benchmarks.routing_simulation import Simulation
from benchmarks.routing_workloads import tasks
from vllm_kvpool.router.policies import POLICIES, make_policy
from vllm_kvpool.router.policy import Policy

ARRIVALS = tasks(seed=3, num_tasks=20, num_sessions=400, duration_s=300)


def run(policy: Policy, *, events: bool) -> Simulation:
    """Asserts at its end that all loads are released and all states are sound."""
    model = {"cache_tokens": 300_000, "prefill_rate": 8_000.0, "decode_rate": 40.0}
    return simulate(policy, ARRIVALS, argparse.Namespace(replicas=6, events=events, **model))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_leaks_when_the_fleet_changes(name: str) -> None:
    simulation = run(make_policy(name), events=True)
    assert len(simulation.served) == len(ARRIVALS) + simulation.retried
    assert {request.replica for request in simulation.served} >= {f"r{i}" for i in range(6)}
    after_crash = [r for r in simulation.served if ARRIVALS[-1].at_s / 2 < r.at_s]
    assert "added" in {request.replica for request in after_crash}


@pytest.mark.parametrize("name", ["task", "cache_aware"])
def test_affinity_is_near_the_ideal_and_far_from_none(name: str) -> None:
    policy = hit_rate(run(make_policy(name), events=False).served)
    assert policy >= hit_rate(run(Ideal(), events=False).served) - 0.02
    assert policy >= hit_rate(run(make_policy("round_robin"), events=False).served) + 0.1


def test_sessions_spread_evenly() -> None:
    assert hotspot(run(make_policy("session"), events=False).served) <= 1.3


@pytest.mark.parametrize("name", ["task", "cache_aware"])
def test_predictions_come_true(name: str) -> None:
    """The tree has the replicas' size, and nobody else fills them."""
    served = run(make_policy(name), events=True).served
    predicted = sum(request.predicted_tokens for request in served)
    reported = sum(request.cached_tokens for request in served)
    assert abs(predicted - reported) <= 0.02 * reported


@pytest.mark.parametrize("name", POLICIES)
def test_equal_runs_are_equal(name: str) -> None:
    assert run(make_policy(name), events=True).served == run(make_policy(name), events=True).served
