"""What a pool with an upstream offers of what it held before, of a real pool."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from owned_pool import DIGEST, OwnedPool

from vllm_kvpool.pool.offers import AGAIN_MS, ARRIVED, FEW_WAITING, TURN_MS, WHOLE, Offers
from vllm_kvpool.types import KEY_BYTES, REF_BYTES

UPSTREAM = b"u" * 16


class Front(OwnedPool):
    """A pool of some chains, and its offers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
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

    def run(self, milliseconds: int) -> list[tuple[bytes, bytes]]:
        """What was offered meanwhile."""
        self.offered = []
        for _ in range(milliseconds // TURN_MS):
            self.now += TURN_MS
            self.offers.turn(self.now)
        return self.offered


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Front]:
    with Front(tmp_path) as front:
        yield front


def last_two(keys: bytes) -> tuple[bytes, bytes]:
    return keys[-2 * KEY_BYTES : -KEY_BYTES], keys[-KEY_BYTES:]


def test_the_last_block_of_every_chain_once(pool: Front) -> None:
    chains = [pool.store(count) for count in (1, 2, 50, 3_000)]
    assert sorted(pool.run(60_000)) == sorted(last_two(keys) for keys in chains)
    assert pool.run(2 * AGAIN_MS) == []


def test_nothing_is_offered_of_a_chain_that_lost_the_block_before_its_last(pool: Front) -> None:
    keys = os.urandom(5 * KEY_BYTES)
    refs = pool.owner.prepare_store(pool.client, keys, b"", 0)
    pool.owner.complete_store(pool.client, refs)
    pool.owner.drop(refs[-2 * REF_BYTES : -REF_BYTES])
    assert pool.run(60_000) == [last_two(keys[: 3 * KEY_BYTES])]


def test_a_turn_looks_at_no_whole_chains(pool: Front, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_not_too_many_at_a_time(pool: Front) -> None:
    for _ in range(3_000):
        pool.store(1)
    pool.counters["push_waiting"] = FEW_WAITING
    assert pool.run(60_000) == []
    pool.counters["push_waiting"] = 0
    assert 0 < len(pool.run(TURN_MS)) < 1_000
    assert len({keys for _, keys in pool.run(60_000)}) > 2_000


def test_what_was_given_up_is_offered_again(pool: Front) -> None:
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


def test_what_pushes_tell(pool: Front) -> None:
    keys = pool.store(5)
    pool.offers.hear(WHOLE, DIGEST, keys[-KEY_BYTES:])
    assert pool.offered == [(b"", keys)]
    pool.offers.hear(WHOLE, DIGEST, os.urandom(KEY_BYTES))
    assert pool.counters["push_no_parent"] == 1
    pool.offers.hear(ARRIVED, DIGEST, keys)
    assert pool.owner.stats()["copies"] == 5


def test_what_comes_from_the_upstream_is_not_offered(pool: Front) -> None:
    pool.offers.stored(DIGEST, b"", b"a" * KEY_BYTES, UPSTREAM)
    pool.offers.stored(DIGEST, b"", b"b" * KEY_BYTES, b"")
    assert pool.offered == [(b"", b"b" * KEY_BYTES)]
