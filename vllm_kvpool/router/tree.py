"""The approximate cache tree: what each replica should still hold, by what was sent there.

One LRU of text blocks for each replica, as large as its cache, because a tree that never forgets
promises hits that are long gone. A prompt is touched from its last block to its first, so that a
parent is never older than its children, and leaves are evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from vllm_kvpool.router.prefix_index import Holders, PrefixIndex

DEFAULT_BLOCKS = 4_096
"""Of a replica whose cache's size is not known: about 500,000 tokens."""


class CacheTree:
    """At most the sum of all capacities in entries of about 200 bytes."""

    def __init__(self, default_blocks: int = DEFAULT_BLOCKS) -> None:
        self._default_blocks = default_blocks
        self._index = PrefixIndex()
        self._caches: dict[str, OrderedDict[int, None]] = {}
        self._capacities: dict[str, int] = {}

    def __len__(self) -> int:
        """Blocks of all replicas together."""
        return sum(map(len, self._caches.values()))

    def depth(self, blocks: Sequence[int], replica_id: str) -> int:
        """Leading blocks that the replica should hold."""
        return self._index.depth(blocks, replica_id)

    def depths(self, blocks: Sequence[int], above: int = 0) -> Iterator[tuple[int, Holders]]:
        """See `PrefixIndex.depths`."""
        return self._index.depths(blocks, above)

    def touch(self, replica_id: str, blocks: Sequence[int]) -> None:
        """The replica was sent a prompt of these."""
        cache = self._caches.setdefault(replica_id, OrderedDict())
        bit = self._index.bit(replica_id)
        for block in reversed(blocks):
            if block in cache:
                cache.move_to_end(block)
            else:
                cache[block] = None
                self._index.add(block, bit)
        self._evict(replica_id)

    def resize(self, replica_id: str, capacity: int) -> None:
        """In text blocks; takes effect at once."""
        self._capacities[replica_id] = max(1, capacity)
        self._evict(replica_id)

    def forget(self, replica_id: str) -> None:
        bit = self._index.bit(replica_id)
        for block in self._caches.pop(replica_id, ()):
            self._index.discard(block, bit)
        self._index.free_bit(replica_id)
        self._capacities.pop(replica_id, None)

    def _evict(self, replica_id: str) -> None:
        cache = self._caches.get(replica_id, OrderedDict())
        capacity = self._capacities.get(replica_id, self._default_blocks)
        bit = self._index.bit(replica_id)
        while len(cache) > capacity:
            self._index.discard(cache.popitem(last=False)[0], bit)

    def check_integrity(self) -> None:
        self._index.check_integrity()
        held = {block for cache in self._caches.values() for block in cache}
        assert len(held) == len(self._index)
        for replica_id, cache in self._caches.items():
            assert len(cache) <= self._capacities.get(replica_id, self._default_blocks)
            assert all(self._index.depth((block,), replica_id) for block in cache)
