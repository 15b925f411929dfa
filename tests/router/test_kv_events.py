"""The whole way of KV events: a replica's cache is filled by somebody else, and the router knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import until
from router.conftest import CHAT, RouterUnderTest, chat_body

from benchmarks.processes import MockEngine, free_port

EVENTS = ("--speed", "0", "--dp-ranks", "2", "--events-port")
TOKENS_IN_TIME = ("--connect-timeout-s", "40")
"""An engine has a quarter of it to tell them."""


@pytest.fixture
def events_port() -> int:
    return free_port(1, 1_000, 1_001)


@pytest.fixture
def engine(tmp_path: Path, events_port: int) -> Iterator[MockEngine]:
    """Two data-parallel ranks."""
    with MockEngine(tmp_path / "mock.log", *EVENTS, str(events_port)) as running:
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
    engine: MockEngine, events_port: int, make_router: Callable[..., RouterUnderTest]
) -> None:
    texts = [f"{number} ".ljust(4_000, "x") for number in range(8)]
    for text in texts:
        engine.ask(CHAT, chat_body(text), X_data_parallel_rank="1")
    ports = f"{events_port},{events_port + 1_000}"
    ranks = [f"r{rank}={engine.url}@{rank}" for rank in range(2)]
    options = ("--policy", "kv_events", "--kv-events", ports, *TOKENS_IN_TIME)
    router = make_router(*ranks, options=options)
    until(lambda: predicted_hit_tokens(router, texts[-1]) > 900, "the events to be heard")
    reasons = {router.ask("/route", chat_body(text)).json["reason"] for text in texts}
    assert "events" in reasons
    for text in texts:
        replica, predicted, cached = hits(router, text)
        assert replica == "r1"
        assert predicted == cached > 900
    assert hits(router, "y" * 4_000)[1:] == (0, 0)
    engine.ask("/mock/restart", {})
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
