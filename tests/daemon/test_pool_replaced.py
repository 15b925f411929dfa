"""Another pool under the same name: clients drain the old one, then use the new one."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable

from helpers import (
    LONGER_THAN_THE_GRACE_S,
    Daemon,
    check_bytes,
    keys_of,
    prepare,
    store,
    until,
    wait_connected,
)

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import num_refs


def wait_for_pool(client: PoolClient, daemon: Daemon) -> None:
    pool_id = daemon.stats()["pool"]["pool_id"]

    def moved() -> bool:
        client.poll()
        if client.connected and client.view.pool_id == pool_id:
            return True
        client.prepare_store(keys_of("probe", 1))  # refused by a new daemon: a hello is due
        return False

    until(moved, "the new pool")


def use(client: PoolClient) -> None:
    """What a busy engine does all the time, and what tells it of a new daemon."""
    client.poll()
    client.prepare_store(keys_of("probe", 1))


def test_client_moves_to_the_new_pool(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    store(client, keys)
    daemon.replace_pool()
    wait_for_pool(client, daemon)
    assert client.match_prefix(keys) == b""
    store(client, keys)
    assert num_refs(client.match_prefix(keys)) == 4


def test_held_leases_are_drained_first(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    store(client, keys)
    refs = client.match_prefix(keys)
    client.lease(refs)
    old = client.view
    daemon.replace_pool()
    until(lambda: (use(client), client.match_prefix(keys) == b"")[1], "draining")
    assert client.view is old
    assert not client.connected
    check_bytes(client, keys, refs)  # a load in flight still reads its bytes
    assert client.lease(refs) == b""  # but no new one starts
    client.release(refs)
    wait_for_pool(client, daemon)
    assert client.view is not old


def test_store_in_flight_never_reaches_the_new_pool(daemon: Daemon, client: PoolClient) -> None:
    """The same reference may name a slot there as well: the old pool stays mapped until the copy has ended."""
    keys = keys_of("chain", 4)
    grant = prepare(client, keys)
    old = client.view
    daemon.replace_pool()
    until(lambda: (use(client), client._draining)[1], "draining")
    assert client.view is old
    client.complete_store(grant.request_id)
    wait_for_pool(client, daemon)
    client.poll()
    assert daemon.counter("stored") == 0
    assert client.match_prefix(keys) == b""


def test_deleted_pool_file(
    daemon: Daemon, client: PoolClient, make_client: Callable[..., PoolClient]
) -> None:
    """Daemon and engines keep their mapping; the daemon says so once; the next start is cold."""
    keys = keys_of("chain", 4)
    store(client, keys)
    daemon.paths.pool.unlink()
    until(lambda: "was deleted" in daemon.errors(), "the daemon's complaint")
    assert num_refs(client.match_prefix(keys)) == 4
    store(client, keys_of("after", 4))
    assert daemon.errors().count("was deleted") == 1
    assert daemon.stop() == 0
    daemon.start()
    assert "0 blocks kept" in daemon.ready_line
    wait_for_pool(client, daemon)


def test_deleted_folder_of_a_running_daemon(daemon: Daemon, client: PoolClient) -> None:
    """Those who are connected go on."""
    store(client, keys_of("chain", 4))
    shutil.rmtree(daemon.paths.folder)
    until_s = time.monotonic() + LONGER_THAN_THE_GRACE_S
    for i in itertools.count():
        store(client, keys_of(f"chain {i}", 4))
        time.sleep(0.1)
        if time.monotonic() > until_s and "was deleted" in daemon.errors():
            break
    assert "is gone" not in daemon.errors()


def test_deleted_folder(daemon: Daemon, client: PoolClient) -> None:
    """Lock files are gone as well: the client makes its own anew and is not taken for dead."""
    keys = keys_of("chain", 4)
    store(client, keys)
    refs = client.match_prefix(keys)
    client.lease(refs)
    daemon.replace_pool()
    until(lambda: (use(client), client.lock_path.exists())[1])
    client.release(refs)
    wait_for_pool(client, daemon)
    wait_connected(client)
    store(client, keys)
