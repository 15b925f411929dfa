"""Engines that start before their pool does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import PATIENT_MS, Daemon, keys_of, namespace_of, store, until, wait_connected

from vllm_kvpool.client import PoolClient
from vllm_kvpool.config import pool_dir
from vllm_kvpool.types import SlotRefs, num_refs


@pytest.fixture
def early(shm_dir: Path) -> Iterator[PoolClient]:
    client = PoolClient(pool_dir("test", str(shm_dir)), namespace_of("a"), timeout_ms=PATIENT_MS)
    yield client
    client.close()


def test_everything_is_a_miss_and_nothing_raises(early: PoolClient) -> None:
    keys = keys_of("chain", 4)
    some_refs = SlotRefs(b"\1" * 16)
    for _ in range(3):
        assert early.poll() == []
        assert early.match_prefix(keys) == b""
        assert early.lease(some_refs) == b""
        assert early.prepare_store(keys) is None
        early.touch(some_refs)
        early.drop(some_refs)
        assert not early.complete_store(1)
    assert not early.connected
    assert early.view is None
    skipped = ("store_not_connected", "touch_not_sent", "drop_not_sent")
    assert [early.skipped[reason] for reason in skipped] == [3, 3, 3]


def test_connects_when_the_daemon_appears(
    early: PoolClient, make_daemon: Callable[..., Daemon]
) -> None:
    early.poll()
    make_daemon()
    wait_connected(early)
    store(early, keys_of("chain", 4))
    assert num_refs(early.match_prefix(keys_of("chain", 4))) == 4


def test_pool_file_without_a_daemon_is_not_read(
    shm_dir: Path, early: PoolClient, make_daemon: Callable[..., Daemon]
) -> None:
    """Nothing protects a reader that has no lease bitmap."""
    daemon = make_daemon()
    assert daemon.stop() == 0
    early.poll()
    assert early.view is not None
    assert early.match_prefix(keys_of("chain", 1)) == b""
    daemon.start()
    wait_connected(early)


def test_daemon_of_another_protocol_version_is_said_once(
    early: PoolClient,
    make_daemon: Callable[..., Daemon],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    daemon = make_daemon()
    monkeypatch.setattr("vllm_kvpool.client.PROTOCOL_VERSION", 7)
    monkeypatch.setattr("vllm_kvpool.client.REFUSED_RETRY_MS", 100)
    until(lambda: (early.poll(), daemon.counter("error_version") >= 3)[1])
    assert not early.connected
    assert early.prepare_store(keys_of("chain", 1)) is None
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert "speaks protocol 1, not 7" in warnings[0]
