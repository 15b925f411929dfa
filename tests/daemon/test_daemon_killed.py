"""kill -9 of the daemon: what is READY stays served, before and after its restart; stores are
skipped meanwhile."""

from __future__ import annotations

import zmq
from helpers import (
    Daemon,
    check_bytes,
    keys_of,
    prepare,
    store,
    until,
    wait_connected,
    wait_grant,
    write_blocks,
)

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import num_refs


def wait_away(client: PoolClient) -> None:
    """The client notices at its next attempt to store, once ZeroMQ has."""
    until(lambda: not client.channel.socket.poll(0, zmq.POLLOUT), "the end of the connection")
    assert client.prepare_store(keys_of("probe", 1)) is None
    assert not client.connected


def test_lookups_and_leases_go_on(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 6)
    store(client, keys)
    daemon.kill()
    refs = client.match_prefix(keys)
    assert client.lease(refs) == refs
    check_bytes(client, keys, refs)
    client.release(refs)
    wait_away(client)
    assert num_refs(client.match_prefix(keys)) == 6
    assert client.skipped["store_not_sent"] + client.skipped["store_not_connected"] > 0


def test_ready_blocks_are_served_after_the_restart(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 6)
    store(client, keys)
    view = client.view
    daemon.kill()
    daemon.start()
    assert "6 blocks kept" in daemon.ready_line
    until(lambda: (client.poll(), client.connected and client.view.epoch == 2)[1])
    wait_connected(client)
    assert client.view is view  # the same mapping goes on
    refs = client.match_prefix(keys)
    check_bytes(client, keys, refs)
    store(client, keys_of("after", 3))


def test_lease_survives_the_restart(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 6)
    store(client, keys)
    assert num_refs(client.lease(client.match_prefix(keys))) == 6
    daemon.kill()
    daemon.start()
    until(lambda: (client.poll(), daemon.stats()["clients"])[1])
    assert [c["leases"] for c in daemon.stats()["clients"]] == [6]
    client.release(client.match_prefix(keys))
    assert [c["leases"] for c in daemon.stats()["clients"]] == [0]


def test_store_in_flight_is_completed_after_the_restart(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    grant = prepare(client, keys)
    write_blocks(client, keys, grant.refs)
    daemon.kill()
    client.complete_store(grant.request_id)
    daemon.start()
    until(lambda: (client.poll(), num_refs(client.match_prefix(keys)) == 4)[1])
    until(lambda: (client.poll(), daemon.counter("writing") == 0)[1])


def test_prepare_without_an_answer_ends_as_lost_and_leaks_nothing(
    daemon: Daemon, client: PoolClient
) -> None:
    daemon.pause()
    request_id = client.prepare_store(keys_of("chain", 4))
    daemon.kill()
    assert request_id is not None
    daemon.start()
    grant = wait_grant(client, request_id)
    assert grant.refs is None
    assert grant.reason in {"lost", "timeout"}
    wait_connected(client)
    assert daemon.counter("writing") == 0
    store(client, keys_of("chain", 4))
