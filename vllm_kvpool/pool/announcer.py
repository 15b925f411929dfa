"""Tells the directory which blocks this host holds: what changes as it changes, and everything from
time to time, because entries expire and Redis forgets.

Runs on the daemon's own thread, between messages, a slice at a time: engines wait for no more than one
slice, however much there is to tell.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.pool.anchors import anchors, grain_of
from vllm_kvpool.pool.directory import BLOCK_TTL_S, Directory
from vllm_kvpool.pool.namespaces import fields_of
from vllm_kvpool.types import KEY_BYTES

SLICE_SLOTS = 2_048
"""Looked at and told in one turn: about a millisecond."""
TURN_MS = 250
SLICE_MS = 5
"""Between turns while there is more to tell."""
REFRESH_MS = BLOCK_TTL_S * 1_000 // 3


class Announcer:
    def __init__(self, owner: PoolOwner, directory: Directory) -> None:
        self._owner = owner
        self._directory = directory
        self._grains: dict[int, int] = {}
        self._changes: deque[tuple[int, memoryview, bool]] = deque()
        """(namespace, keys, whether they are here), in the order of telling."""
        self._next_slot = 0
        self._walk_again_ms = 0
        self._next_turn_ms = 0
        owner.keep_journal()

    def wait_ms(self, now_ms: int) -> int:
        """How long until the next `turn` has something to do."""
        return max(0, self._next_turn_ms - now_ms)

    def turn(self, now_ms: int) -> None:
        """Call it whenever there is time: it does nothing before it is due."""
        if now_ms < self._next_turn_ms:
            return
        self._take_changes()
        if self._directory.wants_all:
            self._next_slot, self._walk_again_ms = 0, 0
        if self._directory.available:
            self._directory.wants_all = False
            self._tell_slice(now_ms)
        else:
            self._changes.clear()  # all will be told when it is back
        more = self._directory.available and (self._changes or now_ms >= self._walk_again_ms)
        self._next_turn_ms = now_ms + (SLICE_MS if more else TURN_MS)

    def _take_changes(self) -> None:
        for namespace, ready, gone in self._owner.take_changes():
            # What has come and gone is told as being here: a hint too many expires.
            self._changes.append((namespace, memoryview(gone), False))
            self._changes.append((namespace, memoryview(ready), True))

    def _tell_slice(self, now_ms: int) -> None:
        self._grains.clear()  # a number may be another namespace's by now
        left = SLICE_SLOTS
        while self._changes and left:
            namespace, keys, here = self._changes.popleft()
            cut = min(len(keys), left * KEY_BYTES)
            if cut < len(keys):
                self._changes.appendleft((namespace, keys[cut:], here))
            self._tell(namespace, bytes(keys[:cut]), here)
            left -= cut // KEY_BYTES
        if left and now_ms >= self._walk_again_ms and not self._directory.is_behind:
            self._walk(left, now_ms)

    def _walk(self, limit: int, now_ms: int) -> None:
        namespace, keys, self._next_slot = self._owner.ready_keys(self._next_slot, limit)
        self._tell(namespace, keys, True)
        if self._next_slot == self._owner.num_slots:
            self._next_slot, self._walk_again_ms = 0, now_ms + REFRESH_MS

    def _tell(self, namespace: int, keys: bytes, here: bool) -> None:
        if keys:
            listed = [key for _, key in anchors(keys, self._grain(namespace))]
            self._directory.announce(listed, here)

    def _grain(self, namespace: int) -> int:
        if not self._grains:
            spaces: list[dict[str, Any]] = self._owner.namespaces()
            self._grains = {
                space["index"]: grain_of(fields_of(space["description"])) for space in spaces
            }
        return self._grains.get(namespace, 1)
