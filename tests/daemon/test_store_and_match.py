"""The two halves of a store, and what every client of the namespace sees of it."""

from __future__ import annotations

from collections.abc import Callable

from helpers import Daemon, check_bytes, keys_of, prepare, store, until, write_blocks

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import SlotRefs, num_refs, unpack_refs


def test_stored_block_is_found_by_another_client(make_client: Callable[..., PoolClient]) -> None:
    writer, reader = make_client(), make_client()
    keys = keys_of("chain", 8)
    store(writer, keys)
    refs = reader.match_prefix(keys)
    assert num_refs(refs) == 8
    assert reader.lease(refs) == refs
    check_bytes(reader, keys, refs)
    reader.release(refs)


def test_block_is_invisible_until_complete(client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    grant = prepare(client, keys)
    assert client.match_prefix(keys) == b""
    write_blocks(client, keys, grant.refs)
    assert client.complete_store(grant.request_id)
    until(lambda: num_refs(client.match_prefix(keys)) == 4)


def test_aborted_block_is_never_visible(daemon: Daemon, client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    grant = prepare(client, keys)
    client.complete_store(grant.request_id, aborted=SlotRefs(grant.refs[16:]))
    until(lambda: num_refs(client.match_prefix(keys)) == 2)
    assert daemon.counter("writing") == 0


def test_present_blocks_get_no_slot(client: PoolClient) -> None:
    store(client, keys_of("chain", 4))
    grant = prepare(client, keys_of("chain", 6))
    refs = unpack_refs(grant.refs)
    assert [ref == 0 for ref in refs] == [True] * 4 + [False] * 2
    client.complete_store(grant.request_id, aborted=SlotRefs(grant.refs[32:]))


def test_dropped_block_is_a_miss(client: PoolClient) -> None:
    keys = keys_of("chain", 4)
    refs = store(client, keys)
    client.drop(SlotRefs(refs[8:16]))
    until(lambda: num_refs(client.match_prefix(keys)) == 1)
