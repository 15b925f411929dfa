"""Makes the pool's pages exist, slab by slab, on several threads, while the daemon already serves.

The kernel zeroes a page at its first touch, at 2-10 GB/s a thread: done here, neither an engine's
copy nor the first request pays for it, and a mount that is fuller than it said shows now, as an
error, and not later, as SIGBUS in an engine. A slab is handed out only once it is populated.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.pool.files import size_text
from vllm_kvpool.pool.mount import Mount

logger = logging.getLogger(__name__)

MAX_THREADS = 8


class Prefault:
    def __init__(self, owner: PoolOwner, mount: Mount) -> None:
        self._owner = owner
        self._mount = mount
        self._slabs: Iterator[int] = iter(range(owner.num_slabs))
        self._next = threading.Lock()
        self._stopped = threading.Event()
        self.failure = ""
        """Why the pool is smaller than it was to be; empty while all is well."""
        count = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._threads = [
            threading.Thread(target=self._run, name=f"prefault-{i}", daemon=True)
            for i in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when no thread touches the pool: at most one slab's time."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._next:
                slab = next(self._slabs, None)
            if slab is None:
                return
            try:
                self._owner.populate(slab)
            except OSError as error:
                self._limit(error)

    def _limit(self, error: OSError) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        usable = self._owner.populated_slabs * self._owner.slab_bytes
        self.failure = (
            f"{self._mount.path} is full ({error.strerror or error}): the pool uses "
            f"{size_text(usable)} of its {size_text(self._owner.size)}; "
            f"{self._mount.fix(self._owner.size)}, then restart the daemon"
        )
        logger.error("%s", self.failure)
