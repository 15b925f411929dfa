"""Chains that cannot go up, now or ever: they are given up in the end, and nobody else waits for them.

A real upstream refuses blocks only when all that it holds is guarded, so here it is one that answers by hand.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvpool.pool import pushes
from vllm_kvpool.pool.offers import WHOLE
from vllm_kvpool.pool.pushes import LOOKED_AT, MAX_TRIES, PASSED_OVER, PATIENCE_MS, PAUSE_MS, Pushes
from vllm_kvpool.protocol import WriteBlocks, Written
from vllm_kvpool.types import KEY_BYTES, BlockKeys, SlotRefs, num_keys

DIGEST = b"d" * KEY_BYTES
SILENT = b"s" * KEY_BYTES
"""A namespace whose client never connects."""
ROOM = 8


def chain(name: str, first: int, count: int) -> BlockKeys:
    return BlockKeys(
        b"".join(f"{name} {first + n:04}".encode().ljust(KEY_BYTES) for n in range(count))
    )


class Upstream:
    """Has room for the first `ROOM` blocks of the chain "long", and for all of any other."""

    forgetful = False
    """Others evict each batch before the next one comes."""
    num_greeted = 4
    takes_writes = True
    sockets = ("socket",)

    def __init__(self) -> None:
        self.asked: list[WriteBlocks] = []
        self.new: list[WriteBlocks] = []
        self.held: set[bytes] = set()

    def ask(self, request: WriteBlocks) -> str:
        self.asked.append(request)
        self.new.append(request)
        return "socket"

    def receive(self) -> list[tuple[Written, list[memoryview]]]:
        new, self.new = self.new, []
        return [(self._answer(request), []) for request in new]

    def _answer(self, request: WriteBlocks) -> Written:
        if request.parent and (self.forgetful or request.parent not in self.held):
            return Written(id=request.id, reason="no_parent")
        last = request.keys[-KEY_BYTES:]
        if last.startswith(b"long") and int(last.split()[1]) >= ROOM:
            return Written(id=request.id, reason="no_room")
        self.held.add(last)
        return Written(id=request.id, blocks=num_keys(BlockKeys(request.keys)))

    def refused(self, now: int) -> bool:
        return False


class Pushing:
    """Pushes of a pool that has every block, a turn each 10 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            pushes,
            "Outbox",
            lambda *_: SimpleNamespace(busy=False, released=0, pump=int, holds=lambda *_: False),
        )
        client = SimpleNamespace(
            readable=True, match_prefix=lambda keys: SlotRefs(bytes(8 * num_keys(keys)))
        )
        silent = SimpleNamespace(readable=False)
        self.spaces = {
            digest: SimpleNamespace(
                client=of, slot_bytes=2 << 20, namespace=None, digest=digest, made_ms=0
            )
            for digest, of in ((DIGEST, client), (SILENT, silent))
        }
        spaces: Any = SimpleNamespace(get=lambda digest, now: self.spaces[digest])
        self.upstream: Any = Upstream()
        self.counters: Counter[str] = Counter()
        self.whole: list[bytes] = []
        self.pushes = Pushes(spaces, lambda: self.upstream, self._tell, self.counters)
        self.now = 0

    def _tell(self, what: bytes, digest: bytes, keys: bytes) -> None:
        if what == WHOLE:
            self.whole.append(keys)

    def run(self, milliseconds: int) -> None:
        end = self.now + milliseconds
        while self.now < end:
            for last in self.whole:
                count = int(last.split()[1]) + 1
                self.pushes.add(DIGEST, b"", chain("long", 0, count), self.now)
            self.whole.clear()
            self.pushes.turn(self.now)
            self.now += 10


@pytest.fixture
def pushing(monkeypatch: pytest.MonkeyPatch) -> Pushing:
    return Pushing(monkeypatch)


def test_what_comes_behind_a_batch_that_was_given_up_is_given_up(pushing: Pushing) -> None:
    pushing.pushes.add(DIGEST, b"", chain("long", 0, 32), 0)
    pushing.run(60 * PAUSE_MS)
    assert pushing.counters["push_no_room"] == 32 - ROOM
    assert pushing.counters["push_waiting"] == 0
    batches_with_room = ROOM // 4
    assert len(pushing.upstream.asked) == batches_with_room + MAX_TRIES


def test_others_do_not_wait_for_a_chain_without_room(pushing: Pushing) -> None:
    pushing.pushes.add(DIGEST, b"", chain("long", 0, 32), 0)
    pushing.run(100)
    pushing.pushes.add(DIGEST, b"", chain("short", 0, 4), pushing.now)
    pushing.run(30)
    assert chain("short", 0, 4)[-KEY_BYTES:] in pushing.upstream.held


def test_others_do_not_wait_for_a_namespace_that_nobody_can_read(pushing: Pushing) -> None:
    for n in range(2 * LOOKED_AT):
        pushing.pushes.add(SILENT, b"", chain(f"silent {n}", 0, 2), 0)
    pushing.pushes.add(DIGEST, b"", chain("short", 0, 4), 0)
    pushing.run(100)
    assert chain("short", 0, 4)[-KEY_BYTES:] in pushing.upstream.held
    assert pushing.counters["push_waiting"] == 4 * LOOKED_AT
    pushing.run(PATIENCE_MS)
    assert (pushing.counters["push_waiting"], pushing.counters["push_lost"]) == (0, 4 * LOOKED_AT)


def test_a_namespace_has_time_to_be_known_after_it_was_asked_for(pushing: Pushing) -> None:
    """The chain has waited for the upstream until now."""
    pushing.now = pushing.spaces[SILENT].made_ms = 5 * PATIENCE_MS
    pushing.pushes.add(SILENT, b"", chain("silent", 0, 2), 0)
    pushing.run(PATIENCE_MS // 2)
    assert pushing.counters["push_waiting"] == 2
    pushing.run(PATIENCE_MS)
    assert pushing.counters["push_lost"] == 2


@pytest.mark.parametrize("count", [LOOKED_AT, 3 * PASSED_OVER])
def test_children_may_stand_before_what_they_wait_for(pushing: Pushing, count: int) -> None:
    whole = chain("short", 0, 4)
    for n in range(count):
        pushing.pushes.add(DIGEST, whole[-KEY_BYTES:], chain(f"child {n}", 0, 1), 0)
    pushing.pushes.add(DIGEST, b"", whole, 0)
    pushing.upstream.num_greeted = 1
    pushing.run(20 * count)
    assert pushing.counters["pushed_blocks"] == 4 + count
    assert pushing.whole == []


def test_an_upstream_that_evicts_every_batch_is_offered_a_chain_a_few_times(
    pushing: Pushing,
) -> None:
    pushing.upstream.forgetful = True
    pushing.pushes.add(DIGEST, b"", chain("long", 0, 12), 0)
    pushing.run(PAUSE_MS // 2)
    assert len(pushing.upstream.asked) == 2
    pushing.run(60 * PAUSE_MS)
    assert len(pushing.upstream.asked) == 2 * MAX_TRIES
    assert (pushing.counters["push_lost"], pushing.counters["push_waiting"]) == (8, 0)


def test_what_lost_its_head_goes_up_with_its_whole_chain(pushing: Pushing) -> None:
    pushing.pushes.add(DIGEST, chain("long", 3, 1), chain("long", 4, 4), 0)
    pushing.run(2 * PAUSE_MS)
    assert pushing.counters["pushed_blocks"] == 8
    assert [len(asked.keys) // KEY_BYTES for asked in pushing.upstream.asked] == [4, 4, 4]


def test_what_comes_behind_a_lost_head_waits_no_longer_than_for_an_answer(
    pushing: Pushing,
) -> None:
    """The head is not here either: nothing answers."""
    pushing.pushes.add(DIGEST, chain("gone", 3, 1), chain("gone", 4, 8), 0)
    pushing.pushes._tell = lambda *_: None
    pushing.run(PATIENCE_MS)
    assert (len(pushing.upstream.asked), pushing.counters["push_waiting"]) == (1, 4)
    pushing.run(4 * PAUSE_MS)
    assert (len(pushing.upstream.asked), pushing.counters["push_waiting"]) == (2, 0)


def test_a_full_queue_gives_up_no_chain_that_is_on_its_way(
    pushing: Pushing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "MAX_WAITING", 16)
    way = chain("way", 0, 12)
    pushing.pushes.add(DIGEST, b"", way, 0)
    pushing.run(10)
    assert len(pushing.upstream.asked) == 1
    parent = chain("old", 0, 4)
    pushing.pushes.add(SILENT, b"", parent, pushing.now)
    for n in range(2):  # behind it, on two branches
        pushing.pushes.add(SILENT, parent[-KEY_BYTES:], chain(f"branch {n}", 0, 2), pushing.now)
    pushing.pushes.add(DIGEST, b"", chain("new", 0, 4), pushing.now)
    assert pushing.counters["push_slow"] == 8
    pushing.run(100)
    assert pushing.whole == []
    assert pushing.counters["pushed_blocks"] == 16
