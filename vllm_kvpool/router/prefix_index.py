"""Which replicas hold which blocks, and how deep into a prompt each of them does.

Blocks are named by chained hashes, so a chain of hashes is a path in a tree of prefixes, and a dict
of hashes is all of the tree there needs to be. Depths are found by bisection: that is exact while
whoever holds a block holds its parents, which is so where leaves are evicted first. Replicas are
bits of a number; a bit is used again once its replica is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

MAX_DEPTHS = 4
"""Different depths that are worth a look: whoever is no better than the fourth is not chosen for it."""


class Holders(Collection[str]):
    """Replicas, as bits of one index; good until the index changes."""

    def __init__(self, bits: int, ids: Sequence[str | None], id_to_bit: Mapping[str, int]) -> None:
        self._bits = bits
        self._ids = ids
        self._id_to_bit = id_to_bit

    def __len__(self) -> int:
        return self._bits.bit_count()

    def __contains__(self, replica_id: object) -> bool:
        return isinstance(replica_id, str) and self._bits & self._id_to_bit.get(replica_id, 0) != 0

    def __iter__(self) -> Iterator[str]:
        bits = self._bits
        while bits:
            lowest = bits & -bits
            name = self._ids[lowest.bit_length() - 1]
            assert name is not None, "a bit without a replica"
            yield name
            bits ^= lowest


class PrefixIndex:
    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        """Block to the bits of its holders; never 0."""
        self._ids: list[str | None] = []
        """Number of the bit to replica."""
        self._bits: dict[str, int] = {}

    def bit(self, replica_id: str) -> int:
        """Its bit, a new one if need be."""
        bit = self._bits.get(replica_id)
        if bit is None:
            number = self._ids.index(None) if None in self._ids else len(self._ids)
            self._ids[number : number + 1] = [replica_id]
            bit = self._bits[replica_id] = 1 << number
        return bit

    def free_bit(self, replica_id: str) -> None:
        """Nothing of it may be left in the index."""
        bit = self._bits.pop(replica_id, 0)
        if bit:
            self._ids[bit.bit_length() - 1] = None

    def add(self, block: int, bit: int) -> None:
        self._holders[block] = self._holders.get(block, 0) | bit

    def discard(self, block: int, bit: int) -> None:
        left = self._holders.get(block, 0) & ~bit
        if left:
            self._holders[block] = left
        else:
            self._holders.pop(block, None)

    def __len__(self) -> int:
        return len(self._holders)

    def depth(self, blocks: Sequence[int], replica_id: str) -> int:
        """Leading blocks that it holds."""
        bit = self._bits.get(replica_id, 0)
        return self._deepest(blocks, bit, len(blocks)) if bit else 0

    def depths(self, blocks: Sequence[int], above: int = 0) -> Iterator[tuple[int, Holders]]:
        """Who holds how many leading blocks, the deepest first, as far as it is more than `above`."""
        left, end = -1, len(blocks)
        for _ in range(MAX_DEPTHS):
            depth = self._deepest(blocks, left, end)
            if depth <= above:
                return
            holders = self._holders[blocks[depth - 1]] & left
            yield depth, Holders(holders, self._ids, self._bits)
            left, end = left & ~holders, depth

    def _deepest(self, blocks: Sequence[int], bits: int, end: int) -> int:
        get = self._holders.get
        low, high = 0, end
        while low < high:
            middle = (low + high + 1) // 2
            if get(blocks[middle - 1], 0) & bits:
                low = middle
            else:
                high = middle - 1
        return low

    def check_integrity(self) -> None:
        known = 0
        for name, bit in self._bits.items():
            assert self._ids[bit.bit_length() - 1] == name
            known |= bit
        assert all(bits and not bits & ~known for bits in self._holders.values())
