"""Chains that wait to be pushed, oldest first. Pure: no I/O, no clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, KeysView
from dataclasses import dataclass

from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_keys, split_keys


@dataclass(slots=True, eq=False)
class Chain:
    digest: bytes
    parent: bytes
    keys: BlockKeys
    since_ms: int
    tries: int = 0
    not_before_ms: int = 0
    wholes: int = 0
    """Times that the upstream had lost its head, and all of it was offered anew."""

    def split(self, blocks: int) -> tuple[Chain, Chain | None]:
        """Its first blocks, and the rest."""
        end = blocks * KEY_BYTES
        head = Chain(self.digest, self.parent, BlockKeys(self.keys[:end]), self.since_ms)
        head.tries, head.wholes = self.tries, self.wholes
        if end >= len(self.keys):
            return head, None
        rest = BlockKeys(self.keys[end:])
        return head, Chain(self.digest, head.last, rest, self.since_ms, wholes=self.wholes)

    @property
    def last(self) -> bytes:
        return self.keys[-KEY_BYTES:]


class PushQueue:
    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._chains: deque[Chain] = deque()
        self._by_last: dict[bytes, Chain] = {}
        self._by_parent: dict[bytes, set[Chain]] = {}
        self.num_blocks = 0

    def __len__(self) -> int:
        return len(self._chains)

    def __getitem__(self, place: int) -> Chain:
        return self._chains[place]

    def __iter__(self) -> Iterator[Chain]:
        return iter(self._chains)

    @property
    def lasts(self) -> KeysView[bytes]:
        """Last keys of the chains."""
        return self._by_last.keys()

    def add(self, chain: Chain) -> None:
        """Behind the others, or behind what it continues."""
        self.num_blocks += num_keys(chain.keys)
        before = self._by_last.get(chain.parent)
        if before is not None and before.digest == chain.digest:
            del self._by_last[before.last]
            before.keys = BlockKeys(before.keys + chain.keys)
            before.since_ms = chain.since_ms
            chain = before
        else:
            self._chains.append(chain)
            self._by_parent.setdefault(chain.parent, set()).add(chain)
        self._by_last[chain.last] = chain

    def put_back(self, chain: Chain) -> None:
        """Before the others."""
        self._chains.appendleft(chain)
        self._by_parent.setdefault(chain.parent, set()).add(chain)
        self._by_last[chain.last] = chain
        self.num_blocks += num_keys(chain.keys)

    def take_out(self, place: int) -> Chain:
        chain = self._chains[place]
        del self._chains[place]
        self.num_blocks -= num_keys(chain.keys)
        if self._by_last.get(chain.last) is chain:
            del self._by_last[chain.last]
        siblings = self._by_parent[chain.parent]
        siblings.remove(chain)
        if not siblings:
            del self._by_parent[chain.parent]
        return chain

    # what is given up -----------------------------------------------------------------------------

    def drop(self, chain: Chain, reason: str) -> None:
        """It is not in the queue any more."""
        self._counters[f"push_{reason}"] += num_keys(chain.keys)

    def drop_all(self, reason: str) -> None:
        while self._chains:
            self.drop(self.take_out(0), reason)

    def drop_behind(self, batch: Chain, reason: str) -> None:
        """What continues any block of it: that would be refused, and the whole chain offered again, and so on."""
        lost = list(split_keys(batch.keys))
        while lost:
            for chain in list(self._by_parent.get(lost.pop(), ())):
                self.drop(self.take_out(self._chains.index(chain)), reason)
                lost += split_keys(chain.keys)
