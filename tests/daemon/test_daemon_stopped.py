"""A daemon that hangs (SIGSTOP): lookups and loads go on, stores time out, and nothing leaks when
it comes back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from helpers import (
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
from vllm_kvpool.types import SlotRefs, num_refs


@pytest.fixture
def hasty(make_client: Callable[..., PoolClient]) -> PoolClient:
    """A client that waits 200 ms for an answer."""
    return make_client(timeout_ms=200)


def test_lookups_and_leases_go_on(daemon: Daemon, hasty: PoolClient) -> None:
    keys = keys_of("chain", 6)
    store(hasty, keys)
    daemon.pause()
    refs = hasty.match_prefix(keys)
    assert hasty.lease(refs) == refs
    hasty.release(refs)


def test_no_call_waits(daemon: Daemon, hasty: PoolClient) -> None:
    store(hasty, keys_of("chain", 64))
    daemon.pause()
    slowest = 0.0
    give_up = time.monotonic() + 3
    while time.monotonic() < give_up:
        start = time.perf_counter()
        hasty.poll()
        hasty.match_prefix(keys_of("chain", 4))
        hasty.prepare_store(keys_of("new", 64))
        hasty.touch(hasty.match_prefix(keys_of("chain", 4)))
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.005)
    assert slowest < 0.1  # the daemon's timeout is 0.2 s; scheduling noise of a busy machine is not


def test_stores_time_out_and_are_skipped(daemon: Daemon, hasty: PoolClient) -> None:
    daemon.pause()
    requests = [hasty.prepare_store(keys_of(f"chain {i}", 4)) for i in range(3)]
    grants = wait_grants(hasty, requests)
    assert {(grant.refs, grant.reason) for grant in grants} == {(None, "timeout")}
    assert not hasty.connected
    assert hasty.prepare_store(keys_of("more", 4)) is None
    assert hasty.skipped["store_timeout"] == 3
    assert hasty.skipped["store_not_connected"] == 1


def test_grants_that_come_too_late_leak_nothing(daemon: Daemon, hasty: PoolClient) -> None:
    daemon.pause()
    request_id = hasty.prepare_store(keys_of("chain", 8))
    assert wait_grant(hasty, request_id).refs is None
    daemon.resume()
    wait_connected(hasty)
    assert daemon.counter("writing") == 0
    assert hasty.match_prefix(keys_of("chain", 8)) == b""
    assert num_refs(store(hasty, keys_of("chain", 8))) == 8


def test_grant_given_before_the_pause_but_read_after_the_deadline(
    daemon: Daemon, hasty: PoolClient
) -> None:
    """Busy schedulers read late; an answer that is there counts."""
    request_id = hasty.prepare_store(keys_of("chain", 8))
    until(lambda: daemon.counter("writing") == 8)
    time.sleep(0.5)
    assert wait_grant(hasty, request_id).refs is not None


def test_store_in_flight_is_completed_afterwards(daemon: Daemon, hasty: PoolClient) -> None:
    keys = keys_of("chain", 4)
    grant = prepare(hasty, keys)
    granted = write_blocks(hasty, keys, grant.refs)
    daemon.pause()
    hasty.complete_store(grant.request_id, aborted=SlotRefs(granted[16:]))
    until(lambda: (hasty.poll(), not hasty.connected)[1])
    daemon.resume()
    until(lambda: (hasty.poll(), num_refs(hasty.match_prefix(keys)) == 2)[1])
    wait_connected(hasty)
    until(lambda: (hasty.poll(), daemon.counter("writing") == 0)[1])
