"""A block with a time to live expires; a pinned one is not evicted until then."""

from __future__ import annotations

from helpers import Daemon, keys_of, run_cli, store, until

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import num_refs


def fill(client: PoolClient) -> None:
    """More than the pool holds, of blocks nobody asked to keep."""
    for i in range(10):
        store(client, keys_of(f"filler {i}", 60))


def test_block_expires(daemon: Daemon, client: PoolClient) -> None:
    assert num_refs(store(client, keys_of("short", 3), ttl_s=1)) == 3
    store(client, keys_of("long", 3), ttl_s=600)
    store(client, keys_of("ever", 3))
    assert num_refs(client.match_prefix(keys_of("long", 3))) == 3
    until(lambda: client.match_prefix(keys_of("short", 3)) == b"", "the end")
    until(lambda: daemon.counter("expired") == 3, "its slots")
    assert num_refs(client.match_prefix(keys_of("long", 3))) == 3
    assert num_refs(client.match_prefix(keys_of("ever", 3))) == 3


def test_expired_block_is_a_miss_while_the_daemon_is_stopped(
    daemon: Daemon, client: PoolClient
) -> None:
    store(client, keys_of("short", 3), ttl_s=1)
    daemon.pause()
    until(lambda: client.match_prefix(keys_of("short", 3)) == b"", "the end")
    daemon.resume()


def test_pinned_block_outlives_pressure(client: PoolClient) -> None:
    store(client, keys_of("pinned", 10), pin=True)
    store(client, keys_of("plain", 10))
    fill(client)
    assert num_refs(client.match_prefix(keys_of("pinned", 10))) == 10
    assert num_refs(client.match_prefix(keys_of("plain", 10))) < 10


def test_pin_ends_with_its_time(client: PoolClient) -> None:
    store(client, keys_of("pinned", 10), pin=True, ttl_s=1)
    until(lambda: client.match_prefix(keys_of("pinned", 10)) == b"", "the end")
    fill(client)


def test_pin_and_time_survive_a_restart(daemon: Daemon, client: PoolClient) -> None:
    store(client, keys_of("pinned", 10), pin=True)
    store(client, keys_of("short", 10), ttl_s=3)
    daemon.kill()
    daemon.start()
    until(lambda: (client.poll(), client.connected and client.view.epoch == 2)[1])
    until(lambda: client.match_prefix(keys_of("short", 10)) == b"", "the end")
    fill(client)
    assert num_refs(client.match_prefix(keys_of("pinned", 10))) == 10


def test_half_of_the_pool_is_never_pinned(daemon: Daemon, client: PoolClient) -> None:
    for i in range(30):
        store(client, keys_of(f"pinned {i}", 10), pin=True)
    entry = daemon.stats()["namespaces"][0]
    assert 0 < entry["pinned"] <= entry["slots"] // 2
    assert entry["ready"] > entry["pinned"]
    assert daemon.counter("pin_refused") > 10
    fill(client)
    assert num_refs(client.match_prefix(keys_of("pinned 0", 10))) == 10


def test_clear_frees_pinned_blocks(daemon: Daemon, client: PoolClient) -> None:
    store(client, keys_of("pinned", 10), pin=True)
    result = run_cli("clear", "--name", "test", "--shm-dir", daemon.shm_dir)
    assert "10 blocks forgotten" in result.stdout
    assert client.match_prefix(keys_of("pinned", 10)) == b""
