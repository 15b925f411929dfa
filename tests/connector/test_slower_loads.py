"""A prefix whose load is predicted to take longer than its computation is computed."""

from __future__ import annotations

import time
from collections.abc import Callable

from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of

from vllm_kvpool.connector.tradeoff import MIN_OBSERVATIONS, TRUST_S, Tradeoff

MakeEngine = Callable[..., MiniEngine]
SLOW_S, QUICK_S = 60.0, 1e-4
"""For a block: slower and faster than the engine, whatever the machine."""


def tradeoff_of(engine: MiniEngine) -> Tradeoff:
    assert engine.connector._scheduler is not None
    return engine.connector._scheduler._tradeoff


def teach_loads(engine: MiniEngine, seconds: float) -> None:
    """One after the other, the last one just now."""
    count = 3 * MIN_OBSERVATIONS
    first_s = time.monotonic() - count * seconds
    tradeoff_of(engine)._last_load_s = first_s
    for i in range(count):
        tradeoff_of(engine).loaded(BLOCK, first_s + i * seconds, first_s + (i + 1) * seconds)


def teach_floor(engine: MiniEngine) -> None:
    """A step takes half a minute at least, a token a quarter of a second; loads are quick."""
    for _ in range(3 * MIN_OBSERVATIONS):
        for tokens, seconds in ((1_000, 250.0), (1, 30.0)):
            Tradeoff.computed(tradeoff_of(engine), tokens, seconds, alone=True)
    teach_loads(engine, QUICK_S)


def watched_prefills(engine: MiniEngine) -> list[tuple[int, bool]]:
    """(tokens, alone) of those that the engine learns from."""
    seen: list[tuple[int, bool]] = []
    tradeoff_of(engine).computed = lambda tokens, seconds, alone: seen.append((tokens, alone))
    return seen


def test_engines_learn_both_from_their_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, learn=True)
    for seed in range(MIN_OBSERVATIONS):
        prompt = prompt_of(seed, (3 + seed) * BLOCK + 5)
        engine.generate(prompt)
        engine.reset_prefix_cache()
        assert engine.generate(prompt)[1] == (3 + seed) * BLOCK
    tradeoff = tradeoff_of(engine)
    assert tradeoff._computations.count == 2 * MIN_OBSERVATIONS
    assert tradeoff._loads.count == MIN_OBSERVATIONS
    prediction = tradeoff.predict(4 * BLOCK, 5, False, tradeoff._last_load_s)
    assert prediction is not None
    assert 0 < prediction.compute_s < 10


def test_slow_loads_are_left_until_it_is_time_to_try_again(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, learn=True)
    prompts = [prompt_of(seed, 6 * BLOCK + 5) for seed in range(MIN_OBSERVATIONS)]
    for prompt in prompts:
        engine.generate(prompt)
    engine.reset_prefix_cache()
    teach_loads(engine, SLOW_S)
    assert engine.generate(prompts[0]) == (expected_output(prompts[0]), 0)
    assert engine.stats["misses:slower"] == 1
    (predicted,) = engine.stats["predicted_load_seconds"]
    assert predicted > engine.stats["predicted_compute_seconds"][0]
    tradeoff_of(engine)._last_load_s -= TRUST_S
    engine.reset_prefix_cache()
    assert engine.generate(prompts[0]) == (expected_output(prompts[0]), 6 * BLOCK)


def test_quick_loads_are_made(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, learn=True)
    prompts = [prompt_of(seed, 6 * BLOCK + 5) for seed in range(MIN_OBSERVATIONS)]
    for prompt in prompts:
        engine.generate(prompt)
    engine.reset_prefix_cache()
    teach_loads(engine, QUICK_S)
    for _ in range(3 * MIN_OBSERVATIONS):
        tradeoff_of(engine).computed(BLOCK, SLOW_S, alone=True)
    assert engine.generate(prompts[1]) == (expected_output(prompts[1]), 6 * BLOCK)
    assert len(engine.stats["predicted_load_seconds"]) == 1
    assert "misses:slower" not in engine.stats


def test_within_the_floor_only_a_busy_engine_loads(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64)
    prompt, other = prompt_of(1, 6 * BLOCK + 5), prompt_of(2, BLOCK + 5)
    engine.generate(prompt)
    engine.reset_prefix_cache()
    teach_floor(engine)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    assert engine.stats["misses:slower"] == 1
    assert engine.stats["predicted_compute_seconds"] == [0]
    engine.reset_prefix_cache()
    engine.add(other, max_tokens=20)
    engine.step()
    teach_loads(engine, QUICK_S)
    assert engine.generate(prompt) == (expected_output(prompt), 6 * BLOCK)


def test_prefills_are_alone_from_begin_to_end(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, max_tokens=2 * BLOCK)
    prefills = watched_prefills(engine)
    engine.generate(prompt_of(0, 100))
    assert prefills == [(100, True)]
    engine.add(prompt_of(1, 101))
    engine.step()
    engine.add(prompt_of(2, 102), max_tokens=20)  # comes in the midst of it
    engine.run()
    engine.add(prompt_of(3, 103), max_tokens=20)
    engine.step()
    engine.step()
    request_id = engine.add(prompt_of(4, 104))
    engine.step()
    engine.abort(request_id)
    engine.run()
    engine.generate(prompt_of(5, 105))
    assert sorted(prefills[1:]) == [(101, False), (102, False), (103, False), (105, True)]


def test_a_request_that_outlasts_others_was_not_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, max_tokens=2 * BLOCK)
    prefills = watched_prefills(engine)
    decoding = engine.add(prompt_of(1, 2 * BLOCK), max_tokens=100)
    engine.step()
    engine.step()
    engine.add(prompt_of(2, 102))
    engine.step()
    engine.abort(decoding)
    engine.run()
    assert prefills == [(2 * BLOCK, True), (102, False)]
