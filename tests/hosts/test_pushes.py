"""What engines store in front of another pool comes there."""

from __future__ import annotations

import msgpack
import zmq
from helpers import connect, keys_of, namespace_of, prepare, run_cli, store, until
from hosts.conftest import Host, MakeHost, make_front, make_upstream
from hosts.fronts import COUNT, check_has, wait_pushed, wait_there

from benchmarks.processes import free_port
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs, unpack_refs


def test_what_is_stored_comes_to_the_upstream(upstream: Host, front: Host) -> None:
    """Which has no engine of its own, and has never heard of the namespace."""
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    wait_pushed(front, COUNT)
    check_has(upstream, keys)
    assert upstream.counter("written_blocks") == COUNT
    # A gauge: it is shown at 0, too.
    until(lambda: front.daemon.stats()["counters"]["push_waiting"] == 0, "an empty queue")


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


def test_upstream_full(make: MakeHost) -> None:
    """Of blocks that somebody reads: there is no room, nothing is evicted for it, and it passes."""
    upstream = make_upstream(make, size="8MiB")
    refs = store(upstream.client, keys_of("leased", 1_000))
    assert upstream.client.lease(refs) == refs
    front = make_front(make, upstream.port)
    store(front.client, keys_of("first", 20))
    until(lambda: front.counter("push_no_room") >= 20, "the refusal")
    check_has(front, keys_of("first", 20))
    assert upstream.counter("write_no_room") > 0
    upstream.client.release(refs)
    store(front.client, keys_of("second", 20))
    wait_pushed(front, 20)
    check_has(upstream, keys_of("second", 20))


def welcome_all(door: zmq.Socket[bytes]) -> None:
    """As a version that knows no writes does."""
    while door.poll(10):
        connection, payload = door.recv_multipart()
        assert msgpack.unpackb(payload)["type"] == "hello"
        welcome = {"type": "welcome", "id": 0, "version": 1, "pool_id": "0" * 32, "epoch": 0}
        door.send_multipart([connection, msgpack.packb(welcome)])


def test_upstream_that_takes_no_writes(make: MakeHost) -> None:
    """An older version: its welcome does not say that it knows the message."""
    port = free_port()
    front = make_front(make, port)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        door.linger = 0
        door.bind(f"tcp://127.0.0.1:{port}")
        store(front.client, keys_of("chain", 20))
        until(lambda: (welcome_all(door), front.counter("push_version") == 20)[1], "the refusal")
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


def test_what_waited_goes_after_a_restart(make: MakeHost) -> None:
    """Also in chains that do not grow any more; nobody remembers what was pushed, so the upstream is asked."""
    port = free_port()
    front = make_front(make, port)
    chains = [keys_of(f"chain {i}", 15) for i in range(20)]
    for keys in chains:
        store(front.client, keys)
    branch = keys_of("branch", 3)
    store(front.client, branch, parent=BlockKeys(chains[0][4 * KEY_BYTES : 5 * KEY_BYTES]))
    front.daemon.kill()
    front.daemon.start()
    upstream = make_upstream(make, port=port)
    for keys in [*chains, BlockKeys(chains[0][: 5 * KEY_BYTES] + branch)]:
        wait_there(upstream, keys)
    wait_pushed(front, 20 * 15 + 3)
    assert upstream.counter("written_blocks") == 20 * 15 + 3


def test_after_a_restart_nothing_goes_twice(front: Host, upstream: Host) -> None:
    for i in range(20):
        store(front.client, keys_of(f"chain {i}", 15))
    wait_pushed(front, 20 * 15)
    front.daemon.kill()
    front.daemon.start()
    # The last block of each is known to be there, once it was asked for.
    until(lambda: front.counter("copies") == 20, "all chains to be asked for")
    assert (front.counter("push_waiting"), front.counter("sent_blocks")) == (0, 0)
    assert upstream.counter("written_blocks") == 20 * 15


def test_what_was_pushed_goes_first(make: MakeHost, upstream: Host) -> None:
    """In a full pool, before blocks that are here alone."""
    front = make_front(make, upstream.port, size="16MiB")
    pushed, alone = keys_of("pushed", 60), keys_of("alone", 60)
    store(front.client, pushed)
    until(lambda: front.counter("copies") == 60, "the push")
    upstream.daemon.pause()
    store(front.client, alone)
    number = 0
    while front.counter("evicted") < 30:
        store(front.client, keys_of(f"fill {number}", 10))
        number += 1
    assert front.counter("evicted_copies") == front.counter("evicted")
    check_has(front, alone)
    upstream.daemon.resume()
    for i in range(number):
        wait_there(upstream, keys_of(f"fill {i}", 10))
    wait_there(upstream, alone)
    check_has(upstream, pushed)


def test_what_others_write_goes_on(make: MakeHost, upstream: Host) -> None:
    """A pool that has an upstream and is one."""
    between = make_upstream(make, "--upstream", f"tcp://127.0.0.1:{upstream.port}")
    front = make_front(make, between.port)
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    wait_there(between, keys)
    wait_there(upstream, keys)
    wait_pushed(between, COUNT)
    # What it gets from its own upstream does not go back.
    store(upstream.client, keys_of("other", 20))
    assert between.pull(keys_of("other", 20)).blocks == 20
    assert between.counter("pushed_blocks") == upstream.counter("written_blocks") == COUNT
