"""Load or compute: what is learnt, and when it is believed."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from vllm_kvpool.connector import prefill_time
from vllm_kvpool.connector.tradeoff import MIN_OBSERVATIONS, TRUST_S, Line, Tradeoff

H200_MS = {9: 15.0, 128: 16.5, 256: 15.8, 512: 17.6, 1_024: 29.3, 2_048: 52.2}
"""Llama 3 8B, eager: time to the first token of a request alone, by its tokens."""
LOAD_S, LOAD_TOKEN_S = 3.2e-3, 3.2e-6
"""4 ms for 256 tokens, 6.5 for 1,024."""


def taught(load_s: float, compute_s: float) -> Tradeoff:
    """Seconds for 1,000 tokens; the last load ended at 100 s."""
    tradeoff = Tradeoff()
    for i in range(MIN_OBSERVATIONS):
        ended_s = 93.0 + i
        tradeoff.loaded(1_000, ended_s - load_s, ended_s)
        tradeoff.computed(1_000, compute_s)
    return tradeoff


def teach(tradeoff: Tradeoff, times_ms: Mapping[int, float], rounds: int = 12) -> None:
    for _ in range(rounds):
        for tokens, ms in times_ms.items():
            tradeoff.computed(tokens, ms / 1e3)


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
    quick = taught(load_s=0.01, compute_s=0.1).predict(3_000, 1, False, 101.0)
    slow = taught(load_s=0.2, compute_s=0.1).predict(3_000, 1, False, 101.0)
    assert quick is not None
    assert quick.load_is_faster
    assert quick.load_s == pytest.approx(0.03)
    assert slow is not None
    assert not slow.load_is_faster
    assert slow.compute_s == pytest.approx(0.3)


def test_the_crossover_lies_where_the_lines_meet() -> None:
    """Loads of 4 ms and 5 us a token, computation of 25 us a token: 200 tokens."""
    tradeoff = Tradeoff()
    for begun_s, tokens in enumerate((500, 1_000, 2_000, 4_000) * 3):
        tradeoff.loaded(tokens, begun_s, begun_s + 0.004 + 5e-6 * tokens)
        tradeoff.computed(tokens, 25e-6 * tokens)
    answers = [tradeoff.predict(tokens, 1, False, 12.0) for tokens in (190, 210)]
    assert [answer is not None and answer.load_is_faster for answer in answers] == [False, True]


def test_a_step_that_takes_as_long_with_them_saves_nothing() -> None:
    """The rest takes it in any case."""
    tradeoff = taught_alone(H200_MS)
    assert abs(compute_ms(tradeoff, 256)) < 2
    assert [loads(tradeoff, tokens) for tokens in (128, 256, 512)] == [False] * 3
    assert [loads(tradeoff, tokens) for tokens in (1_024, 1_536, 2_048)] == [True] * 3


def test_tokens_beside_a_long_rest_take_their_time() -> None:
    tradeoff = taught_alone(H200_MS)
    assert loads(tradeoff, 256, rest=1_200)
    assert compute_ms(tradeoff, 256, rest=1_200) == pytest.approx(256 * 22.4e-3, rel=0.1)


def test_beside_other_requests_every_token_counts() -> None:
    tradeoff = taught_alone(H200_MS)
    assert compute_ms(tradeoff, 256, alone=False) == pytest.approx(256 * 52.2 / 2_048, rel=0.01)
    assert loads(tradeoff, 256, alone=False)
    assert not loads(tradeoff, 64, alone=False)  # 1.6 ms


def test_engines_that_see_only_long_prompts_load() -> None:
    """A load shows them what the rest of a prompt takes."""
    tradeoff = taught_alone({2_048: 52.2})
    assert loads(tradeoff, 256)
    teach(tradeoff, {9: 15.0, 300: 16.0})
    assert not loads(tradeoff, 256)


def test_where_a_hundred_tokens_are_work_there_is_no_free_step() -> None:
    """1.1 ms a token, as on CPUs: what is loaded is saved, alone too."""
    tradeoff = taught_alone({20: 22.0, 100: 110.0, 200: 220.0, 400: 440.0})
    assert compute_ms(tradeoff, 120, rest=60) == pytest.approx(132)
    assert loads(tradeoff, 16, rest=60)


def test_loads_that_wait_for_each_other_are_not_slow() -> None:
    """Sixteen at once, 10 ms each: the last one is there after 160 ms, and the link is as fast as ever."""
    tradeoff = taught(load_s=0.01, compute_s=0.1)
    for i in range(16):
        tradeoff.loaded(1_000, 101.0, 101.0 + 0.01 * (i + 1))
    answer = tradeoff.predict(1_000, 1, False, 101.2)
    assert answer is not None
    assert answer.load_s == pytest.approx(0.01)


def test_a_load_that_waited_for_one_that_failed_is_not_slow() -> None:
    tradeoff = taught(load_s=0.01, compute_s=0.1)
    for i in range(16):
        begun_s = 101.0 + i
        tradeoff.ended(begun_s + 0.5)
        tradeoff.loaded(1_000, begun_s, begun_s + 0.51)
    assert tradeoff.load_s(1_000, 117.0) == pytest.approx(0.01)


def test_nothing_is_said_before_both_are_known() -> None:
    tradeoff = Tradeoff()
    for _ in range(MIN_OBSERVATIONS):
        assert tradeoff.predict(1_000, 1, False, 0.0) is None
        tradeoff.loaded(1_000, -9.0, 0.0)
    for _ in range(prefill_time.MIN_OBSERVATIONS):
        assert tradeoff.predict(1_000, 1, False, 0.0) is None
        tradeoff.computed(1_000, 0.1)
    assert tradeoff.predict(1_000, 1, False, 0.0) is not None


def test_slow_loads_are_tried_again_after_a_while() -> None:
    tradeoff = taught(load_s=0.2, compute_s=0.1)
    assert tradeoff.predict(1_000, 1, False, 100.0 + TRUST_S) is not None
    assert tradeoff.predict(1_000, 1, False, 100.1 + TRUST_S) is None


def test_what_computing_takes_is_known_without_loads() -> None:
    tradeoff = Tradeoff()
    assert tradeoff.compute_s(1_000, 1, alone=True) is None
    teach(tradeoff, H200_MS)
    assert tradeoff.compute_s(1_024, 1_024, alone=True) == pytest.approx(22.9e-3)
    assert tradeoff.compute_s(1_024, 1_024, alone=False) == pytest.approx(26.1e-3)
    assert tradeoff.load_s(1_024, 12.0) is None
