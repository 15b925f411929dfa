"""Loads, scheduler side: lookup, leases, and what becomes of them.

    look_up    at every step until the request is admitted; changes nothing
    admit      blocks are allocated: lease the slots and plan the copy
    finish     all workers ended the copy: give the leases back

A slot that cannot be leased any more (evicted since the lookup), or whose copy fails, costs its
block and those after it: the workers report load errors, and vLLM computes from there.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_kvpool._native import (
    COPY_CANCELLED,
    COPY_CHECKSUM,
    COPY_FAILED,
    COPY_STALE,
    COPY_UNMAPPED,
)
from vllm_kvpool.client import PoolClient
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector import compat
from vllm_kvpool.connector.link import PoolLink
from vllm_kvpool.connector.metadata import JobReport, LoadJob
from vllm_kvpool.connector.records import Lookup, RequestRecord
from vllm_kvpool.connector.stats import KVPoolStats
from vllm_kvpool.connector.tradeoff import Tradeoff
from vllm_kvpool.types import (
    KEY_BYTES,
    NO_REFS,
    REF_BYTES,
    BlockKeys,
    SlotRefs,
    num_refs,
    pack_refs,
    unpack_refs,
)

STATUS_REASONS = {
    COPY_STALE: "stale",
    COPY_CHECKSUM: "checksum",
    COPY_CANCELLED: "deadline",
    COPY_FAILED: "device",
    COPY_UNMAPPED: "unmapped",
}


@dataclass(slots=True)
class _Load:
    record: RequestRecord
    refs: SlotRefs
    """Leased."""
    first: int
    num_unleased: int
    begun_s: float
    report: JobReport | None = None


class _Plan(NamedTuple):
    number: int
    load: _Load
    chain: SlotRefs
    """From block 0 to the last leased one: what was used, for eviction."""
    rows: Sequence[Any]
    """vLLM's blocks to load into."""


class LoadPlanner:
    def __init__(
        self,
        link: PoolLink,
        config: ConnectorConfig,
        stats: KVPoolStats,
        numbers: Iterator[int],
        lookahead_blocks: int,
        tradeoff: Tradeoff,
    ) -> None:
        self._link = link
        self._min_load_tokens = config.min_load_tokens
        self._stats = stats
        self._numbers = numbers
        self._lookahead_blocks = lookahead_blocks
        self._tradeoff = tradeoff
        self._loads: dict[int, _Load] = {}
        self._planned: list[_Plan] = []
        self._used: list[SlotRefs] = []
        """Chains of requests that load nothing: the engine has the blocks itself. Were the pool not told, it would
        take the prompts that are used most for the oldest."""

    # lookup ---------------------------------------------------------------------------------------

    def look_up(self, record: RequestRecord, num_computed_tokens: int) -> Lookup:
        first = num_computed_tokens // self._link.block_tokens
        refused = self._why_not(record)
        if refused:
            return Lookup(NO_REFS, first, refused)
        end = self.end(record)
        refs = self._match(record, end)
        num_blocks = num_refs(refs) - first
        miss = ""
        if first >= end:
            miss = "local"
        elif num_blocks <= 0:
            miss = "absent"
        elif num_blocks * self._link.block_tokens < self._min_load_tokens:
            miss = "short"
        if miss:
            return Lookup(refs, first, miss)
        return self._compared(record, refs, first)

    def _compared(self, record: RequestRecord, refs: SlotRefs, first: int) -> Lookup:
        end = num_refs(refs)
        num_tokens = (end - first) * self._link.block_tokens
        rest = record.request.num_tokens - end * self._link.block_tokens
        prediction = self._tradeoff.predict(num_tokens, rest, record.alone, time.monotonic())
        load = prediction is None or prediction.load_is_faster
        return Lookup(refs, first, "" if load else "slower", prediction)

    def _why_not(self, record: RequestRecord) -> str:
        if not self._link.usable:
            return "no_pool"
        if not record.hints.load:
            return "hint"
        if getattr(record.request, "skip_reading_prefix_cache", False):
            return "engine"
        if record.load_failed:
            return "load_failed"
        if self._link.device_off:
            return "device"
        return "lora" if record.ambiguous_lora else ""

    def end(self, record: RequestRecord) -> int:
        """Blocks that could be loaded at most. The last token is always computed: nothing is sampled otherwise."""
        full_blocks: int = (record.request.num_tokens - 1) // self._link.block_tokens
        return max(0, full_blocks - self._lookahead_blocks)

    def _match(self, record: RequestRecord, end: int) -> SlotRefs:
        """From block 0, also where the engine has the first blocks itself: the whole chain is used,
        and a block without those before it is worth nothing."""
        keys = record.keys(self._link.mask)
        return self._link.match_prefix(BlockKeys(keys[: end * KEY_BYTES]))

    # admission ------------------------------------------------------------------------------------

    def admit(self, record: RequestRecord, blocks: Any, num_external_tokens: int) -> None:
        """vLLM calls this again, without a lookup before it, when the loaded request is
        scheduled."""
        lookup, record.lookup = record.lookup, None
        if lookup is None:
            return
        record.cursor = max(record.cursor, num_refs(lookup.refs))
        if lookup.prediction is not None:
            self._stats.observe("predicted_load_seconds", lookup.prediction.load_s)
            self._stats.observe("predicted_compute_seconds", lookup.prediction.compute_s)
        if lookup.miss or num_external_tokens == 0:
            if lookup.refs:
                self._used.append(lookup.refs)
            self._stats.count("misses", reason=lookup.miss or "other_connector")
            return
        assert num_external_tokens == lookup.num_load_blocks * self._link.block_tokens
        self._start(record, lookup, blocks)

    def _start(self, record: RequestRecord, lookup: Lookup, blocks: Any) -> None:
        """Only what cannot wait: the rest follows in `take_planned`, as each hook has little time."""
        num_blocks = lookup.num_load_blocks
        refs = self._client.lease(SlotRefs(lookup.refs[lookup.first * REF_BYTES :]))
        number = next(self._numbers)
        begun_s = time.monotonic()
        load = _Load(record, refs, lookup.first, num_blocks - num_refs(refs), begun_s)
        self._loads[number] = load
        chain = SlotRefs(lookup.refs[: lookup.first * REF_BYTES] + refs)
        rows = compat.allocated_blocks(blocks, lookup.first, num_blocks)
        self._planned.append(_Plan(number, load, chain, rows))
        record.load_number, record.arriving = number, False

    def take_planned(self) -> tuple[LoadJob, ...]:
        """In the step in which they were admitted."""
        used, self._used = self._used, []
        for chain in used:
            self._client.touch(chain)
        planned, self._planned = self._planned, []
        return tuple(map(self._job, planned))

    def _job(self, plan: _Plan) -> LoadJob:
        self._client.touch(plan.chain)
        refs = plan.load.refs
        leased = num_refs(refs)
        self._stats.count("hit_blocks", leased)
        self._stats.count("hit_tokens", leased * self._link.block_tokens)
        block_ids = compat.block_ids(plan.rows)
        return LoadJob(
            number=plan.number,
            refs=refs,
            blocks=array("I", block_ids[:leased]).tobytes(),
            request_id=plan.load.record.request.request_id,
            unleased_blocks=tuple(block_ids[leased:]),
        )

    # end ------------------------------------------------------------------------------------------

    def report(self, number: int, report: JobReport) -> bool:
        """Whether `number` is a load. vLLM may look its request up again as soon as one worker has failed."""
        load = self._loads.get(number)
        if load is None:
            return False
        if load.num_unleased or any(report.statuses):
            self._fail(load, report)
        load.report = report.merged(load.report)
        return True

    def _fail(self, load: _Load, report: JobReport) -> None:
        load.record.load_failed = True
        load.record.cursor = min(load.record.cursor, load.first + report.num_good)
        if COPY_CHECKSUM in report.statuses:
            pairs = zip(unpack_refs(load.refs), report.statuses, strict=True)
            damaged = pack_refs(ref for ref, status in pairs if status == COPY_CHECKSUM)
            self._link.drop_damaged(damaged)

    def end_step(self, announced: Collection[str]) -> None:
        """After the reports of a step. `announced`: requests that vLLM goes on with; the reports of their loads have
        come, or follow."""
        for number, load in list(self._loads.items()):
            if load.record.load_number == number and load.record.request.request_id in announced:
                load.record.arriving = True
                self._learn(load)
            if load.report and load.report.num_workers == self._link.num_workers:
                del self._loads[number]
                self._finish(number, load, load.report.statuses)

    def _learn(self, load: _Load) -> None:
        now_s = time.monotonic()
        if load.record.load_failed:
            self._tradeoff.ended(now_s)
        else:
            num_tokens = num_refs(load.refs) * self._link.block_tokens
            self._tradeoff.loaded(num_tokens, load.begun_s, now_s)

    def _finish(self, number: int, load: _Load, statuses: bytes) -> None:
        if load.refs:
            self._client.release(load.refs)
        if load.record.load_number == number:
            load.record.load_number, load.record.arriving = 0, False
        if load.num_unleased:
            self._stats.count("load_failed_blocks", load.num_unleased, reason="lease")
        for status, reason in STATUS_REASONS.items():
            if amount := statuses.count(status):
                self._stats.count("load_failed_blocks", amount, reason=reason)

    @property
    def in_flight(self) -> bool:
        """Whether workers have still to report."""
        return bool(self._loads)

    @property
    def _client(self) -> PoolClient:
        assert self._link.client is not None
        return self._link.client
