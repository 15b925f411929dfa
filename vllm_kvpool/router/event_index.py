"""What each replica's cache holds, by its own KV events, and how far that can be believed.

    NONE      nothing heard, or not understood: the events say nothing
    REPLAY    batches are missing; the engine was asked to send them again
    PARTIAL   every batch since some one, but not since the first: what it knows of is there, and
              more may be
    EXACT     every batch since the engine's start

Where a replay does not close a gap, all is forgotten, since removals may have been missed, and begins
again as PARTIAL. A sequence number that goes back while the engine's clock goes on is an engine that
has restarted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm_kvpool.router import token_hashes
from vllm_kvpool.router.event_wire import Batch, Cleared, EngineHash, Removed, Stored
from vllm_kvpool.router.prefix_index import Holders, PrefixIndex

MAX_BLOCKS = 1 << 20
"""Of one replica: far above what a cache holds. More would mean that removals are not told."""


class Trust(Enum):
    NONE = "none"
    REPLAY = "replay"
    PARTIAL = "partial"
    EXACT = "exact"


@dataclass(slots=True)
class _Source:
    trust: Trust = Trust.NONE
    from_start: bool = True
    """No batch was missed since the engine's start."""
    next_sequence: int | None = 0
    """Of the batch to come; None: whichever it is."""
    misfit: bool = False
    """Its blocks have another size than those of the others."""
    time_s: float = 0.0
    """Of the last batch, by the engine's clock."""
    engine_to_own: dict[EngineHash, int] = field(default_factory=dict)
    """Its blocks: exactly those that the index has for it."""


class EventIndex:
    def __init__(self) -> None:
        self.block_tokens = 0
        """Of all replicas: one with blocks of another size is not understood. 0: not known yet."""
        self._index = PrefixIndex()
        self._sources: dict[str, _Source] = {}
        self._loras: set[str] = set()

    def __len__(self) -> int:
        """Blocks that are held somewhere."""
        return len(self._index)

    # questions --------------------------------------------------------------------------------------

    def knows(self, replica_id: str) -> bool:
        """Whether anything was heard of it, or asked for, since it started."""
        return replica_id in self._sources

    def trust(self, replica_id: str) -> Trust:
        source = self._sources.get(replica_id)
        return source.trust if source else Trust.NONE

    def next_sequence(self, replica_id: str) -> int:
        """The first number that a replay should bring."""
        source = self._sources.get(replica_id)
        return (source.next_sequence or 0) if source else 0

    def chain(self, model: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """Hashes of a prompt's blocks; `model` may name an adapter. Empty while no event has told
        the size of a block."""
        if not self.block_tokens:
            return ()
        return token_hashes.chain(model if model in self._loras else "", tokens, self.block_tokens)

    def depth(self, blocks: Sequence[int], replica_id: str) -> int:
        """Leading blocks that the replica holds."""
        return self._index.depth(blocks, replica_id)

    def depths(self, blocks: Sequence[int], above: int = 0) -> Iterator[tuple[int, Holders]]:
        """See `PrefixIndex.depths`."""
        return self._index.depths(blocks, above)

    # batches ----------------------------------------------------------------------------------------

    def received(self, replica_id: str, sequence: int, batch: Batch) -> bool:
        """One batch, live. False: some before it are missing, from `next_sequence` on; this one
        waits for their replay."""
        source = self._sources.setdefault(replica_id, _Source())
        expected = source.next_sequence
        if expected is not None and sequence < expected:
            if batch.time_s <= source.time_s:
                return True  # a replay has brought it already
            source = self._restarted(replica_id)
            expected = 0
        if expected is not None and sequence > expected:
            source.trust = Trust.REPLAY
            return False
        if expected is None:
            source.from_start = sequence == 0
        self._take(replica_id, source, sequence, batch)
        return True

    def replayed(self, replica_id: str, batches: Sequence[tuple[int, Batch]]) -> None:
        """The engine's answer: all that it still has from `next_sequence` on, in order."""
        source = self._sources.setdefault(replica_id, _Source())
        if not batches and source.next_sequence != 0:
            self.not_replayed(replica_id)
            return
        first = batches[0][0] if batches else 0  # an engine that has published nothing yet
        if first != source.next_sequence:
            self._clear(replica_id, source)
            source.from_start = first == 0
        source.trust = _trust(source)
        for sequence, batch in batches:
            self._take(replica_id, source, sequence, batch)

    def not_replayed(self, replica_id: str) -> None:
        """No answer: take what comes."""
        source = self._sources.setdefault(replica_id, _Source())
        self._clear(replica_id, source)
        source.trust, source.next_sequence, source.from_start = Trust.PARTIAL, None, False

    def not_understood(self, replica_id: str) -> None:
        """It sends what we cannot read: believe nothing of it."""
        source = self._sources.setdefault(replica_id, _Source())
        self._clear(replica_id, source)
        source.trust, source.next_sequence, source.from_start = Trust.NONE, None, False

    def forget(self, replica_id: str) -> None:
        """It has restarted, or is gone."""
        source = self._sources.pop(replica_id, None)
        if source is not None:
            self._clear(replica_id, source)
            self._index.free_bit(replica_id)

    def _restarted(self, replica_id: str) -> _Source:
        self.forget(replica_id)
        source = self._sources[replica_id] = _Source()
        return source

    # events -----------------------------------------------------------------------------------------

    def _take(self, replica_id: str, source: _Source, sequence: int, batch: Batch) -> None:
        source.next_sequence = sequence + 1
        source.time_s = max(source.time_s, batch.time_s)
        for event in batch.events:
            match event:
                case Stored():
                    self._store(replica_id, source, event)
                case Removed():
                    self._remove(replica_id, source, event)
                case Cleared():
                    self._clear(replica_id, source)
                    source.from_start = True  # what is left is all there is
        source.trust = _trust(source)

    def _store(self, replica_id: str, source: _Source, event: Stored) -> None:
        """Blocks whose parent is not known cannot be named: they are left out, with all below."""
        if event.block_tokens != (self.block_tokens or event.block_tokens):
            source.misfit = True
            return
        self.block_tokens = event.block_tokens
        if event.lora_name:
            self._loras.add(event.lora_name)
        own = token_hashes.root(event.lora_name)
        if event.parent is not None:
            known = source.engine_to_own.get(event.parent)
            if known is None:
                return
            own = known
        bit, size = self._index.bit(replica_id), event.block_tokens
        for number, (name, extra) in enumerate(zip(event.hashes, event.extras, strict=True)):
            own = token_hashes.child(own, event.tokens[number * size : (number + 1) * size], extra)
            if source.engine_to_own.setdefault(name, own) == own:
                self._index.add(own, bit)
        if len(source.engine_to_own) > MAX_BLOCKS:
            self._clear(replica_id, source)
            source.from_start = False

    def _remove(self, replica_id: str, source: _Source, event: Removed) -> None:
        bit = self._index.bit(replica_id)
        for name in event.hashes:
            own = source.engine_to_own.pop(name, None)
            if own is not None:
                self._index.discard(own, bit)

    def _clear(self, replica_id: str, source: _Source) -> None:
        bit = self._index.bit(replica_id)
        for own in source.engine_to_own.values():
            self._index.discard(own, bit)
        source.engine_to_own.clear()

    def check_integrity(self) -> None:
        self._index.check_integrity()
        for replica_id, source in self._sources.items():
            assert len(source.engine_to_own) <= MAX_BLOCKS
            assert source.trust is not Trust.EXACT or source.from_start
            held = source.engine_to_own.values()
            assert all(self._index.depth((own,), replica_id) for own in held)
        owned = {own for source in self._sources.values() for own in source.engine_to_own.values()}
        assert len(owned) == len(self._index)


def _trust(source: _Source) -> Trust:
    """Of one that misses no batch now."""
    if source.misfit:
        return Trust.NONE
    return Trust.EXACT if source.from_start else Trust.PARTIAL
