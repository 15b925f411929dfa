"""A pool in front of another host's: what engines store comes there, what they miss comes from there."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq
from helpers import (
    Daemon,
    check_bytes,
    connect,
    keys_of,
    namespace_of,
    prepare,
    run_cli,
    store,
    until,
)
from hosts.conftest import Host
from hosts.fault_proxy import FaultProxy

from benchmarks.processes import free_port
from vllm_kvpool.curve import make_keys
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs, unpack_refs

MakeHost = Callable[..., Host]
COUNT = 200


@pytest.fixture
def make(shm_dir: Path) -> Iterator[MakeHost]:
    """Daemons that know no directory."""
    hosts: list[Host] = []

    def make(*options: str, size: str = "64MiB", port: int = 0) -> Host:
        folder = shm_dir / f"host{len(hosts)}"
        folder.mkdir()
        hosts.append(Host(Daemon(folder, *options, size=size).start(), port))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def upstream(make: MakeHost) -> Host:
    return make_upstream(make)


def make_upstream(make: MakeHost, *options: str, size: str = "64MiB", port: int = 0) -> Host:
    port = port or free_port()
    return make("--listen", f"tcp://127.0.0.1:{port}", *options, size=size, port=port)


def quiet_port() -> int:
    """Which nothing listens on yet. None of those that the kernel draws from for connections: who tries to
    connect there long enough would meet himself."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def make_front(make: MakeHost, port: int, *options: str, size: str = "64MiB") -> Host:
    return make("--upstream", f"tcp://127.0.0.1:{port}", *options, size=size)


@pytest.fixture
def front(make: MakeHost, upstream: Host) -> Host:
    return make_front(make, upstream.port)


def wait_pushed(front: Host, blocks: int) -> None:
    until(lambda: front.counter("pushed_blocks") >= blocks, "the push")


def check_has(host: Host, keys: BlockKeys) -> None:
    """All of the chain, byte by byte."""
    refs = host.client.match_prefix(keys)
    assert num_refs(refs) == len(keys) // KEY_BYTES
    check_bytes(host.client, keys, refs)


def test_what_is_stored_comes_to_the_upstream(upstream: Host, front: Host) -> None:
    """Which has no engine of its own, and has never heard of the namespace."""
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    wait_pushed(front, COUNT)
    check_has(upstream, keys)
    assert upstream.counter("written_blocks") == COUNT
    assert front.counter("push_waiting") == 0


def test_what_is_missing_comes_from_the_upstream(
    make: MakeHost, upstream: Host, front: Host
) -> None:
    """To another host, and to this one when it has forgotten it."""
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    wait_pushed(front, COUNT)
    other = make_front(make, upstream.port)
    assert other.client.pulls
    assert other.pull(keys).blocks == COUNT
    check_has(other, keys)
    assert run_cli("clear", "--name", "test", "--shm-dir", front.daemon.shm_dir).returncode == 0
    assert num_refs(front.client.match_prefix(keys)) == 0
    assert front.pull(keys).blocks == COUNT
    check_has(front, keys)
    # What came from there does not go back.
    assert (front.counter("pushed_blocks"), other.counter("pushed_blocks")) == (COUNT, 0)
    assert upstream.counter("written_blocks") == COUNT
    assert front.counter("pull_stale_entries") == 0


def test_nobody_has_it(front: Host) -> None:
    pulled = front.pull(keys_of("chain", 20))
    assert (pulled.blocks, pulled.reason) == (0, "absent")


def test_every_byte_is_the_same(upstream: Host, front: Host) -> None:
    """Also of blocks that are larger than a frame."""
    space = namespace_of("large", (1 << 20) + 4096 + 256)
    keys = keys_of("chain", 9)
    client = connect(front.daemon.paths, space)
    grant = prepare(client, keys)
    assert grant.refs is not None
    for i, ref in enumerate(unpack_refs(grant.refs)):
        client.view.payload(ref)[:] = bytes([i + 1]) * (space.slot_bytes - 3) + b"end"
    client.complete_store(grant.request_id)
    until(lambda: (client.poll(), front.counter("pushed_blocks") == 9)[1], "the push")
    there = connect(upstream.daemon.paths, space)
    found = unpack_refs(there.match_prefix(keys))
    assert len(found) == 9
    for here, ref in zip(found, unpack_refs(grant.refs), strict=True):
        assert there.view.payload(here) == client.view.payload(ref)
    client.close()
    there.close()


def test_a_chain_that_grows(upstream: Host, front: Host) -> None:
    """Block by block, as tokens are generated: none comes before its parent."""
    keys = keys_of("chain", 60)
    for i in range(60):
        at = i * KEY_BYTES
        parent = keys[at - KEY_BYTES : at] if i else b""
        store(front.client, BlockKeys(keys[at : at + KEY_BYTES]), parent=parent)
    wait_pushed(front, 60)
    check_has(upstream, keys)
    assert upstream.counter("write_no_parent") == 0


def test_what_the_upstream_has_is_not_sent_again(make: MakeHost, upstream: Host) -> None:
    keys = keys_of("chain", COUNT)
    store(upstream.client, BlockKeys(keys[: 150 * KEY_BYTES]))
    front = make_front(make, upstream.port)
    store(front.client, keys)
    wait_pushed(front, 50)
    check_has(upstream, keys)
    assert upstream.counter("written_blocks") == front.counter("sent_blocks") == 50


def test_two_fronts_that_store_the_same(make: MakeHost, upstream: Host, front: Host) -> None:
    other = make_front(make, upstream.port)
    keys = keys_of("chain", COUNT)
    for host in (front, other):
        assert host.client.connected
    for host in (front, other):
        store(host.client, keys)
    until(lambda: upstream.counter("written_blocks") >= COUNT, "the blocks")
    check_has(upstream, keys)
    until(lambda: front.counter("push_waiting") + other.counter("push_waiting") == 0, "the queues")
    assert upstream.counter("written_blocks") == COUNT


def test_a_large_backlog_through_a_small_pool(make: MakeHost, upstream: Host) -> None:
    """More than the pool in front holds: what is not pushed in time is counted, and nothing stops."""
    front = make_front(make, upstream.port, size="8MiB")
    pushed_or_lost = 0
    for i in range(20):
        refs = store(front.client, keys_of(f"chain {i}", 30))
        pushed_or_lost += num_refs(refs)

    def settled() -> bool:
        counters = front.daemon.stats()["counters"]
        gone = counters.get("pushed_blocks", 0) + counters.get("push_evicted", 0)
        gone += counters.get("push_no_parent", 0)
        return bool(gone >= pushed_or_lost and counters.get("push_waiting", 0) == 0)

    until(settled, "the end of all pushes", timeout_s=60)
    there = sum(
        num_refs(upstream.client.match_prefix(keys_of(f"chain {i}", 30))) for i in range(20)
    )
    assert there == front.counter("pushed_blocks") > 0


def test_reads_keep_blocks_from_eviction(make: MakeHost) -> None:
    """What hosts read is what the upstream keeps, though none of its own engines uses it."""
    upstream = make_upstream(make, size="8MiB")
    front = make_front(make, upstream.port)
    keys = keys_of("used", 20)
    store(front.client, keys)
    wait_pushed(front, 20)
    for i in range(12):
        front.client.drop(front.client.match_prefix(keys))
        until(lambda: num_refs(front.client.match_prefix(keys)) == 0, "the drop")
        assert front.pull(keys).blocks == 20, f"forgotten after {i} further chains"
        before = front.counter("pushed_blocks")
        store(front.client, keys_of(f"once {i}", 20))
        wait_pushed(front, before + 20)
    assert upstream.counter("evicted") > 0


# faults -------------------------------------------------------------------------------------------


def test_upstream_away_and_back(make: MakeHost) -> None:
    """Blocks stay here; they go when it comes."""
    port = quiet_port()
    front = make_front(make, port)
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    until(lambda: front.counter("push_waiting") == COUNT, "the queue")
    begun = time.monotonic()
    pulled = front.pull(keys_of("other", 10), within_ms=1_000)
    assert (pulled.blocks, pulled.reason in {"lost", "absent", "deadline"}) == (0, True)
    assert time.monotonic() - begun < 5
    check_has(front, keys)
    upstream = make_upstream(make, port=port)
    wait_pushed(front, COUNT)
    check_has(upstream, keys)
    until(lambda: front.counter("push_waiting") == 0, "an empty queue")


def test_upstream_that_has_lost_its_blocks(make: MakeHost) -> None:
    """What follows a chain up there brings the whole chain: without its head nobody would find it."""
    upstream = make_upstream(make)
    front = make_front(make, upstream.port)
    keys = keys_of("chain", 100)
    store(front.client, BlockKeys(keys[: 60 * KEY_BYTES]))
    wait_pushed(front, 60)
    cleared = run_cli("clear", "--name", "test", "--shm-dir", upstream.daemon.shm_dir)
    assert cleared.returncode == 0
    rest = BlockKeys(keys[60 * KEY_BYTES :])
    store(front.client, rest, parent=keys[59 * KEY_BYTES : 60 * KEY_BYTES])
    wait_pushed(front, 160)
    check_has(upstream, keys)
    assert upstream.counter("write_no_parent") >= 1


@pytest.fixture
def proxied(make: MakeHost) -> Iterator[tuple[Host, Host, FaultProxy]]:
    """The pool in front reaches the upstream through the proxy only."""
    upstream = make_upstream(make)
    with FaultProxy(upstream.port) as proxy:
        yield upstream, make_front(make, proxy.port), proxy


def check_nothing_half_done(host: Host) -> None:
    until(lambda: host.counter("writing") == 0, "unfinished slots to be free")


def test_upstream_killed_in_mid_push(proxied: tuple[Host, Host, FaultProxy]) -> None:
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    proxy.hold_after = 5 << 20
    store(front.client, keys)
    until(lambda: proxy.taken > proxy.hold_after, "the middle of the push")
    upstream.daemon.kill()
    proxy.hold_after = None
    store(front.client, keys_of("meanwhile", 20))  # nobody waits for it
    check_has(front, keys)
    upstream.daemon.start()
    until(lambda: front.counter("push_waiting") == 0, "the rest of the push", timeout_s=60)
    until(lambda: num_refs(upstream.client.match_prefix(keys)) == 400, "all blocks", timeout_s=60)
    check_has(upstream, keys)
    check_nothing_half_done(upstream)
    assert sum(client["leases"] for client in front.daemon.stats()["clients"]) == 0


def test_upstream_killed_in_mid_pull(proxied: tuple[Host, Host, FaultProxy]) -> None:
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    store(upstream.client, keys)
    proxy.stall_after = 5 << 20
    pull_id = front.start_pull(keys, within_ms=3_000)
    until(lambda: proxy.passed > proxy.stall_after, "the middle of the pull")
    upstream.daemon.kill()
    proxy.stall_after = None
    (pulled,) = front.wait_pulls(pull_id)
    assert pulled.blocks < 400
    upstream.daemon.start()
    until(lambda: front.pull(keys, 3_000).blocks == 400, "recovery", timeout_s=60)
    check_has(front, keys)
    check_nothing_half_done(front)


def test_partition_in_mid_push(proxied: tuple[Host, Host, FaultProxy]) -> None:
    """Nothing passes and nobody hears of it: the slots up there are free again, and the blocks come later."""
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    proxy.hold_after = 3 << 20
    store(front.client, keys)
    until(lambda: upstream.counter("writing") > 0, "the middle of the push")
    proxy.dropping = True
    until(lambda: front.counter("push_losses") > 0, "the loss to be noticed")
    check_nothing_half_done(upstream)
    proxy.hold_after, proxy.dropping = None, False
    until(lambda: num_refs(upstream.client.match_prefix(keys)) == 400, "all blocks", timeout_s=60)
    check_has(upstream, keys)


def test_corrupted_on_the_way_up(proxied: tuple[Host, Host, FaultProxy]) -> None:
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    proxy.spoil_after = 6_000_001
    store(front.client, keys)
    until(lambda: num_refs(upstream.client.match_prefix(keys)) == 400, "all blocks", timeout_s=60)
    assert proxy.spoil_after is None, "nothing was corrupted"
    check_has(upstream, keys)
    noticed = upstream.counter("write_checksum") + upstream.counter("write_malformed")
    assert noticed + front.counter("push_losses") > 0 or proxy.connections > 8


def test_upstream_full(make: MakeHost) -> None:
    """Of blocks that somebody reads: there is no room, nothing is evicted for it, and it passes."""
    upstream = make_upstream(make, size="8MiB")
    refs = store(upstream.client, keys_of("leased", 1_000))
    assert set(upstream.client.lease(refs)) == {1}
    front = make_front(make, upstream.port)
    store(front.client, keys_of("first", 20))
    until(lambda: front.counter("push_no_room") >= 20, "the refusal")
    check_has(front, keys_of("first", 20))
    assert upstream.counter("write_no_room") > 0
    upstream.client.release(refs)
    store(front.client, keys_of("second", 20))
    wait_pushed(front, 20)
    check_has(upstream, keys_of("second", 20))


def test_upstream_that_takes_no_writes(make: MakeHost) -> None:
    """An older version: its welcome does not say that it knows the message."""
    port = quiet_port()
    front = make_front(make, port)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        door.linger = 0
        door.bind(f"tcp://127.0.0.1:{port}")
        store(front.client, keys_of("chain", 20))
        while front.counter("push_version") < 20:
            assert door.poll(10_000)
            connection, payload = door.recv_multipart()
            hello = msgpack.unpackb(payload)
            assert hello["type"] == "hello"
            welcome = {"type": "welcome", "id": 0, "version": 1, "pool_id": "0" * 32, "epoch": 0}
            door.send_multipart([connection, msgpack.packb(welcome)])
    check_has(front, keys_of("chain", 20))


def test_a_namespace_that_does_not_fit(make: MakeHost, upstream: Host) -> None:
    """Blocks larger than the upstream's slabs: refused, and counted here."""
    front = make_front(make, upstream.port, size="1GiB")
    client = connect(front.daemon.paths, namespace_of("huge", 3 << 20))
    keys = keys_of("chain", 2)
    store(client, keys)
    until(lambda: front.counter("push_refused") == 2, "the refusal")
    assert num_refs(client.match_prefix(keys)) == 2
    assert upstream.counter("error_namespace") == 1
    client.close()


# access -------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Key folders of an upstream, of a host that it knows, and of a stranger."""
    made = {name: tmp_path / name for name in ("up", "front", "stranger")}
    public = {name: make_keys(folder, name)[0] for name, folder in made.items()}
    shutil.copy(public["front"], made["up"])
    for name in ("front", "stranger"):
        shutil.copy(public["up"], made[name] / "upstream.key")
    return made


def test_with_keys(make: MakeHost, folders: dict[str, Path]) -> None:
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    front = make_front(make, upstream.port, "--keys", str(folders["front"]))
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    wait_pushed(front, COUNT)
    check_has(upstream, keys)
    front.client.drop(front.client.match_prefix(keys))
    until(lambda: num_refs(front.client.match_prefix(keys)) == 0, "the drop")
    assert front.pull(keys).blocks == COUNT
    check_has(front, keys)


@pytest.mark.parametrize("name", ["stranger", ""])
def test_an_unknown_key_writes_nothing(make: MakeHost, folders: dict[str, Path], name: str) -> None:
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    options = ["--keys", str(folders[name])] if name else []
    front = make_front(make, upstream.port, *options)
    keys = keys_of("chain", 20)
    store(front.client, keys)
    assert front.pull(keys_of("other", 5), within_ms=1_000).blocks == 0
    assert front.counter("push_waiting") == 20
    counted = ("peer_requests", "written_blocks", "sent_blocks")
    assert [upstream.counter(name) for name in counted] == [0, 0, 0]
    check_has(front, keys)


def test_a_key_that_comes_later_counts(make: MakeHost, folders: dict[str, Path]) -> None:
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    stranger = make_front(make, upstream.port, "--keys", str(folders["stranger"]))
    store(stranger.client, keys_of("chain", 20))
    until(lambda: stranger.counter("push_waiting") == 20, "the queue")
    shutil.copy(folders["stranger"] / "stranger.key", folders["up"])
    wait_pushed(stranger, 20)
    check_has(upstream, keys_of("chain", 20))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--upstream", "10.0.0.1:7707"], "give tcp://host:port"),
        (["--upstream", "tcp://10.0.0.1"], "give tcp://host:port"),
        (["--upstream", "tcp://*:7707"], "give tcp://host:port"),
        (["--upstream", "tcp://10.0.0.1:0"], "give tcp://host:port"),
        (["--upstream", "tcp://10.0.0.1:70000"], "give tcp://host:port"),
        (["--upstream", "tcp://h:7", "--directory", "redis://h"], "leave one of them out"),
    ],
)
def test_refused_options(shm_dir: Path, options: list[str], says: str) -> None:
    common = ["--name", "test", "--size", "16MiB", "--shm-dir", str(shm_dir)]
    done = run_cli("serve", *common, *options)
    assert done.returncode == 2
    assert says in done.stderr


def test_keys_without_that_of_the_upstream(shm_dir: Path, folders: dict[str, Path]) -> None:
    common = ["--name", "test", "--size", "16MiB", "--shm-dir", str(shm_dir)]
    keys = ["--keys", str(folders["up"])]
    done = run_cli("serve", *common, "--upstream", "tcp://127.0.0.1:7", *keys)
    assert done.returncode == 2
    assert "copy the other side's public key to upstream.key" in done.stderr
