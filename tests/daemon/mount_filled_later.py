"""Run by test_mount_too_small_or_full.py inside a small mount: a pool that gets only part of its
memory."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import SLOT_BYTES, Daemon, connect, keys_of, store, until

from vllm_kvpool._native import PoolOwner
from vllm_kvpool.types import num_refs


def main(folder: str) -> None:
    shm_dir = Path(folder)
    daemon = Daemon(shm_dir, size="16MiB")
    daemon.error_file = Path(tempfile.mkdtemp()) / "errors"
    daemon.paths.clients.mkdir(parents=True)
    # As left by a daemon that was killed before it had touched the pages.
    PoolOwner.create(str(daemon.paths.pool), 16 << 20, SLOT_BYTES)
    with (shm_dir / "other").open("wb") as other:
        other.write(bytes(12 << 20))
    daemon._is_populated = lambda: daemon.stats()["pool"]["prefault_error"]  # type: ignore[method-assign]
    try:
        check(daemon)
    finally:
        if daemon.process is not None:
            daemon.kill()
    print(daemon.errors())


def check(daemon: Daemon) -> None:
    daemon.start()
    client = connect(daemon.paths)
    granted = store(client, keys_of("chain", 300))
    assert 0 < num_refs(granted) < 224
    until(lambda: num_refs(client.match_prefix(keys_of("chain", 300))) == num_refs(granted))
    client.close()
    assert daemon.stop() == 0
