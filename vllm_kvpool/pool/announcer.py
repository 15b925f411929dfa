"""Tells the directory which blocks this host holds: what changes as it changes, and everything from
time to time, because entries expire and Redis forgets.

Runs on the daemon's own thread, between messages, a little at a time.
"""

from __future__ import annotations

from typing import Any

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.pool.anchors import anchors, grain_of
from vllm_kvpool.pool.directory import BLOCK_TTL_S, Directory
from vllm_kvpool.pool.namespaces import fields_of

SLABS_A_TURN = 4
"""At most 65,536 slots, about two milliseconds."""
REFRESH_MS = BLOCK_TTL_S * 1_000 // 3


class Announcer:
    def __init__(self, owner: PoolOwner, directory: Directory) -> None:
        self._owner = owner
        self._directory = directory
        self._grains: dict[int, int] = {}
        self._next_slab = 0
        self._walk_again_ms = 0
        owner.keep_journal()

    def turn(self, now_ms: int) -> None:
        """Call it a few times a second."""
        changes = self._owner.take_changes()
        if not self._directory.available:
            return  # all will be told when it is back
        if self._directory.wants_all:
            self._directory.wants_all = False
            self._next_slab, self._walk_again_ms = 0, 0
        if changes or now_ms >= self._walk_again_ms:
            self._read_grains()
        for namespace, ready, gone in changes:
            here = self._listed(namespace, ready)
            # What has come and gone is told as being here: a hint too many expires.
            self._directory.announce(here, set(self._listed(namespace, gone)) - set(here))
        if now_ms >= self._walk_again_ms:
            self._walk(now_ms)

    def _walk(self, now_ms: int) -> None:
        end = min(self._next_slab + SLABS_A_TURN, self._owner.num_slabs)
        for slab in range(self._next_slab, end):
            namespace, keys = self._owner.ready_keys(slab)
            self._directory.announce(self._listed(namespace, keys), ())
        self._next_slab = end
        if end == self._owner.num_slabs:
            self._next_slab, self._walk_again_ms = 0, now_ms + REFRESH_MS

    def _read_grains(self) -> None:
        spaces: list[dict[str, Any]] = self._owner.namespaces()
        self._grains = {
            space["index"]: grain_of(fields_of(space["description"])) for space in spaces
        }

    def _listed(self, namespace: int, keys: bytes) -> list[bytes]:
        return [key for _, key in anchors(keys, self._grains.get(namespace, 1))]
