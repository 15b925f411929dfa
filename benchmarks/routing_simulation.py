"""Replicas and a router in simulated time: the policies' own code, on `modelled_engine.py`.

No sockets, no clock: an hour takes seconds, and equal inputs give equal results. What the proxy does around a policy
(loads, warm-up, health, retries) is done here in a few lines, and only as far as it matters for where requests go.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.modelled_engine import EngineModel, ModelledEngine
from benchmarks.routing_workloads import Arrival
from vllm_kvpool.router.fleet import Fleet, Load
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.types import Replica, ReplicaState

WARM_UP_S = 60.0
WARM_UP_STEPS = 4


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request."""

    at_s: float
    session: int
    replica: str
    reason: str
    prompt_tokens: int
    cached_tokens: int
    cached_stable_tokens: int
    predicted_tokens: int
    load_tokens: int
    ttft_s: float
    fair_share: float
    """Of all tokens, for one replica of the fleet as it was."""


@dataclass(slots=True)
class _InFlight:
    load: Load
    arrival: Arrival
    first_token_s: float
    cached_tokens: int
    lost: bool = False


@dataclass(slots=True)
class Simulation:
    policy: Policy
    model: EngineModel
    num_replicas: int
    served: list[Served] = field(default_factory=list)
    retried: int = 0
    broken: int = 0
    """Requests of a crashed replica: sent again, and those whose answer had begun."""
    fleet: Fleet = field(default_factory=Fleet)
    engines: dict[str, ModelledEngine] = field(default_factory=dict)
    now_s: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0
    _in_flight: dict[str, list[_InFlight]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for number in range(self.num_replicas):
            self.add(f"r{number}", warm=True)

    def run(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self._run_until(arrival.at_s)
            self._send(arrival, arrival.at_s)
        self._run_until(float("inf"))
        self.check_integrity()

    # events of the fleet ----------------------------------------------------------------------------

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, event))

    def add(self, replica_id: str, warm: bool = False) -> None:
        self.fleet.add(Replica(replica_id, f"http://{replica_id}"))
        self.engines[replica_id] = ModelledEngine(self.model)
        self._begin(replica_id, warm)

    def crash(self, replica_id: str, back_after_s: float) -> None:
        """Everything it holds is lost; it comes back empty."""
        self.fleet.set_state(replica_id, ReplicaState.OUT)
        self.engines[replica_id].clear()
        self.policy.forget(replica_id)
        for request in self._in_flight.pop(replica_id, []):
            request.lost = True
            self.fleet.release_load(request.load)
            if request.first_token_s <= self.now_s:
                self.broken += 1
            else:
                self.retried += 1
                self._send(request.arrival, self.now_s)
        self.at(self.now_s + back_after_s, lambda: self._begin(replica_id, warm=False))

    def drain(self, replica_id: str, remove_after_s: float) -> None:
        self.fleet.set_state(replica_id, ReplicaState.DRAINING)
        self.at(self.now_s + remove_after_s, lambda: self._remove(replica_id))

    def _begin(self, replica_id: str, warm: bool) -> None:
        self.policy.resize(replica_id, self.model.cache_tokens)
        self.fleet.set_state(replica_id, ReplicaState.ACCEPTING)
        if warm:
            return
        for step in range(WARM_UP_STEPS):
            share = (step + 1) / WARM_UP_STEPS
            time_s = self.now_s + step * WARM_UP_S / WARM_UP_STEPS
            self.at(time_s, lambda share=share: self.fleet.set_share(replica_id, share))
        self.fleet.set_share(replica_id, 1 / WARM_UP_STEPS)

    def _remove(self, replica_id: str) -> None:
        self.fleet.remove(replica_id)
        self.policy.forget(replica_id)

    # requests ---------------------------------------------------------------------------------------

    def _run_until(self, time_s: float) -> None:
        while self._events and self._events[0][0] <= time_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    def _send(self, arrival: Arrival, now_s: float) -> None:
        self.now_s = now_s
        request = arrival.request
        decision = self.policy.decide(request, self.fleet, now_s)
        assert decision is not None, "a fleet without a replica"
        name = decision.replica.id
        load = self.fleet.add_load(name, decision.load_tokens)
        self.policy.dispatched(request, name, now_s)
        admission = self.engines[name].admit(
            request.blocks, request.prompt_tokens, arrival.output_tokens, now_s
        )
        cached = admission.cached_tokens
        flight = _InFlight(load, arrival, admission.first_token_s, cached)
        self._in_flight[name].append(flight)
        self.at(admission.finished_s, lambda: self._finish(name, flight))
        self.served.append(
            Served(
                now_s, request.session, name, decision.reason, request.prompt_tokens, cached,
                min(cached, request.stable_tokens), decision.hits.total,
                request.prompt_tokens + arrival.output_tokens,
                admission.first_token_s - arrival.at_s, 1 / self.fleet.accepting_share,
            )
        )  # fmt: skip

    def _finish(self, name: str, flight: _InFlight) -> None:
        if flight.lost:
            return
        self._in_flight[name].remove(flight)
        self.fleet.release_load(flight.load)
        self.policy.finished(flight.arrival.request, name, flight.cached_tokens, self.now_s)

    def check_integrity(self) -> None:
        self.fleet.check_integrity()
        self.policy.check_integrity()
        assert self.fleet.total_tokens == 0, "a load was not released"
        assert not any(self._in_flight.values())
        for engine in self.engines.values():
            engine.check_integrity()
