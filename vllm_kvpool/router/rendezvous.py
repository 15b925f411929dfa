"""Rendezvous hashing (Thaler and Ravishankar, 1998): every key has its own order of all replicas.

Each pair of key and replica has a score; the order is by falling score. So a replica that goes moves
only its own keys, and spreads them over all others; one that comes takes its part from each.

A replica whose share is below 1 has only that part of its keys: a second hash of the pair says
whether a key is among them. As the share grows keys come to it, and none moves elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.types import ReplicaState

MASK = (1 << 64) - 1
_MIX_1 = 0x9E3779B97F4A7C15
_MIX_2 = 0xD1B54A32D192ED03
_SCORE = (1 << 30) - 1
MAX_CANDIDATES = 9
"""One to be chosen and eight to fall back to."""


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def mix(left: int, right: int) -> int:
    """64 bits of two: the folded 128-bit product, as in wyhash. 0.2 us, where another
    blake2b would be 1 us."""
    product = (left ^ _MIX_1) * (right ^ _MIX_2)
    return (product ^ (product >> 64)) & MASK


class Rendezvous:
    """Orders of a fleet's members by key, the last `capacity` of them kept."""

    def __init__(self, seed: int = 0, capacity: int = 16_384) -> None:
        self._seed = hash64(b"rendezvous %d" % seed)
        self._capacity = capacity
        self._fleet: Fleet | None = None
        self._version = -1
        self._members: tuple[Member, ...] = ()
        self._own_hash: dict[Member, int] = {}
        """In the order of `_members`; odd, so that multiplying loses nothing."""
        self._orders: OrderedDict[tuple[int, int, int], tuple[Member, ...]] = OrderedDict()

    def __len__(self) -> int:
        """Orders that are kept."""
        return len(self._orders)

    def order(self, key: int, fleet: Fleet) -> tuple[Member, ...]:
        """All members, whatever their state, the key's favourite first."""
        return self._kept((key, 0, 0), fleet)

    def order_in_group(self, key: int, group: int, size: int, fleet: Fleet) -> tuple[Member, ...]:
        """The first `size` members in the order of `group`, as `key` orders them; then the others
        as `group` does."""
        return self._kept((key, group, size), fleet)

    def candidates(self, order: Sequence[Member], key: int, bound_to: str | None) -> list[Member]:
        """The first that may take a request, in this order: those that accept, and the one that
        drains where the key is bound to it. Those that have no part in the key come last."""
        if self._fleet is not None and self._fleet.all_well:
            return list(order[:MAX_CANDIDATES])
        found: list[Member] = []
        later: list[Member] = []
        for member in order:
            if member.state is ReplicaState.ACCEPTING or (
                member.state is ReplicaState.DRAINING and member.replica.id == bound_to
            ):
                whole = member.share >= 1 or self._has_part(key, member)
                (found if whole else later).append(member)
                if len(found) == MAX_CANDIDATES:
                    return found
        return (found + later)[:MAX_CANDIDATES]

    def _has_part(self, key: int, member: Member) -> bool:
        salted = mix(key, self._seed ^ _MIX_1)
        return mix(salted, hash64(member.replica.id.encode())) < member.share * MASK

    def _kept(self, entry: tuple[int, int, int], fleet: Fleet) -> tuple[Member, ...]:
        if fleet is not self._fleet or fleet.version != self._version:
            self._begin(fleet)
        order = self._orders.get(entry)
        if order is not None:
            self._orders.move_to_end(entry)
            return order
        return self._keep(entry, fleet)

    def _keep(self, entry: tuple[int, int, int], fleet: Fleet) -> tuple[Member, ...]:
        key, group, size = entry
        if size:
            members = self.order(group, fleet)
            order = (*self._ranked(key, members[:size]), *members[size:])
        else:
            order = tuple(self._ranked(key, self._members))
        self._orders[entry] = order
        if len(self._orders) > self._capacity:
            self._orders.popitem(last=False)
        return order

    def _begin(self, fleet: Fleet) -> None:
        self._fleet, self._version = fleet, fleet.version
        self._orders.clear()
        self._members = tuple(fleet)
        self._own_hash = {m: hash64(m.replica.id.encode()) | 1 for m in fleet}

    def _ranked(self, key: int, members: Sequence[Member]) -> list[Member]:
        """By the upper 30 of the low 64 bits of key times member: one multiplication each, since there
        are 64 of them in the time of a decision, and numbers that small are sorted twice as fast.
        Both are hashes, so nothing more needs mixing."""
        salted = mix(key, self._seed) | 1
        own = self._own_hash
        if members is self._members:
            scores = [salted * value >> 34 & _SCORE for value in own.values()]
        else:
            scores = [salted * own[member] >> 34 & _SCORE for member in members]
        falling = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return [members[i] for i in falling]

    def check_integrity(self) -> None:
        assert len(self._orders) <= self._capacity
