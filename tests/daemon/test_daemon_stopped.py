"""A daemon that hangs (SIGSTOP): lookups and loads go on, stores time out, and nothing leaks when
it comes back."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import pytest
from helpers import (
    PATIENT_MS,
    Daemon,
    keys_of,
    prepare,
    store,
    until,
    wait_connected,
    wait_grant,
    wait_grants,
    write_blocks,
)

from vllm_kvpool.client import PoolClient
from vllm_kvpool.clock import now_ms
from vllm_kvpool.types import SlotRefs, num_refs

SHORT_MS = 200


def lose_patience(client: PoolClient) -> None:
    """From now on it waits 200 ms for an answer. Not before: an answer of a daemon that lives may take long on a
    busy machine."""
    client.timeout_ms = SHORT_MS


def test_lookups_and_leases_go_on(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 6)
    store(client, keys)
    daemon.pause()
    refs = client.match_prefix(keys)
    assert client.lease(refs) == refs
    client.release(refs)


def times_slept() -> int:
    """How often this thread has waited for something. To be held up by other threads and processes is no waiting."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def test_no_call_waits(daemon: Daemon, make_client: Callable[..., PoolClient]) -> None:
    clients = [make_client() for _ in range(3)]
    store(clients[0], keys_of("chain", 64))
    daemon.pause()
    waits = [num_waits(client) for client in clients]
    assert 0 in waits, "some are the machine's, what waits for the daemon does so with each client"


def num_waits(client: PoolClient) -> int:
    lose_patience(client)
    waits = 0
    give_up = time.monotonic() + 1.5  # an attempt to connect again is among it
    while time.monotonic() < give_up:
        start, slept = time.perf_counter(), times_slept()
        client.poll()
        client.match_prefix(keys_of("chain", 4))
        client.prepare_store(keys_of("new", 64))
        client.touch(client.match_prefix(keys_of("chain", 4)))
        took_s = time.perf_counter() - start
        waits += times_slept() > slept and took_s > SHORT_MS / 2_000
        time.sleep(0.005)
    return waits


def test_stores_time_out_and_are_skipped(daemon: Daemon, client: PoolClient) -> None:
    daemon.pause()
    lose_patience(client)
    requests = [client.prepare_store(keys_of(f"chain {i}", 4)) for i in range(3)]
    grants = wait_grants(client, requests)
    assert {(grant.refs, grant.reason) for grant in grants} == {(None, "timeout")}
    assert not client.connected
    assert client.prepare_store(keys_of("more", 4)) is None
    assert client.skipped["store_timeout"] == 3
    assert client.skipped["store_not_connected"] == 1


def test_grants_that_come_too_late_leak_nothing(daemon: Daemon, client: PoolClient) -> None:
    daemon.pause()
    lose_patience(client)
    request_id = client.prepare_store(keys_of("chain", 8))
    assert wait_grant(client, request_id).refs is None
    client.timeout_ms = PATIENT_MS
    daemon.resume()
    wait_connected(client)
    assert daemon.counter("writing") == 0
    assert client.match_prefix(keys_of("chain", 8)) == b""
    assert num_refs(store(client, keys_of("chain", 8))) == 8


def test_grant_given_before_the_pause_but_read_after_the_deadline(
    client: PoolClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Busy schedulers read late; an answer that is there counts."""
    request_id = client.prepare_store(keys_of("chain", 8))
    assert client.channel.socket.poll(PATIENT_MS)
    late = now_ms() + 2 * PATIENT_MS
    monkeypatch.setattr("vllm_kvpool.client.now_ms", lambda: late)
    assert wait_grant(client, request_id).refs is not None


def test_store_in_flight_is_completed_afterwards(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    grant = prepare(client, keys)
    granted = write_blocks(client, keys, grant.refs)
    daemon.pause()
    lose_patience(client)
    client.complete_store(grant.request_id, aborted=SlotRefs(granted[16:]))
    until(lambda: (client.poll(), not client.connected)[1])
    client.timeout_ms = PATIENT_MS
    daemon.resume()
    until(lambda: (client.poll(), num_refs(client.match_prefix(keys)) == 2)[1])
    wait_connected(client)
    until(lambda: (client.poll(), daemon.counter("writing") == 0)[1])
