"""A real daemon, and the exchange's own clients of it, for what is fuzzed of the traffic between hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.target import SPACE
from tests.helpers import WAIT_S, Daemon, connect, store, wait_connected
from vllm_kvpool.clock import now_ms
from vllm_kvpool.pool.admin import clear
from vllm_kvpool.pool.spaces import IDLE_MS, Space, Spaces
from vllm_kvpool.types import BlockKeys


class FuzzHost:
    def __init__(self, shm_dir: Path) -> None:
        options = ("--min-block", str(SPACE.slot_bytes))
        self.daemon = Daemon(shm_dir, *options, size="16MiB").start()
        self._engine = connect(self.daemon.paths, SPACE)
        self.spaces = Spaces(self.daemon.paths)
        wait_connected(self.space.client)

    @property
    def space(self) -> Space:
        space = self.spaces.get(SPACE.digest, now_ms())
        assert space is not None
        return space

    def store(self, keys: BlockKeys) -> None:
        store(self._engine, keys)

    def restore(self, keys: BlockKeys) -> None:
        """Nothing but these blocks."""
        clear(self.daemon.name, str(self.daemon.shm_dir))
        self.store(keys)

    def forget_others(self) -> None:
        """Clients of namespaces that are not ours."""
        later = now_ms() + IDLE_MS + 1
        self.space.used_ms = later
        self.spaces.close_idle(later)

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Tries again as soon as the daemon has said something."""
        give_up = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < give_up, what
            self.space.client.channel.socket.poll(1)

    def close(self) -> None:
        self.spaces.close()
        self._engine.close()
        status, errors = self.daemon.stop(), self.daemon.errors()
        assert status == 0, errors
        assert "Traceback" not in errors, errors
