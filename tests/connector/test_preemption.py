"""Memory pressure: requests lose their blocks while copies run, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from connector.test_failed_loads import view_of
from helpers import Daemon, until

MakeEngine = Callable[..., MiniEngine]
both = pytest.mark.parametrize("asynchronous", [False, True])


def preemptions(engine: MiniEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    preempt = engine.scheduler._preempt_request

    def note(request: Any, *arguments: Any, **named: Any) -> None:
        seen.append(request.request_id)
        preempt(request, *arguments, **named)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", note)
    return seen


@both
@pytest.mark.parametrize("delay", [0, 1, 7])
@pytest.mark.parametrize("resumed_as_new", [False, True])
def test_trap_4_5_and_19_preempted_while_its_blocks_are_being_stored(
    make_engine: MakeEngine,
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    delay: int,
    resumed_as_new: bool,
) -> None:
    """Pinned blocks are not handed out before they are copied; the request is taken up again (as a
    cached one or, by the V2 runner, as a new one) before its copies are done."""
    engine = make_engine(asynchronous=asynchronous, num_blocks=40, max_tokens=64)
    engine.scheduler.use_v2_model_runner = resumed_as_new
    engine.delay_stores(delay)
    seen = preemptions(engine, monkeypatch)
    prompts = [prompt_of(seed, 8 * BLOCK + seed) for seed in range(6)]
    ids = [engine.add(prompt, 6 * BLOCK) for prompt in prompts]
    engine.run()
    assert seen, "nothing was preempted"
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert engine.outputs[request_id] == expected_output(prompt, 6 * BLOCK)
    assert engine.free_blocks == 39
    check_pool_bytes(make_engine, prompts)


def check_pool_bytes(make_engine: MakeEngine, prompts: list[list[int]]) -> None:
    """What was stored under pressure is right: the attention of another engine checks each byte."""
    reader = make_engine(num_blocks=512, extra={"min_load_tokens": 1})
    for prompt in prompts:
        whole = [*prompt, *expected_output(prompt, 6 * BLOCK)]
        assert reader.generate(whole)[0] == expected_output(whole)
    assert reader.stats["hit_blocks"] > 0


@both
def test_preempted_request_loads_its_own_blocks_back(
    make_engine: MakeEngine, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    engine = make_engine(asynchronous=asynchronous, num_blocks=48)
    engine.unhurried = True
    seen = preemptions(engine, monkeypatch)
    prompts = [prompt_of(seed, 12 * BLOCK) for seed in range(3)]
    ids = [engine.add(prompt, 8 * BLOCK) for prompt in prompts]
    engine.run()
    assert seen
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert engine.outputs[request_id] == expected_output(prompt, 8 * BLOCK)
    assert engine.stats["hit_blocks"] > 0


@both
def test_trap_8_many_loads_and_room_for_four(
    make_engine: MakeEngine, daemon: Daemon, asynchronous: bool
) -> None:
    """64 loads of 8 blocks each, 40 blocks in all: they come by turns, and all end."""
    filler = make_engine(num_blocks=2048, max_tokens=2048)  # half may be pinned at once
    prompts = [prompt_of(seed, 8 * BLOCK) for seed in range(64)]
    for prompt in prompts:
        filler.add(prompt, 1)
    filler.run()
    until(lambda: daemon.counter("ready") == 64 * 8)
    engine = make_engine(asynchronous=asynchronous, num_blocks=41, max_num_seqs=64)
    ids = [engine.add(prompt, 2 * BLOCK) for prompt in prompts]
    engine.run()
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert engine.outputs[request_id] == expected_output(prompt, 2 * BLOCK)
    assert engine.free_blocks == 40
    assert engine.stats["hit_blocks"] >= 64 * 6
    assert view_of(engine).leased_slots == 0


def test_allocation_waits_for_pins_rather_than_preempting(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_blocks=40)
    engine.generate(prompt_of(2, 2 * BLOCK), 1)
    assert not engine.connector.has_pending_block_frees()
    engine.delay_stores(3)
    engine.add(prompt_of(1, 6 * BLOCK), 1)
    engine.step()
    assert engine.connector.has_pending_block_frees()
    assert engine.connector.has_pending_push_work()
    engine.run()
    assert not engine.connector.has_pending_block_frees()


def test_trap_8_first_requests_of_an_engine_are_put_off_together(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    """The daemon's first answer comes while vLLM asks for one request after the other: those that
    were put off must not end up waiting for the blocks of those that load (vLLM up to 0.29)."""
    prompts = [prompt_of(seed, 8 * BLOCK) for seed in range(16)]
    filler = make_engine(num_blocks=2048, max_tokens=2048)
    for prompt in prompts:
        filler.add(prompt, 1)
    filler.run()
    until(lambda: daemon.counter("ready") == 16 * 8)
    engine = make_engine(num_blocks=41, connect=False)
    ids = [engine.add(prompt) for prompt in prompts]
    link = engine.connector._scheduler._link
    lookups = 0
    look_up = engine.connector.get_num_new_matched_tokens

    def answered_in_the_middle(*arguments: Any) -> Any:
        nonlocal lookups
        lookups += 1
        if lookups == 8:
            until(lambda: (link.client.poll(), link.client.connected)[1])
        return look_up(*arguments)

    engine.connector.get_num_new_matched_tokens = answered_in_the_middle
    engine.run()
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert engine.outputs[request_id] == expected_output(prompt)
    assert engine.stats["hit_blocks"] >= 16 * 7
