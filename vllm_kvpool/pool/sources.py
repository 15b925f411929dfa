"""Hosts that blocks here are copies of. While such a host lives, eviction takes its copies before blocks
that may be the only ones; once it has been out of the directory for a while, or the directory itself
has been away for so long, nobody is known to have those blocks, and they are copies no more.

Runs on the daemon's own thread.
"""

from __future__ import annotations

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.pool.finder import Finder

ABSENT_MS = 15_000
"""A host that was started anew, and a Redis that came back empty, are complete again long before."""


class Sources:
    def __init__(self, owner: PoolOwner, finder: Finder | None) -> None:
        self._owner = owner
        self._finder = finder
        self._absent_since_ms: dict[bytes, int] = {}

    def review(self, now_ms: int) -> None:
        """Call it every second or so."""
        living = self._finder.living if self._finder is not None else frozenset()
        absent = [source for source in self._owner.copy_sources() if source not in living]
        since_ms = {source: self._absent_since_ms.get(source, now_ms) for source in absent}
        for source, since in since_ms.items():
            if now_ms - since >= ABSENT_MS:
                self._owner.forget_source(source)
        self._absent_since_ms = since_ms
