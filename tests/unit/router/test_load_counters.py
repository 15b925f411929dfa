"""Whatever happens to a fleet, its load counters are the sum of what is in flight, and end at zero."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vllm_kvpool.router.fleet import Fleet, Load
from vllm_kvpool.router.types import Replica, ReplicaState

ids = st.sampled_from(["a", "b", "c", "d"])


class Chaos(RuleBasedStateMachine):
    loads = Bundle("loads")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.open: list[Load] = []

    @rule(replica_id=ids)
    def add_or_remove(self, replica_id: str) -> None:
        if replica_id in self.fleet:
            self.fleet.remove(replica_id)
        else:
            self.fleet.add(Replica(replica_id, "http://x"))

    @rule(replica_id=ids, state=st.sampled_from(ReplicaState), share=st.floats(0.01, 1))
    def change(self, replica_id: str, state: ReplicaState, share: float) -> None:
        if replica_id in self.fleet:
            self.fleet.set_state(replica_id, state)
            self.fleet.set_share(replica_id, share)

    @rule(target=loads, replica_id=ids, tokens=st.integers(0, 1 << 20))
    def dispatch(self, replica_id: str, tokens: int) -> Load | None:
        if replica_id not in self.fleet:
            return None
        load = self.fleet.add_load(replica_id, tokens)
        self.open.append(load)
        return load

    @rule(load=consumes(loads), times=st.integers(1, 3))
    def release(self, load: Load | None, times: int) -> None:
        if load is not None:
            for _ in range(times):
                self.fleet.release_load(load)
            self.open.remove(load)

    @invariant()
    def sums_fit(self) -> None:
        self.fleet.check_integrity()
        members = set(self.fleet)
        assert self.fleet.total_tokens == sum(
            load.tokens for load in self.open if load.member in members
        )

    def teardown(self) -> None:
        for load in self.open:
            self.fleet.release_load(load)
        assert (self.fleet.total_tokens, self.fleet.total_requests) == (0, 0)
        assert all(not member.tokens and not member.requests for member in self.fleet)


TestChaos = Chaos.TestCase
TestChaos.settings = settings(max_examples=60, stateful_step_count=40)
