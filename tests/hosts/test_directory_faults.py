"""Redis away, emptied, slow, protected: engines of the host never notice, and it comes back by
itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from helpers import Daemon, keys_of, store, until
from hosts.conftest import Host, wait_listed
from redis_server import RedisServer

from vllm_kvpool.protocol import MAX_PULL_MS

MakeHost = Callable[..., Host]


def hasty(daemon: Daemon) -> Daemon:
    """With the package's own limits."""
    return daemon


def wait_pulled(host: Host, seed: str, count: int) -> None:
    """A miss is not asked for again at once: the answers of the directory are kept for a second."""
    keys = keys_of(seed, count)
    until(lambda: host.pull(keys).blocks == count, f"pull of {seed}")


def test_killed_and_restarted_empty(make_host: MakeHost, redis_server: RedisServer) -> None:
    a, b = make_host(), make_host()
    store(a.client, keys_of("before", 20))
    wait_listed(a, keys_of("before", 20))
    redis_server.kill()
    pulled = b.pull(keys_of("before", 20))
    assert pulled.blocks == 0
    store(a.client, keys_of("meanwhile", 20))  # nothing here needs Redis
    until(lambda: a.counter("directory_errors") > 0, "the loss to be noticed")
    redis_server.start()
    wait_pulled(b, "before", 20)
    wait_pulled(b, "meanwhile", 20)
    assert a.daemon.errors().count("the directory is away") == 1


def test_emptied_while_running(make_host: MakeHost, redis_server: RedisServer) -> None:
    a, b = make_host(), make_host()
    store(a.client, keys_of("chain", 20))
    wait_listed(a, keys_of("chain", 20))
    redis_server.client.flushall()
    wait_pulled(b, "chain", 20)


def test_not_there_yet(make_host: MakeHost, redis_server: RedisServer) -> None:
    redis_server.kill()
    a, b = make_host(), make_host()
    store(a.client, keys_of("chain", 20))
    assert b.pull(keys_of("chain", 20)).reason == "no_directory"
    redis_server.start()
    wait_pulled(b, "chain", 20)


def test_hanging(make_host: MakeHost, redis_server: RedisServer) -> None:
    """Pulls end as misses at once, stores and the daemon's answers go on as ever."""
    a, b = make_host(tune=hasty), make_host(tune=hasty)
    store(a.client, keys_of("chain", 20))
    wait_listed(a, keys_of("chain", 20))
    assert b.client.pulls
    redis_server.pause()
    for _ in range(3):
        begun = time.monotonic()
        assert b.pull(keys_of("chain", 20), within_ms=MAX_PULL_MS).blocks == 0
        assert time.monotonic() - begun < 30, "not the deadline of the pull"
        store(b.client, keys_of("own", 20))
    redis_server.resume()
    wait_pulled(b, "chain", 20)


def test_records_that_are_none(make_host: MakeHost, redis_server: RedisServer) -> None:
    """Somebody else writes into the same Redis."""
    a, b = make_host(), make_host()
    store(a.client, keys_of("chain", 20))
    wait_listed(a, keys_of("chain", 20))
    client = redis_server.client
    (record,) = client.keys(b"kvpool:1:test:{hosts}:*")[:1]
    good = client.get(record)
    for number, raw in enumerate(
        [b"\x81\xa4name\xa1\xff", b"\x91" * 5_000, good.replace(b"tcp:", b"udp:")]
    ):
        host = bytes([number]) * 16
        client.set(b"kvpool:1:test:{hosts}:" + host, raw)
        client.sadd(b"kvpool:1:test:{hosts}", host)
        for entry in client.keys(b"kvpool:1:test:{[0-9a-f]*"):
            client.sadd(entry, host)
    wait_pulled(b, "chain", 20)
    assert b.counter("directory_failed") == 0


def test_stale_entry(make_host: MakeHost, redis_server: RedisServer) -> None:
    """The directory says that a host has what it has no more."""
    a, b = make_host(), make_host()
    keys = keys_of("chain", 20)
    store(a.client, keys)
    wait_listed(a, keys)
    entries = redis_server.client.keys(b"kvpool:1:test:{[0-9a-f]*")
    host = redis_server.client.smembers(entries[0])
    a.client.drop(a.client.match_prefix(keys))
    until(lambda: not redis_server.client.exists(*entries), "the entries to go")
    for entry in entries:
        redis_server.client.sadd(entry, *host)
    pulled = b.pull(keys)
    assert (pulled.blocks, pulled.reason) == (0, "absent")
    assert b.counter("pull_stale_entries") == 1
    until(lambda: not redis_server.client.exists(*entries), "the entries to be mended")


def test_forgotten_blocks_leave_the_directory(
    make_host: MakeHost, redis_server: RedisServer
) -> None:
    a = make_host()
    keys = keys_of("chain", 20)
    store(a.client, keys)
    wait_listed(a, keys)
    before = redis_server.client.dbsize()
    a.client.drop(a.client.match_prefix(keys))
    until(lambda: redis_server.client.dbsize() == before - 20, "the entries to go")


def test_a_host_that_leaves_is_gone_at_once(make_host: MakeHost, redis_server: RedisServer) -> None:
    a, b = make_host(), make_host()
    hosts = b"kvpool:1:test:{hosts}:*"
    assert len(redis_server.client.keys(hosts)) == 2
    store(a.client, keys_of("chain", 20))
    wait_listed(a, keys_of("chain", 20))
    a.daemon.stop()
    assert len(redis_server.client.keys(hosts)) == 1
    until(lambda: b.pull(keys_of("chain", 20), 2_000).reason == "absent", "the end of the host")


def test_password_and_cluster(make_host: MakeHost, tmp_path: Path) -> None:
    """One node of a Redis Cluster that has all the slots, behind a password."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    server = RedisServer(folder, "--cluster-enabled", "yes", password="sesame").start()
    try:
        client = server.client
        for first in range(0, 16384, 1024):
            slots = range(first, first + 1024)
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
        until(lambda: client.cluster("INFO")["cluster_state"] == "ok", "cluster")
        url = f"redis-cluster://:sesame@127.0.0.1:{server.port}"
        a, b = (make_host(server=server, url=url) for _ in range(2))
        store(a.client, keys_of("chain", 40))
        wait_listed(a, keys_of("chain", 40))
        wait_pulled(b, "chain", 40)
    finally:
        server.kill()
