"""What a host tells the directory, slice by slice, of a real pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from owned_pool import OwnedPool

from vllm_kvpool.pool.announcer import SLICE_MS, SLICE_SLOTS, TURN_MS, Announcer
from vllm_kvpool.types import KEY_BYTES


class Listener:
    """The directory's side: what it was told, and how much at a time."""

    def __init__(self) -> None:
        self.available = True
        self.wants_all = False
        self.is_behind = False
        self.here: set[bytes] = set()
        self.told = 0
        """In the present turn."""

    def announce(self, keys: list[bytes], here: bool) -> None:
        self.told += len(keys)
        (self.here.update if here else self.here.difference_update)(keys)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[OwnedPool]:
    with OwnedPool(tmp_path) as owned:
        yield owned


def stored(pool: OwnedPool, count: int) -> set[bytes]:
    keys = pool.store(count)
    return {keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)}


def turns_until_quiet(announcer: Announcer, listener: Listener, now_ms: int) -> int:
    """The time when there is nothing more to tell."""
    for _ in range(1_000):
        listener.told = 0
        announcer.turn(now_ms)
        assert listener.told <= SLICE_SLOTS, "one turn held the loop for too long"
        wait_ms = announcer.wait_ms(now_ms)
        now_ms += wait_ms
        if wait_ms == TURN_MS:
            return now_ms
        assert wait_ms == SLICE_MS
    raise AssertionError("it never ends")


def test_everything_is_told_in_slices(pool: OwnedPool) -> None:
    keys = stored(pool, 10_000)
    listener = Listener()
    announcer = Announcer(pool.owner, listener)
    now_ms = turns_until_quiet(announcer, listener, 0)
    assert listener.here == keys
    listener.here.clear()  # Redis came back empty
    listener.wants_all = True
    turns_until_quiet(announcer, listener, now_ms)
    assert listener.here == keys
    assert not listener.wants_all


def test_many_changes_at_once(pool: OwnedPool) -> None:
    """All that was there is forgotten and other blocks come, between two turns."""
    listener = Listener()
    announcer = Announcer(pool.owner, listener)
    stored(pool, 8_000)
    now_ms = turns_until_quiet(announcer, listener, 0)
    pool.owner.clear()
    keys = stored(pool, 5_000)
    turns_until_quiet(announcer, listener, now_ms)
    assert listener.here == keys


def test_changes_do_not_keep_the_walk_from_its_end(pool: OwnedPool) -> None:
    keys = stored(pool, 6_000)
    listener = Listener()
    announcer = Announcer(pool.owner, listener)
    now_ms = 0
    for _ in range(40):
        keys |= stored(pool, 100)
        announcer.turn(now_ms)
        now_ms += announcer.wait_ms(now_ms)
    turns_until_quiet(announcer, listener, now_ms)
    assert listener.here == keys


def test_the_walk_waits_for_a_slow_directory(pool: OwnedPool) -> None:
    old = stored(pool, 3_000)
    listener = Listener()
    listener.is_behind = True
    announcer = Announcer(pool.owner, listener)
    new = stored(pool, 10)
    for now_ms in range(0, 1_000, SLICE_MS):
        announcer.turn(now_ms)
    assert listener.here == new
    listener.is_behind = False
    turns_until_quiet(announcer, listener, 1_000)
    assert listener.here == old | new


def test_nothing_is_told_to_a_directory_that_is_away(pool: OwnedPool) -> None:
    listener = Listener()
    listener.available = False
    announcer = Announcer(pool.owner, listener)
    keys = stored(pool, 100)
    announcer.turn(0)
    assert (listener.here, announcer.wait_ms(0)) == (set(), TURN_MS)
    listener.available = listener.wants_all = True
    turns_until_quiet(announcer, listener, TURN_MS)
    assert listener.here == keys
