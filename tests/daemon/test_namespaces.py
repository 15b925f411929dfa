"""Engines that differ share a pool and no block."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from helpers import PATIENT_MS, SLOT_BYTES, Daemon, keys_of, namespace_of, store, until

from vllm_kvpool.client import PoolClient
from vllm_kvpool.keys import block_keys, key_mask
from vllm_kvpool.protocol import Namespace
from vllm_kvpool.types import KEY_BYTES, num_refs


def keys_in(namespace: Namespace, count: int):
    """The same tokens, so the same block hashes, in this namespace."""
    hashes = keys_of("the same tokens", count)
    split = [hashes[i : i + KEY_BYTES] for i in range(0, len(hashes), KEY_BYTES)]
    return block_keys(key_mask(namespace.digest, 0), split)


def test_no_hit_across(daemon: Daemon, make_client: Callable[..., PoolClient]) -> None:
    spaces = [namespace_of("a"), namespace_of("b", slot_bytes=SLOT_BYTES * 2)]
    one, other = (make_client(space) for space in spaces)
    store(one, keys_in(spaces[0], 5))
    assert num_refs(one.match_prefix(keys_in(spaces[0], 5))) == 5
    assert other.match_prefix(keys_in(spaces[1], 5)) == b""
    store(other, keys_in(spaces[1], 3))
    assert num_refs(other.match_prefix(keys_in(spaces[1], 5))) == 3
    ready = {entry["slot_bytes"]: entry["ready"] for entry in daemon.stats()["namespaces"]}
    assert ready == {SLOT_BYTES: 5, SLOT_BYTES * 2: 3}


def test_one_namespace_cannot_have_two_slot_sizes(
    daemon: Daemon,
    client: PoolClient,
    make_client: Callable[..., PoolClient],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal digests with unequal sizes are a bug of an engine: refused, said once, no crash."""
    # However slow the machine is: a hello whose answer is still to come is not said again.
    monkeypatch.setattr("vllm_kvpool.client.RETRY_MS", PATIENT_MS)
    changed = msgspec.structs.replace(namespace_of("a"), slot_bytes=SLOT_BYTES * 2)
    wrong = PoolClient(daemon.paths.folder, changed)
    until(lambda: (wrong.poll(), "namespace" in caplog.text)[1])
    assert not wrong.connected
    assert daemon.counter("error_namespace") == 1
    wrong.close()
    store(client, keys_of("chain", 2))


def test_a_busy_namespace_takes_room_from_an_idle_one(
    daemon: Daemon, make_client: Callable[..., PoolClient]
) -> None:
    idle, busy = make_client("idle"), make_client("busy")
    full = num_refs(store(idle, keys_of("idle", 400)))
    assert num_refs(store(busy, keys_of("busy", 400))) > 0
    assert num_refs(idle.match_prefix(keys_of("idle", 400))) < full


def test_log_says_which_field_differed(
    daemon: Daemon, make_client: Callable[..., PoolClient]
) -> None:
    make_client("a")
    assert "new namespace" not in daemon.errors()
    make_client("b")
    make_client("b")
    until(lambda: "differs from the closest of 1 in 'model'" in daemon.errors())
    assert daemon.errors().count("new namespace") == 1
