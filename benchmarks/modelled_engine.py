"""A model of one engine's prefix cache and speed: what mock replicas and simulations share.

    cache     LRU over blocks; a chain is touched from its leaf to its root, so that leaves go first
    prefill   one request after the other, at `prefill_tokens_per_s`, of what the cache does not hold
    decode    each request by itself, at `decode_tokens_per_s`

It has no clock: times are arguments and results, in seconds. A rate of 0 means "at once".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineModel:
    """The defaults are about an 8B model on one GPU."""

    cache_tokens: int = 400_000
    block_tokens: int = 16
    prefill_tokens_per_s: float = 25_000
    decode_tokens_per_s: float = 60
    overhead_s: float = 0.02
    """Of every request, before its first token."""


@dataclass(frozen=True, slots=True)
class Admission:
    cached_tokens: int
    first_token_s: float
    finished_s: float
    """When the first and the last token are there."""
    stored: list[int]
    """Positions in the chain of the blocks that are new in the cache."""
    evicted: list[int]
    """Hashes of the blocks that had to go."""


@dataclass(slots=True)
class ModelledEngine:
    model: EngineModel
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """The cache, least recently used first. At most `capacity` of them."""
    prefill_free_s: float = 0.0
    """When the prefills that were admitted are done."""

    @property
    def capacity(self) -> int:
        return max(1, self.model.cache_tokens // self.model.block_tokens)

    def admit(
        self, chain: Sequence[int], prompt_tokens: int, output_tokens: int, now_s: float
    ) -> Admission:
        """One request whose prompt has these full blocks. The last token is always computed."""
        hit_blocks = min(self.match(chain), max(0, prompt_tokens - 1) // self.model.block_tokens)
        cached_tokens = hit_blocks * self.model.block_tokens
        stored, evicted = self.store(chain)
        start_s = max(now_s, self.prefill_free_s)
        computed = prompt_tokens - cached_tokens
        self.prefill_free_s = start_s + _duration(computed, self.model.prefill_tokens_per_s)
        first_s = self.prefill_free_s + self.model.overhead_s
        finished_s = first_s + _duration(output_tokens, self.model.decode_tokens_per_s)
        return Admission(cached_tokens, first_s, finished_s, stored, evicted)

    def match(self, chain: Sequence[int]) -> int:
        """Leading blocks that the cache holds."""
        return next((i for i, block in enumerate(chain) if block not in self.blocks), len(chain))

    def store(self, chain: Sequence[int]) -> tuple[list[int], list[int]]:
        """Positions that are new, and what was evicted for them."""
        stored = [i for i, block in enumerate(chain) if block not in self.blocks]
        for block in reversed(chain):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        evicted = []
        while len(self.blocks) > self.capacity:
            evicted.append(self.blocks.popitem(last=False)[0])
        return stored, evicted

    def clear(self) -> None:
        """A restart."""
        self.blocks.clear()
        self.prefill_free_s = 0.0

    def check_integrity(self) -> None:
        assert len(self.blocks) <= self.capacity


def _duration(tokens: int, tokens_per_s: float) -> float:
    return tokens / tokens_per_s if tokens_per_s else 0.0
