"""Every message, spoken without our own code."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import Daemon, keys_of, prepare
from raw_client import CLIENT_ID, DIGEST, RawClient

from vllm_kvpool.client import PoolClient


def test_hello(daemon: Daemon, raw: RawClient) -> None:
    welcome = raw.hello()
    assert welcome == {
        "type": "welcome", "id": 1, "version": 1, "epoch": 1, "client": 0,
        "pool_id": daemon.stats()["pool"]["pool_id"],
    }  # fmt: skip


def test_store_touch_drop_clear(daemon: Daemon, raw: RawClient) -> None:
    raw.hello()
    prepared = raw.call(type="prepare_store", id=2, keys=keys_of("chain", 3), parent=b"", ttl_s=60)
    assert (prepared["type"], prepared["id"], len(prepared["refs"])) == ("prepared", 2, 24)
    completed = raw.call(
        type="complete_store", id=3, refs=prepared["refs"][:16], aborted=prepared["refs"][16:]
    )
    assert completed == {"type": "completed", "id": 3, "ready": 2}
    for verb in ("touch", "drop"):  # no reply: the next one is that of `stats`
        raw.send(type=verb, id=4, refs=prepared["refs"][8:16])
    counters = raw.call(type="stats", id=5)["counters"]
    assert (counters["ready"], counters["dropped"], counters["writing"]) == (1, 1, 0)
    assert raw.call(type="clear", id=6) == {"type": "cleared", "id": 6, "blocks": 1}


def test_clear_of_one_namespace(raw: RawClient) -> None:
    raw.hello()
    prepared = raw.call(type="prepare_store", id=2, keys=keys_of("chain", 3))
    raw.call(type="complete_store", id=3, refs=prepared["refs"])
    assert raw.call(type="clear", id=4, namespace=bytes(32))["code"] == "namespace"
    assert raw.call(type="clear", id=5, namespace=DIGEST)["blocks"] == 3


def test_stats(raw: RawClient) -> None:
    raw.hello()
    stats = raw.call(type="stats", id=9)
    assert stats["pool"]["name"] == "test"
    assert [n["digest"] for n in stats["namespaces"]] == [DIGEST.hex()]
    assert [c["client_id"] for c in stats["clients"]] == [CLIENT_ID]


def test_references_out_of_the_blue(daemon: Daemon, raw: RawClient) -> None:
    raw.hello()
    prepared = raw.call(type="prepare_store", id=2, keys=keys_of("chain", 3))
    raw.call(type="complete_store", id=3, refs=prepared["refs"])
    for i in range(50):
        refs = random.Random(i).randbytes(8 * 100) + b"\xff" * 8 + bytes(8)
        for verb in ("touch", "drop"):
            raw.send(type=verb, id=4, refs=refs)
        assert raw.call(type="complete_store", id=5, refs=refs, aborted=refs).get("ready", 0) == 0
        raw.hello(writing=refs)
    assert daemon.counter("ready") == 3


def test_what_another_client_stores_is_not_ours_to_complete(
    daemon: Daemon, raw: RawClient, client: PoolClient
) -> None:
    raw.hello()
    grant = prepare(client, keys_of("chain", 2))
    assert raw.call(type="complete_store", id=2, refs=grant.refs).get("ready", 0) == 0
    assert raw.call(type="complete_store", id=3, refs=b"", aborted=grant.refs)["ready"] == 0
    assert daemon.counter("writing") == 2


def test_unknown_fields_are_ignored(raw: RawClient) -> None:
    assert raw.hello(colour="blue")["type"] == "welcome"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": 2}, "version"),
        ({"version": 0}, "version"),
        ({"client_id": "me"}, "malformed"),
        ({"client_id": "../" + "0" * 29}, "malformed"),
        ({"client_id": "f" * 32}, "lock"),
        ({"namespace": None}, "malformed"),
        ({"namespace": {"digest": b"short", "slot_bytes": 1, "fields": {}}}, "malformed"),
        ({"namespace": {"digest": DIGEST, "slot_bytes": 1 << 30, "fields": {}}}, "namespace"),
        ({"namespace": {"digest": DIGEST, "slot_bytes": 1 << 40, "fields": {}}}, "malformed"),
        ({"pid": 0}, "malformed"),
        ({"pid": 1 << 40}, "malformed"),
        ({"writing": b"odd"}, "malformed"),
    ],
)
def test_refused_hello(raw: RawClient, changes: dict[str, Any], code: str) -> None:
    error = raw.hello(**changes)
    assert (error["type"], error["id"], error["code"]) == ("error", 1, code)
    assert error["message"]
    assert raw.hello()["type"] == "welcome"
