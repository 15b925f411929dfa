"""The worker side of the connector: copies between this worker's KV cache and the pool.

Copies run on the copy engine's threads, or by a GPU's DMA; hooks only start and poll them. A load
always ends: one that gets nowhere for `load_deadline_ms` is stopped first and reported then, because
vLLM may reuse its blocks as soon as it hears. Each job is reported once, by every worker, of all its blocks.

vLLM takes some milliseconds from hearing of a load to computing with it. So an engine that has nothing else to do
hears of one whose last bytes are on their way. What the next step computes or copies comes after them, whoever has got
their blocks by then: a GPU is told so and its kernels are started meanwhile, a CPU waits. That step's tokens are not
handed out before the load was found good to its end.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from array import array
from pathlib import Path
from typing import Any

import torch

from vllm_kvpool._native import (
    COPY_FAILED,
    COPY_OK,
    COPY_UNMAPPED,
    CopyEngine,
    PoolFormatError,
    PoolView,
)
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector import compat
from vllm_kvpool.connector.device import KVDevice
from vllm_kvpool.connector.layout import KVLayout, cross_layer_layout, layer_layout
from vllm_kvpool.connector.metadata import (
    CopyJob,
    JobReport,
    KVPoolMetadata,
    KVPoolWorkerMetadata,
    LoadJob,
    PoolAttachment,
    Shard,
    WorkerLayout,
)
from vllm_kvpool.connector.stats import KVPoolStats
from vllm_kvpool.errors import PoolUnavailable
from vllm_kvpool.liveness import ClientLock
from vllm_kvpool.paths import check_folder
from vllm_kvpool.types import num_refs, unpack_refs

logger = logging.getLogger(__name__)

CHECKSUM_EVERY = {"off": 0, "sampled": 64, "all": 1}
RETRY_S = 1.0
"""Between attempts to map a pool that could not be mapped."""
ARRIVAL_WAIT_MS = 1
"""Of an engine without other work, which would sleep for as long and ask again then."""
LOOK_EVERY_S = 1.0
"""At how the device copies by now, for the log."""
SLOW_END_MS = 2_000
"""What has begun on a device ends by itself, also when the device is lost."""
LOCK_WAIT_S = 1.0
"""The daemon looks at the engine's lock for an instant now and then."""


class _Attached:
    """The pool as this worker has it mapped, and the copies under way there."""

    def __init__(self, pool_id: str, lock: ClientLock, engine: CopyEngine, shard: Shard) -> None:
        self.pool_id = pool_id
        self.engine = engine
        self.shard = shard
        self.running: dict[int, CopyJob] = {}
        """By the engine's number of the copy."""
        self.announced: set[int] = set()
        """Loads among them that vLLM takes for ended."""
        self._lock = lock
        self._told = ("", "")
        """How the device copies, and what it has refused, as the log has it already."""
        self._next_look_s = 0.0

    def hold(self) -> bool:
        """Whether the engine's lock is held: no slot may be touched without it."""
        return self._lock.hold()

    def look_now_and_then(self) -> None:
        """Ways are chosen, memory is refused and devices are lost on the engine's own threads."""
        if time.monotonic() >= self._next_look_s:
            self.look()

    def look(self) -> None:
        """Log what is new of the device."""
        self._next_look_s = time.monotonic() + LOOK_EVERY_S
        backend, error = state = (self.engine.backend, self.engine.error)
        if state == self._told:
            return
        self._told = state
        if error:
            logger.error("KV pool: copies by %s; the device refused: %s", backend, error)
        else:
            logger.info("KV pool: copies by %s", backend)

    def of_all_blocks(self, job: CopyJob, statuses: bytes) -> bytes:
        """`statuses`: of those that were copied here. About the rest of a store its other holders
        tell."""
        if isinstance(job, LoadJob):
            return statuses
        num_blocks = num_refs(job.refs)
        known = bytearray([COPY_OK]) * num_blocks
        known[self.shard.stored_blocks(job.number, num_blocks)] = statuses
        return bytes(known)

    def close(self) -> None:
        """Takes a GPU's driver seconds, with a large pool."""
        self.engine.close()
        self._lock.close()


class WorkerSide:
    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._deadline_s = config.load_deadline_ms / 1_000
        self._checksum = CHECKSUM_EVERY[config.checksum]
        self._name = uuid.uuid4().hex
        self._layout: KVLayout | None = None
        self._device = KVDevice(-1)
        self._attached: _Attached | None = None
        self._closing: list[threading.Thread] = []
        self._next_try = 0.0
        self._stats = KVPoolStats()
        self._reports: dict[int, JobReport] = {}
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._computes = True

    # layout ---------------------------------------------------------------------------------------

    def register_layers(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pages = compat.layer_page_bytes(self._kv_cache_config)
        self._layout = layer_layout(
            kv_caches,
            pages,
            self._kv_cache_config.num_blocks,
            lambda layer: compat.attention_backend(self._vllm_config, layer),
        )
        self._device = KVDevice.of(kv_caches[next(iter(pages))])

    def register_cross_layers(self, tensor: torch.Tensor, backend: Any) -> None:
        pages = compat.layer_page_bytes(self._kv_cache_config)
        num_blocks = self._kv_cache_config.num_blocks
        self._layout = cross_layer_layout(tensor, pages, num_blocks, backend.get_name())
        self._device = KVDevice.of(tensor)

    def handshake(self) -> WorkerLayout | None:
        if self._layout is None:
            return None
        logger.info("KV pool: %d regions, %s", len(self._layout.regions), self._layout.text)
        same = compat.ranks_hold_the_same(self._vllm_config, self._kv_cache_config)
        return WorkerLayout(self._name, self._layout.shard_bytes, self._layout.text, same)

    # copies ---------------------------------------------------------------------------------------

    def before_forward(self, metadata: KVPoolMetadata) -> None:
        """Blocks whose bytes are still on their way are neither computed with, nor loaded into, nor stored."""
        self._computes = metadata.computes
        attached = self._attached
        uses_blocks = metadata.computes or metadata.loads or metadata.stores
        if attached is None or not attached.announced or not uses_blocks:
            return
        # Where all of them have come nobody waits: the order would be after other loads, too.
        self._take_finished(attached)
        if attached.announced and not attached.engine.order_after_loads(self._device.stream()):
            self._wait_for_announced(attached)
            self._take_finished(attached)

    def start(self, metadata: KVPoolMetadata) -> None:
        attached = self._attach(metadata.attachment)
        if not metadata.loads and not metadata.stores:
            return
        stream = self._device.stream()
        for load in metadata.loads:
            self._failed_blocks.update(load.unleased_blocks)
            if attached is None or not load.refs:
                self._loaded.add(load.request_id)
                self._end(load, bytes([COPY_UNMAPPED]) * num_refs(load.refs))
                continue
            number = attached.engine.submit_load(load.refs, load.blocks, stream)
            attached.running[number] = load
        for store in metadata.stores:
            if attached is None:
                self._end(store, bytes([COPY_UNMAPPED]) * num_refs(store.refs))
                continue
            self._start_store(attached, store, stream)

    def _start_store(self, attached: _Attached, store: CopyJob, stream: int) -> None:
        own = attached.shard.stored_blocks(store.number, num_refs(store.refs))
        refs, blocks = unpack_refs(store.refs)[own], array("I", store.blocks)[own]
        if not refs:
            self._end(store, bytes([COPY_OK]) * num_refs(store.refs))
            return
        number = attached.engine.submit_store(refs.tobytes(), blocks.tobytes(), stream)
        attached.running[number] = store

    def _attach(self, attachment: PoolAttachment | None) -> _Attached | None:
        """Map the pool of `attachment`, if it is another one than before. None: it cannot be
        used."""
        if attachment is None:
            return None
        if self._attached is not None and self._attached.pool_id == attachment.pool_id:
            return self._attached if self._attached.hold() else None
        self._detach()
        if time.monotonic() < self._next_try:
            return None
        try:
            self._attached = self._open(attachment)
        except (OSError, PoolFormatError, PoolUnavailable) as error:
            self._next_try = time.monotonic() + RETRY_S
            logger.error("KV pool: cannot use %s: %s", attachment.pool_path, error)
        return self._attached

    def _open(self, attachment: PoolAttachment) -> _Attached:
        assert self._layout is not None
        check_folder(Path(attachment.pool_path).parent)
        view = PoolView.open(attachment.pool_path)
        if view.pool_id != attachment.pool_id:
            raise OSError("it was replaced by another pool")
        shard = attachment.shards[self._name]
        engine = CopyEngine(
            view, self._layout.regions, shard.offset, self._checksum, device=self._device.index
        )
        lock = ClientLock(Path(attachment.lock_path))
        if not lock.hold(LOCK_WAIT_S):
            raise OSError(f"cannot share the engine's lock file {attachment.lock_path}")
        logger.info("KV pool: mapped %s", attachment.pool_path)
        return _Attached(view.pool_id, lock, engine, shard)

    def _detach(self, *, beside_steps: bool = True) -> None:
        """Nothing is copied from then on. `beside_steps`: the rest of the end is not waited for."""
        attached = self._attached
        if attached is None:
            return
        self._attached = None
        try:
            for number in list(attached.running):
                attached.engine.cancel(number)
            self._take_finished(attached)
        finally:
            if beside_steps:
                self._close_beside_steps(attached)
            else:
                attached.close()

    def _close_beside_steps(self, attached: _Attached) -> None:
        closing = threading.Thread(target=attached.close, name="kvpool-close")
        closing.start()
        self._closing = [*filter(threading.Thread.is_alive, self._closing), closing]

    def poll(self) -> None:
        """Note what has ended. When no part of any load has for as long as one may take, stop them all: a long one, or
        many at once, may take longer, as long as they get on."""
        attached = self._attached
        if attached is None:
            return
        attached.look_now_and_then()
        if not attached.running:
            return
        if self._computes:
            self._wait_for_announced(attached)
        else:
            self._announce(attached)
        self._take_finished(attached)
        if attached.engine.loads_stand_still_s < self._deadline_s:
            return
        for number, job in list(attached.running.items()):
            if isinstance(job, LoadJob):
                attached.engine.cancel(number)
        self._take_finished(attached)

    def _announce(self, attached: _Attached) -> None:
        for number in attached.engine.arriving(ARRIVAL_WAIT_MS):
            job = attached.running.get(number)
            if isinstance(job, LoadJob) and number not in attached.announced:
                attached.announced.add(number)
                self._loaded.add(job.request_id)

    def _wait_for_announced(self, attached: _Attached) -> None:
        for number in attached.announced:
            while not attached.engine.wait(number, SLOW_END_MS):
                logger.warning(
                    "KV pool: the last bytes of a load take more than %d ms", SLOW_END_MS
                )

    def _take_finished(self, attached: _Attached) -> None:
        """RuntimeError: bytes of an announced load were lost on the way, with the device or with a lease, and vLLM
        cannot be told any more."""
        for number, statuses, nanoseconds in attached.engine.poll():
            if COPY_FAILED in statuses:
                attached.look()
            job = attached.running.pop(number)
            if number in attached.announced:
                attached.announced.discard(number)
                if any(statuses):
                    cause = attached.engine.error or "a slot was lost"
                    raise RuntimeError(f"KV pool: a load broke off at its end: {cause}")
            elif isinstance(job, LoadJob):
                self._loaded.add(job.request_id)
            self._count(job, statuses, nanoseconds / 1e9)
            self._end(job, attached.of_all_blocks(job, statuses))

    def _count(self, job: CopyJob, statuses: bytes, seconds: float) -> None:
        assert self._layout is not None
        kind = "load" if isinstance(job, LoadJob) else "store"
        block_bytes = sum(region.nbytes for region in self._layout.regions)
        self._stats.count(f"{kind}_bytes", statuses.count(COPY_OK) * block_bytes)
        self._stats.observe(f"{kind}_seconds", seconds)

    def _end(self, job: CopyJob, statuses: bytes) -> None:
        """`statuses`: of all its blocks."""
        self._reports[job.number] = JobReport(1, statuses)
        if isinstance(job, LoadJob) and any(statuses):
            pairs = zip(array("I", job.blocks), statuses, strict=True)
            self._failed_blocks.update(block for block, status in pairs if status != COPY_OK)

    # what vLLM asks for at the end of a step ------------------------------------------------------

    def take_loaded(self) -> set[str] | None:
        """Requests whose load has ended, well or badly."""
        loaded, self._loaded = self._loaded, set()
        return loaded or None

    def take_failed_blocks(self) -> set[int]:
        """Of requests whose load ended since the last call (or ends later, in this worker)."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_reports(self) -> KVPoolWorkerMetadata | None:
        reports, self._reports = self._reports, {}
        if not reports:
            return None
        device_off = self._attached is not None and self._attached.engine.is_off
        return KVPoolWorkerMetadata(reports, device_off)

    def take_stats(self) -> KVPoolStats | None:
        return self._stats.taken()

    def close(self) -> None:
        try:
            self._detach(beside_steps=False)
        finally:
            for closing in self._closing:
                closing.join()
