"""An engine killed while it stores or loads: what it held is free again in seconds, and nothing
half-written is seen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from helpers import LONGER_THAN_THE_GRACE_S, Daemon, EngineProcess, keys_of, until

from vllm_kvpool.client import PoolClient
from vllm_kvpool.liveness import ClientLock, is_held
from vllm_kvpool.types import num_refs


def test_killed_while_storing(
    daemon: Daemon, client: PoolClient, make_engine: Callable[..., EngineProcess]
) -> None:
    engine = make_engine()
    assert engine.do("prepare", "chain", 20) == 20
    assert daemon.counter("writing") == 20
    engine.end()
    until(lambda: daemon.counter("writing") == 0, "the slots")
    assert client.match_prefix(keys_of("chain", 20)) == b""
    assert daemon.counter("reaped_clients") == 1
    assert "is gone" in daemon.errors()


def test_killed_while_loading(
    daemon: Daemon, client: PoolClient, make_engine: Callable[..., EngineProcess]
) -> None:
    engine = make_engine()
    engine.do("store", "chain", 20)
    assert engine.do("lease", "chain", 20) == 20
    assert sum(entry["leases"] for entry in daemon.stats()["clients"]) == 20
    engine.end()
    until(lambda: len(daemon.stats()["clients"]) == 1, "the leases")
    assert num_refs(client.match_prefix(keys_of("chain", 20))) == 20
    assert len(list(daemon.paths.clients.iterdir())) == 1


def test_killed_while_the_daemon_was_away(
    daemon: Daemon, make_engine: Callable[..., EngineProcess]
) -> None:
    engine = make_engine()
    assert engine.do("prepare", "chain", 20) == 20
    daemon.kill()
    engine.end()
    daemon.start()
    until(lambda: daemon.counter("writing") == 0, "the slots")


def test_living_worker_keeps_what_its_dead_scheduler_held(
    daemon: Daemon, make_engine: Callable[..., EngineProcess]
) -> None:
    """Its DMA may still be writing to the slots."""
    engine = make_engine()
    assert engine.do("prepare", "chain", 20) == 20
    lock_path = next(daemon.paths.clients.iterdir())
    worker = ClientLock(lock_path)
    assert worker.hold()
    engine.end()
    time.sleep(LONGER_THAN_THE_GRACE_S)
    assert daemon.counter("writing") == 20
    worker.close()
    until(lambda: daemon.counter("writing") == 0, "the slots")


def test_lock_files_of_the_unborn_are_swept(daemon: Daemon) -> None:
    """An engine that died between its lock file and its Hello."""
    orphan = daemon.paths.client_lock("f" * 32)
    orphan.touch()
    long_ago = time.time() - 3600
    os.utime(orphan, (long_ago, long_ago))
    until(lambda: not orphan.exists(), "the sweep")


def test_deleted_lock_file_does_not_make_a_client_dead(
    daemon: Daemon, make_engine: Callable[..., EngineProcess]
) -> None:
    """Somebody tidied up by hand. The engine makes it anew and says hello again."""
    engine = make_engine()
    assert engine.do("prepare", "chain", 20) == 20
    lock_path = next(daemon.paths.clients.iterdir())
    lock_path.unlink()
    until(lambda: (engine.do("connected"), is_held(lock_path))[1])
    give_up = time.monotonic() + LONGER_THAN_THE_GRACE_S
    while time.monotonic() < give_up:
        engine.do("connected")
        assert daemon.counter("writing") == 20
    assert engine.do("complete") == 20
    engine.end()
    until(lambda: daemon.stats()["clients"] == [], "its end")
