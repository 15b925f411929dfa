"""The whole way of KV events: a replica's cache is filled by somebody else, and the router knows."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import until
from router.conftest import CHAT, RouterUnderTest, chat_body

from benchmarks.processes import ChildProcess


def free_ports() -> int:
    """One that is free with its neighbour, and so are both a thousand further."""
    for port in range(20_000, 28_000, 7):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for other in (port, port + 1, port + 1_000, port + 1_001):
                stack.enter_context(socket.create_server(("127.0.0.1", other)))
            return port
    raise AssertionError("no port is free")


class MockEngine(ChildProcess):
    """Two data-parallel ranks."""

    def __init__(self, log: Path) -> None:
        self.events_port = free_ports()
        options = ["--speed", "0", "--dp-ranks", "2", "--events-port", str(self.events_port)]
        super().__init__([sys.executable, "-m", "benchmarks.mock_replica", *options], log)
        self.url = ""

    def wait_ready(self) -> None:
        until(lambda: b"ready http" in self.log.read_bytes(), "the mock replica")
        self.url = self.log.read_text().split("ready ")[1].split()[0]

    def post(self, path: str, body: object, **headers: str) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode())
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[MockEngine]:
    with MockEngine(tmp_path / "mock.log") as running:
        running.wait_ready()
        yield running


def hits(router: RouterUnderTest, text: str) -> tuple[str, int, int]:
    """Who took it, and what of it was predicted and reported."""
    answer = router.ask(CHAT, chat_body(text))
    cached = answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer.replica, int(answer.headers["x-kvpool-predicted-hit-tokens"]), cached


def predicted_hit_tokens(router: RouterUnderTest, text: str) -> int:
    time.sleep(0.02)
    return int(router.ask("/route", chat_body(text)).json["predicted_hit_tokens"])


def test_the_router_knows_what_others_put_into_a_cache(
    engine: MockEngine, make_router: Callable[..., RouterUnderTest]
) -> None:
    texts = [f"{number} ".ljust(4_000, "x") for number in range(8)]
    for text in texts:
        engine.post(CHAT, chat_body(text), X_data_parallel_rank="1")
    ports = f"{engine.events_port},{engine.events_port + 1_000}"
    ranks = [f"r{rank}={engine.url}@{rank}" for rank in range(2)]
    router = make_router(*ranks, options=("--policy", "kv_events", "--kv-events", ports))
    until(lambda: predicted_hit_tokens(router, texts[-1]) > 900, "the events to be heard")
    reasons = {router.ask("/route", chat_body(text)).json["reason"] for text in texts}
    assert "events" in reasons
    for text in texts:
        replica, predicted, cached = hits(router, text)
        assert replica == "r1"
        assert predicted == cached > 900
    assert hits(router, "y" * 4_000)[1:] == (0, 0)
    engine.post("/mock/restart", {})
    until(lambda: predicted_hit_tokens(router, texts[0]) == 0, "the cleared cache to be known")


def test_without_events_the_tree_decides(
    engine: MockEngine, make_router: Callable[..., RouterUnderTest]
) -> None:
    """Nothing listens at these ports, and no request waits for it."""
    router = make_router(
        f"r0={engine.url}@0", options=("--policy", "kv_events", "--kv-events", "9,9")
    )
    text = "z" * 4_000
    assert hits(router, text)[1:] == (0, 0)
    _, predicted, cached = hits(router, text)
    assert predicted > 800
    assert cached > 900
