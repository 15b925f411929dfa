"""A real pool and one client of it, without a daemon: for what the daemon's own parts do with it."""

from __future__ import annotations

import fcntl
import os
import random
from pathlib import Path
from typing import Self

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.types import KEY_BYTES

SLOT_BYTES = 2_048
DIGEST = b"d" * KEY_BYTES
"""Of its one namespace, in which every block is listed."""


class OwnedPool:
    """16,384 small slots and more."""

    def __init__(self, folder: Path) -> None:
        self._draw = random.Random(1)
        self.owner = PoolOwner.create(str(folder / "pool"), 48 << 20, SLOT_BYTES)
        for slab in range(self.owner.num_slabs):
            self.owner.populate(slab)
        self.lock = (folder / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_SH)
        namespace = self.owner.add_namespace(DIGEST, SLOT_BYTES, "")
        self.client = self.owner.add_client("c", str(folder / "lock"), os.getpid(), namespace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    def store(self, count: int) -> bytes:
        """The keys of a new chain of so many blocks."""
        keys = self._draw.randbytes(count * KEY_BYTES)
        refs = self.owner.prepare_store(self.client, keys, b"", 0)
        assert self.owner.complete_store(self.client, refs) == count
        return keys
