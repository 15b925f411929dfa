"""The replicas as a policy sees them, and what is in flight on each.

The proxy keeps it: membership, states, shares, loads and gauges. One event loop owns a fleet; there
are no locks. Each load is counted at dispatch and released in `finally`:

    load = fleet.add_load(decision.replica.id, decision.load_tokens)
    try: ...
    finally: fleet.release_load(load)

State: `total_tokens` and `total_requests` are the sums over all members; a member that was removed
keeps its loads to itself, and a replica that comes back under the same id begins at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_kvpool.router.types import Replica, ReplicaState


@dataclass(slots=True, eq=False)
class Member:
    """One replica in the fleet. Only `Fleet` writes it, but for the gauges, which the proxy does."""

    replica: Replica
    state: ReplicaState = ReplicaState.ACCEPTING
    share: float = 1.0
    """Part of its full load that it is given, in (0, 1]: below 1 while it warms up."""
    tokens: int = 0
    """In flight from this router."""
    requests: int = 0
    waiting: float | None = None
    """Requests queued in the engine (`vllm:num_requests_waiting`); None: not known."""
    cache_usage: float | None = None
    """Share of its KV memory in use (`vllm:kv_cache_usage_perc`); None: not known."""


@dataclass(slots=True, eq=False)
class Load:
    """One request in flight. Released once; a second release changes nothing."""

    member: Member
    tokens: int
    released: bool = False


class Fleet:
    def __init__(self, replicas: tuple[Replica, ...] = ()) -> None:
        self.version = 0
        """Grows when members come or go: what is cached about the set of ids holds for one version."""
        self.total_tokens = 0
        self.total_requests = 0
        self.accepting_share = 0.0
        """Sum of the shares of those that accept: 1 for each that is warm."""
        self.all_well = True
        """All members accept, and are warm."""
        self._members: dict[str, Member] = {}
        for replica in replicas:
            self.add(replica)

    # members --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        """In the order of their ids, the same in every router."""
        return iter(self._members.values())

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._members

    def __getitem__(self, replica_id: str) -> Member:
        return self._members[replica_id]

    def get(self, replica_id: str) -> Member | None:
        return self._members.get(replica_id)

    def add(self, replica: Replica, share: float = 1.0) -> Member:
        """ValueError: there is one with this id."""
        if replica.id in self._members:
            raise ValueError(f"replica {replica.id!r} is in the fleet already")
        member = Member(replica, share=_checked_share(share))
        self._members[replica.id] = member
        self._members = dict(sorted(self._members.items()))
        self.version += 1
        self._sum_shares()
        return member

    def remove(self, replica_id: str) -> None:
        """Its loads go with it. KeyError: there is none."""
        member = self._members.pop(replica_id)
        self.total_tokens -= member.tokens
        self.total_requests -= member.requests
        self.version += 1
        self._sum_shares()

    def set_state(self, replica_id: str, state: ReplicaState) -> None:
        self._members[replica_id].state = state
        self._sum_shares()

    def set_share(self, replica_id: str, share: float) -> None:
        self._members[replica_id].share = _checked_share(share)
        self._sum_shares()

    def _sum_shares(self) -> None:
        shares = [m.share for m in self if m.state is ReplicaState.ACCEPTING]
        self.accepting_share = sum(shares)
        self.all_well = len(shares) == len(self) and all(share == 1 for share in shares)

    # loads ----------------------------------------------------------------------------------------

    def add_load(self, replica_id: str, tokens: int) -> Load:
        """KeyError: there is no such member."""
        member = self._members[replica_id]
        self._count(member, tokens, 1)
        return Load(member, tokens)

    def release_load(self, load: Load) -> None:
        if not load.released:
            load.released = True
            self._count(load.member, -load.tokens, -1)

    def _count(self, member: Member, tokens: int, requests: int) -> None:
        member.tokens += tokens
        member.requests += requests
        if self._members.get(member.replica.id) is member:
            self.total_tokens += tokens
            self.total_requests += requests

    def check_integrity(self) -> None:
        members = self._members.values()
        assert list(self._members) == sorted(self._members)
        assert all(name == m.replica.id for name, m in self._members.items())
        assert all(member.tokens >= 0 and member.requests >= 0 for member in members)
        assert all(member.requests or not member.tokens for member in members)
        assert all(0 < member.share <= 1 for member in members)
        assert self.total_tokens == sum(member.tokens for member in members)
        assert self.total_requests == sum(member.requests for member in members)
        well = (m.state is ReplicaState.ACCEPTING and m.share == 1 for m in members)
        assert self.all_well == all(well)


def _checked_share(share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share = {share!r}: give a number above 0 and at most 1")
    return share
