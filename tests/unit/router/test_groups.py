"""A task's group follows its part of the load: up at once, down with hysteresis, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpool.router.groups import CAPACITY, HALF_LIFE_S, HOLD_S, Groups

counts = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 1 << 20), st.floats(0, 10_000)), max_size=60
)


@given(counts, st.integers(1, 64))
def test_sizes_are_possible_whatever_is_counted(
    told: list[tuple[int, int, float]], replicas: int
) -> None:
    table, now = Groups(), 0.0
    for stable, tokens, pause_s in told:
        now += pause_s
        table.count(stable, tokens, now)
        table.check_integrity()
        assert all(1 <= table.size(known, replicas) <= replicas for known in range(7))


def fill(table: Groups, parts: dict[int, float], start_s: float, end_s: float) -> None:
    """A load of 100,000 tokens a second, divided like this."""
    for second in range(int(start_s), int(end_s)):
        for stable, part in parts.items():
            table.count(stable, int(part * 100_000), float(second))


def test_a_hot_task_grows_and_the_others_stay_small() -> None:
    table = Groups()
    fill(table, {1: 0.48, **dict.fromkeys(range(2, 54), 0.01)}, 0, 300)
    assert table.size(1, 16) == 10  # 0.48 x 16 x 1.25
    assert all(table.size(stable, 16) == 1 for stable in range(2, 54))
    assert table.size(99, 16) == 1


def test_it_grows_at_once_and_shrinks_late() -> None:
    table = Groups()
    others = dict.fromkeys(range(2, 22), 0.05)
    fill(table, others, 0, 300)
    assert table.size(1, 16) == 1
    fill(table, {1: 1.0, **others}, 300, 360)  # half of all, within a half-life
    grown = table.size(1, 16)
    assert grown >= 6
    fill(table, {1: 0.01, **others}, 360, 360 + HOLD_S / 2)
    assert table.size(1, 16) >= grown
    fill(table, {1: 0.01, **others}, 420, 360 + 3 * HOLD_S + 6 * HALF_LIFE_S)
    assert table.size(1, 16) <= 2


def test_noise_does_not_move_a_group() -> None:
    table, sizes = Groups(), set()
    for minute in range(30):
        part = 0.30 if minute % 2 else 0.25
        fill(table, {1: part, 2: 1 - part}, minute * 60, minute * 60 + 60)
        if minute > 3:
            sizes.add(table.size(1, 16))
    assert len(sizes) == 1


def test_an_idle_fleet_spreads_nobody() -> None:
    table = Groups()
    for second in range(600):
        table.count(1, 50, float(second))
    assert table.size(1, 16) == 2  # 4,300 tokens in flight of memory: a part of IDLE_TOKENS


def test_old_counts_do_not_overflow() -> None:
    table = Groups()
    for day in range(400):
        table.count(1, 1_000_000, day * 86_400.0)
        table.check_integrity()
    assert table.size(1, 8) == 8


def test_no_more_tasks_are_kept_than_told() -> None:
    table = Groups()
    for stable in range(CAPACITY + 500):
        table.count(stable, 100, stable / 100)
    table.check_integrity()
    assert len(table) == CAPACITY
