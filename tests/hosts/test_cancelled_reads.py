"""What nobody waits for any more is not sent any more."""

from __future__ import annotations

import time
from collections.abc import Callable

from helpers import check_bytes, keys_of, store, until
from hosts.conftest import Host, wait_listed
from hosts.fault_proxy import FaultProxy

from benchmarks.processes import free_port
from vllm_kvpool.protocol import MAX_PULL_MS
from vllm_kvpool.types import num_refs

MakeHost = Callable[..., Host]
COUNT = 1_500
SLOT_BYTES = 64 << 10
ON_THE_WAY_BYTES = 50 << 20
"""Of four connections: what ZeroMQ was given, and what the kernel's and the proxy's buffers hold."""


def test_a_cancelled_pull_stops_the_sender(make_host: MakeHost) -> None:
    port = free_port()
    with FaultProxy(port) as proxy:
        a = make_host("--advertise", f"tcp://127.0.0.1:{proxy.port}", port=port, size="128MiB")
        b = make_host(size="128MiB")
        keys = keys_of("chain", COUNT)
        store(a.client, keys)
        wait_listed(a, keys)
        proxy.stall_after = 2 << 20
        pull_id = b.start_pull(keys, within_ms=MAX_PULL_MS)
        until(lambda: proxy.passed > 2 << 20, "the middle of the pull")
        b.client.cancel_pull(pull_id)
        until(lambda: a.counter("reads_cancelled") > 0, "the end of the reads")
        proxy.stall_after = None
        until(lambda: a.leases == 0, "the leases to go")
        until(lambda: is_quiet(proxy), "the last bytes")
        assert proxy.passed < ON_THE_WAY_BYTES < COUNT * SLOT_BYTES
        assert a.counter("sent_bytes") < ON_THE_WAY_BYTES
        until(lambda: b.counter("writing") == 0, "the slots to be free")
        assert b.counter("pull_cancelled") == 0, "nobody was there to be answered"
        # Not all at once, if the stall lasted: what a link that slow brings in time is asked for.
        until(lambda: b.pull(keys, within_ms=MAX_PULL_MS).blocks == COUNT, "all blocks")
        check_bytes(b.client, keys, b.client.match_prefix(keys))
        assert num_refs(b.client.match_prefix(keys)) == COUNT


def is_quiet(proxy: FaultProxy) -> bool:
    before = proxy.passed
    time.sleep(0.5)
    return proxy.passed - before < 10_000  # heartbeats go on
