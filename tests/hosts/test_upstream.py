"""A pool in front of another host's: what its engines miss comes from there."""

from __future__ import annotations

from helpers import check_bytes, keys_of, run_cli, store, until
from hosts.conftest import Host, MakeHost, make_front, make_upstream
from hosts.fault_proxy import FaultProxy
from hosts.fronts import COUNT, check_has, check_nothing_half_done, wait_pushed

from vllm_kvpool.types import num_refs


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


def test_what_has_come_by_the_deadline_counts(proxied: tuple[Host, Host, FaultProxy]) -> None:
    """Blocks of batches that did not come whole, too: the answer says what can be loaded."""
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    store(upstream.client, keys)
    proxy.stall_each_after = 3 << 20  # less than a batch
    pulled = front.pull(keys, within_ms=10_000)
    assert (pulled.reason, front.counter("pulls")) == ("deadline", 1)
    until(lambda: front.counter("writing") == 0, "the end of the pull")
    assert pulled.blocks == num_refs(front.client.match_prefix(keys)) > 0
    check_bytes(front.client, keys, front.client.match_prefix(keys))


def test_upstream_killed_in_mid_pull(proxied: tuple[Host, Host, FaultProxy]) -> None:
    upstream, front, proxy = proxied
    keys = keys_of("chain", 400)
    store(upstream.client, keys)
    proxy.stall_after = 5 << 20
    pull_id = front.start_pull(keys, within_ms=10_000)
    until(lambda: proxy.passed > proxy.stall_after, "the middle of the pull")
    upstream.daemon.kill()
    proxy.stall_after = None
    (pulled,) = front.wait_pulls(pull_id)
    assert pulled.blocks < 400
    upstream.daemon.start()
    until(lambda: front.pull(keys, 3_000).blocks == 400, "recovery", timeout_s=60)
    check_has(front, keys)
    check_nothing_half_done(front)
