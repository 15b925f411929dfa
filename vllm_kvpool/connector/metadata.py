"""What the two sides of the connector tell each other, through vLLM's own channels.

worker -> scheduler   `WorkerLayout`, once, after the KV cache was allocated
scheduler -> workers  `KVPoolMetadata`, in every step
workers -> scheduler  `KVPoolWorkerMetadata`: copies that ended, merged over the workers of a step
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvpool._native import COPY_OK
from vllm_kvpool.connector.compat import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm_kvpool.types import SlotRefs


@dataclass(frozen=True)
class WorkerLayout(KVConnectorHandshakeMetadata):
    """How one worker's part of a block looks."""

    worker: str
    """Drawn by the worker: names it in `PoolAttachment.shards`."""
    shard_bytes: int
    layout: str
    """Layers, shapes and strides, for the namespace: workers that differ must not share blocks."""
    replicated: bool
    """Whether the other tensor-parallel ranks hold the same bytes."""


@dataclass(frozen=True)
class Shard:
    """A worker's part of each slot, and of storing it."""

    offset: int
    """In the slot."""
    turn: int
    """Of the `num_holders` workers that hold the same bytes, and share this shard."""
    num_holders: int

    def stored_blocks(self, job: int, num_blocks: int) -> slice:
        """Those of a store that this worker copies: each is one holder's. In one run, as slots that
        follow each other are copied together; jobs begin with another holder each, as many are of
        a single block."""
        part = (self.turn + job) % self.num_holders
        return slice(*(num_blocks * end // self.num_holders for end in (part, part + 1)))


@dataclass(frozen=True)
class PoolAttachment:
    """Where the workers find the pool."""

    pool_path: str
    pool_id: str
    lock_path: str
    """The engine's lock file: share it before the first copy."""
    shards: dict[str, Shard]
    """By worker."""


@dataclass(frozen=True)
class CopyJob:
    """Blocks to copy; block i is a row of the KV cache, reference i its slot."""

    number: int
    refs: SlotRefs
    blocks: bytes
    """n x uint32."""


@dataclass(frozen=True)
class LoadJob(CopyJob):
    request_id: str
    unleased_blocks: tuple[int, ...]
    """Blocks that follow, whose slots were lost before they could be leased: to be reported as load
    errors, so that vLLM computes them."""


@dataclass(frozen=True)
class KVPoolMetadata(KVConnectorMetadata):
    attachment: PoolAttachment | None = None
    """With all copies, and once before them: mapping a pool, and registering it with a GPU, takes a
    worker time. None otherwise."""
    loads: tuple[LoadJob, ...] = ()
    stores: tuple[CopyJob, ...] = ()
    computes: bool = True
    """Whether the step computes tokens. If not, the engine may have nothing else to do than to wait for its loads."""


@dataclass(frozen=True)
class JobReport:
    """How a job ended in `num_workers` of the workers: one COPY_* byte a block, the worst of
    them."""

    num_workers: int
    statuses: bytes

    def merged(self, other: JobReport | None) -> JobReport:
        """Together with what is known already, if anything is."""
        if other is None:
            return self
        worst = bytes(map(max, self.statuses, other.statuses))
        return JobReport(self.num_workers + other.num_workers, worst)

    @property
    def num_good(self) -> int:
        """Of the leading blocks."""
        return len(self.statuses) - len(self.statuses.lstrip(bytes([COPY_OK])))


@dataclass
class KVPoolWorkerMetadata(KVConnectorWorkerMetadata):
    reports: dict[int, JobReport] = field(default_factory=dict)
    device_off: bool = False
    """A worker's device refuses all copies for good."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVPoolWorkerMetadata:
        assert isinstance(other, KVPoolWorkerMetadata)
        merged = dict(self.reports)
        for number, report in other.reports.items():
            merged[number] = report.merged(merged.get(number))
        return KVPoolWorkerMetadata(merged, self.device_off or other.device_off)
