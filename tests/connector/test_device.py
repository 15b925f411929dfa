"""Workers and their device: when they map the pool, and what becomes of copies that a device refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import WAIT_S, Daemon, until

from vllm_kvpool import _native
from vllm_kvpool._native import COPY_FAILED, CopyEngine
from vllm_kvpool.connector import link, worker
from vllm_kvpool.connector.device import KVDevice
from vllm_kvpool.connector.loads import STATUS_REASONS
from vllm_kvpool.types import SlotRefs, num_refs

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 10 * BLOCK + 1)
BLOCKS = 10


def step_while_idle(engine: MiniEngine) -> None:
    """As vLLM's core does as long as there is anything to do, a request or not."""
    give_up = time.monotonic() + WAIT_S
    while engine.scheduler.has_requests():
        assert time.monotonic() < give_up, "the engine never rests"
        engine.step()


def test_workers_map_the_pool_before_the_first_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapping it, and registering it with a GPU, takes time that no request should wait for."""
    monkeypatch.setattr(link, "ABSENT_S", WAIT_S)
    engine = make_engine(connect=False, tensor_parallel_size=2)
    assert all(worker.connector._worker._attached is None for worker in engine.workers)
    step_while_idle(engine)
    assert all(worker.connector._worker._attached is not None for worker in engine.workers)
    assert engine.connector._scheduler._attachment(False) is None, "told again without need"
    assert engine.generate(PROMPT) == (expected_output(PROMPT), 0)


def test_engine_without_a_daemon_rests_soon(make_engine: MakeEngine, daemon: Daemon) -> None:
    daemon.kill()
    engine = make_engine(connect=False)
    step_while_idle(engine)
    assert engine.generate(PROMPT) == (expected_output(PROMPT), 0)
    daemon.start()
    engine.wait_connected()
    assert engine.generate(prompt_of(2, 5 * BLOCK))[1] == 0
    assert engine.worker._worker._attached is not None


class BrokenCopies:
    """A copy engine whose device refuses everything."""

    backend = "cuda, switched off"
    error = "CUDA_ERROR_ILLEGAL_ADDRESS"
    loads_stand_still_s = 0.0

    def __init__(self, engine: CopyEngine, is_off: bool) -> None:
        self._engine = engine
        self.is_off = is_off
        self._ended: list[tuple[int, bytes, int]] = []
        self._numbers = 0

    def submit_load(self, refs: SlotRefs, blocks: bytes, stream: int) -> int:
        self._numbers += 1
        self._ended.append((self._numbers, bytes([COPY_FAILED]) * num_refs(refs), 1))
        return self._numbers

    submit_store = submit_load

    def poll(self) -> list[tuple[int, bytes, int]]:
        ended, self._ended = self._ended, []
        return ended

    def arriving(self, milliseconds: int) -> list[int]:
        return []

    def cancel(self, number: int) -> None:
        pass

    def close(self) -> None:
        self._engine.close()


class SlowToClose:
    """A copy engine whose end takes long, as that of a large pool with a GPU does."""

    backend, error, is_off = "cpu", "", False

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self.may_end = threading.Event()
        self.ended = False

    def poll(self) -> list[tuple[int, bytes, int]]:
        return self._engine.poll()

    def close(self) -> None:
        self.may_end.wait(WAIT_S)
        self._engine.close()
        self.ended = True


def test_no_step_waits_for_the_end_of_a_replaced_pool(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.step()  # an empty one will do
    side = engine.worker._worker
    replaced = side._attached
    replaced.engine = slow = SlowToClose(replaced.engine)
    replaced.pool_id = "of the pool before"
    assert engine.generate(PROMPT) == (expected_output(PROMPT), 0)
    assert side._attached.pool_id != replaced.pool_id
    assert not slow.ended
    assert replaced._lock.held, "no slot may be touched without it"
    slow.may_end.set()
    side.close()
    assert slow.ended
    assert not replaced._lock.held


def break_copies(engine: MiniEngine, *, is_off: bool = False) -> None:
    engine.step()  # an empty one will do
    attached = engine.worker._worker._attached
    attached.engine = BrokenCopies(attached.engine, is_off)


def test_load_that_the_device_refuses_is_computed(
    make_engine: MakeEngine, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == BLOCKS)
    break_copies(engine)
    for _ in range(2):
        engine.reset_prefix_cache()
        assert engine.generate(PROMPT)[0] == expected_output(PROMPT)
    assert engine.stats["load_failed_blocks:device"] == 2 * BLOCKS
    assert caplog.text.count("the device refused: CUDA_ERROR_ILLEGAL_ADDRESS") == 1
    assert engine.free_blocks == 255


def test_store_that_the_device_refuses_is_skipped(make_engine: MakeEngine, daemon: Daemon) -> None:
    engine = make_engine()
    break_copies(engine)
    assert engine.generate(PROMPT, 1) == (expected_output(PROMPT, 1), 0)
    assert engine.stats["store_skipped_blocks:copy_failed"] >= BLOCKS
    until(lambda: daemon.counter("writing") == 0)
    assert daemon.counter("ready") == 0
    assert engine.free_blocks == 255


def test_a_device_that_was_switched_off_is_not_asked_again(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_engine()
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == BLOCKS)
    break_copies(engine, is_off=True)
    for _ in range(3):
        engine.reset_prefix_cache()
        assert engine.generate(PROMPT) == (expected_output(PROMPT), 0)
    assert engine.stats["load_failed_blocks:device"] == BLOCKS
    assert engine.stats["misses:device"] == 2
    skipped = engine.stats.get("store_skipped_blocks:copy_failed", 0)
    engine.generate(prompt_of(2, 5 * BLOCK), 1)
    assert engine.stats.get("store_skipped_blocks:copy_failed", 0) == skipped
    assert engine.stats["store_skipped_blocks:device"] == 5


def test_a_device_that_was_switched_off_gets_another_chance_with_another_pool(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_engine()
    break_copies(engine, is_off=True)
    engine.generate(PROMPT, 1)
    assert engine.connector._scheduler._link.device_off
    daemon.replace_pool()

    def stored_there() -> bool:
        engine.reset_prefix_cache()
        engine.generate(PROMPT, 1)
        return daemon.counter("ready") == BLOCKS

    until(stored_there, "the new pool")
    engine.reset_prefix_cache()
    assert engine.generate(PROMPT) == (expected_output(PROMPT), BLOCKS * BLOCK)


class ChangingDevice:
    """A copy engine whose device is a GPU, as far as it tells."""

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self.backend, self.error, self.is_off = "cuda Fake, not calibrated yet", "", False

    def poll(self) -> list[tuple[int, bytes, int]]:
        return self._engine.poll()

    def close(self) -> None:
        self._engine.close()


def test_what_becomes_of_a_device_is_logged_once_each(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no copy fails: its memory was refused, and it is slower from then on."""
    monkeypatch.setattr(worker, "LOOK_EVERY_S", 0.0)
    engine = make_engine()
    engine.step()
    attached = engine.worker._worker._attached
    attached.engine = device = ChangingDevice(attached.engine)
    refused = "cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY"
    slower = "cuda Fake, loads staged, slower where memory could not be registered"
    changes = [
        ("cuda Fake, not calibrated yet", ""),
        ("cuda Fake, loads staged", ""),
        (slower, refused),
        ("cuda Fake, switched off", refused),
    ]
    for device.backend, device.error in changes:
        for _ in range(3):
            engine.step()
    told = [record for record in caplog.records if "copies by" in record.message]
    assert [(record.levelname, record.message) for record in told] == [
        ("INFO", "KV pool: copies by cpu"),
        ("INFO", "KV pool: copies by cuda Fake, not calibrated yet"),
        ("INFO", "KV pool: copies by cuda Fake, loads staged"),
        ("ERROR", f"KV pool: copies by {slower}; the device refused: {refused}"),
        ("ERROR", f"KV pool: copies by cuda Fake, switched off; the device refused: {refused}"),
    ]


def test_memory_of_this_process_has_no_stream_to_wait_for() -> None:
    device = KVDevice.of(torch.zeros(1))
    assert device == KVDevice(-1)
    assert device.stream() == 0


def test_every_bad_end_of_a_load_has_its_reason() -> None:
    statuses = {value for name, value in vars(_native).items() if name.startswith("COPY_")}
    assert set(STATUS_REASONS) == statuses - {_native.COPY_OK}
