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


def teach_steps(engine: MiniEngine) -> None:
    """However many tokens, a step takes half a minute; loads are quick."""
    for tokens in (1, 1_000) * MIN_OBSERVATIONS:
        Tradeoff.computed(tradeoff_of(engine), tokens, 30.0)
    teach_loads(engine, QUICK_S)


def watched_prefills(engine: MiniEngine) -> list[int]:
    """How many tokens were computed during each that the engine learns from."""
    seen: list[int] = []
    tradeoff_of(engine).computed = lambda tokens, seconds: seen.append(tokens)
    return seen


def test_engines_learn_both_from_their_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, learn=True)
    for seed in range(MIN_OBSERVATIONS):
        prompt = prompt_of(seed, (3 + seed) * BLOCK + 5)
        engine.generate(prompt)
        engine.reset_prefix_cache()
        assert engine.generate(prompt)[1] == (3 + seed) * BLOCK
    tradeoff = tradeoff_of(engine)
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
        tradeoff_of(engine).computed(6 * BLOCK + 5, SLOW_S)
    assert engine.generate(prompts[1]) == (expected_output(prompts[1]), 6 * BLOCK)
    assert len(engine.stats["predicted_load_seconds"]) == 1
    assert "misses:slower" not in engine.stats


def test_only_a_busy_engine_loads_what_a_step_computes_as_well(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64)
    prompt, other = prompt_of(1, 6 * BLOCK + 5), prompt_of(2, BLOCK + 5)
    engine.generate(prompt)
    engine.reset_prefix_cache()
    teach_steps(engine)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    assert engine.stats["misses:slower"] == 1
    assert engine.stats["predicted_compute_seconds"] == [0]
    engine.reset_prefix_cache()
    engine.add(other, max_tokens=20)
    engine.step()
    teach_loads(engine, QUICK_S)
    assert engine.generate(prompt) == (expected_output(prompt), 6 * BLOCK)


def test_prefills_count_what_was_computed_beside_them(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, max_tokens=4 * BLOCK)
    prefills = watched_prefills(engine)
    engine.generate(prompt_of(0, 6 * BLOCK))
    for seed in (1, 2):
        engine.add(prompt_of(seed, 2 * BLOCK))
    engine.run()
    assert prefills == [6 * BLOCK, 4 * BLOCK, 4 * BLOCK]


def test_prefill_of_an_aborted_request_teaches_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64, max_tokens=2 * BLOCK)
    prefills = watched_prefills(engine)
    request_id = engine.add(prompt_of(1, 5 * BLOCK))
    engine.step()
    engine.abort(request_id)
    engine.run()
    assert prefills == []
