"""One host of a simulated fleet: an engine's prefix cache in VRAM, a pool, and a link to the other hosts.

The pool is a real one with the real eviction policy, only that its slots hold no KV: a few bytes stand for a block.
What takes time is modelled, the engine by `modelled_engine.py` and this file, the link as bytes one after the other.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.modelled_engine import EngineModel, ModelledEngine
from benchmarks.scaling_workload import BLOCK_TOKENS
from vllm_kvpool._native import PoolOwner, PoolView
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector.tradeoff import Tradeoff
from vllm_kvpool.types import KEY_BYTES, num_refs

SLAB_BYTES = (2 << 20) + (8 << 10)
"""What pools of up to a gigabyte are made of."""
SLAB_SLOTS = 1 << 15
TABLE_BYTES = 4 << 20


@dataclass(frozen=True)
class HostModel:
    """The defaults are an 8B model (Llama 3's shape, bf16) on one H200, as `docs/benchmarks.md` has measured it."""

    vram_tokens: int = 400_000
    pool_tokens: int = 2_097_152
    """256 GiB."""
    kv_bytes: int = 131_072
    """Of a token."""
    prefill_tokens_per_s: float = 30_000
    """38,000 for a prompt of 8k tokens, 27,000 for one of 32k."""
    load_tokens_per_s: float = 400_000
    load_s: float = 0.005
    """Of any load, beside its bytes."""
    link_gbit_s: float = 100
    pull_s: float = 0.005
    """Of any pull, beside its bytes: the directory's answer, the other host's."""
    decode_tokens_per_s: float = 60
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)

    @property
    def block_bytes(self) -> int:
        return BLOCK_TOKENS * self.kv_bytes

    @property
    def link_bytes_per_s(self) -> float:
        return self.link_gbit_s * 1e9 / 8


class HostPool:
    """One namespace, one client, as many blocks as asked for."""

    def __init__(self, folder: Path, num_blocks: int) -> None:
        folder.mkdir()
        slabs = -(-num_blocks // SLAB_SLOTS)
        self.capacity = -(-num_blocks // slabs) * slabs
        slot_bytes = SLAB_BYTES // (self.capacity // slabs)
        size = slabs * SLAB_BYTES + self.capacity * 256 + TABLE_BYTES
        self.owner = PoolOwner.create(str(folder / "pool"), size, slot_bytes)
        for slab in range(slabs):
            self.owner.populate(slab)
        self._lock = (folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        namespace = self.owner.add_namespace(bytes(KEY_BYTES), slot_bytes, "simulation")
        lock_path = str(folder / "lock")
        self._client = self.owner.add_client("simulation", lock_path, os.getpid(), namespace)
        self._view = PoolView.open(str(folder / "pool"))
        self.owner.keep_journal()

    def match(self, keys: bytes) -> int:
        """Leading blocks."""
        return num_refs(self._view.match_prefix(keys, 0))

    def touch(self, keys: bytes) -> None:
        self.owner.touch(self._view.match_prefix(keys, 0))

    def store(self, keys: bytes, start: int, end: int) -> None:
        """Blocks `start` to `end` of a chain."""
        parent = keys[(start - 1) * KEY_BYTES : start * KEY_BYTES] if start else b""
        chain = keys[start * KEY_BYTES : end * KEY_BYTES]
        self.owner.complete_store(
            self._client, self.owner.prepare_store(self._client, chain, parent, 0)
        )

    def take_changes(self) -> tuple[bytes, bytes]:
        """Keys that came, and keys that went, without those that did both."""
        for _, ready, gone in self.owner.take_changes():
            return ready, gone
        return b"", b""

    @property
    def num_blocks(self) -> int:
        return self.owner.stats()["ready"]

    def close(self) -> None:
        self._lock.close()


class Link:
    """One direction of a host's link: what is sent goes one after the other."""

    def __init__(self) -> None:
        self.free_s = 0.0
        self.busy_s = 0.0


@dataclass(slots=True)
class Rate:
    """Of one peer, as `peer.Peer.note_rate` has it; 0: not known."""

    bytes_per_s: float = 0.0

    def note(self, nbytes: float, elapsed_s: float) -> None:
        rate = nbytes / max(0.001, elapsed_s)
        self.bytes_per_s = (self.bytes_per_s + rate) / 2 if self.bytes_per_s else rate


class SimulatedHost:
    def __init__(self, model: HostModel, folder: Path) -> None:
        self.model = model
        self.engine = ModelledEngine(EngineModel(model.vram_tokens, BLOCK_TOKENS))
        self.pool = HostPool(folder, model.pool_tokens // BLOCK_TOKENS)
        self.tradeoff = Tradeoff()
        self.out, self.into = Link(), Link()
        self.rates: dict[int, Rate] = {}
        self.peers: dict[int, float] = {}
        """Hosts that blocks were asked of, and when for the last time."""

    # rules ----------------------------------------------------------------------------------------

    def loads(self, tokens: int, now_s: float) -> bool:
        """As `connector.loads.LoadPlanner`."""
        if tokens < max(1, self.model.connector.min_load_tokens):
            return False
        prediction = self.tradeoff.predict(tokens, rest=0, alone=False, now_s=now_s)
        return prediction is None or prediction.load_is_faster

    def pull_within_s(self, tokens: int, now_s: float) -> float:
        """How long to wait for so many tokens of another host, as `connector.pulls.PullPlanner`; 0: not at all."""
        config = self.model.connector
        if tokens < max(1, config.min_remote_tokens):
            return 0.0
        prediction = self.tradeoff.predict(tokens, rest=0, alone=False, now_s=now_s)
        worth_s = tokens / config.prefill_tokens_per_s
        if prediction is not None:
            worth_s = prediction.compute_s - prediction.load_s
        return max(0.0, min(config.pull_deadline_ms / 1_000, worth_s))

    # time -----------------------------------------------------------------------------------------

    def receive(
        self, peer: int, sender: SimulatedHost, blocks: int, due_s: float, now_s: float
    ) -> tuple[int, float]:
        """Pull blocks, as far as the links bring them by `due_s`: how many come, and when the request goes on."""
        nbytes, speed = self.model.block_bytes, self.model.link_bytes_per_s
        rate = self.rates.setdefault(peer, Rate())
        if rate.bytes_per_s:  # as `pool.pulls.Pulls._affordable`
            affordable = int(rate.bytes_per_s * (due_s - now_s) / nbytes)
            if not affordable:
                rate.bytes_per_s *= 1.1
            blocks = min(blocks, affordable)
        start_s = max(now_s, sender.out.free_s, self.into.free_s)
        count = min(blocks, max(0, int((due_s - start_s) * speed / nbytes)))
        taken_s = count * nbytes / speed
        if count:
            sender.out.free_s = self.into.free_s = start_s + taken_s
            sender.out.busy_s += taken_s
            self.into.busy_s += taken_s
            rate.note(count * nbytes, start_s + taken_s - now_s)
        return count, start_s + taken_s if count == blocks else due_s

    def load(self, tokens: int, now_s: float) -> float:
        """When it is done."""
        done_s = now_s + self.model.load_s + tokens / self.model.load_tokens_per_s
        self.tradeoff.loaded(tokens, now_s, done_s)
        return done_s

    def compute(self, tokens: int, arrived_s: float, ready_s: float) -> tuple[float, float]:
        """When the first token is there, and how long the computation took: in proportion to its tokens, steps have
        no floor here. Who waits for a load holds up nobody."""
        taken_s = tokens / self.model.prefill_tokens_per_s
        self.engine.prefill_free_s = max(self.engine.prefill_free_s, arrived_s) + taken_s
        self.tradeoff.computed(tokens, taken_s)
        return max(self.engine.prefill_free_s, ready_s + taken_s), taken_s
