"""A request that comes too late changes nothing, whatever the client's clock says."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from helpers import Daemon
from raw_client import RawClient


@pytest.mark.parametrize("clock_error_ms", [0, 10**9, -(10**5)])
def test_deadline_is_on_the_clients_clock(
    daemon: Daemon, raw: RawClient, clock_error_ms: int
) -> None:
    def client_ms() -> int:
        return time.monotonic_ns() // 1_000_000 + clock_error_ms

    raw.hello(now_ms=client_ms())
    late = raw.call(type="stats", id=2, deadline_ms=client_ms() - 60_000)
    in_time = raw.call(type="stats", id=3, deadline_ms=client_ms() + 60_000)
    without = raw.call(type="stats", id=4)
    assert (late["type"], late["code"], late["id"]) == ("error", "deadline", 2)
    assert in_time["type"] == without["type"] == "stats_reply"
    assert daemon.counter("error_deadline") == 1


def test_older_hello_that_arrives_later_is_refused(make_raw: Callable[[], RawClient]) -> None:
    """It sat in the queue of an earlier connection; its list of writing slots is out of date."""
    new, old = make_raw(), make_raw()
    now = time.monotonic_ns() // 1_000_000
    assert new.hello(now_ms=now)["type"] == "welcome"
    refs = new.call(type="prepare_store", id=2, keys=bytes(32))["refs"]
    assert old.hello(now_ms=now - 1)["code"] == "deadline"
    assert old.call(type="complete_store", id=3, refs=refs)["code"] == "hello"
    assert new.call(type="complete_store", id=4, refs=refs)["ready"] == 1


def test_newer_hello_takes_the_client_over(make_raw: Callable[[], RawClient]) -> None:
    old, new = make_raw(), make_raw()
    old.hello()
    time.sleep(0.002)
    assert new.hello()["client"] == 0
    assert old.call(type="prepare_store", id=2, keys=bytes(32))["code"] == "hello"
