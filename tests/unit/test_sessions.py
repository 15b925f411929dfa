"""One live connection a client; the newest Hello wins."""

from __future__ import annotations

import random

import pytest

from vllm_kvpool.pool import sessions
from vllm_kvpool.pool.sessions import Session, Sessions
from vllm_kvpool.protocol import NO_CLIENT


def of(client_id: str, hello_ms: int = 0, offset_ms: int = 0) -> Session:
    return Session(NO_CLIENT if not client_id else 1, client_id, hello_ms, offset_ms)


def test_newer_connection_replaces_the_older() -> None:
    table = Sessions()
    table.add(b"one", of("a", 10))
    table.add(b"two", of("a", 20))
    assert table.get(b"one") is None
    assert table.get(b"two") == of("a", 20)
    assert table.is_stale("a", 19)
    assert not table.is_stale("a", 20)
    assert not table.is_stale("b", 0)


def test_smallest_clock_offset_is_kept() -> None:
    """A Hello that waited in a queue overstates it."""
    table = Sessions()
    table.add(b"one", of("a", 10, offset_ms=3))
    table.add(b"one", of("a", 20, offset_ms=5_000))
    session = table.get(b"one")
    assert session is not None
    assert session.offset_ms == 3


def test_admin_connections_do_not_disturb_each_other() -> None:
    table = Sessions()
    table.add(b"one", of(""))
    table.add(b"two", of(""))
    assert table.get(b"one") is not None
    assert table.get(b"two") is not None


def test_forgotten_client_has_to_say_hello_again() -> None:
    table = Sessions()
    table.add(b"one", of("a"))
    table.forget_client("a")
    table.forget_client("unknown")
    assert table.get(b"one") is None
    assert not table.is_stale("a", -1)


def test_the_idle_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    table = Sessions()
    table.add(b"one", of("a"))
    table.add(b"two", of("b"))
    table.get(b"one")
    table.add(b"three", of("c"))
    assert table.get(b"two") is None
    assert table.get(b"one") is not None


def test_any_order_keeps_the_two_maps_together() -> None:
    random.seed(7)
    table = Sessions()
    for step in range(2_000):
        connection = bytes([random.randrange(6)])
        client_id = random.choice(["", "a", "b", "c"])
        match random.randrange(3):
            case 0:
                table.add(connection, of(client_id, step))
            case 1:
                table.get(connection)
            case 2:
                table.forget_client(client_id)
        table.check_integrity()
