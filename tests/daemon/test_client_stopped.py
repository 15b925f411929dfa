"""A stopped engine (SIGSTOP) is not dead: a late write of its must never land in a slot of somebody
else."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable

from helpers import LONGER_THAN_THE_GRACE_S, Daemon, EngineProcess, keys_of, prepare, store, until

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import num_refs, unpack_refs


def test_stores_in_flight_are_kept(
    daemon: Daemon, client: PoolClient, make_engine: Callable[..., EngineProcess]
) -> None:
    engine = make_engine()
    assert engine.do("prepare", "chain", 20) == 20
    engine.send_signal(signal.SIGSTOP)
    # Somebody else wants all the room there is, again and again.
    until_s = time.monotonic() + LONGER_THAN_THE_GRACE_S
    for i in itertools.count():
        store(client, keys_of(f"other {i}", 60))
        if time.monotonic() > until_s and daemon.counter("evicted") > 0:
            break
    assert daemon.counter("writing") == 20
    engine.send_signal(signal.SIGCONT)
    assert engine.do("complete") == 20
    until(lambda: num_refs(client.match_prefix(keys_of("chain", 20))) == 20)


def test_leases_are_kept(
    daemon: Daemon, client: PoolClient, make_engine: Callable[..., EngineProcess]
) -> None:
    engine = make_engine()
    engine.do("store", "chain", 20)
    assert engine.do("lease", "chain", 20) == 20
    engine.send_signal(signal.SIGSTOP)
    time.sleep(LONGER_THAN_THE_GRACE_S)
    for i in range(20):
        store(client, keys_of(f"other {i}", 60))
    refs = client.match_prefix(keys_of("chain", 20))
    assert num_refs(refs) == 20
    engine.send_signal(signal.SIGCONT)
    engine.do("release")


def test_stopped_then_killed(
    daemon: Daemon, client: PoolClient, make_engine: Callable[..., EngineProcess]
) -> None:
    engine = make_engine()
    assert engine.do("prepare", "chain", 20) == 20
    engine.send_signal(signal.SIGSTOP)
    engine.end()
    until(lambda: daemon.counter("writing") == 0, "the slots")
    refs = prepare(client, keys_of("chain", 20)).refs
    assert 0 not in unpack_refs(refs)
