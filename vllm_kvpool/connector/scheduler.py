"""The scheduler side of the connector: vLLM's hooks, in the order in which vLLM calls them.

Nothing here waits, and nothing that goes wrong with the pool leaves it: a lookup that cannot be
made is a miss, a store that cannot be made is skipped, each with its reason in the metrics.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector import compat
from vllm_kvpool.connector.hints import HintReader
from vllm_kvpool.connector.link import PoolLink
from vllm_kvpool.connector.loads import LoadPlanner
from vllm_kvpool.connector.metadata import (
    KVPoolMetadata,
    KVPoolWorkerMetadata,
    PoolAttachment,
    WorkerLayout,
)
from vllm_kvpool.connector.prefills import PrefillTimes
from vllm_kvpool.connector.pulls import PullPlanner
from vllm_kvpool.connector.records import RequestRecord
from vllm_kvpool.connector.stats import KVPoolStats
from vllm_kvpool.connector.stores import StorePlanner
from vllm_kvpool.connector.tradeoff import Tradeoff

logger = logging.getLogger(__name__)


class SchedulerSide:
    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> None:
        self._link = PoolLink(vllm_config, kv_cache_config, config)
        self._stats = KVPoolStats()
        numbers = itertools.count(1)
        lookahead = compat.lookahead_blocks(vllm_config)
        self._tradeoff = Tradeoff()
        self._prefills = PrefillTimes()
        self._loads = LoadPlanner(
            self._link, config, self._stats, numbers, lookahead, self._tradeoff
        )
        self._stores = StorePlanner(self._link, config, self._stats, numbers)
        self._hints = HintReader()
        self._pulls = PullPlanner(self._link, config, self._stats, self._tradeoff)
        self._records: dict[str, RequestRecord] = {}
        self._polled = False
        """Whether messages were taken since the last step was planned."""
        self._announced: PoolAttachment | None = None
        self._lora_is_hashed = compat.lora_path_is_hashed()

    def set_layouts(self, layouts: Mapping[tuple[int, int], WorkerLayout]) -> None:
        self._link.set_layouts(layouts)

    def bind_block_pool(self, block_pool: Any) -> None:
        self._stores.set_block_pool(compat.BlockPins(block_pool))

    # a request ------------------------------------------------------------------------------------

    def add_request(self, request: Any) -> RequestRecord:
        self._link.start()
        hints = self._hints.read(request.request_id, request.kv_transfer_params)
        record = RequestRecord(request, hints)
        if request.lora_request is not None and not self._lora_is_hashed:
            record.ambiguous_lora = True
        record.may_store = hints.store and not record.ambiguous_lora
        self._records[request.request_id] = record
        if self._link.mask:
            record.keys(self._link.mask)  # most of a lookup's time, spent before it is waited for
        return record

    def _record(self, request: Any) -> RequestRecord:
        """MultiConnector of older versions does not announce requests."""
        return self._records.get(request.request_id) or self.add_request(request)

    def look_up(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        record = self._record(request)
        if self._link.settling:
            return None, False
        record.alone = len(self._records) == 1
        record.lookup = self._loads.look_up(record, num_computed_tokens)
        if self._pulls.puts_off(record, record.lookup, self._loads.end(record)):
            record.lookup = None
            return None, False
        num_tokens = record.lookup.num_load_blocks * self._link.block_tokens
        return num_tokens, num_tokens > 0

    def admit(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._loads.admit(self._record(request), blocks, num_external_tokens)
        self._pulls.admitted(request, num_external_tokens)

    def finish_request(self, request: Any, block_ids: list[int]) -> None:
        """The last blocks may have got their hashes only now."""
        self._learn_prefills(time.monotonic())
        self._prefills.forget(request.request_id)
        record = self._records.pop(request.request_id, None)
        if record is not None:
            self._pulls.finished(record)
        if record is not None and self._link.connected:
            record.block_ids = block_ids
            self._stores.offer(record, request.num_computed_tokens, last=True)

    # a step ---------------------------------------------------------------------------------------

    def plan_step(self, output: Any) -> KVPoolMetadata:
        if not self._polled:  # vLLM passes over end_step where the workers had nothing to say
            self._poll()
        self._polled = False
        connected = self._link.connected
        now_s = time.monotonic()
        self._learn_prefills(now_s)
        for request_id, block_ids, replace, num_computed in compat.scheduled_requests(output):
            record = self._records[request_id]
            if replace:
                record.block_ids = list(block_ids)
                if not record.arriving:
                    self._prefills.scheduled(record.request, now_s)
            elif block_ids:
                record.block_ids.extend(block_ids)
            if connected:
                self._stores.offer(record, num_computed + output.num_scheduled_tokens[request_id])
        self._prefills.step(output.total_num_scheduled_tokens)
        self._pulls.end_step()
        loads, stores = self._loads.take_planned(), self._stores.take_planned()
        attachment = self._attachment(bool(loads or stores))
        return KVPoolMetadata(attachment, loads, stores, output.total_num_scheduled_tokens > 0)

    def _learn_prefills(self, now_s: float) -> None:
        for num_tokens, seconds in self._prefills.take_finished(now_s):
            self._tradeoff.computed(num_tokens, seconds)

    def _attachment(self, needed: bool) -> PoolAttachment | None:
        if not needed and not self._link.connected:
            return None
        attachment = self._link.attachment()
        if not needed and attachment is self._announced:
            return None
        self._announced = attachment
        return attachment

    def end_step(self, loaded: Collection[str], told: KVPoolWorkerMetadata) -> None:
        """All that comes in, the daemon's answers too: the other threads of the engine are at rest now. When the next
        step is planned they wait for their turn, and would take it at our first system call."""
        if told.device_off:
            self._link.device_off = True
        for number, report in told.reports.items():
            known = self._loads.report(number, report) or self._stores.report(number, report)
            assert known, f"a worker reports job {number}, which is not in flight"
        self._loads.end_step(loaded)
        self._poll()
        self._polled = True

    def _poll(self) -> None:
        self._stores.take_grants(self._link.poll())
        self._pulls.take_answers()

    @property
    def stores_in_flight(self) -> bool:
        return self._stores.in_flight

    @property
    def copies_in_flight(self) -> bool:
        return self.stores_in_flight or self._loads.in_flight

    @property
    def introducing(self) -> bool:
        """Whether the engine has just started and the workers have not heard of the pool yet."""
        if self._announced is not None:
            return False
        self._link.start()
        return self._link.awaiting or self._link.connected

    # engine ---------------------------------------------------------------------------------------

    def reset_cache(self) -> None:
        """What was stored so far was computed by other weights (or is to be forgotten): this engine
        finds none of it again. Requests that run now mix old and new: they store nothing any
        more."""
        self._link.hide_stored_blocks()
        for record in self._records.values():
            record.forget_keys()
            record.may_store = False
        logger.info("KV pool: blocks stored before now are hidden from this engine")

    def take_stats(self) -> KVPoolStats | None:
        for reason, amount in self._link.take_skipped().items():
            self._stats.count("client_skipped", amount, reason=reason)
        return self._stats.taken()

    def close(self) -> None:
        self._link.close()

    def check_integrity(self) -> None:
        self._stores.check_integrity()
        self._pulls.check_integrity()
