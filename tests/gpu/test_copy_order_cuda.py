"""Copies come at the right time: what the compute stream has been given before a job, but has not done when the job
is submitted, must be done before the job's copies. A kernel that spins keeps it busy.
"""

from __future__ import annotations

import time

import pytest
import torch
from gpu.copies import COUNT, KV, SPIN_CYCLES, Pool, numbers, spin, start, stored, succeed, wait

from vllm_kvpool._native import COPY_OK


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
