"""An upstream that has no room for a chain: it is given up, and nobody else waits for it.

A real upstream refuses blocks only when all that it holds is guarded, so here it is one that answers by hand.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvpool.pool import pushes
from vllm_kvpool.pool.offers import WHOLE
from vllm_kvpool.pool.pushes import MAX_TRIES, PAUSE_MS, Pushes
from vllm_kvpool.protocol import WriteBlocks, Written
from vllm_kvpool.types import KEY_BYTES, BlockKeys, SlotRefs, num_keys

DIGEST = b"d" * KEY_BYTES
ROOM = 8


def chain(name: str, first: int, count: int) -> BlockKeys:
    return BlockKeys(
        b"".join(f"{name} {first + n:04}".encode().ljust(KEY_BYTES) for n in range(count))
    )


class Upstream:
    """Has room for the first `ROOM` blocks of the chain "long", and for all of any other."""

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
        if request.parent and request.parent not in self.held:
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
        space = SimpleNamespace(client=client, slot_bytes=2 << 20, namespace=None, digest=DIGEST)
        spaces: Any = SimpleNamespace(get=lambda digest, now: space)
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
