"""Loads that vLLM hears of before their end, because it has nothing else to do.

The copies here are real and begin as late as they may: in the step that computes with their blocks, when it waits for
them, or, as with a GPU, when its kernels are told to come later. A step that did neither would find other bytes there,
and the model of `mini_engine` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from connector.test_failed_loads import view_of
from connector.test_several_workers import damage, slot_bytes_of
from helpers import Daemon, until

from vllm_kvpool._native import COPY_FAILED, COPY_STALE, CopyEngine
from vllm_kvpool.connector.metadata import CopyJob, KVPoolMetadata
from vllm_kvpool.types import NO_REFS, SlotRefs, num_refs

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 10 * BLOCK + 1)
BLOCKS = 10
WAIT_MS = 10_000
POLLS = 20
"""After so many a load ends by itself."""


class LateCopies:
    """A copy engine whose loads arrive at once and end when somebody waits for them, or after many polls, as `ends_as`:
    the last one first, so that the bytes of older ones come as late as they can. `orders`: as a GPU does, whose kernels
    find the bytes that they were ordered to come after, before anybody on the processor has waited for them."""

    backend = "cuda, switched off"
    error = "CUDA_ERROR_ILLEGAL_ADDRESS"
    is_off = False
    loads_stand_still_s = 0.0

    def __init__(self, engine: CopyEngine, orders: bool) -> None:
        self._engine = engine
        self._orders = orders
        self._not_waited_for: dict[int, list[tuple[int, bytes, int]]] = {}
        self._late: dict[int, tuple[SlotRefs, bytes]] = {}
        self._ended: list[tuple[int, bytes, int]] = []
        self._last_poll: dict[int, int] = {}
        self._polls = 0
        self._numbers = 1_000_000
        self.ends_as: int | None = None
        self.waits = 0

    def submit_load(self, refs: SlotRefs, blocks: bytes, stream: int) -> int:
        self._numbers += 1
        self._late[self._numbers] = (refs, blocks)
        self._last_poll[self._numbers] = self._polls + POLLS
        return self._numbers

    def submit_store(self, refs: SlotRefs, blocks: bytes, stream: int) -> int:
        return self._engine.submit_store(refs, blocks, stream)

    def arriving(self, milliseconds: int) -> list[int]:
        return [*self._late, *self._not_waited_for]

    def order_after_loads(self, stream: int) -> bool:
        for late in sorted(self._late, reverse=True) if self._orders else ():
            self._end(late, *self._late.pop(late), WAIT_MS)
            self._not_waited_for[late], self._ended = self._ended, []
        return self._orders

    def wait(self, number: int, milliseconds: int) -> bool:
        self.waits += 1
        self._end_from(number, milliseconds)
        return True

    def _end_from(self, number: int, milliseconds: int) -> None:
        for late in sorted(self._late, reverse=True):
            if late >= number:
                self._end(late, *self._late.pop(late), milliseconds)
        self._ended += self._not_waited_for.pop(number, [])

    def _end(self, number: int, refs: SlotRefs, blocks: bytes, milliseconds: int) -> None:
        real = self._engine.submit_load(refs, blocks)
        assert self._engine.wait(real, milliseconds)
        for job, statuses, nanoseconds in self._engine.poll():
            if job != real:
                self._ended.append((job, statuses, nanoseconds))
            elif self.ends_as is None:
                self._ended.append((number, statuses, nanoseconds))
            else:
                self._ended.append((number, bytes([self.ends_as]) * num_refs(refs), nanoseconds))

    def poll(self) -> list[tuple[int, bytes, int]]:
        self._polls += 1
        for number in [*self._late, *self._not_waited_for]:
            if self._last_poll[number] <= self._polls:
                self._end_from(number, WAIT_MS)
        ended, self._ended = self._ended, []
        return ended + self._engine.poll()

    def cancel(self, number: int) -> None:
        self.wait(number, WAIT_MS)

    def close(self) -> None:
        self._engine.close()


def loaded(make_engine: MakeEngine, daemon: Daemon, orders: bool, **options: bool) -> MiniEngine:
    """An engine whose pool, but not whose KV cache, holds the blocks of PROMPT."""
    engine = make_engine(**options)
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == BLOCKS)
    engine.reset_prefix_cache()
    attached = engine.worker._worker._attached
    attached.engine = LateCopies(attached.engine, orders)
    return engine


@pytest.fixture(params=[False, True], ids=["waits", "orders"])
def orders(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def loader(
    make_engine: MakeEngine, daemon: Daemon, orders: bool, request: pytest.FixtureRequest
) -> Iterator[MiniEngine]:
    engine = loaded(make_engine, daemon, orders, asynchronous=request.param)
    yield engine
    engine.run()
    assert engine.free_blocks == 255
    assert view_of(engine).leased_slots == 0


def copies_of(engine: MiniEngine) -> LateCopies:
    copies = engine.worker._worker._attached.engine
    assert isinstance(copies, LateCopies)
    return copies


def test_step_that_computes_waits_for_the_load(loader: MiniEngine) -> None:
    assert loader.generate(PROMPT) == (expected_output(PROMPT), BLOCKS * BLOCK)
    assert copies_of(loader).waits == 1
    assert loader.stats["load_bytes"] > 0


def test_wait_for_a_load_is_not_taken_for_computing(loader: MiniEngine) -> None:
    """The step that computes the rest of the prompt takes as long as the load."""
    assert loader.connector._scheduler is not None
    seen: list[int] = []
    loader.connector._scheduler._tradeoff.computed = lambda tokens, seconds: seen.append(tokens)
    loader.generate(PROMPT, 1)
    assert seen == []
    other = prompt_of(2, 3 * BLOCK)
    loader.generate(other, 1)
    assert seen == [3 * BLOCK]


def test_load_that_has_come_is_not_waited_for(loader: MiniEngine) -> None:
    request_id = loader.add(PROMPT)
    copies = copies_of(loader)
    while not loader.worker._worker._attached.announced:
        loader.step()
    for number in list(copies._late):
        copies.wait(number, WAIT_MS)
    ordered: list[int] = []
    copies.order_after_loads = lambda stream: bool(ordered.append(stream))
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)
    assert ordered == []


def test_engine_with_other_work_is_not_held_up(loader: MiniEngine) -> None:
    """It hears of the load at its end, which nobody waits for."""
    other = prompt_of(2, 3 * BLOCK)
    loader.add(other, 8)
    loader.step()
    request_id = loader.add(PROMPT)
    for _ in range(4):
        loader.step()
    assert copies_of(loader).waits == 0
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)


def test_stores_come_after_loads_that_arrive(loader: MiniEngine) -> None:
    """Also in a step that computes nothing."""
    request_id = loader.add(PROMPT)
    while not loader.worker._worker._attached.announced:
        loader.step()
    store = CopyJob(1_000, NO_REFS, b"")
    loader.worker.handle_preemptions(KVPoolMetadata(stores=(store,), computes=False))
    assert not copies_of(loader)._late
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)


@pytest.mark.parametrize(
    ("status", "reason"), [(COPY_FAILED, "ILLEGAL_ADDRESS"), (COPY_STALE, "a slot was lost")]
)
def test_engine_ends_rather_than_compute_with_wrong_bytes(
    make_engine: MakeEngine, daemon: Daemon, orders: bool, status: int, reason: str
) -> None:
    """The device is lost, and the engine with it, or the pool has broken its promise. A GPU computes all the same, but
    nobody gets that token."""
    engine = loaded(make_engine, daemon, orders)
    copies_of(engine).ends_as = status
    if status == COPY_STALE:
        copies_of(engine).error = ""
    request_id = engine.add(PROMPT)
    with pytest.raises(RuntimeError, match=reason):
        engine.run()
    assert not engine.outputs.get(request_id)


@pytest.mark.parametrize("steps", range(1, 6))
def test_nothing_is_left_of_a_request_that_ends_before_its_load(
    loader: MiniEngine, steps: int
) -> None:
    request_id = loader.add(PROMPT)
    for _ in range(steps):
        loader.step()
    loader.abort(request_id)
    loader.run()
    assert view_of(loader).leased_slots == 0
    assert loader.generate(PROMPT)[0] == expected_output(PROMPT)


def test_a_preempted_request_loads_again_before_its_first_load_was_reported(
    make_engine: MakeEngine, daemon: Daemon, orders: bool
) -> None:
    """The first one's end says nothing of the second, whose blocks hold no tokens yet: they must not be stored."""
    engine = loaded(make_engine, daemon, orders, asynchronous=True)
    request_id = engine.add(PROMPT, 40)
    while not engine.busy:
        engine.step()
    engine.add(prompt_of(2, 3 * BLOCK), 40)  # a step that computes announces nothing
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.step()
    engine.step()
    side = engine.connector._scheduler
    assert len(side._loads._loads) == len(copies_of(engine)._late) == 1  # the second one
    assert side._records[request_id].loading
    engine.run()
    assert engine.outputs[request_id] == expected_output(PROMPT, 40)
    assert engine.stats["hit_blocks"] == 2 * BLOCKS


def test_one_rank_announces_its_part_and_the_other_fails(
    make_engine: MakeEngine, daemon: Daemon, orders: bool
) -> None:
    """The request is looked up again before the first rank's report: it computes, and loads nothing twice."""
    engine = make_engine(tensor_parallel_size=2)
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == BLOCKS)
    engine.reset_prefix_cache()
    attached = engine.workers[0].connector._worker._attached
    attached.engine = LateCopies(attached.engine, orders)
    request_id = engine.add(PROMPT)
    damage(engine, request_id, 0, slot_bytes_of(engine) // 2 + 9)
    engine.run()
    assert engine.outputs[request_id] == expected_output(PROMPT)
    assert engine.stats["hit_blocks"] == BLOCKS
    assert engine.stats["load_failed_blocks:checksum"] == 1
    until(lambda: daemon.counter("dropped") == 1)
    assert view_of(engine).leased_slots == 0


def test_blocks_given_to_another_load_are_not_written_late(
    loader: MiniEngine, daemon: Daemon
) -> None:
    """vLLM frees the blocks of a request that was aborted as soon as it hears of its load, and hands them out first."""
    other = prompt_of(9, 10 * BLOCK + 1)
    loader.generate(other, 1)
    until(lambda: daemon.counter("ready") == 2 * BLOCKS)
    loader.reset_prefix_cache()
    aborted = loader.add(PROMPT)
    loader.step()
    loader.abort(aborted)
    loader.step()
    request_id = loader.add(other)
    loader.run()
    assert loader.outputs[request_id] == expected_output(other)
    assert loader.generate(other)[0] == expected_output(other)


def test_request_that_ends_at_once_stores_what_it_computed(
    loader: MiniEngine, daemon: Daemon
) -> None:
    longer = prompt_of(1, 14 * BLOCK + 1)
    assert loader.generate(longer, 1) == (expected_output(longer, 1), BLOCKS * BLOCK)
    until(lambda: daemon.counter("ready") == 14)


def test_two_requests_of_one_prefix(loader: MiniEngine) -> None:
    other = prompt_of(1, 9 * BLOCK + 1)
    ids = [loader.add(PROMPT), loader.add(other)]
    loader.run()
    assert [loader.outputs[one] for one in ids] == [expected_output(PROMPT), expected_output(other)]


def test_request_that_comes_while_the_other_arrives(loader: MiniEngine) -> None:
    """Its forward is the step that has to wait, for a load that is not its own."""
    first = loader.add(PROMPT)
    loader.step()
    loader.step()
    other = prompt_of(3, 2 * BLOCK)
    second = loader.add(other)
    loader.run()
    assert loader.outputs[first] == expected_output(PROMPT)
    assert loader.outputs[second] == expected_output(other)


def test_pool_that_is_replaced_meanwhile(loader: MiniEngine, daemon: Daemon) -> None:
    request_id = loader.add(PROMPT)
    loader.step()
    loader.step()
    loader.worker._worker._detach()
    loader.run()
    assert loader.outputs[request_id] == expected_output(PROMPT)
