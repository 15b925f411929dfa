"""Stores, scheduler side. Best effort: a block that cannot be stored now and here is skipped.

    offer         blocks are full after this step: pin them, ask the daemon for slots   -> asked
    take_grants   the daemon answered (a step or more later): plan the copy             -> copying
    report        all workers ended the copy: complete it, unpin                        -> gone

Pinned blocks are in `asked` or `copying`, at most `max_pinned` of them; vLLM keeps a pinned block
as it is, whatever becomes of its request. The copy is handed to the workers with a later step than
the one that computed the block, so it comes after that step in each worker.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_kvpool._native import COPY_OK
from vllm_kvpool.client import PoolClient
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector.compat import BlockPins
from vllm_kvpool.connector.link import PoolLink
from vllm_kvpool.connector.metadata import CopyJob, JobReport
from vllm_kvpool.connector.records import RequestRecord
from vllm_kvpool.connector.stats import KVPoolStats
from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.types import (
    KEY_BYTES,
    NO_REF,
    NO_REFS,
    BlockKeys,
    SlotRefs,
    num_refs,
    pack_refs,
    unpack_refs,
    without_none,
)

MAX_PINNED_SHARE = 0.5
"""Of the KV cache: where that is small it is what a few steps full of prompts compute before the first of them are
reported as stored, and requests that end meanwhile lose what was not pinned."""
RETRY_S = 1.0
"""Before blocks that got no slot are offered again. After copies that failed it doubles with each: what keeps them from
succeeding may last, and they take others' room and the GPU's time."""
MAX_RETRY_S = 64.0
MAX_ASK_BLOCKS = 512
"""In one request to the daemon, of which a step has one for each request of the engine."""
MAX_LAST_ASKS = 8
"""When a request ends: bounds the time spent in that hook."""


@dataclass(slots=True)
class _Store:
    record: RequestRecord
    places: Sequence[int]
    """Which of the request's blocks they are."""
    block_ids: Sequence[int]
    grant_id: int
    refs: SlotRefs = NO_REFS
    """Granted."""
    report: JobReport | None = None


class StorePlanner:
    def __init__(
        self,
        link: PoolLink,
        config: ConnectorConfig,
        stats: KVPoolStats,
        numbers: Iterator[int],
    ) -> None:
        self._link = link
        self._config = config
        self._stats = stats
        self._numbers = numbers
        self._pins: BlockPins | None = None
        self._max_pinned = 0
        self._num_pinned = 0
        self._asked: dict[int, _Store] = {}
        self._copying: dict[int, _Store] = {}
        self._planned: list[CopyJob] = []
        self._refused = False

    def set_block_pool(self, pins: BlockPins) -> None:
        self._pins = pins
        self._max_pinned = max(1, int(pins.num_blocks * MAX_PINNED_SHARE))

    @property
    def in_flight(self) -> bool:
        return self._num_pinned > 0

    # offer ----------------------------------------------------------------------------------------

    def offer(self, record: RequestRecord, num_computed_tokens: int, *, last: bool = False) -> None:
        """Store what is full with `num_computed_tokens`, as far as room and hashes reach: hashes
        come only with confirmed tokens, later than the blocks when scheduling is asynchronous.
        `last`: the request ends, there is no later."""
        tokens = num_computed_tokens
        if self._config.store == "prompt":
            tokens = min(tokens, record.request.num_prompt_tokens)
        full = tokens // self._link.block_tokens
        end = min(full, len(record.request.block_hashes), len(record.block_ids))
        if end <= record.cursor or not self._may_store(record):
            return
        if last:
            self._offer_rest(record, end)
        elif self._room > 0 and time.monotonic() >= record.store_after_s:
            self._skip_present(record, end)
            self._ask(record, end)

    def _offer_rest(self, record: RequestRecord, end: int) -> None:
        if not record.failed_copies:
            self._skip_present(record, end)
            for _ in range(MAX_LAST_ASKS):
                self._ask(record, end)
        if end > record.cursor:
            self._stats.count(
                "store_skipped_blocks",
                end - record.cursor,
                reason="device" if self._link.device_off else "ended",
            )

    def _may_store(self, record: RequestRecord) -> bool:
        long_enough = record.request.num_prompt_tokens >= self._config.min_store_tokens
        return record.may_store and long_enough and not record.loading

    def _skip_present(self, record: RequestRecord, end: int) -> None:
        keys = record.keys(self._link.mask)[record.cursor * KEY_BYTES : end * KEY_BYTES]
        record.cursor += num_refs(self._link.match_prefix(BlockKeys(keys)))

    @property
    def _room(self) -> int:
        """Blocks that may be asked for in this step."""
        idle = self._refused or self._link.device_off
        return 0 if idle else self._max_pinned - self._num_pinned

    def _ask(self, record: RequestRecord, end: int) -> None:
        """For the next of the blocks before `end`, if there are any."""
        end = min(end, record.cursor + min(self._room, MAX_ASK_BLOCKS))
        if end <= record.cursor:
            return
        keys = record.keys(self._link.mask)
        start = record.cursor * KEY_BYTES
        hints = record.hints
        number = self._client.prepare_store(
            BlockKeys(keys[start : end * KEY_BYTES]),
            parent=keys[max(0, start - KEY_BYTES) : start],
            ttl_s=hints.ttl_s or 0,
            pin=hints.pin,
        )
        if number is None:
            self._refused = True  # until the next step, which offers the same blocks again
            return
        places = range(record.cursor, end)
        store = _Store(record, places, record.block_ids[record.cursor : end], number)
        self._asked[number] = store
        self._pin(store.block_ids)
        record.cursor = end

    # grants ---------------------------------------------------------------------------------------

    def take_grants(self, grants: list[StoreGrant]) -> None:
        """Call it at each step."""
        self._refused = False
        for grant in grants:
            store = self._asked.pop(grant.request_id)
            if grant.refs is None:
                self._give_up(store.block_ids, grant.reason)
                self._rewind(store.record, store.places[0])
            else:
                self._plan(store, grant.refs)

    def _rewind(self, record: RequestRecord, place: int) -> None:
        """That block is not in the pool: what follows is worth nothing without it. Offer it again,
        when there has been time to come back or to make room."""
        record.cursor = min(record.cursor, place)
        pause_s = min(RETRY_S * 2**record.failed_copies, MAX_RETRY_S)
        record.store_after_s = time.monotonic() + pause_s

    def _plan(self, store: _Store, refs: SlotRefs) -> None:
        assert num_refs(refs) == len(store.block_ids)
        granted = without_none(refs)
        if len(granted) < len(refs):
            self._drop_not_granted(store, unpack_refs(refs))
        if not granted:
            return
        store.refs = granted
        number = next(self._numbers)
        self._copying[number] = store
        self._planned.append(CopyJob(number, granted, array("I", store.block_ids).tobytes()))

    def _drop_not_granted(self, store: _Store, refs: Sequence[int]) -> None:
        granted = [i for i, ref in enumerate(refs) if ref != NO_REF]
        left = [block for ref, block in zip(refs, store.block_ids, strict=True) if ref == NO_REF]
        self._give_up(left, "not_granted")
        if refs[-1] == NO_REF:  # no room for the rest, or another engine is storing it
            self._rewind(store.record, store.places[granted[-1] + 1 if granted else 0])
        store.block_ids = [store.block_ids[i] for i in granted]
        store.places = [store.places[i] for i in granted]

    def _give_up(self, block_ids: Sequence[int], reason: str) -> None:
        self._unpin(block_ids)
        self._stats.count("store_skipped_blocks", len(block_ids), reason=reason)

    def take_planned(self) -> tuple[CopyJob, ...]:
        planned, self._planned = self._planned, []
        return tuple(planned)

    # end ------------------------------------------------------------------------------------------

    def report(self, number: int, report: JobReport) -> bool:
        """Whether `number` is a store."""
        store = self._copying.get(number)
        if store is None:
            return False
        store.report = report.merged(store.report)
        if store.report.num_workers == self._link.num_workers:
            del self._copying[number]
            self._finish(store, store.report)
        return True

    def _finish(self, store: _Store, report: JobReport) -> None:
        self._unpin(store.block_ids)
        failed = NO_REFS
        if any(report.statuses):
            pairs = zip(unpack_refs(store.refs), report.statuses, strict=True)
            failed = pack_refs(ref for ref, status in pairs if status != COPY_OK)
            self._stats.count("store_skipped_blocks", num_refs(failed), reason="copy_failed")
            self._rewind(store.record, store.places[report.num_good])
            store.record.failed_copies += 1
        else:
            store.record.failed_copies = 0
        if self._client.complete_store(store.grant_id, failed):
            self._stats.count("store_blocks", num_refs(store.refs) - num_refs(failed))

    # pins -----------------------------------------------------------------------------------------

    def _pin(self, block_ids: Sequence[int]) -> None:
        assert self._pins is not None
        self._pins.pin(block_ids)
        self._num_pinned += len(block_ids)

    def _unpin(self, block_ids: Sequence[int]) -> None:
        assert self._pins is not None
        self._pins.unpin(block_ids)
        self._num_pinned -= len(block_ids)

    @property
    def _client(self) -> PoolClient:
        assert self._link.client is not None
        return self._link.client

    def check_integrity(self) -> None:
        stores = [*self._asked.values(), *self._copying.values()]
        assert self._num_pinned == sum(len(store.block_ids) for store in stores)
        assert self._num_pinned <= self._max_pinned
