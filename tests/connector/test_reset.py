"""Trap 27: stale KV after a weight update, and what a plain reset leaves."""

from __future__ import annotations

from collections.abc import Callable

from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon, until

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 10 * BLOCK + 1)


def test_trap_27_plain_reset_still_hits(engine: MiniEngine) -> None:
    engine.generate(PROMPT)
    engine.reset_prefix_cache()
    assert engine.generate(PROMPT)[1] == 10 * BLOCK


def test_trap_27_reset_of_the_connector_misses_until_stored_again(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine, other = make_engine(), make_engine()
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == 10)
    engine.reset_prefix_cache(connector=True)
    assert engine.generate(PROMPT, 1) == (expected_output(PROMPT, 1), 0)
    until(lambda: daemon.counter("ready") == 20)
    engine.reset_prefix_cache()
    assert engine.generate(PROMPT, 1)[1] == 10 * BLOCK
    assert other.generate(PROMPT, 1)[1] == 10 * BLOCK, "the other engine was not reset"


def test_trap_27_request_that_ran_during_the_reset_stores_nothing(
    engine: MiniEngine, daemon: Daemon
) -> None:
    """Half of its blocks come from the old weights."""
    engine.generate(prompt_of(2, 2 * BLOCK), 1)
    until(lambda: daemon.counter("ready") == 2)
    request_id = engine.add(PROMPT, 4 * BLOCK, hints={"load": False})
    engine.step()
    engine.connector.reset_cache()
    engine.run()
    assert engine.outputs[request_id] == expected_output(PROMPT, 4 * BLOCK)
    until(lambda: daemon.counter("writing") == 0)
    assert daemon.counter("ready") <= 2 + 10
    engine.reset_prefix_cache()
    assert engine.generate(PROMPT, 1)[1] == 0


def test_reset_is_refused_only_while_blocks_are_held(engine: MiniEngine) -> None:
    """vLLM asks for the reset before it tells the connector: stores in flight make it say no."""
    engine.generate(prompt_of(3, 2 * BLOCK), 1)
    engine.delay_stores(2)
    engine.add(PROMPT, 1)
    engine.step()
    engine.step()
    assert not engine.scheduler.requests
    assert engine.scheduler.reset_prefix_cache() is False
    engine.run()
    assert engine.scheduler.reset_prefix_cache() is True
