"""KV events over real sockets, from a mock replica: what the policy believes is what the cache holds."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import zmq
import zmq.asyncio
from helpers import WAIT_S

from benchmarks.mock_replica import MockConfig, MockReplica, serving
from benchmarks.modelled_engine import EngineModel
from benchmarks.processes import free_port
from vllm_kvpool.router import subscriber
from vllm_kvpool.router.event_index import Trust
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.keys import route_request
from vllm_kvpool.router.kv_events import KvEvents
from vllm_kvpool.router.subscriber import Subscriber, endpoint_of_rank
from vllm_kvpool.router.types import Replica, RouteRequest


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that stands still for seconds is not one that has no replay."""
    monkeypatch.setattr(subscriber, "REPLAY_TIMEOUT_S", WAIT_S)


@pytest.fixture
def quick_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber, "QUIET_MS", 50)


class Setting:
    """A mock replica, and a policy that follows it."""

    def __init__(
        self, config: MockConfig, client: aiohttp.ClientSession, mock: MockReplica
    ) -> None:
        self.config, self.client, self.mock = config, client, mock
        self.policy = KvEvents()
        self.subscriber = Subscriber(self.policy.events)

    def follow(self, replay: bool = True) -> None:
        endpoint = f"tcp://127.0.0.1:{self.config.events_port}"
        replay_endpoint = f"tcp://127.0.0.1:{self.config.events_port + 1000}" if replay else ""
        self.subscriber.follow("a", endpoint, replay_endpoint)

    async def ask(self, text: str) -> None:
        async with self.client.post("/v1/completions", json={"prompt": text}) as answer:
            assert answer.status == 200

    async def request(self, text: str) -> RouteRequest:
        async with self.client.post("/tokenize", json={"prompt": text}) as answer:
            tokens = (await answer.json())["tokens"]
        return self.policy.with_tokens(route_request({"prompt": text}, {}), tokens)

    async def hit_tokens(self, text: str) -> int:
        decision = self.policy.decide(
            await self.request(text), Fleet((Replica("a", "http://a"),)), 0.0
        )
        assert decision is not None
        return decision.hits.total

    async def until(self, what: Callable[[], Awaitable[Any]], value: Any) -> None:
        give_up = time.monotonic() + WAIT_S
        while (seen := await what()) != value:
            assert time.monotonic() < give_up, f"{seen!r}, not {value!r}"
            await asyncio.sleep(0.01)

    async def trust(self) -> Trust:
        return self.policy.events.trust("a")


def run(body: Callable[[Setting], Awaitable[None]], **config: Any) -> None:
    async def inner() -> None:
        settings = MockConfig(speed=0, events_port=free_port(1_000), **config)
        async with serving(settings) as (mock, url), aiohttp.ClientSession(url) as client:
            setting = Setting(settings, client, mock)
            try:
                await body(setting)
                setting.policy.check_integrity()
            finally:
                await setting.subscriber.close()

    asyncio.run(inner())


LONG = "x" * 4_000  # 1,000 tokens: 62 blocks, all of them full and 8 tokens over


@pytest.mark.parametrize("as_arrays", [False, True])
def test_what_is_stored_is_known(as_arrays: bool) -> None:
    async def body(setting: Setting) -> None:
        setting.follow()
        await setting.until(setting.trust, Trust.EXACT)
        await setting.ask(LONG)
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)
        assert await setting.hit_tokens(LONG[:2_000] + "y" * 2_000) == 31 * 16
        assert await setting.hit_tokens("y" * 4_000) == 0

    run(body, events_as_arrays=as_arrays)


def test_what_was_published_before_is_asked_for() -> None:
    async def body(setting: Setting) -> None:
        await setting.ask(LONG)
        setting.follow()
        await setting.until(setting.trust, Trust.EXACT)
        assert await setting.hit_tokens(LONG) == 62 * 16

    run(body)


def test_lost_batches_are_asked_for() -> None:
    async def body(setting: Setting) -> None:
        setting.follow()
        await setting.ask(LONG)
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)
        await setting.client.post("/mock/faults", json={"kind": "lose_events", "count": 1})
        await setting.ask("y" * 4_000)
        await setting.ask("z" * 4_000)  # its batch shows that one is missing
        await setting.until(lambda: setting.hit_tokens("y" * 4_000), 62 * 16)
        assert await setting.trust() is Trust.EXACT

    run(body)


def test_a_lost_batch_that_is_the_last_is_asked_for_when_it_is_quiet() -> None:
    """As one that was published while the subscription was on its way."""

    async def body(setting: Setting) -> None:
        setting.follow()
        await setting.until(setting.trust, Trust.EXACT)
        await setting.client.post("/mock/faults", json={"kind": "lose_events", "count": 1})
        await setting.ask(LONG)
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)
        assert await setting.trust() is Trust.EXACT

    run(body)


def test_a_batch_that_is_lost_after_a_long_silence_is_asked_for(quick_to_ask: None) -> None:
    async def body(setting: Setting) -> None:
        setting.follow()
        await setting.until(setting.trust, Trust.EXACT)
        await asyncio.sleep(0.5)  # asked a few times, for nothing
        await setting.client.post("/mock/faults", json={"kind": "lose_events", "count": 1})
        await setting.ask(LONG)
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)

    run(body)


def test_an_engine_that_was_forgotten_is_asked_from_its_start(quick_to_ask: None) -> None:
    async def body(setting: Setting) -> None:
        setting.follow()
        await setting.ask(LONG)
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)
        setting.policy.events.forget("a")
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)
        assert await setting.trust() is Trust.EXACT

    run(body)


def test_a_replay_that_has_forgotten_the_gap_leaves_partial_trust() -> None:
    async def body(setting: Setting) -> None:
        setting.follow()
        await setting.ask(LONG)
        await setting.until(lambda: setting.hit_tokens(LONG), 62 * 16)
        await setting.client.post("/mock/faults", json={"kind": "lose_events", "count": 3})
        for letter in "abcde":
            await setting.ask(letter * 4_000)
        await setting.until(setting.trust, Trust.PARTIAL)
        await setting.until(lambda: setting.hit_tokens("e" * 4_000), 62 * 16)

    run(body, events_kept=2)


def test_without_replays_the_tree_helps_out() -> None:
    async def body(setting: Setting) -> None:
        await setting.ask(LONG)
        setting.follow(replay=False)
        await setting.until(setting.trust, Trust.PARTIAL)
        numbers = itertools.count()

        async def heard() -> bool:
            """PUB sends nothing before it has heard of the subscription."""
            text = f"{next(numbers)} " + "y" * 4_000
            await setting.ask(text)
            await asyncio.sleep(0.02)
            return await setting.hit_tokens(text) > 0

        await setting.until(heard, True)
        assert await setting.hit_tokens(LONG) == 0
        setting.policy.dispatched(await setting.request(LONG), "a", 0.0)
        assert await setting.hit_tokens(LONG) > 800

    run(body)


def test_evicted_and_cleared_blocks_are_gone() -> None:
    async def body(setting: Setting) -> None:
        setting.follow()
        for letter in "abc":
            await setting.ask(letter * 4_000)
        held = setting.mock.ranks[0].engine
        # each prompt is 63 blocks with its answer: of the first, 130 - 2 x 63 are left
        await setting.until(lambda: setting.hit_tokens("a" * 4_000), 4 * 16)
        await setting.until(lambda: setting.hit_tokens("c" * 4_000), 62 * 16)

        async def known() -> int:
            return len(setting.policy.events._sources["a"].engine_to_own)

        await setting.until(known, len(held.blocks))
        await setting.client.post("/mock/restart")
        await setting.until(lambda: setting.hit_tokens("c" * 4_000), 0)

    run(body, engine=EngineModel(cache_tokens=130 * 16))


def test_garbage_is_believed_less_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def inner() -> None:
        port = free_port(1_000)
        context = zmq.asyncio.Context()
        policy = KvEvents()
        subscriber = Subscriber(policy.events)
        with context.socket(zmq.PUB) as pub:
            pub.bind(f"tcp://127.0.0.1:{port}")
            subscriber.follow("a", f"tcp://127.0.0.1:{port}")
            give_up = time.monotonic() + WAIT_S
            while (
                len(caplog.records) < 3
            ):  # PUB sends nothing before it has heard of the subscription
                assert time.monotonic() < give_up
                for frames in ([b"alone"], [b"", b"short", b""], [b"", bytes(8), b"no batch"]):
                    await pub.send_multipart(frames)
                await asyncio.sleep(0.02)
            assert policy.events.trust("a") is Trust.NONE
            assert not subscriber._tasks["a"].done()
        await subscriber.close()
        context.term()

    with caplog.at_level(logging.WARNING):
        asyncio.run(inner())
    assert "not understood" in caplog.text


def test_ranks_are_at_ports_of_their_own() -> None:
    assert endpoint_of_rank("tcp://host:5557", None) == "tcp://host:5557"
    assert endpoint_of_rank("tcp://host:5557", 0) == "tcp://host:5557"
    assert endpoint_of_rank("tcp://host:5557", 3) == "tcp://host:5560"
    with pytest.raises(ValueError, match="no port"):
        endpoint_of_rank("ipc:///tmp/x", 1)
