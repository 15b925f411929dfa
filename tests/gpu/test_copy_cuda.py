"""Copies between the memory of a real GPU and a real pool file: the right bytes, at the right time.

Ordering is tested with a kernel that spins: what the compute stream has been given before a job, but has not done
when the job is submitted, must be done before the job's copies.
"""

from __future__ import annotations

import os
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvpool._native import COPY_CANCELLED, COPY_OK, CopyEngine, PoolOwner, PoolView

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA GPU: run scripts/test -m gpu where one is",
    ),
]

MIB = 1 << 20
BLOCK_BYTES = 2 * MIB
LAYOUTS = {"1 x 2 MiB": 1, "32 x 64 KiB": 32, "64 x 32 KiB": 64, "256 x 8 KiB": 256}
WAYS = ["driver", "staged", ""]
COUNT = 64
"""Blocks of a job: two batches, 64 MiB each."""
MANY = 120
"""Of a job whose two batches two threads copy side by side, and fill each its own buffer four times."""
CHUNK_BYTES = 64 * MIB
CHUNKS = 9
"""Room for two jobs of `MANY` blocks."""
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


@pytest.fixture(scope="module")
def module_pool() -> Iterator[Pool]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Pool(Path(folder))


@pytest.fixture
def pool(module_pool: Pool) -> Iterator[Pool]:
    yield module_pool
    module_pool.empty()


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


@pytest.fixture
def stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@pytest.fixture(params=WAYS, ids=lambda way: way or "calibrated")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("regions", LAYOUTS.values(), ids=LAYOUTS)
def test_bytes_come_back_as_they_were(pool: Pool, way: str, regions: int) -> None:
    kv = KV(regions)
    engine = start(pool, kv, way)
    before = kv.blocks(0)
    refs = stored(pool, kv, engine)
    assert torch.equal(pool.bytes_of(refs), before)
    succeed(engine, engine.submit_load(refs, numbers(COUNT)))
    assert torch.equal(kv.blocks(COUNT), before)
    assert torch.equal(kv.blocks(0), before)
    assert engine.error == ""
    engine.close()


@pytest.mark.parametrize("regions", [1, 64])
def test_bytes_of_a_pool_that_is_not_registered(regions: int, way: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        pool = Pool(Path(folder), holes=True)
        kv = KV(regions)
        engine = start(pool, kv, way, registered=False)
        refs = stored(pool, kv, engine)
        succeed(engine, engine.submit_load(refs, numbers(COUNT)))
        assert torch.equal(kv.blocks(COUNT), kv.blocks(0))
        assert engine.registered_bytes == 0
        engine.close()


def test_odd_sizes_and_gaps(pool: Pool, way: str) -> None:
    """No 16-byte alignment: the kernel cannot have these."""
    memory = torch.empty((8, 10_001), dtype=torch.uint8, device="cuda").random_()
    engine = CopyEngine(
        pool.view, [(memory.data_ptr() + 1, 10_001, 9_999)], 256, 1, device=0, way=way
    )
    before = memory.clone()
    refs = pool.prepare(4)
    succeed(engine, engine.submit_store(refs, numbers(0, 4)))
    pool.complete(refs)
    succeed(engine, engine.submit_load(refs, numbers(4, 4)))
    before[4:, 1:10_000] = before[:4, 1:10_000]
    assert torch.equal(memory, before)
    engine.close()


def test_both_directions_at_once(pool: Pool, way: str) -> None:
    kv = KV(64)
    engine = start(pool, kv, way)
    first = stored(pool, kv, engine)
    expected = kv.blocks(0)
    second = pool.prepare()
    jobs = {engine.submit_store(second, numbers(0)), engine.submit_load(first, numbers(COUNT))}
    while jobs:
        for job, statuses, _ in engine.poll():
            assert statuses == bytes([COPY_OK]) * COUNT
            jobs.remove(job)
    assert torch.equal(kv.blocks(COUNT), expected)
    assert torch.equal(pool.bytes_of(second), expected)
    engine.close()


@pytest.mark.parametrize("regions", LAYOUTS.values(), ids=LAYOUTS)
def test_several_batches_at_once_in_both_directions(pool: Pool, way: str, regions: int) -> None:
    kv = KV(regions, blocks=2 * MANY)
    engine = start(pool, kv, way)
    expected = kv.blocks(0, MANY)
    first, second = pool.prepare(MANY), pool.prepare(MANY)
    succeed(engine, engine.submit_store(first, numbers(0, MANY)))
    assert torch.equal(pool.bytes_of(first), expected)
    pool.complete(first)
    jobs = {
        engine.submit_load(first, numbers(MANY, MANY)),
        engine.submit_store(second, numbers(0, MANY)),
    }
    give_up = time.monotonic() + WAIT_S
    while jobs:
        assert time.monotonic() < give_up, "a job does not end"
        for job, statuses, _ in engine.poll():
            assert statuses == bytes([COPY_OK]) * MANY, engine.error
            jobs.remove(job)
    assert torch.equal(kv.blocks(MANY, MANY), expected)
    assert torch.equal(pool.bytes_of(second), expected)
    assert engine.error == ""
    engine.close()


# ordering -----------------------------------------------------------------------------------------


def spin(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)


@pytest.mark.parametrize("regions", [1, 64])
def test_a_store_reads_what_was_written_before_it(
    pool: Pool, way: str, regions: int, stream: torch.cuda.Stream
) -> None:
    kv = KV(regions)
    engine = start(pool, kv, way)
    new = torch.empty_like(kv.memory).random_()
    refs = pool.prepare()
    torch.cuda.synchronize()
    spin(stream)
    with torch.cuda.stream(stream):
        kv.memory.copy_(new)
    submitted = time.monotonic()
    job = engine.submit_store(refs, numbers(0), stream.cuda_stream)
    assert time.monotonic() - submitted < 0.05, "the calling thread waited"
    assert not stream.query(), "the spin was too short to show anything"
    succeed(engine, job)
    assert torch.equal(kv.memory, new)
    assert torch.equal(pool.bytes_of(refs), kv.blocks(0))
    engine.close()


def test_of_the_default_stream_too(pool: Pool, way: str) -> None:
    kv = KV(64)
    engine = start(pool, kv, way)
    new = torch.empty_like(kv.memory).random_()
    refs = pool.prepare()
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    kv.memory.copy_(new)
    job = engine.submit_store(refs, numbers(0))
    assert not torch.cuda.default_stream().query()
    succeed(engine, job)
    assert torch.equal(pool.bytes_of(refs), kv.blocks(0))
    engine.close()


def test_without_the_order_the_old_bytes_are_stored(
    pool: Pool, way: str, stream: torch.cuda.Stream
) -> None:
    """The control: these tests do see a store that comes too early."""
    kv = KV(64)
    engine = start(pool, kv, way)
    old = kv.blocks(0)
    new = torch.empty_like(kv.memory).random_()
    refs = pool.prepare()
    torch.cuda.synchronize()
    spin(stream)
    with torch.cuda.stream(stream):
        kv.memory.copy_(new)
    idle = torch.cuda.Stream()
    succeed(engine, engine.submit_store(refs, numbers(0), idle.cuda_stream))
    assert not stream.query(), "the spin was too short to show anything"
    torch.cuda.synchronize()
    assert torch.equal(pool.bytes_of(refs), old)
    engine.close()


@pytest.mark.parametrize("regions", [1, 64])
def test_a_load_leaves_earlier_readers_their_bytes(
    pool: Pool, way: str, regions: int, stream: torch.cuda.Stream
) -> None:
    kv = KV(regions)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    seen = torch.empty_like(kv.memory)
    expected = kv.memory.clone()
    torch.cuda.synchronize()
    spin(stream)
    with torch.cuda.stream(stream):
        seen.copy_(kv.memory)
    job = engine.submit_load(refs, numbers(COUNT), stream.cuda_stream)
    assert not stream.query(), "the spin was too short to show anything"
    succeed(engine, job)
    stream.synchronize()
    assert torch.equal(seen, expected)
    assert torch.equal(kv.blocks(COUNT), kv.blocks(0))
    engine.close()


def test_a_load_comes_after_an_earlier_writer(
    pool: Pool, way: str, stream: torch.cuda.Stream
) -> None:
    """As when vLLM zeroes new blocks."""
    kv = KV(64)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    torch.cuda.synchronize()
    spin(stream)
    with torch.cuda.stream(stream):
        kv.memory[:, COUNT:].zero_()
    succeed(engine, engine.submit_load(refs, numbers(COUNT), stream.cuda_stream))
    stream.synchronize()
    assert torch.equal(kv.blocks(COUNT), kv.blocks(0))
    engine.close()


def test_later_work_of_the_stream_does_not_hold_a_job_up(
    pool: Pool, way: str, stream: torch.cuda.Stream
) -> None:
    kv = KV(64)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    torch.cuda.synchronize()
    job = engine.submit_load(refs, numbers(COUNT), stream.cuda_stream)
    spin(stream)
    succeed(engine, job)
    assert not stream.query(), "it ended after work that was submitted later"
    torch.cuda.synchronize()
    engine.close()


def test_a_load_arrives_before_it_has_ended(
    pool: Pool, way: str, stream: torch.cuda.Stream
) -> None:
    kv = KV(64, blocks=3 * COUNT)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    torch.cuda.synchronize()
    spin(stream)
    job = engine.submit_load(refs * 2, numbers(COUNT, 2 * COUNT), stream.cuda_stream)
    assert engine.arriving(10_000) == [job]
    assert not engine.wait(job, 1)
    assert not stream.query(), "the spin was too short to show anything"
    assert engine.wait(job, 10_000)
    assert engine.arriving() == []
    for first in (COUNT, 2 * COUNT):
        assert torch.equal(kv.blocks(first), kv.blocks(0))
    assert set(wait(engine, job)) == {COPY_OK}
    engine.close()


@pytest.mark.parametrize("ordered", [True, False])
def test_work_that_is_ordered_after_a_load_finds_its_bytes(
    pool: Pool, way: str, stream: torch.cuda.Stream, ordered: bool
) -> None:
    """And work that is not does not: the control."""
    kv = KV(64)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    before = kv.blocks(COUNT)
    torch.cuda.synchronize()
    spin(stream)
    job = engine.submit_load(refs, numbers(COUNT), stream.cuda_stream)
    assert engine.arriving(10_000) == [job]
    compute = torch.cuda.Stream()
    if ordered:
        assert engine.order_after_loads(compute.cuda_stream)
    with torch.cuda.stream(compute):
        seen = kv.memory[:, COUNT:].clone()
    if not ordered:
        compute.synchronize()
    assert not stream.query(), "the spin was too short to show anything"
    succeed(engine, job)
    compute.synchronize()
    expected = kv.blocks(0) if ordered else before
    assert torch.equal(seen.transpose(0, 1).reshape(COUNT, -1).cpu(), expected)
    engine.close()


# the end of jobs ----------------------------------------------------------------------------------


def test_nothing_arrives_after_cancel(pool: Pool, way: str, stream: torch.cuda.Stream) -> None:
    times = 9  # 1.1 GiB: five batches
    kv = KV(64, blocks=times * COUNT)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    torch.cuda.synchronize()
    spin(stream)
    blocks = numbers(0, times * COUNT)
    job = engine.submit_load(refs * times, blocks, stream.cuda_stream)
    time.sleep(0.01)  # the first batches wait for the stream
    engine.cancel(job)
    kv.memory.fill_(7)
    torch.cuda.synchronize()
    statuses = wait(engine, job)
    assert list(statuses) == sorted(statuses)
    assert set(statuses) == {COPY_OK, COPY_CANCELLED}
    time.sleep(0.05)
    assert bool((kv.memory == 7).all())
    succeed(engine, engine.submit_load(refs, numbers(0)))
    engine.close()


def test_close_in_the_middle(pool: Pool, way: str) -> None:
    kv = KV(64, blocks=8 * COUNT)
    engine = start(pool, kv, way)
    refs = stored(pool, kv, engine)
    job = engine.submit_load(refs * 8, numbers(0, 8 * COUNT))
    engine.close()
    kv.memory.fill_(7)
    torch.cuda.synchronize()
    ((number, statuses, _),) = engine.poll()
    assert number == job
    assert set(statuses) <= {COPY_OK, COPY_CANCELLED}
    time.sleep(0.05)
    assert bool((kv.memory == 7).all())


def test_two_engines_over_one_pool(pool: Pool, way: str) -> None:
    """As a bench or two models in one process have it: one ends, the other goes on."""
    kv, other = KV(64), KV(1)
    engine, second = start(pool, kv, way), start(pool, other, way)
    refs = stored(pool, other, second)
    second.close()
    refs = stored(pool, kv, engine)
    succeed(engine, engine.submit_load(refs, numbers(COUNT)))
    assert torch.equal(kv.blocks(COUNT), kv.blocks(0))
    engine.close()


def test_a_graph_is_captured_while_the_pool_is_registered(way: str) -> None:
    """Registering is forbidden to threads while another one captures, unless they say otherwise."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        pool = Pool(Path(folder), holes=True)
        kv = KV(64)
        engine = start(pool, kv, way, registered=False)
        graph = torch.cuda.CUDAGraph()
        value = torch.zeros(1, device="cuda")
        with torch.cuda.graph(graph):
            pool.owner.populate(0)
            value += 1
            give_up = time.monotonic() + WAIT_S
            while engine.registered_bytes == 0 and time.monotonic() < give_up:
                time.sleep(0.001)
        assert engine.registered_bytes > 0, engine.error
        graph.replay()
        assert value.item() == 1
        engine.close()


def test_no_such_device(pool: Pool) -> None:
    with pytest.raises(OSError, match="CUDA device 99"):
        CopyEngine(pool.view, [(0, 16, 16)], 0, 0, device=99)
