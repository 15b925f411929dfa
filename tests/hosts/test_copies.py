"""What came from another host goes before what nobody else has, as long as that host lives."""

from __future__ import annotations

from collections.abc import Callable

from helpers import Daemon, check_bytes, keys_of, store, until
from hosts.conftest import Host, patient, wait_listed

from vllm_kvpool.types import BlockKeys, num_refs

MakeHost = Callable[..., Host]
COUNT = 60


def forgetful(daemon: Daemon) -> Daemon:
    """Who is dead is not known to have been there for 8 seconds: 25 with the package's own limits. Who lives may
    pause for 5."""
    return patient(daemon).tuned(
        directory__HOST_TTL_S=6, directory__BEAT_S=0.5, sources__ABSENT_MS=2_000
    )


def here(host: Host, keys: BlockKeys) -> int:
    refs = host.client.match_prefix(keys)
    check_bytes(host.client, keys, refs)
    return num_refs(refs)


def pull_and_use(a: Host, b: Host) -> tuple[BlockKeys, BlockKeys]:
    """B has stored a chain of its own, and then got one of A's and used it."""
    own, copies = keys_of("own", COUNT), keys_of("copies", COUNT)
    store(a.client, copies)
    wait_listed(a, copies)
    store(b.client, own)
    assert b.pull(copies).blocks == COUNT
    b.client.touch(b.client.match_prefix(copies))
    return own, copies


def fill(host: Host, evicted: int) -> None:
    """New blocks until so many others have gone."""
    number = 0
    while host.counter("evicted") < evicted:
        store(host.client, keys_of(f"fill {number}", 10))
        number += 1


def test_copies_go_before_what_is_older_and_single(make_host: MakeHost) -> None:
    a, b = make_host(), make_host(size="16MiB")
    own, copies = pull_and_use(a, b)
    assert b.counter("copies") == COUNT
    fill(b, COUNT // 2)
    assert here(b, own) == COUNT
    assert here(b, copies) == COUNT - b.counter("evicted_copies")
    assert b.counter("evicted_copies") == b.counter("evicted") >= COUNT // 2
    assert here(a, copies) == COUNT
    assert a.counter("copies") == 0


def test_a_prefix_in_demand_is_no_copy_any_more(make_host: MakeHost) -> None:
    a, b = make_host(), make_host(size="16MiB")
    own, copies = pull_and_use(a, b)
    b.client.touch(b.client.match_prefix(copies))
    until(lambda: b.counter("copies") == 0, "the second use")
    assert b.counter("kept_copies") == COUNT
    fill(b, COUNT // 2)
    assert here(b, copies) == COUNT
    assert here(b, own) < COUNT
    assert b.counter("evicted_copies") == 0


def test_after_the_source_has_died_they_are_ordinary_blocks(make_host: MakeHost) -> None:
    a, b = make_host(tune=forgetful), make_host(size="16MiB", tune=forgetful)
    own, copies = pull_and_use(a, b)
    a.daemon.kill()
    until(lambda: b.counter("copies") == 0, "the source to be forgotten")
    fill(b, COUNT // 2)
    assert here(b, copies) == COUNT
    assert here(b, own) < COUNT


def test_a_restarted_daemon_knows_no_copies(make_host: MakeHost) -> None:
    a, b = make_host(), make_host(size="16MiB")
    _, copies = pull_and_use(a, b)
    until(lambda: b.counter("copies") == COUNT, "the copies")
    b.daemon.kill()
    b.daemon.start()
    assert b.counter("copies") == 0
    assert b.counter("recovered") == 2 * COUNT
    until(lambda: (b.client.poll(), b.client.connected)[1], "connection")
    assert here(b, copies) == COUNT
