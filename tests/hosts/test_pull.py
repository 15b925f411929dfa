"""Blocks come from the host that has them."""

from __future__ import annotations

from collections.abc import Callable

from helpers import (
    check_bytes,
    connect,
    keys_of,
    namespace_of,
    prepare,
    store,
    until,
    write_blocks,
)
from hosts.conftest import PULL_MS, Host, wait_listed

from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs, unpack_refs

MakeHost = Callable[..., Host]


def test_what_one_host_stored_comes_to_another(make_host: MakeHost) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 100)
    store(a.client, keys)
    wait_listed(a, keys)
    pulled = b.pull(keys)
    assert (pulled.blocks, pulled.reason) == (100, "")
    refs = b.client.match_prefix(keys)
    assert num_refs(refs) == 100
    check_bytes(b.client, keys, refs)
    assert b.counter("pulled_blocks") == a.counter("sent_blocks") == 100


def test_every_byte_is_the_same(make_host: MakeHost) -> None:
    """Also of blocks that are larger than a frame."""
    a, b = make_host(), make_host()
    slot_bytes = (1 << 20) + 4096 + 256
    space = namespace_of("large", slot_bytes)
    keys = keys_of("chain", 3)
    clients = [connect(host.daemon.paths, space) for host in (a, b)]
    refs = store(clients[0], keys)
    for i, ref in enumerate(unpack_refs(refs)):
        clients[0].view.payload(ref)[:] = bytes([i + 1]) * (slot_bytes - 3) + b"end"
    wait_listed(a, keys)
    pull_id = clients[1].pull(keys, b"", PULL_MS)
    until(lambda: (clients[1].poll(), clients[1].take_pulled())[1], "pull")
    assert pull_id is not None
    found = unpack_refs(clients[1].match_prefix(keys))
    assert len(found) == 3
    for here, there in zip(found, unpack_refs(refs), strict=True):
        assert clients[1].view.payload(here) == clients[0].view.payload(there)
    for client in clients:
        client.close()


def test_a_chain_that_goes_in_a_circle(make_host: MakeHost) -> None:
    """Nobody's engine asks so, but what cannot be must not stay behind either."""
    a, b = make_host(), make_host()
    keys = keys_of("chain", 3)
    store(a.client, keys)
    wait_listed(a, keys)
    first = keys[:KEY_BYTES]
    circle = BlockKeys(keys[: 2 * KEY_BYTES] + first + keys[2 * KEY_BYTES :])
    b.pull(circle)
    assert b.pull(keys).blocks == 3


def test_only_what_is_missing(make_host: MakeHost) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 60)
    store(a.client, keys)
    store(b.client, BlockKeys(keys[: 20 * KEY_BYTES]))
    wait_listed(a, keys)
    assert b.pull(keys).blocks == 60
    assert b.counter("pulled_blocks") == 40


def test_what_the_other_has_of_it(make_host: MakeHost) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 60)
    store(a.client, BlockKeys(keys[: 45 * KEY_BYTES]))
    wait_listed(a, BlockKeys(keys[: 45 * KEY_BYTES]))
    pulled = b.pull(keys)
    assert (pulled.blocks, pulled.reason) == (45, "absent")
    assert num_refs(b.client.match_prefix(keys)) == 45


def test_nobody_has_it(make_host: MakeHost) -> None:
    make_host()
    host, keys = make_host(), keys_of("chain", 10)
    until(lambda: host.pull(keys).reason != "no_directory", "the directory")
    pulled = host.pull(keys)
    assert (pulled.blocks, pulled.reason) == (0, "absent")


def test_from_the_one_that_has_most(make_host: MakeHost) -> None:
    a, b, c = make_host(), make_host(), make_host()
    keys = keys_of("chain", 40)
    store(a.client, BlockKeys(keys[: 10 * KEY_BYTES]))
    store(b.client, keys)
    wait_listed(a, BlockKeys(keys[: 10 * KEY_BYTES]))
    wait_listed(b, keys)
    assert c.pull(keys).blocks == 40
    assert (a.counter("sent_blocks"), b.counter("sent_blocks")) == (0, 40)


def test_pulled_blocks_are_passed_on(make_host: MakeHost) -> None:
    a, b, c = make_host(), make_host(), make_host()
    keys = keys_of("chain", 30)
    store(a.client, keys)
    wait_listed(a, keys)
    assert b.pull(keys).blocks == 30
    wait_listed(b, keys)
    a.daemon.kill()
    assert c.pull(keys, within_ms=12_000).blocks == 30  # half of the time may go to the dead host
    check_bytes(c.client, keys, c.client.match_prefix(keys))


def test_concurrent_misses_pull_once(make_host: MakeHost) -> None:
    """32 requests of one prefix, some of them longer or shorter than others."""
    a, b = make_host(), make_host()
    keys = keys_of("chain", 200)
    store(a.client, keys)
    wait_listed(a, keys)
    lengths = [200 if i % 2 else 100 + i for i in range(32)]
    asked = [b.start_pull(BlockKeys(keys[: n * KEY_BYTES])) for n in lengths]
    answers = {pulled.id: pulled.blocks for pulled in b.wait_pulls(*asked)}
    assert [answers[pull_id] for pull_id in asked] == lengths
    assert b.counter("pulls") == 32
    assert b.counter("pulled_blocks") == a.counter("sent_blocks") == 200


def test_a_prefix_that_is_being_stored_here_is_not_brought_twice(make_host: MakeHost) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 20)
    store(a.client, keys)
    wait_listed(a, keys)
    grant = prepare(b.client, BlockKeys(keys[: 5 * KEY_BYTES]))
    pulled = b.pull(keys)
    assert pulled.blocks == 0  # the first blocks are not visible yet
    write_blocks(b.client, keys, grant.refs)
    b.client.complete_store(grant.request_id)
    until(lambda: (b.client.poll(), num_refs(b.client.match_prefix(keys)) == 20)[1], "all blocks")
    assert b.counter("pulled_blocks") == 15


def test_full_of_leases_means_no_room(make_host: MakeHost) -> None:
    a, b = make_host(), make_host(size="16MiB")
    fill = keys_of("leased", 1_000)
    refs = store(b.client, fill)
    assert b.client.lease(refs) == refs
    keys = keys_of("chain", 50)
    store(a.client, keys)
    wait_listed(a, keys)
    pulled = b.pull(keys, within_ms=1_000)
    assert pulled.blocks == 0
    assert num_refs(b.client.match_prefix(fill)) == num_refs(refs)
    b.client.release(refs)
    assert b.counter("writing") == 0


def test_cancelled(make_host: MakeHost) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 20)
    store(a.client, keys)
    wait_listed(a, keys)
    a.daemon.pause()
    pull_id = b.start_pull(keys, within_ms=20_000)
    b.client.cancel_pull(pull_id)
    until(lambda: b.counter("pulls_cancelled") == 1, "the end of the pull")
    a.daemon.resume()
    assert b.pull(keys).blocks in {0, 20}  # it may still be suspected
    until(lambda: b.counter("writing") == 0, "the slots to be free")
