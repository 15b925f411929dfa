"""What a pool with an upstream offers of what it held before, of a real pool."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.pool.offers import AGAIN_MS, ARRIVED, FEW_WAITING, TURN_MS, WHOLE, Offers
from vllm_kvpool.types import KEY_BYTES, REF_BYTES

SLOT_BYTES = 2_048
DIGEST = b"d" * KEY_BYTES
UPSTREAM = b"u" * 16


class Pool:
    """Of some chains, and its offers."""

    def __init__(self, folder: Path) -> None:
        self.owner = PoolOwner.create(str(folder / "pool"), 48 << 20, SLOT_BYTES)
        for slab in range(self.owner.num_slabs):
            self.owner.populate(slab)
        self.lock = (folder / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_SH)
        namespace = self.owner.add_namespace(DIGEST, SLOT_BYTES, "")
        self.client = self.owner.add_client("c", str(folder / "lock"), os.getpid(), namespace)
        self.counters: Counter[str] = Counter()
        self.offered: list[tuple[bytes, bytes]] = []
        """(parent, keys)."""
        self.full = False
        self.offers = Offers(self.owner, UPSTREAM, self._submit, self.counters)
        self.now = 0

    def _submit(self, digest: bytes, parent: bytes, keys: bytes) -> bool:
        assert digest == DIGEST
        if not self.full:
            self.offered.append((parent, keys))
        return not self.full

    def store(self, count: int) -> bytes:
        keys = os.urandom(count * KEY_BYTES)
        refs = self.owner.prepare_store(self.client, keys, b"", 0)
        assert self.owner.complete_store(self.client, refs) == count
        return keys

    def run(self, milliseconds: int) -> list[tuple[bytes, bytes]]:
        """What was offered meanwhile."""
        self.offered = []
        for _ in range(milliseconds // TURN_MS):
            self.now += TURN_MS
            self.offers.turn(self.now)
        return self.offered


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path)
    yield made
    made.lock.close()


def last_two(keys: bytes) -> tuple[bytes, bytes]:
    return keys[-2 * KEY_BYTES : -KEY_BYTES], keys[-KEY_BYTES:]


def test_the_last_block_of_every_chain_once(pool: Pool) -> None:
    chains = [pool.store(count) for count in (1, 2, 50, 3_000)]
    assert sorted(pool.run(60_000)) == sorted(last_two(keys) for keys in chains)
    assert pool.run(2 * AGAIN_MS) == []


def test_nothing_is_offered_of_a_chain_that_lost_the_block_before_its_last(pool: Pool) -> None:
    keys = os.urandom(5 * KEY_BYTES)
    refs = pool.owner.prepare_store(pool.client, keys, b"", 0)
    pool.owner.complete_store(pool.client, refs)
    pool.owner.drop(refs[-2 * REF_BYTES : -REF_BYTES])
    assert pool.run(60_000) == [last_two(keys[: 3 * KEY_BYTES])]


def test_a_turn_looks_at_no_whole_chains(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loop that engines wait for."""
    chains = [pool.store(500) for _ in range(20)]
    calls: Counter[str] = Counter()

    class Counted:
        def __getattr__(self, name: str) -> object:
            calls[name] += 1
            return getattr(pool.owner, name)

    monkeypatch.setattr(pool.offers, "_owner", Counted())
    turns = 60_000 // TURN_MS
    assert len(pool.run(turns * TURN_MS)) == len(chains)
    assert calls["path_to"] == 0
    assert calls["namespaces"] <= calls["num_slots"] / 2


def test_not_too_many_at_a_time(pool: Pool) -> None:
    for _ in range(3_000):
        pool.store(1)
    pool.counters["push_waiting"] = FEW_WAITING
    assert pool.run(60_000) == []
    pool.counters["push_waiting"] = 0
    assert 0 < len(pool.run(TURN_MS)) < 1_000
    assert len({keys for _, keys in pool.run(60_000)}) > 2_000


def test_what_was_given_up_is_offered_again(pool: Pool) -> None:
    keys = pool.store(5)
    pool.full = True
    pool.run(10_000)
    assert pool.counters == {"push_unheard": 1}
    pool.full = False
    assert pool.run(AGAIN_MS // 2) == []
    assert pool.run(AGAIN_MS) == [last_two(keys)]
    pool.counters["push_slow"] += 1
    assert pool.run(2 * AGAIN_MS) == [last_two(keys)]
    assert pool.run(2 * AGAIN_MS) == []


def test_what_pushes_tell(pool: Pool) -> None:
    keys = pool.store(5)
    pool.offers.hear(WHOLE, DIGEST, keys[-KEY_BYTES:])
    assert pool.offered == [(b"", keys)]
    pool.offers.hear(WHOLE, DIGEST, os.urandom(KEY_BYTES))
    assert pool.counters["push_no_parent"] == 1
    pool.offers.hear(ARRIVED, DIGEST, keys)
    assert pool.owner.stats()["copies"] == 5


def test_what_comes_from_the_upstream_is_not_offered(pool: Pool) -> None:
    pool.offers.stored(DIGEST, b"", b"a" * KEY_BYTES, UPSTREAM)
    pool.offers.stored(DIGEST, b"", b"b" * KEY_BYTES, b"")
    assert pool.offered == [(b"", b"b" * KEY_BYTES)]
