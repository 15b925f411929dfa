"""How copies end: cancelled, closed in the middle, beside another engine, or not begun at all."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
import torch
from gpu.copies import COUNT, KV, WAIT_S, Pool, numbers, spin, start, stored, succeed, wait

from vllm_kvpool._native import COPY_CANCELLED, COPY_OK, CopyEngine


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
