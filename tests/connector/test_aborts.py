"""Requests that end at any moment: every load is reported once, everything comes back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon, until
from vllm.v1.request import RequestStatus

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 10 * BLOCK + 1)


def fill_pool(engine: MiniEngine, daemon: Daemon) -> None:
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == 10)
    engine.reset_prefix_cache()


def check_everything_returned(engine: MiniEngine) -> None:
    engine.run()
    assert engine.free_blocks == 255
    assert not engine.scheduler.requests
    assert not engine.connector._scheduler._records
    assert not engine.connector._scheduler._loads._loads
    assert engine.connector._scheduler._link.client.view.leased_slots == 0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("steps", range(6))
def test_trap_9_and_10_abort_after_any_step(
    make_engine: MakeEngine, daemon: Daemon, asynchronous: bool, steps: int
) -> None:
    """Step 0 lies before the first schedule (trap 11), 1 in the load, then prefill and decode."""
    engine = make_engine(asynchronous=asynchronous)
    fill_pool(engine, daemon)
    request_id = engine.add(PROMPT, 50)
    for _ in range(steps):
        engine.step()
    engine.abort(request_id)
    check_everything_returned(engine)
    assert engine.generate(PROMPT)[0] == expected_output(PROMPT)


def test_trap_11_never_scheduled_request(make_engine: MakeEngine) -> None:
    """Because another one takes all of the engine."""
    engine = make_engine(max_num_seqs=1)
    running, waiting = engine.add(PROMPT, 20), engine.add(prompt_of(2, 5 * BLOCK))
    engine.step()
    assert engine.status(waiting) == RequestStatus.WAITING
    engine.abort(waiting)
    engine.abort(waiting, "never heard of")
    engine.run()
    assert engine.outputs[running] == expected_output(PROMPT, 20)
    check_everything_returned(engine)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_trap_9_aborts_in_random_order(
    make_engine: MakeEngine, daemon: Daemon, asynchronous: bool, seed: int
) -> None:
    engine = make_engine(asynchronous=asynchronous, num_blocks=256)
    fill_pool(engine, daemon)
    engine.delay_stores(3)
    draw = random.Random(seed)
    alive: dict[str, list[int]] = {}
    for _ in range(60):
        if draw.random() < 0.5:
            prompt = PROMPT[: draw.randrange(1, len(PROMPT))] + prompt_of(draw.randrange(9), 40)
            alive[engine.add(prompt, 30)] = prompt
        engine.step()
        while alive and draw.random() < 0.3:
            victim = draw.choice(list(alive))
            engine.abort(victim)
            del alive[victim]
    engine.run()
    for request_id, prompt in alive.items():
        assert engine.outputs[request_id] == expected_output(prompt, 30)
    check_everything_returned(engine)
