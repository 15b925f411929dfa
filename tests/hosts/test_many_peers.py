"""A host that pulls from hundreds of others has more connections than a process may usually have files."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator

import msgspec
import pytest
from helpers import keys_of, store
from hosts.conftest import Host, wait_listed
from redis_server import RedisServer

from vllm_kvpool.pool.directory import HostRecord
from vllm_kvpool.protocol import POOL_ID_BYTES
from vllm_kvpool.types import BlockKeys

PEERS = 260
"""Four connections to each are more than ZeroMQ's 1,023 sockets."""


@contextlib.contextmanager
def usual_file_limit() -> Iterator[None]:
    """What a process gets that is started now: 1,024 files, and more if it asks for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12 * PEERS:
        pytest.skip(f"no process may have more than {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1_024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def give_to_another(redis: RedisServer, entry: bytes, address: str) -> None:
    """Of the block that is listed in `entry`, the only holder is a host that nobody has met."""
    host = os.urandom(POOL_ID_BYTES)
    client = redis.client
    client.set(b"kvpool:1:test:{hosts}:" + host, msgspec.msgpack.encode(HostRecord(host, address)))
    client.sadd(b"kvpool:1:test:{hosts}", host)
    client.delete(entry)
    client.sadd(entry, host)


@pytest.mark.slow
def test_hundreds_of_peers(make_host: Callable[..., Host], redis_server: RedisServer) -> None:
    """One host under hundreds of names."""
    with usual_file_limit():
        a, b = make_host(), make_host()
    chains = [keys_of(f"chain {i}", 1) for i in range(PEERS)]
    for keys in chains:
        store(a.client, keys)
    wait_listed(a, BlockKeys(b"".join(chains)))
    entries = redis_server.client.keys(b"kvpool:1:test:{[0-9a-f]*")
    assert len(entries) == PEERS
    for entry in entries:
        give_to_another(redis_server, entry, f"tcp://127.0.0.1:{a.port}")
    for keys in chains:
        assert b.pull(keys).blocks == 1
    assert b.counter("pulled_blocks") == PEERS
    assert b.counter("peers_bad_address") == 0
    open_files = len(os.listdir(f"/proc/{b.daemon.process.pid}/fd"))
    assert open_files > 8 * PEERS, "the connections are there at the same time"
