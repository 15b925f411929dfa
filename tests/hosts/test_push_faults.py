"""Pushes over a bad network, and to an upstream that comes and goes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from helpers import Daemon, keys_of, store, until
from hosts.conftest import Host, MakeHost, make_front, make_upstream, patient
from hosts.fault_proxy import FaultProxy
from hosts.fronts import (
    COUNT,
    check_has,
    check_nothing_half_done,
    wait_pushed,
    wait_there,
)
from hosts.message_relay import MessageRelay

from benchmarks.processes import free_port
from vllm_kvpool.types import num_refs


def attentive(daemon: Daemon) -> Daemon:
    """What does not go on is noticed sooner than with the package's own limits, of ten and fifteen seconds; not so
    soon that who pauses would not go on."""
    return patient(daemon).tuned(inbox__IDLE_MS=6_000, pushes__ANSWER_MS=9_000)


@pytest.fixture
def upstream(make: MakeHost) -> Host:
    return make_upstream(make, tune=attentive)


@pytest.fixture
def proxied(make: MakeHost, upstream: Host) -> Iterator[tuple[Host, Host, FaultProxy]]:
    """An upstream that is lost is noticed in two seconds, not five."""
    with FaultProxy(upstream.port) as proxy:
        front = make_front(
            make, proxy.port, tune=lambda daemon: attentive(daemon).tuned(pushes__STALL_MS=2_000)
        )
        yield upstream, front, proxy


def test_upstream_away_and_back(make: MakeHost) -> None:
    """Blocks stay here; they go when it comes."""
    port = free_port()
    front = make_front(make, port)
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    until(lambda: front.counter("push_waiting") == COUNT, "the queue")
    begun = time.monotonic()
    pulled = front.pull(keys_of("other", 10), within_ms=1_000)
    assert (pulled.blocks, pulled.reason in {"lost", "absent", "deadline"}) == (0, True)
    assert time.monotonic() - begun < 20
    check_has(front, keys)
    upstream = make_upstream(make, port=port)
    wait_pushed(front, COUNT)
    check_has(upstream, keys)
    until(lambda: front.counter("push_waiting") == 0, "an empty queue")


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
    wait_there(upstream, keys)
    check_nothing_half_done(upstream)
    until(lambda: front.leases == 0, "the leases to go")


def test_partition_in_mid_push(proxied: tuple[Host, Host, FaultProxy]) -> None:
    """Nothing passes and nobody hears of it: the slots up there are free again, and the blocks come later."""
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    proxy.hold_after = 3 << 20
    store(front.client, keys)
    until(lambda: proxy.taken > proxy.hold_after, "the middle of the push")
    proxy.dropping = True
    until(lambda: front.counter("push_losses") > 0, "the loss to be noticed")
    check_nothing_half_done(upstream)
    proxy.hold_after, proxy.dropping = None, False
    wait_there(upstream, keys)


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


def check_recovers_beside_others(
    front: Host, upstream: Host, relay: MessageRelay, expected: int
) -> None:
    """A batch whose answer is lost is offered again, though others are answered all the time."""
    keys = keys_of("chain", 160)  # more than a batch
    store(front.client, keys)
    until(lambda: relay.lost is not None, "the loss")

    def all_there() -> bool:
        store(front.client, keys_of(f"other {int(10 * time.monotonic())}", 2))
        time.sleep(0.1)
        there = num_refs(upstream.client.match_prefix(keys)) == 160
        return there and front.counter("push_unanswered") >= expected

    until(all_there, "another attempt", timeout_s=60)
    check_has(upstream, keys)
    check_nothing_half_done(upstream)
    assert (front.counter("push_losses"), front.counter("push_lost")) == (0, 0)


def test_a_lost_wanted(make: MakeHost, upstream: Host) -> None:
    """The upstream hears nothing of that write, and ends it."""
    with MessageRelay(upstream.port) as relay:
        front = make_front(make, relay.port, tune=attentive)
        relay.lose = "wanted"
        check_recovers_beside_others(front, upstream, relay, 0)
        assert upstream.counter("write_deadline") == 1


def test_a_lost_written(make: MakeHost, upstream: Host) -> None:
    """It has the blocks, and says so when it is asked again."""
    with MessageRelay(upstream.port) as relay:
        front = make_front(make, relay.port, tune=attentive)
        relay.lose = "written"
        check_recovers_beside_others(front, upstream, relay, 1)


def test_only_one_connection_gets_through(make: MakeHost, upstream: Host) -> None:
    """It gets no more at once than the upstream takes over one."""
    chains = [keys_of(f"chain {i}", 20) for i in range(30)]
    with FaultProxy(upstream.port) as proxy:
        proxy.most_connections = 0
        front = make_front(make, proxy.port)
        for keys in chains:
            store(front.client, keys)
        until(lambda: front.counter("push_waiting") == 30 * 20, "the queue")
        proxy.most_connections = 1
        for keys in chains:
            wait_there(upstream, keys)
    assert upstream.counter("error_busy") == 0
    assert upstream.counter("written_blocks") == 30 * 20
