"""What the scheduler side knows about a request: one record, from `on_new_request` to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_kvpool.connector.hints import Hints
from vllm_kvpool.connector.tradeoff import Prediction
from vllm_kvpool.keys import block_keys
from vllm_kvpool.types import KEY_BYTES, BlockKeys, SlotRefs, num_refs

NO_KEYS = BlockKeys(b"")


@dataclass(frozen=True, slots=True)
class Lookup:
    """Answer of the last lookup. It counts for nothing before the request is admitted."""

    refs: SlotRefs
    """The leading READY blocks, from block 0."""
    first: int
    """Blocks that the engine holds itself: the load begins here."""
    miss: str
    """Why nothing is to be loaded; empty when there is."""
    prediction: Prediction | None = None
    """What decided, where loading was compared with computing."""

    @property
    def num_load_blocks(self) -> int:
        return 0 if self.miss else num_refs(self.refs) - self.first


@dataclass(slots=True)
class RequestRecord:
    request: Any
    """vLLM's own Request: its hashes and token counts change under our hands."""
    hints: Hints
    block_ids: list[int] = field(default_factory=list)
    cursor: int = 0
    """Blocks before it are in the pool, or were offered to it: stores go on from here."""
    store_after_s: float = 0.0
    """Nothing is offered before: the last offer got no slots for all of it."""
    failed_copies: int = 0
    """Of its stores, in a row."""
    alone: bool = False
    """When it was looked up, no other request was in the engine."""
    lookup: Lookup | None = None
    load_number: int = 0
    """The job of its latest load, until all workers have told how that ended. It may begin before an earlier one's
    reports have come: vLLM does not wait for those."""
    arriving: bool = False
    """vLLM goes on with it, but the end of its load has not been reported: its first step may have to wait for that."""
    load_failed: bool = False
    """A load failed: this request computes, or it might try the same slots for ever."""
    pull_asked: bool = False
    pull_id: int = 0
    pull_due_ms: int = 0
    """Blocks of other hosts are waited for until then; 0: not, or not any more."""
    may_store: bool = True
    ambiguous_lora: bool = False
    """Its block hashes do not tell its LoRA adapter from another of the same name."""
    _keys: BlockKeys = NO_KEYS
    _last_hash: bytes = b""

    @property
    def loading(self) -> bool:
        """Its blocks are being written by a load: they hold no tokens yet."""
        return self.load_number != 0 and not self.arriving

    def keys(self, mask: bytes) -> BlockKeys:
        """Keys of all full blocks with a confirmed hash, derived as hashes appear.

        Hashes are chained: where the last known one is unchanged, so are all before it. It changes
        when a streaming session drops the tokens that it had only guessed.
        """
        hashes = self.request.block_hashes
        known = len(self._keys) // KEY_BYTES
        if known and (len(hashes) < known or hashes[known - 1] != self._last_hash):
            self._keys, known = BlockKeys(b""), 0
        if len(hashes) > known:
            self._keys = BlockKeys(self._keys + block_keys(mask, hashes[known:]))
            self._last_hash = hashes[-1]
        return self._keys

    def forget_keys(self) -> None:
        self._keys = BlockKeys(b"")
