"""The conditions of a replica, step by step, in time of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpool.router.health import FIRST_PAUSE_S, FIRST_SHARE, LAST_PAUSE_S, Condition, Health


def test_there_from_the_start() -> None:
    health = Health(30, warm=True)
    assert not health.usable
    health.ok(0)
    assert (health.condition, health.share(0)) == (Condition.WELL, 1)


def test_a_newcomer_warms_up() -> None:
    health = Health(10, warm=False)
    health.ok(100)
    assert health.share(100) == FIRST_SHARE
    assert health.share(105) == pytest.approx((1 + FIRST_SHARE) / 2)
    health.ok(110)
    assert (health.condition, health.share(110)) == (Condition.WELL, 1)


def test_one_lost_probe_is_forgiven_two_are_not() -> None:
    health = Health(10, warm=True)
    health.ok(0)
    health.failed(1, "slow", refused=False)
    assert health.usable
    health.ok(2)
    health.failed(3, "slow", refused=False)
    health.failed(4, "slow", refused=False)
    assert health.condition is Condition.EJECTED


def test_refused_is_out_at_once_and_probed_less_and_less_often() -> None:
    health = Health(10, warm=True)
    health.ok(0)
    now, pauses = 1.0, []
    for _ in range(8):
        health.failed(now, "refused", refused=True)
        assert not health.probe_due(now)
        pause = next(p / 8 for p in range(1, 1_000) if health.probe_due(now + p / 8))
        pauses.append(pause)
        now += pause
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LAST_PAUSE_S
    assert health.ejections == 1


def test_many_reports_of_one_failure_are_one() -> None:
    health = Health(10, warm=True)
    health.ok(0)
    for report in range(20):
        health.failed(1 + report / 1_000, "reset", refused=True)
    assert health.probe_due(1 + FIRST_PAUSE_S)
    health.failed(1 + FIRST_PAUSE_S, "refused", refused=True)
    assert not health.probe_due(1 + FIRST_PAUSE_S + FIRST_PAUSE_S)
    assert health.probe_due(1 + FIRST_PAUSE_S + 2 * FIRST_PAUSE_S)


def test_half_open_forgives_nothing_and_keeps_the_pause() -> None:
    health = Health(10, warm=True)
    health.ok(0)
    health.failed(1, "refused", refused=True)
    health.ok(2)
    assert health.condition is Condition.WARMING
    health.failed(3, "slow", refused=False)
    assert health.condition is Condition.EJECTED
    assert not health.probe_due(3 + FIRST_PAUSE_S)
    assert health.ejections == 2


@given(st.lists(st.tuples(st.sampled_from(["ok", "failed", "refused"]), st.floats(0, 60))))
def test_whatever_happens_it_is_probed_again_and_comes_back(
    events: list[tuple[str, float]],
) -> None:
    health, now = Health(10, warm=True), 0.0
    for what, pause in events:
        now += pause
        if what == "ok":
            health.ok(now)
            assert health.usable
        else:
            health.failed(now, what, refused=what == "refused")
        assert 0 < health.share(now) <= 1
    assert health.probe_due(now + LAST_PAUSE_S)
    health.ok(now + LAST_PAUSE_S)
    health.ok(now + LAST_PAUSE_S + 10)
    assert health.share(now + LAST_PAUSE_S + 10) == pytest.approx(1)
