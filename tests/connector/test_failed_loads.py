"""Loads that cannot be finished: always a miss, never a wrong byte, never a request that hangs.

Every test also checks that leases and KV blocks are all given back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import WAIT_S, Daemon, until

from vllm_kvpool._native import COPY_CANCELLED, CopyEngine
from vllm_kvpool.connector.metadata import LoadJob
from vllm_kvpool.pool.admin import clear
from vllm_kvpool.types import REF_BYTES, SlotRefs, num_refs, pack_refs, unpack_refs

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 10 * BLOCK + 1)
BLOCKS = 10


@pytest.fixture
def loader(make_engine: MakeEngine, daemon: Daemon) -> Iterator[MiniEngine]:
    """An engine whose pool, but not whose KV cache, holds the blocks of PROMPT."""
    engine = make_engine()
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == BLOCKS)
    engine.reset_prefix_cache()
    yield engine
    engine.run()
    assert engine.free_blocks == 255
    assert view_of(engine).leased_slots == 0


def client_of(engine: MiniEngine):  # type: ignore[no-untyped-def]
    return engine.connector._scheduler._link.client


def view_of(engine: MiniEngine):  # type: ignore[no-untyped-def]
    return client_of(engine).view


def refs_of(engine: MiniEngine) -> SlotRefs:
    record = engine.connector._scheduler.add_request(
        engine.scheduler.requests[engine.add(PROMPT, 1, hints={"load": False, "store": False})]
    )
    refs = client_of(engine).match_prefix(record.keys(engine.connector._scheduler._link.mask))
    engine.run()
    engine.reset_prefix_cache()
    return refs


def flip_byte(engine: MiniEngine, block: int) -> None:
    payload = view_of(engine).payload(unpack_refs(refs_of(engine))[block])
    payload[100] ^= 0xFF


@pytest.mark.parametrize("bad", [0, 4, BLOCKS - 1])
def test_flipped_byte_is_a_counted_miss_and_the_block_is_forgotten(
    loader: MiniEngine, daemon: Daemon, bad: int
) -> None:
    flip_byte(loader, bad)
    assert loader.generate(PROMPT)[0] == expected_output(PROMPT)
    assert loader.stats["load_failed_blocks:checksum"] == 1
    until(lambda: daemon.counter("dropped") == 1)
    until(lambda: daemon.counter("ready") == BLOCKS)  # computed and stored again
    assert loader.connector._scheduler._tradeoff._loads.count == 0  # it tells nothing of loads
    loader.reset_prefix_cache()
    assert loader.generate(PROMPT) == (expected_output(PROMPT), BLOCKS * BLOCK)
    assert loader.connector._scheduler._tradeoff._loads.count == 1


def test_damage_is_forgotten_with_its_pool(loader: MiniEngine, daemon: Daemon) -> None:
    """Another pool counts its references from the beginning: there the same one names a good block."""
    before = refs_of(loader)
    flip_byte(loader, 4)
    loader.generate(PROMPT)
    assert loader.stats["load_failed_blocks:checksum"] == 1
    daemon.replace_pool()
    pool_id = daemon.stats()["pool"]["pool_id"]

    def stored_there() -> bool:
        loader.reset_prefix_cache()
        loader.generate(PROMPT, 1)
        return view_of(loader).pool_id == pool_id and daemon.counter("ready") == BLOCKS

    until(stored_there, "the new pool")
    assert refs_of(loader) == before
    loader.reset_prefix_cache()
    assert loader.generate(PROMPT) == (expected_output(PROMPT), BLOCKS * BLOCK)


def test_while_a_replaced_pool_drains_there_is_none(loader: MiniEngine, daemon: Daemon) -> None:
    client, held = client_of(loader), refs_of(loader)
    assert client.lease(held) == held
    daemon.replace_pool()

    def draining() -> bool:
        loader.generate(prompt_of(2, 4 * BLOCK))
        loader.reset_prefix_cache()
        return not client.readable

    until(draining, "the new daemon")
    before = loader.stats.get("misses:no_pool", 0)
    assert loader.generate(PROMPT) == (expected_output(PROMPT), 0)
    assert loader.stats.get("misses:no_pool", 0) == before + 1
    client.release(held)


def test_the_bytes_are_really_used(make_engine: MakeEngine, daemon: Daemon) -> None:
    """Without checksums a flipped byte reaches the attention: the control for all other tests."""
    engine = make_engine(extra={"checksum": "off"})
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == BLOCKS)
    engine.reset_prefix_cache()
    flip_byte(engine, 3)
    with pytest.raises(AssertionError, match="token 49 of 160 is not in row"):
        engine.generate(PROMPT)


@pytest.mark.parametrize("lost", [0, 4])
def test_block_that_was_evicted_between_lookup_and_lease(loader: MiniEngine, lost: int) -> None:
    """Nothing is shortened silently: the tail is reported, and leases behind the gap are returned."""
    lease = client_of(loader).lease

    def lease_when_one_is_gone(refs: SlotRefs) -> SlotRefs:
        values = unpack_refs(refs)
        values[lost] += 1 << 32  # another block has that slot by now
        return lease(pack_refs(values))

    client_of(loader).lease = lease_when_one_is_gone
    assert loader.generate(PROMPT)[0] == expected_output(PROMPT)
    assert loader.stats["load_failed_blocks:lease"] == BLOCKS - lost
    assert loader.stats["hit_blocks"] == lost


def test_slot_that_is_no_longer_the_block(loader: MiniEngine) -> None:
    """The worker looks at the slot itself, before and after the copy."""
    take_planned = loader.connector._scheduler._loads.take_planned

    def with_old_reference() -> tuple[LoadJob, ...]:
        jobs = take_planned()
        for job in jobs:
            old = (unpack_refs(job.refs)[2] - (1 << 32)).to_bytes(8, "little")
            refs = job.refs[: 2 * REF_BYTES] + old + job.refs[3 * REF_BYTES :]
            object.__setattr__(job, "refs", SlotRefs(refs))
        return jobs

    loader.connector._scheduler._loads.take_planned = with_old_reference
    assert loader.generate(PROMPT)[0] == expected_output(PROMPT)
    assert loader.stats["load_failed_blocks:stale"] == 1


class StuckCopies:
    """A copy engine whose first loads never end by themselves."""

    backend, error, is_off = "cpu", "", False

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self.loads_to_hold = 1_000
        self._stuck: dict[int, int] = {}
        self._cancelled: list[tuple[int, bytes, int]] = []
        self._since_s = 0.0
        self.cancels = 0

    def submit_load(self, refs: SlotRefs, blocks: bytes, stream: int) -> int:
        if len(self._stuck) + self.cancels == self.loads_to_hold:
            return self._engine.submit_load(refs, blocks, stream)
        if not self._stuck:
            self._since_s = time.monotonic()
        number = 1_000_000 + len(self._stuck)
        self._stuck[number] = num_refs(refs)
        return number

    def submit_store(self, refs: SlotRefs, blocks: bytes, stream: int) -> int:
        return self._engine.submit_store(refs, blocks, stream)

    def poll(self) -> list[tuple[int, bytes, int]]:
        cancelled, self._cancelled = self._cancelled, []
        return self._engine.poll() + cancelled

    def arriving(self, milliseconds: int) -> list[int]:
        return []

    @property
    def loads_stand_still_s(self) -> float:
        return time.monotonic() - self._since_s if self._stuck else 0.0

    def cancel(self, number: int) -> None:
        self.cancels += 1
        blocks = self._stuck.pop(number)
        self._cancelled.append((number, bytes([COPY_CANCELLED]) * blocks, 1))

    def close(self) -> None:
        self._engine.close()


class CreepingCopies:
    """A copy engine whose load takes `batches`, one of which ends at each poll."""

    backend, error, is_off = "cpu", "", False

    def __init__(self, engine: CopyEngine, batches: int, batch_s: float) -> None:
        self._engine = engine
        self._batches = batches
        self._batch_s = batch_s
        self._load: tuple[SlotRefs, bytes] | None = None
        self.cancels = 0

    def submit_load(self, refs: SlotRefs, blocks: bytes, stream: int) -> int:
        assert self._load is None
        self._load = refs, blocks
        return 1_000_000

    def poll(self) -> list[tuple[int, bytes, int]]:
        if self._load is None:
            return self._engine.poll()
        self._batches -= 1
        time.sleep(self._batch_s)
        if self._batches > 0:
            return []
        number = self._engine.submit_load(*self._load)
        self._load = None
        assert self._engine.wait(number, 10_000)
        ((_, statuses, nanoseconds),) = self._engine.poll()
        return [(1_000_000, statuses, nanoseconds)]

    def arriving(self, milliseconds: int) -> list[int]:
        return []

    @property
    def loads_stand_still_s(self) -> float:
        return 0.0 if self._load is None else self._batch_s

    def cancel(self, number: int) -> None:
        self.cancels += 1

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def stuck(loader: MiniEngine) -> StuckCopies:
    attached = loader.worker._worker._attached
    attached.engine = StuckCopies(attached.engine)
    return attached.engine


def end_loads_soon(loader: MiniEngine) -> None:
    """From now on: before that, what a test does first has all the time that it takes."""
    loader.worker._worker._deadline_s = 0.2


def test_trap_10_load_past_its_deadline_is_stopped_then_reported(
    loader: MiniEngine, stuck: StuckCopies
) -> None:
    end_loads_soon(loader)
    assert loader.generate(PROMPT)[0] == expected_output(PROMPT)
    assert stuck.cancels == 1
    assert loader.stats["load_failed_blocks:deadline"] == BLOCKS


def test_load_that_gets_on_may_take_longer_than_the_deadline(loader: MiniEngine) -> None:
    end_loads_soon(loader)
    attached = loader.worker._worker._attached
    attached.engine = creeping = CreepingCopies(attached.engine, batches=20, batch_s=0.03)
    assert loader.generate(PROMPT, 1) == (expected_output(PROMPT, 1), BLOCKS * BLOCK)
    assert creeping.cancels == 0


def test_stores_that_end_do_not_save_a_load_that_is_stuck(
    loader: MiniEngine, stuck: StuckCopies
) -> None:
    end_loads_soon(loader)
    request_id = loader.add(PROMPT)
    seeds = itertools.count(2)
    give_up = time.monotonic() + WAIT_S
    while not loader.outputs[request_id]:
        assert time.monotonic() < give_up, "the load is never stopped"
        if len(loader.scheduler.requests) == 1:
            loader.add(prompt_of(next(seeds), 2 * BLOCK), 1)
        loader.step()
    assert stuck.cancels == 1
    assert loader.stats["load_failed_blocks:deadline"] == BLOCKS
    assert loader.stats["store_blocks"] > BLOCKS


def test_trap_10_aborted_load_is_reported_all_the_same(
    loader: MiniEngine, stuck: StuckCopies, daemon: Daemon
) -> None:
    """Its blocks stay with vLLM until then, daemon or no daemon."""
    loader.lose_patience()
    daemon.kill()
    request_id = loader.add(PROMPT)
    loader.step()
    loader.abort(request_id)
    loader.step()
    assert loader.free_blocks < 255
    end_loads_soon(loader)
    loader.run()
    assert loader.free_blocks == 255
    assert stuck.cancels == 1


def test_trap_30_single_request_completes_when_its_load_fails(
    loader: MiniEngine, stuck: StuckCopies, daemon: Daemon
) -> None:
    """Nothing but the engine's own steps wakes it: the daemon is dead."""
    request_id = loader.add(PROMPT)
    loader.step()
    loader.lose_patience()
    daemon.kill()
    end_loads_soon(loader)
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)


def test_trap_30_daemon_killed_during_a_load_changes_nothing(
    loader: MiniEngine, daemon: Daemon
) -> None:
    request_id = loader.add(PROMPT)
    loader.lose_patience()
    daemon.kill()
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)
    assert loader.cached_tokens[request_id] == BLOCKS * BLOCK


def test_same_bad_block_does_not_keep_a_request_busy_for_ever(
    loader: MiniEngine, daemon: Daemon
) -> None:
    """Without a daemon the block cannot be dropped: it is the engine that does not use it again."""
    flip_byte(loader, 4)
    loader.lose_patience()
    daemon.kill()
    for cached in (BLOCKS, 4):
        output, tokens = loader.generate(PROMPT)
        assert (output, tokens) == (expected_output(PROMPT), cached * BLOCK)
        loader.reset_prefix_cache()
    assert loader.stats["load_failed_blocks:checksum"] == 1


def test_pool_file_gone_before_a_worker_mapped_it(
    make_engine: MakeEngine, daemon: Daemon, loader: MiniEngine
) -> None:
    late = make_engine()
    request_id = late.add(PROMPT)
    (daemon.paths.pool).unlink()
    late.run()
    assert late.outputs[request_id] == expected_output(PROMPT)
    assert late.stats["load_failed_blocks:unmapped"] == BLOCKS
    assert late.free_blocks == 255
    assert view_of(late).leased_slots == 0


def test_two_requests_of_one_prefix_of_which_one_fails(
    loader: MiniEngine, stuck: StuckCopies
) -> None:
    """They load into blocks of their own: the one that fails is computed, the other is not touched."""
    stuck.loads_to_hold = 1
    other = prompt_of(1, 9 * BLOCK + 1)
    ids = [loader.add(PROMPT), loader.add(other)]
    until(lambda: (loader.step(), loader.outputs[ids[1]])[1], "the end of the load that ends")
    assert not loader.outputs[ids[0]]
    end_loads_soon(loader)
    loader.run()
    assert [loader.outputs[one] for one in ids] == [expected_output(PROMPT), expected_output(other)]
    assert loader.stats["load_failed_blocks:deadline"] == BLOCKS


def test_cleared_pool_between_lookup_and_load(loader: MiniEngine, daemon: Daemon) -> None:
    request_id = loader.add(PROMPT)
    request = loader.scheduler.requests[request_id]
    assert loader.connector.get_num_new_matched_tokens(request, 0)[0] == BLOCKS * BLOCK
    clear(daemon.name, str(daemon.shm_dir))
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)
