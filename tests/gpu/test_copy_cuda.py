"""Copies between the memory of a real GPU and a real pool file: the right bytes, whatever the layout."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
import torch
from gpu.copies import COUNT, KV, WAIT_S, Pool, numbers, start, stored, succeed

from vllm_kvpool._native import COPY_OK, CopyEngine

LAYOUTS = {"1 x 2 MiB": 1, "32 x 64 KiB": 32, "64 x 32 KiB": 64, "256 x 8 KiB": 256}
MANY = 120
"""Of a job whose two batches two threads copy side by side, and fill each its own buffer four times."""


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
