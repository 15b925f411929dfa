"""A pool file, KV memory of a GPU, and waiting for copies between them."""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path

import torch

from vllm_kvpool._native import COPY_OK, CopyEngine, PoolOwner, PoolView

MIB = 1 << 20
BLOCK_BYTES = 2 * MIB
COUNT = 64
"""Blocks of a job: two batches, 64 MiB each."""
CHUNK_BYTES = 64 * MIB
CHUNKS = 9
"""Room for two jobs of 120 blocks."""
SPIN_CYCLES = 300_000_000
"""0.15 s and more: far longer than any of these copies takes."""
WAIT_S = 30.0


class Pool:
    """A pool file without a daemon: slabs of a bit over 4 MiB, two slots each. It can be registered by the chunk, where
    all slabs of one are made. `holes`: the first slab of each chunk is not."""

    def __init__(self, folder: Path, *, holes: bool = False) -> None:
        self.owner = PoolOwner.create(str(folder / "pool"), 1100 * MIB)
        assert self.owner.slab_bytes // (BLOCK_BYTES + 256) == 2
        self.chunk_slabs = CHUNK_BYTES // self.owner.slab_bytes
        self.registrable_bytes = 0 if holes else CHUNKS * self.chunk_slabs * self.owner.slab_bytes
        for slab in range(CHUNKS * self.chunk_slabs):
            if not holes or slab % self.chunk_slabs:
                self.owner.populate(slab)
        namespace = self.owner.add_namespace(bytes(32), BLOCK_BYTES + 256, "gpu test")
        lock = folder / "lock"
        lock.touch()
        self.client = self.owner.add_client("test", str(lock), os.getpid(), namespace)
        self.view = PoolView.open(str(folder / "pool"))

    def prepare(self, count: int = COUNT) -> bytes:
        refs = self.owner.prepare_store(self.client, os.urandom(32 * count), b"", 1)
        assert all(array("Q", refs))
        return refs

    def complete(self, refs: bytes) -> None:
        assert self.owner.complete_store(self.client, refs) == len(refs) // 8

    def bytes_of(self, refs: bytes) -> torch.Tensor:
        """[blocks, BLOCK_BYTES], as they are in the pool."""
        slots = [bytearray(self.view.payload(ref)[:BLOCK_BYTES]) for ref in array("Q", refs)]
        return torch.stack([torch.frombuffer(slot, dtype=torch.uint8) for slot in slots])

    def empty(self) -> None:
        self.owner.keep_writing(self.client, b"")
        self.owner.clear()


class KV:
    """KV memory of a device: `regions` tensors (layers) of `blocks` blocks each."""

    def __init__(self, regions: int, blocks: int = 2 * COUNT) -> None:
        self.regions = regions
        self.nbytes = BLOCK_BYTES // regions
        self.memory = torch.empty((regions, blocks, self.nbytes), dtype=torch.uint8, device="cuda")
        self.fill(1)

    def fill(self, seed: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.memory.random_(generator=generator)
        torch.cuda.synchronize()

    def tuples(self) -> list[tuple[int, int, int]]:
        return [(region.data_ptr(), self.nbytes, self.nbytes) for region in self.memory]

    def blocks(self, first: int, count: int = COUNT) -> torch.Tensor:
        """[blocks, BLOCK_BYTES] on the CPU, as a slot holds them."""
        part = self.memory[:, first : first + count].cpu()
        return part.transpose(0, 1).reshape(count, BLOCK_BYTES)


def start(pool: Pool, kv: KV, way: str, *, registered: bool = True) -> CopyEngine:
    engine = CopyEngine(pool.view, kv.tuples(), 0, 1, device=0, way=way)
    give_up = time.monotonic() + WAIT_S
    while registered and engine.registered_bytes < pool.registrable_bytes:
        assert time.monotonic() < give_up, engine.error or "the pool is not registered"
        time.sleep(0.001)
    return engine


def numbers(first: int, count: int = COUNT) -> bytes:
    return array("I", range(first, first + count)).tobytes()


def wait(engine: CopyEngine, job: int) -> bytes:
    give_up = time.monotonic() + WAIT_S
    while not (finished := engine.poll()):
        assert time.monotonic() < give_up, "the job does not end"
        time.sleep(0.0001)
    ((number, statuses, _),) = finished
    assert number == job
    return statuses


def succeed(engine: CopyEngine, job: int) -> None:
    statuses = wait(engine, job)
    assert statuses == bytes([COPY_OK]) * len(statuses), (set(statuses), engine.error)


def stored(pool: Pool, kv: KV, engine: CopyEngine) -> bytes:
    """Refs of READY slots with the bytes of the first blocks."""
    refs = pool.prepare()
    succeed(engine, engine.submit_store(refs, numbers(0)))
    pool.complete(refs)
    return refs


def spin(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)
