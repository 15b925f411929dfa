"""Fleets and requests for the router's tests."""

from __future__ import annotations

from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.keys import TEXT_BLOCK_TOKENS
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.rendezvous import hash64, mix
from vllm_kvpool.router.types import Decision, Replica, RouteRequest


def fleet_of(n: int) -> Fleet:
    return Fleet(tuple(Replica(f"r{i}", f"http://r{i}:8000") for i in range(n)))


def request_of(session: str, blocks: int = 20, task: str = "task", stable: int = 4) -> RouteRequest:
    """A prompt of so many text blocks, the first `stable` of them the task's."""
    shared = [mix(hash64(task.encode()), i) for i in range(min(stable, blocks))]
    own = [mix(hash64(f"{task} {session}".encode()), i) for i in range(blocks - len(shared))]
    return RouteRequest(
        model="m",
        stable=hash64(b"stable " + task.encode()),
        session=hash64(session.encode()),
        session_source="header",
        blocks=(*shared, *own),
        stable_tokens=stable * TEXT_BLOCK_TOKENS,
        prompt_tokens=blocks * TEXT_BLOCK_TOKENS,
    )


def decided(policy: Policy, request: RouteRequest, fleet: Fleet, now: float = 0.0) -> Decision:
    decision = policy.decide(request, fleet, now)
    assert decision is not None
    return decision


def sent(policy: Policy, request: RouteRequest, fleet: Fleet, now: float = 0.0) -> Decision:
    """Decided, dispatched and finished."""
    decision = decided(policy, request, fleet, now)
    policy.dispatched(request, decision.replica.id, now)
    policy.finished(request, decision.replica.id, decision.hits.total, now)
    return decision
