"""The other host dies, hangs, lies, or the network between does it harm: a pull ends in time, and
what is visible afterwards is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgpack
import msgspec
import pytest
import zmq
from helpers import PATIENT_MS, Daemon, check_bytes, keys_of, store, until
from hosts.conftest import Host, patient, wait_listed
from hosts.fault_proxy import FaultProxy
from redis_server import RedisServer

from benchmarks.processes import free_port
from vllm_kvpool.pool.directory import HostRecord
from vllm_kvpool.types import BlockKeys, num_refs

MakeHost = Callable[..., Host]
COUNT = 400
"""25 MiB: more than fits into the buffers on the way."""
BROKEN_MS = 10_000
"""For pulls that cannot end well: enough to get into the middle of one, though somebody pauses."""


def doubtful(daemon: Daemon) -> Daemon:
    """Who did not answer is not asked for longer than with the package's own limit, of five seconds."""
    return patient(daemon).tuned(peer__SUSPECT_MS=10_000)


@pytest.fixture
def proxied(
    request: pytest.FixtureRequest, make_host: MakeHost
) -> Iterator[tuple[Host, Host, FaultProxy, BlockKeys]]:
    """A holds a chain, B reaches A through the proxy only. The parameter, if any, tunes B."""
    port = free_port()
    with FaultProxy(port) as proxy:
        a = make_host("--advertise", f"tcp://127.0.0.1:{proxy.port}", port=port)
        b = make_host(tune=getattr(request, "param", patient))
        keys = keys_of("chain", COUNT)
        store(a.client, keys)
        wait_listed(a, keys)
        yield a, b, proxy, keys


def check_what_is_there(host: Host, keys: BlockKeys) -> int:
    """Right bytes, nothing half done; how many blocks."""
    until(lambda: host.counter("writing") == 0, "unfinished slots to be free")
    refs = host.client.match_prefix(keys)
    check_bytes(host.client, keys, refs)
    return num_refs(refs)


def pulls_again(host: Host, keys: BlockKeys) -> None:
    """All by itself, without a restart."""
    until(lambda: host.pull(keys, 3_000).blocks == COUNT, "recovery", timeout_s=60)
    assert check_what_is_there(host, keys) == COUNT


def test_killed_in_mid_pull(proxied: tuple[Host, Host, FaultProxy, BlockKeys]) -> None:
    a, b, proxy, keys = proxied
    proxy.stall_after = 5 << 20
    pull_id = b.start_pull(keys, within_ms=BROKEN_MS)
    until(lambda: proxy.passed > proxy.stall_after, "the middle of the pull")
    a.daemon.kill()
    proxy.stall_after = None
    (pulled,) = b.wait_pulls(pull_id)
    assert pulled.blocks < COUNT
    assert pulled.blocks <= check_what_is_there(b, keys) < COUNT
    a.daemon.start()  # with the blocks of its predecessor, under its old name
    pulls_again(b, keys)


@pytest.mark.parametrize("proxied", [doubtful], indirect=True)
def test_partition(proxied: tuple[Host, Host, FaultProxy, BlockKeys]) -> None:
    """Nothing passes and nobody hears of it."""
    _, b, proxy, keys = proxied
    proxy.dropping = True
    begun = time.monotonic()
    pulled = b.pull(keys, within_ms=8_000)
    assert time.monotonic() - begun < 25
    assert pulled.blocks == 0
    assert pulled.reason in {"deadline", "lost"}
    assert check_what_is_there(b, keys) == 0
    again = b.pull(keys, within_ms=20_000)  # the host is suspected: not even asked
    assert (again.blocks, again.reason) == (0, "absent")
    proxy.dropping = False
    pulls_again(b, keys)


def test_partition_in_mid_pull(proxied: tuple[Host, Host, FaultProxy, BlockKeys]) -> None:
    a, b, proxy, keys = proxied
    proxy.stall_after = 5 << 20
    pulled = b.pull(keys, within_ms=BROKEN_MS)
    assert pulled.blocks < COUNT
    assert pulled.reason == "deadline"
    check_what_is_there(b, keys)
    proxy.stall_after = None
    pulls_again(b, keys)
    assert a.counter("writing") == 0


def test_leases_of_a_lost_reader_go(proxied: tuple[Host, Host, FaultProxy, BlockKeys]) -> None:
    """Blocks that were being sent can be evicted again once the connection is given up."""
    a, b, proxy, keys = proxied
    proxy.stall_after = 2 << 20
    b.start_pull(keys)
    until(lambda: a.leases > 0, "the leases")
    b.daemon.kill()
    proxy.close()
    until(lambda: a.leases == 0, "the leases to go")


def test_delay(proxied: tuple[Host, Host, FaultProxy, BlockKeys]) -> None:
    """Half a second a piece, of a hundred over four connections: in time or not at all."""
    _, b, proxy, keys = proxied
    proxy.delay_s = 0.5
    assert b.pull(keys, within_ms=3_000).blocks < COUNT
    check_what_is_there(b, keys)
    proxy.delay_s = 0.1
    pulls_again(b, keys)


def test_a_slow_link_brings_what_it_can_in_time(
    proxied: tuple[Host, Host, FaultProxy, BlockKeys],
) -> None:
    """Once the rate of the link is known, only so many blocks are asked for."""
    _, b, proxy, keys = proxied
    proxy.delay_s = 0.02
    until(lambda: b.pull(keys_of("chain", 40), 5_000).blocks == 40, "a first pull")
    received = b.counter("pulled_blocks")
    pulled = b.pull(keys, within_ms=400)
    assert pulled.blocks < COUNT
    brought = b.counter("pulled_blocks") - received
    assert brought < COUNT - 40
    check_what_is_there(b, keys)


@pytest.mark.parametrize("place", [1_000_000, 9_000_001])
def test_corrupted_bytes(proxied: tuple[Host, Host, FaultProxy, BlockKeys], place: int) -> None:
    """Without CURVE nothing but our checksums would notice. Where the flip hits ZeroMQ's own framing, the
    connection breaks instead."""
    _, b, proxy, keys = proxied
    proxy.corrupt_after = proxy.passed + place
    pulled = b.pull(keys)
    assert proxy.corrupt_after is None, "nothing was corrupted"
    assert pulled.blocks < COUNT
    assert pulled.reason in {"checksum", "deadline", "lost", "malformed"}
    check_what_is_there(b, keys)
    pulls_again(b, keys)


def test_another_version_is_not_asked(make_host: MakeHost, redis_server: RedisServer) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 20)
    store(a.client, keys)
    wait_listed(a, keys)
    name = b"kvpool:1:test:{hosts}:" + a.id
    redis = redis_server.client
    record = msgspec.msgpack.decode(redis.get(name), type=HostRecord)
    other = msgspec.structs.replace(record, format=record.format + 1)
    a.daemon.pause()  # it would say the truth again
    redis.set(name, msgspec.msgpack.encode(other), ex=60)
    until(
        lambda: b.pull(keys, 2_000).reason and b.counter("peers_other_version_or_security"),
        "refusal",
    )
    assert num_refs(b.client.match_prefix(keys)) == 0


def test_a_daemon_of_another_version_refuses(make_host: MakeHost) -> None:
    a = make_host()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"tcp://127.0.0.1:{a.port}")
        socket.send(msgpack.packb({"type": "hello", "id": 1, "version": 9, "now_ms": 0, "pid": 1}))
        assert socket.poll(PATIENT_MS)
        assert msgpack.unpackb(socket.recv())["code"] == "version"


def test_the_next_host_is_asked(make_host: MakeHost) -> None:
    """One hangs, another has the blocks, too."""
    a, b, c = make_host(), make_host(), make_host()
    keys = keys_of("chain", 20)
    for host in (a, b):
        store(host.client, keys)
        wait_listed(host, keys)
    assert c.client.pulls
    a.daemon.pause()
    assert c.pull(keys, within_ms=12_000).blocks == 20  # half of it for the one that hangs
    assert b.counter("sent_blocks") == 20
