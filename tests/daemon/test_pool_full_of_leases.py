"""When every slot is leased or being written, a store gets no room: a normal answer, at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from helpers import PATIENT_MS, Daemon, keys_of, prepare, store

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import num_refs, unpack_refs

MORE_THAN_THE_POOL = 400


def test_no_room_then_room_again(daemon: Daemon, make_client: Callable[..., PoolClient]) -> None:
    reader, writer = make_client(), make_client()
    keys = keys_of("chain", MORE_THAN_THE_POOL)
    capacity = num_refs(store(reader, keys))
    assert 0 < capacity < MORE_THAN_THE_POOL
    refs = reader.match_prefix(keys)
    assert num_refs(refs) == capacity
    assert reader.lease(refs) == refs

    start = time.monotonic()
    grant = prepare(writer, keys_of("other", 10))
    assert time.monotonic() - start < PATIENT_MS / 2_000
    assert set(unpack_refs(grant.refs)) == {0}
    assert daemon.counter("no_room") > 0
    assert num_refs(reader.match_prefix(keys)) == capacity

    reader.release(refs)
    assert num_refs(store(writer, keys_of("other", 10))) == 10


def test_no_room_among_stores_in_flight(
    daemon: Daemon, make_client: Callable[..., PoolClient]
) -> None:
    one, other = make_client(), make_client()
    grant = prepare(one, keys_of("chain", MORE_THAN_THE_POOL))
    granted = [ref for ref in unpack_refs(grant.refs) if ref]
    assert set(unpack_refs(prepare(other, keys_of("other", 10)).refs)) == {0}
    assert daemon.counter("writing") == len(granted)
