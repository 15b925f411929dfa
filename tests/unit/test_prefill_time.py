"""How long computing takes, by length: what is learnt from prompts, whatever their lengths were."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from vllm_kvpool.connector.prefill_time import (
    FORGOTTEN_AFTER,
    KEPT,
    MIN_OBSERVATIONS,
    REACH,
    PrefillCurve,
)

H200_MS = {9: 15.0, 128: 16.5, 256: 15.8, 512: 17.6, 768: 22.9, 1_024: 29.3, 2_048: 52.2}
"""Llama 3 8B, eager: time to the first token, by tokens computed."""


def taught(times_ms: Mapping[int, float], rounds: int = MIN_OBSERVATIONS) -> PrefillCurve:
    curve = PrefillCurve()
    teach(curve, times_ms, rounds)
    return curve


def teach(curve: PrefillCurve, times_ms: Mapping[int, float], rounds: int) -> None:
    for _ in range(rounds):
        for tokens, ms in times_ms.items():
            curve.add(tokens, ms)


@pytest.mark.parametrize("tokens", [128, 512, 1_024, 2_048])
def test_lengths_that_were_seen(tokens: int) -> None:
    seen = {length: ms for length, ms in H200_MS.items() if length != 768}  # as 512: one length
    assert taught(seen).at(tokens) == pytest.approx(seen[tokens])


def test_more_tokens_never_take_less() -> None:
    curve = taught(H200_MS)
    assert H200_MS[256] < H200_MS[128] == pytest.approx(curve.at(256))
    assert [curve.at(n) for n in range(3_000)] == sorted(curve.at(n) for n in range(3_000))


def test_lengths_in_between_lie_on_a_straight_line() -> None:
    curve = taught({1_024: 30.0, 2_048: 50.0})
    assert curve.at(1_536) == pytest.approx(40.0)
    assert curve.at(1_025) == pytest.approx(30.0, rel=0.01)


def test_fewer_than_32_tokens_take_what_a_step_takes() -> None:
    curve = taught(H200_MS)
    assert curve.at(0) == curve.at(1) == curve.at(9) == pytest.approx(15.0)


def test_what_a_step_takes_is_not_guessed() -> None:
    """From long prompts alone: as much less as they are shorter."""
    assert taught({2_048: 50.0}).at(512) == pytest.approx(12.5)
    assert taught({2_048: 50.0}).at(0) == 0


def test_longer_prompts_than_ever_seen_take_as_much_longer() -> None:
    curve = taught(H200_MS)
    assert curve.at(REACH * 2_048) == pytest.approx(REACH * 52.2)
    assert curve.per_token() == pytest.approx(52.2 / 2_048)


def test_nothing_is_said_of_prompts_far_longer_than_known() -> None:
    """As where all were loaded, and only their rests computed."""
    curve = taught({9: 15.0})
    assert curve.reaches(REACH * 9)
    assert not curve.reaches(1_000)


def test_a_length_is_known_once_it_was_seen_some_times() -> None:
    curve = taught({2_048: 52.2}, rounds=MIN_OBSERVATIONS - 1)
    assert not curve.reaches(1)
    curve.add(100, 16.0)
    assert not curve.reaches(1)
    curve.add(2_048, 52.2)
    assert curve.reaches(2_048)
    assert curve.at(100) < 16.0


def test_what_long_prompts_took_long_ago_is_forgotten() -> None:
    """They were three times as fast as all that came since."""
    curve = taught({8_192: 100.0})
    teach(curve, {2_048: 75.0}, rounds=FORGOTTEN_AFTER - 1)
    assert curve.at(8_192) == pytest.approx(100.0)
    curve.add(2_048, 75.0)
    assert curve.at(8_192) == pytest.approx(300.0)


def test_one_slow_prompt_counts_for_nothing() -> None:
    curve = taught(H200_MS)
    curve.add(128, 2_000.0)  # kernels were loaded
    assert curve.at(128) == pytest.approx(16.5)


def test_short_prompts_in_great_number_say_nothing_about_long_ones() -> None:
    curve = taught(H200_MS)
    teach(curve, {16: 15.0, 128: 17.0}, rounds=FORGOTTEN_AFTER // 2 - 1)
    assert curve.at(2_048) == pytest.approx(52.2)


@pytest.mark.parametrize("factor", [3, 1_000])
def test_an_engine_that_gets_slower_and_faster_again_is_followed(factor: int) -> None:
    """As beside other work of the GPU."""
    curve = taught(H200_MS, rounds=KEPT)
    slow = {tokens: factor * ms for tokens, ms in H200_MS.items()}
    for times in (slow, H200_MS):
        teach(curve, times, rounds=KEPT // 2 + 1)
        assert curve.at(2_048) == pytest.approx(times[2_048])
        assert curve.at(1) == pytest.approx(times[9])
