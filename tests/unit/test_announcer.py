"""What a host tells the directory, slice by slice, of a real pool."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.pool.announcer import SLICE_MS, SLICE_SLOTS, TURN_MS, Announcer
from vllm_kvpool.types import KEY_BYTES

SLOT_BYTES = 2_048


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


class Pool:
    """16,384 small slots and more; one namespace, in which every block is listed."""

    def __init__(self, folder: Path) -> None:
        self.owner = PoolOwner.create(str(folder / "pool"), 48 << 20, SLOT_BYTES)
        for slab in range(self.owner.num_slabs):
            self.owner.populate(slab)
        self.lock = (folder / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_SH)
        namespace = self.owner.add_namespace(bytes(KEY_BYTES), SLOT_BYTES, "")
        self.client = self.owner.add_client("c", str(folder / "lock"), os.getpid(), namespace)

    def store(self, count: int) -> set[bytes]:
        keys = os.urandom(count * KEY_BYTES)
        refs = self.owner.prepare_store(self.client, keys, b"", 0)
        assert self.owner.complete_store(self.client, refs) == count
        return {keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path)
    yield made
    made.lock.close()


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


def test_everything_is_told_in_slices(pool: Pool) -> None:
    keys = pool.store(10_000)
    listener = Listener()
    announcer = Announcer(pool.owner, listener)
    now_ms = turns_until_quiet(announcer, listener, 0)
    assert listener.here == keys
    listener.here.clear()  # Redis came back empty
    listener.wants_all = True
    turns_until_quiet(announcer, listener, now_ms)
    assert listener.here == keys
    assert not listener.wants_all


def test_many_changes_at_once(pool: Pool) -> None:
    """All that was there is forgotten and other blocks come, between two turns."""
    listener = Listener()
    announcer = Announcer(pool.owner, listener)
    pool.store(8_000)
    now_ms = turns_until_quiet(announcer, listener, 0)
    pool.owner.clear()
    keys = pool.store(5_000)
    turns_until_quiet(announcer, listener, now_ms)
    assert listener.here == keys


def test_changes_do_not_keep_the_walk_from_its_end(pool: Pool) -> None:
    keys = pool.store(6_000)
    listener = Listener()
    announcer = Announcer(pool.owner, listener)
    now_ms = 0
    for _ in range(40):
        keys |= pool.store(100)
        announcer.turn(now_ms)
        now_ms += announcer.wait_ms(now_ms)
    turns_until_quiet(announcer, listener, now_ms)
    assert listener.here == keys


def test_the_walk_waits_for_a_slow_directory(pool: Pool) -> None:
    old = pool.store(3_000)
    listener = Listener()
    listener.is_behind = True
    announcer = Announcer(pool.owner, listener)
    new = pool.store(10)
    for now_ms in range(0, 1_000, SLICE_MS):
        announcer.turn(now_ms)
    assert listener.here == new
    listener.is_behind = False
    turns_until_quiet(announcer, listener, 1_000)
    assert listener.here == old | new


def test_nothing_is_told_to_a_directory_that_is_away(pool: Pool) -> None:
    listener = Listener()
    listener.available = False
    announcer = Announcer(pool.owner, listener)
    keys = pool.store(100)
    announcer.turn(0)
    assert (listener.here, announcer.wait_ms(0)) == (set(), TURN_MS)
    listener.available = listener.wants_all = True
    turns_until_quiet(announcer, listener, TURN_MS)
    assert listener.here == keys
