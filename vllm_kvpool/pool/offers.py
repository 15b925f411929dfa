"""What the daemon's loop does for pushes: it says which chains the upstream shall have, and learns which
blocks it has.

    stored   somebody got slots for a chain, from an engine or another host
    WHOLE    the upstream has lost what comes before a block: all of its chain, from the head on
    turn     what was here before the daemon, or was given up while the upstream was away: the last block of
             every chain, a few at a time. An upstream that has it has the chain; one that does not have
             the block before it says so, and WHOLE follows
    ARRIVED  blocks are there, and so they are its copies here (docs/eviction.md)

Runs on the daemon's own thread; `Pushes` is the other side, on the exchange's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.types import num_keys

WHOLE, ARRIVED = b"whole", b"arrived"
TURN_MS = 250
SLICE_SLOTS, SLICES = 64, 32
"""Looked at in one turn: less than a millisecond."""
SLICE_CHAINS = 32
"""Offered in one turn, and a slice more: each may turn out to be a long chain that is not there."""
FEW_WAITING = 1_024
"""Blocks in the queue: what is new shall not wait behind what is old."""
AGAIN_MS = 60_000
"""After blocks were given up, before all is offered once more."""
GIVEN_UP = ("push_lost", "push_slow", "push_busy", "push_unheard")
"""Counters of blocks that may find a better time."""


class Offers:
    def __init__(
        self,
        owner: PoolOwner,
        upstream: bytes,
        submit: Callable[[bytes, bytes, bytes], bool],
        counters: Counter[str],
    ) -> None:
        """`upstream`: its id, as a source of blocks. `submit`: offer a chain (namespace, parent, keys);
        False: too much waits."""
        self._owner = owner
        self._upstream = upstream
        self._submit = submit
        self._counters = counters
        self._next_slot = 0
        self._walk_at_ms: int | None = 0
        """None: all that is here was offered."""
        self._next_turn_ms = 0
        self._given_up = 0
        """Blocks, before this walk began."""

    def stored(self, digest: bytes, parent: bytes, keys: bytes, source: bytes) -> None:
        if source != self._upstream:  # or it comes from there
            self._offer(digest, parent, keys)

    def _offer(self, digest: bytes, parent: bytes, keys: bytes) -> None:
        if not self._submit(digest, parent, keys):
            # Of this thread alone: `+=` of two threads loses some.
            self._counters["push_unheard"] += num_keys(keys)

    def hear(self, what: bytes, digest: bytes, keys: bytes) -> None:
        """From `Pushes`."""
        if what == ARRIVED:
            self._owner.mark_copies(keys, self._upstream)
        elif chain := self._owner.path_to(keys):
            self._offer(digest, b"", chain)
        else:
            self._counters["push_no_parent"] += 1

    # what is here from before ---------------------------------------------------------------------

    def turn(self, now_ms: int) -> None:
        """Call it whenever there is time: it does nothing before it is due."""
        if now_ms < self._next_turn_ms:
            return
        self._next_turn_ms = now_ms + TURN_MS
        given_up = sum(self._counters[name] for name in GIVEN_UP)
        if self._walk_at_ms is None and given_up > self._given_up:
            self._walk_at_ms = now_ms + AGAIN_MS
        due = self._walk_at_ms is not None and now_ms >= self._walk_at_ms
        if due and self._counters["push_waiting"] < FEW_WAITING:
            if self._next_slot == 0:
                self._given_up = given_up
            self._walk()

    def _walk(self) -> None:
        offered, digests = 0, self._digests()
        for _ in range(SLICES):
            offered += self._offer_slice(digests)
            if self._next_slot == self._owner.num_slots:
                self._next_slot, self._walk_at_ms = 0, None
                return
            if offered >= SLICE_CHAINS:
                return

    def _offer_slice(self, digests: dict[int, bytes]) -> int:
        """How many chains."""
        found = self._owner.ready_leaves(self._next_slot, SLICE_SLOTS)
        namespace, leaves, self._next_slot = found
        for parent, key in leaves:
            self._offer(digests[namespace], parent, key)
        return len(leaves)

    def _digests(self) -> dict[int, bytes]:
        """Of the namespaces, by their index: while nothing else happens these do not change."""
        spaces: list[dict[str, Any]] = self._owner.namespaces()
        return {space["index"]: bytes.fromhex(space["digest"]) for space in spaces}
