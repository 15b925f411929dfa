"""Parts of the daemon's answers that no well-behaved client sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvpool._native import PoolOwner, PoolView
from vllm_kvpool.liveness import ClientLock
from vllm_kvpool.pool.files import PoolFolder, size_text
from vllm_kvpool.pool.mount import Mount
from vllm_kvpool.pool.namespaces import describe, fields_of, news
from vllm_kvpool.pool.prefault import Prefault
from vllm_kvpool.pool.service import PoolService
from vllm_kvpool.protocol import (
    MAX_DESCRIPTION_BYTES,
    CompleteStore,
    Error,
    Hello,
    Namespace,
    Prepared,
    PrepareStore,
    encode,
)


def test_description_is_cut_to_fit() -> None:
    fields = {"model": "m", "long": "x" * 10_000, "also long": "y" * 10_000}
    text = describe(fields)
    assert len(text) < MAX_DESCRIPTION_BYTES
    assert json.loads(text)["model"] == "m"
    assert set(json.loads(text)) == set(fields)


def test_description_without_hope() -> None:
    assert describe({str(i): "x" for i in range(10_000)}) == "{}"


def test_what_is_no_description_has_no_fields() -> None:
    assert fields_of("") == fields_of("[1]") == fields_of("cut {") == {}
    assert fields_of(describe({"model": "m"})) == {"model": "m"}


def test_news_of_a_namespace_name_what_differs() -> None:
    fields = {"model": "m", "dtype": "half"}
    near = {"digest": "aa" * 32, "description": describe(fields | {"dtype": "float"})}
    far = {"digest": "bb" * 32, "description": describe({"model": "n"})}
    assert news(bytes(32), describe(fields), []) == ""
    assert news(b"\xaa" * 32, near["description"], [near, far]) == ""
    text = news(bytes(32), describe(fields), [far, near])
    assert text.endswith("the closest of 2 in 'dtype'")
    assert "\n" not in news(bytes(32), describe(fields | {"a\nb": "1"}), [near])


def test_lock_file_that_the_daemon_may_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vllm_kvpool.pool.service.is_held", refuse)
    with PoolFolder("x", str(tmp_path)) as folder:
        owner = PoolOwner.create(str(folder.paths.pool), 16 << 20)
        service = PoolService(owner, folder, Prefault(owner, Mount.of(tmp_path)))
        space = Namespace(digest=bytes(32), slot_bytes=1 << 16, fields={})
        hello = Hello(id=1, version=1, now_ms=0, pid=1, client_id="0" * 32, namespace=space)
        reply = service.handle(b"connection", encode(hello))
        assert isinstance(reply, Error)
        assert reply.code == "lock"
        assert "--group-access" in reply.message


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1 << 10, 3 << 29, 64 << 30, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 GiB", "64.0 GiB", "5.0 TiB",
    ]  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[PoolService, PoolOwner]]:
    """A client has said hello over "connection"."""
    with PoolFolder("x", str(tmp_path)) as folder:
        owner = PoolOwner.create(str(folder.paths.pool), 16 << 20)
        owner.populate(0)
        service = PoolService(owner, folder, Prefault(owner, Mount.of(tmp_path)))
        lock = ClientLock(folder.paths.client_lock("0" * 32))
        assert lock.hold()
        space = Namespace(digest=bytes(32), slot_bytes=1 << 16, fields={})
        hello = Hello(id=1, version=1, now_ms=0, pid=1, client_id="0" * 32, namespace=space)
        service.handle(b"connection", encode(hello))
        yield service, owner
        owner.check_integrity()
        lock.close()


def test_grant_that_cannot_be_delivered_is_taken_back(
    served: tuple[PoolService, PoolOwner],
) -> None:
    """ZeroMQ says so when the client's connection is gone, or takes nothing any more."""
    service, owner = served
    reply = service.handle(b"connection", encode(PrepareStore(id=2, keys=bytes(32) + b"\1" * 32)))
    assert owner.stats()["writing"] == 2
    assert reply is not None
    service.undelivered(b"connection", reply)
    assert owner.stats()["writing"] == 0
    assert service.counters["replies_lost"] == 1


@pytest.mark.parametrize(("stored_ms", "expires_s"), [(10_000, 11), (10_001, 12), (10_999, 12)])
def test_blocks_live_for_their_whole_time(
    served: tuple[PoolService, PoolOwner],
    monkeypatch: pytest.MonkeyPatch,
    stored_ms: int,
    expires_s: int,
) -> None:
    """Pool time has whole seconds; a time of one of them is not over with the second that has begun."""
    service, owner = served
    monkeypatch.setattr("vllm_kvpool.pool.service.pool_time_ms", lambda: stored_ms)
    keys = bytes(32)
    prepared = service.handle(b"connection", encode(PrepareStore(id=2, keys=keys, ttl_s=1)))
    assert isinstance(prepared, Prepared)
    service.handle(b"connection", encode(CompleteStore(id=3, refs=prepared.refs)))
    view = PoolView.open(owner.path)
    assert view.match_prefix(keys, expires_s - 1) == prepared.refs
    assert view.match_prefix(keys, expires_s) == b""
