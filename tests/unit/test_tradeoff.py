"""Load or compute: what is learnt, and when it is believed."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from vllm_kvpool.connector.tradeoff import MIN_OBSERVATIONS, TRUST_S, Line, Tradeoff

H200_MS = {128: 16.5, 256: 15.8, 512: 17.6, 768: 22.9, 1_024: 29.3, 1_536: 39.3, 2_048: 52.2}
"""Llama 3 8B, eager: time to the first token of a request alone, by its tokens."""
CPU_MS = {100: 110.0, 200: 220.0, 400: 440.0}
LOAD_S, LOAD_TOKEN_S = 3.2e-3, 3.2e-6
"""4 ms for 256 tokens, 6.5 for 1,024."""


def taught(load_s: float, compute_s: float) -> Tradeoff:
    """Seconds for 1,000 tokens; the last load ended at 100 s."""
    tradeoff = Tradeoff()
    for i in range(MIN_OBSERVATIONS):
        ended_s = 93.0 + i
        tradeoff.loaded(1_000, ended_s - load_s, ended_s)
        tradeoff.computed(1_000, compute_s, alone=True)
    return tradeoff


def teach(tradeoff: Tradeoff, times_ms: Mapping[int, float], rounds: int = 12) -> None:
    for _ in range(rounds):
        for tokens, ms in times_ms.items():
            tradeoff.computed(tokens, ms / 1e3, alone=True)


def taught_alone(times_ms: Mapping[int, float]) -> Tradeoff:
    tradeoff = Tradeoff()
    for begun_s, tokens in enumerate((256, 512, 1_024, 2_048) * 3):
        tradeoff.loaded(tokens, begun_s, begun_s + LOAD_S + LOAD_TOKEN_S * tokens)
    teach(tradeoff, times_ms)
    return tradeoff


def loads(tradeoff: Tradeoff, tokens: int, *, rest: int = 1, alone: bool = True) -> bool:
    prediction = tradeoff.predict(tokens, rest, alone, 12.0)
    assert prediction is not None
    return prediction.load_is_faster


def compute_ms(tradeoff: Tradeoff, tokens: int, *, rest: int = 1, alone: bool = True) -> float:
    prediction = tradeoff.predict(tokens, rest, alone, 12.0)
    assert prediction is not None
    return prediction.compute_s * 1e3


def floor_ms(tradeoff: Tradeoff) -> float:
    """What the rest takes of a long prompt's time."""
    alone, beside = (compute_ms(tradeoff, 10**6, rest=0, alone=alone) for alone in (True, False))
    return beside - alone


def test_a_line_is_found_again() -> None:
    line = Line()
    for tokens in (100, 2_000, 400, 8_000, 1_000, 300, 5_000, 700):
        line.add(tokens, 0.004 + 20e-6 * tokens)
    assert line.at(0) == pytest.approx(0.004)
    assert line.at(32_000) == pytest.approx(0.644)


def test_noise_does_not_turn_a_line_around() -> None:
    draw = random.Random(1)
    line = Line()
    for _ in range(50):
        line.add(draw.choice((1_000, 1_010)), draw.uniform(0.02, 0.06))
    assert 0.2 < line.at(10_000) < 0.6
    falling = Line()
    for tokens, seconds in ((100, 0.5), (1_000, 0.1)) * 4:
        falling.add(tokens, seconds)
    assert falling.at(2_000) > falling.at(1_000)


def test_what_is_long_past_counts_for_little() -> None:
    line = Line()
    for _ in range(20):
        line.add(1_000, 5.0)  # as when the memory is touched first
    for _ in range(60):
        line.add(1_000, 0.1)
    assert line.at(1_000) == pytest.approx(0.1, rel=0.2)


def test_the_faster_one_is_chosen() -> None:
    quick = taught(load_s=0.01, compute_s=0.1).predict(4_000, 1, False, 101.0)
    slow = taught(load_s=0.2, compute_s=0.1).predict(4_000, 1, False, 101.0)
    assert quick is not None
    assert quick.load_is_faster
    assert quick.load_s == pytest.approx(0.04)
    assert slow is not None
    assert not slow.load_is_faster
    assert slow.compute_s == pytest.approx(0.4)


def test_the_crossover_lies_where_the_lines_meet() -> None:
    """Loads of 4 ms and 5 us a token, computation of 25 us a token: 200 tokens."""
    tradeoff = Tradeoff()
    for begun_s, tokens in enumerate((500, 1_000, 2_000, 4_000) * 3):
        tradeoff.loaded(tokens, begun_s, begun_s + 0.004 + 5e-6 * tokens)
        tradeoff.computed(tokens, 25e-6 * tokens, alone=True)
    answers = [tradeoff.predict(tokens, 1, False, 12.0) for tokens in (190, 210)]
    assert [answer is not None and answer.load_is_faster for answer in answers] == [False, True]


def test_short_prompts_do_not_make_long_ones_look_cheap() -> None:
    """A step takes 20 ms at least: nothing about 8,000 tokens is to be learnt from the difference of
    16 and 500."""
    tradeoff = taught(load_s=0.004, compute_s=0.1)
    for tokens, seconds in ((16, 0.020), (500, 0.021)) * 20:
        tradeoff.computed(tokens, seconds, alone=True)
    answer = tradeoff.predict(8_000, 1, False, 101.0)
    assert answer is not None
    assert answer.compute_s > 0.2


def test_within_the_floor_nothing_is_saved() -> None:
    """The rest takes it in any case."""
    tradeoff = taught_alone(H200_MS)
    assert floor_ms(tradeoff) == pytest.approx(15.8)
    assert compute_ms(tradeoff, 512) == 0
    assert [loads(tradeoff, tokens) for tokens in (128, 256, 512)] == [False] * 3
    assert [loads(tradeoff, tokens) for tokens in (1_024, 1_536, 2_048)] == [True] * 3


def test_tokens_beside_a_long_rest_take_their_time() -> None:
    tradeoff = taught_alone(H200_MS)
    assert loads(tradeoff, 256, rest=1_024)
    assert compute_ms(tradeoff, 256, rest=1_024) == pytest.approx(256 * 26.6e-3, rel=0.02)


def test_beside_other_requests_every_token_counts() -> None:
    tradeoff = taught_alone(H200_MS)
    assert loads(tradeoff, 256, alone=False)
    assert not loads(tradeoff, 64, alone=False)  # 1.7 ms


def test_prompts_that_shared_their_steps_teach_no_floor() -> None:
    tradeoff = taught_alone({2_048: 52.2})
    for _ in range(2 * MIN_OBSERVATIONS):
        tradeoff.computed(16, 0.060, alone=False)
    assert floor_ms(tradeoff) == pytest.approx(0)


def test_engines_that_see_only_long_prompts_know_no_floor() -> None:
    tradeoff = taught_alone({tokens: H200_MS[tokens] for tokens in (1_024, 1_536, 2_048)})
    assert floor_ms(tradeoff) == pytest.approx(0)
    assert loads(tradeoff, 256)


def test_where_a_hundred_tokens_are_work_there_is_no_floor() -> None:
    """1.1 ms a token, as on CPUs: what is loaded is saved, alone too."""
    tradeoff = taught_alone({100: 110.0, 200: 220.0, 400: 440.0})
    assert compute_ms(tradeoff, 50, rest=3) == pytest.approx(55)
    assert loads(tradeoff, 16)


def test_stalls_are_a_floor_until_a_prompt_is_faster() -> None:
    """Where no prompt takes the floor, eight slow ones look as if they did."""
    tradeoff = taught_alone({2_048: 52.2})
    for _ in range(MIN_OBSERVATIONS):
        teach(tradeoff, {1_024: 500.0, 2_048: 52.2}, rounds=1)
    assert floor_ms(tradeoff) == pytest.approx(52.2)
    assert loads(tradeoff, 1_024, rest=2_048)


def test_one_slow_prompt_is_no_floor() -> None:
    tradeoff = taught_alone(H200_MS)
    tradeoff.computed(128, 2.0, alone=True)  # kernels were loaded
    assert floor_ms(tradeoff) == pytest.approx(15.8)


def test_a_floor_that_gets_slower_and_faster_again_is_followed() -> None:
    """As beside other work of the GPU."""
    tradeoff = taught_alone(H200_MS)
    teach(tradeoff, {tokens: 3 * ms for tokens, ms in H200_MS.items()})
    assert floor_ms(tradeoff) == pytest.approx(3 * 15.8)
    teach(tradeoff, H200_MS, rounds=1)
    assert floor_ms(tradeoff) == pytest.approx(15.8)


@pytest.mark.parametrize("factor", [2, 10, 1_000])
def test_long_prompts_that_get_slower_are_no_floor(factor: int) -> None:
    """They look like one until the slope has followed."""
    tradeoff = taught_alone(H200_MS)
    teach(tradeoff, {2_048: factor * 52.2})
    assert floor_ms(tradeoff) == pytest.approx(15.8)


def test_short_prompts_in_great_number_leave_the_floor_as_it_is() -> None:
    """They make a token look dear, so that more is loaded than should be, and never less."""
    tradeoff = taught_alone(H200_MS)
    teach(tradeoff, {128: 16.5, 256: 15.8}, rounds=50)
    assert floor_ms(tradeoff) == pytest.approx(15.8)
    assert [loads(tradeoff, tokens) for tokens in (128, 1_024)] == [False, True]


def test_loads_that_wait_for_each_other_are_not_slow() -> None:
    """Sixteen at once, 10 ms each: the last one is there after 160 ms, and the link is as fast as ever."""
    tradeoff = taught(load_s=0.01, compute_s=0.1)
    for i in range(16):
        tradeoff.loaded(1_000, 101.0, 101.0 + 0.01 * (i + 1))
    answer = tradeoff.predict(1_000, 1, False, 101.2)
    assert answer is not None
    assert answer.load_s == pytest.approx(0.01)


def test_nothing_is_said_before_both_are_known() -> None:
    tradeoff = Tradeoff()
    for _ in range(MIN_OBSERVATIONS):
        assert tradeoff.predict(1_000, 1, False, 0.0) is None
        tradeoff.loaded(1_000, -9.0, 0.0)
    for _ in range(MIN_OBSERVATIONS):
        assert tradeoff.predict(1_000, 1, False, 0.0) is None
        tradeoff.computed(1_000, 0.1, alone=True)
    assert tradeoff.predict(1_000, 1, False, 0.0) is not None


def test_slow_loads_are_tried_again_after_a_while() -> None:
    tradeoff = taught(load_s=0.2, compute_s=0.1)
    assert tradeoff.predict(1_000, 1, False, 100.0 + TRUST_S) is not None
    assert tradeoff.predict(1_000, 1, False, 100.1 + TRUST_S) is None
