"""The mock replica answers as an engine does, with its modelled cache; tests and benchmarks lean on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from benchmarks.mock_replica import MockConfig, MockReplica, serving
from benchmarks.modelled_engine import EngineModel

FAST = MockConfig(speed=0)
Body = Callable[[aiohttp.ClientSession, MockReplica], Awaitable[None]]


def run(body: Body, config: MockConfig = FAST) -> None:
    async def inner() -> None:
        async with serving(config) as (replica, url), aiohttp.ClientSession(url) as client:
            await body(client, replica)

    asyncio.run(asyncio.wait_for(inner(), 30))


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": "mock", "messages": messages, **more}


async def usage(client: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
    async with client.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
        return dict((await response.json())["usage"])


def cached(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_the_second_turn_hits_what_the_first_left() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        first = await usage(client, chat("x" * 4000, max_tokens=40))
        assert cached(first) == 0
        answer = "tok " * 40
        second = await usage(client, chat("x" * 4000, answer, "and?"))
        # prompt and answer were kept, all but the last token of the answer; in full blocks
        known = first["prompt_tokens"] + 39
        assert cached(second) == known // 16 * 16

    run(body)


def test_a_small_cache_forgets_the_oldest() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        for name in ("a", "b", "a", "c", "b"):
            last = await usage(client, chat(name * 4000, max_tokens=1))
        assert cached(last) == 13 * 16  # b's leaves went for c: 137 blocks less two prompts of 62
        assert cached(await usage(client, chat("b" * 4000, max_tokens=1))) > 900
        replica.ranks[0].engine.check_integrity()

    run(body, MockConfig(speed=0, engine=EngineModel(cache_tokens=2_200)))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_ends_with_usage_and_done(path: str) -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
        async with client.post(path, json={**chat("hi"), "prompt": "hi", **options}) as response:
            text = await response.text()
        events = text.strip().split("\n\n")
        assert len(events) == 5 + 2
        assert '"cached_tokens":0' in events[-2]
        assert events[-1] == "data: [DONE]"

    run(body)


def test_speed_scales_the_modelled_time() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        # 10,000 tokens at 1,000 a second, 20 times faster: half a second
        await usage(client, chat("x" * 40_000, max_tokens=1))
        assert loop.time() - start >= 0.5

    run(body, MockConfig(speed=20, engine=EngineModel(prefill_tokens_per_s=1_000)))


def test_ranks_have_caches_of_their_own() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        async def on(rank: str) -> tuple[int, int]:
            headers = {"X-data-parallel-rank": rank}
            async with client.post(
                "/v1/chat/completions", json=chat("x" * 4000), headers=headers
            ) as response:
                answer = await response.json() if response.status == 200 else None
                return response.status, cached(answer["usage"]) if answer else 0

        assert await on("0") == (200, 0)
        assert await on("1") == (200, 0)
        assert (await on("0"))[1] > 900
        assert (await on("2"))[0] == 400

    run(body, MockConfig(speed=0, dp_ranks=2))


def test_faults_come_as_often_as_asked() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        async def status() -> int:
            async with client.post("/v1/chat/completions", json=chat("hi")) as response:
                return response.status

        await client.post("/mock/faults", json={"kind": "status", "status": 429, "count": 2})
        assert [await status() for _ in range(3)] == [429, 429, 200]
        await client.post("/mock/faults", json={"kind": "close"})
        with pytest.raises(aiohttp.ClientError):
            await status()
        await client.post("/mock/faults", json={"kind": "close", "after_parts": 2})
        streamed = chat("hi", stream=True)
        async with client.post("/v1/chat/completions", json=streamed) as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        await client.post("/mock/faults", json={"kind": "unhealthy", "count": -1})
        for _ in range(2):
            assert (await client.get("/health")).status == 503
        await client.delete("/mock/faults")
        assert (await client.get("/health")).status == 200
        answer = await client.post("/mock/faults", json={"kind": "nonsense"})
        assert answer.status == 400

    run(body)


def test_faults_are_counted_and_those_of_streams_wait_for_one() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        await client.post("/mock/faults", json={"kind": "close", "after_parts": 1})
        await client.post("/mock/faults", json={"kind": "status", "status": 503})
        async with client.post("/v1/chat/completions", json=chat("hi")) as response:
            assert response.status == 503
        await usage(client, chat("hi"))
        told = await (await client.get("/mock/faults")).json()
        assert told["met"] == {"status 503": 1}
        assert [fault["kind"] for fault in told["waiting"]] == ["close"]
        async with client.post("/v1/chat/completions", json=chat("hi", stream=True)) as response:
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        told = await (await client.get("/mock/faults")).json()
        assert told == {"met": {"status 503": 1, "close in a stream": 1}, "waiting": []}

    run(body)


def test_a_client_that_leaves_ends_its_generation() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.post("/v1/chat/completions", json=chat("hi", max_tokens=100_000))
        while replica.ranks[0].running or replica.ranks[0].waiting:
            await asyncio.sleep(0.01)

    run(body, MockConfig(speed=1))


def test_metrics_carry_the_names_of_vllm() -> None:
    async def body(client: aiohttp.ClientSession, replica: MockReplica) -> None:
        await usage(client, chat("x" * 4000))
        await usage(client, chat("x" * 4000))
        text = await (await client.get("/metrics")).text()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines())
        labels = '{engine="0",model_name="mock"}'
        assert float(values[f"vllm:num_requests_waiting{labels}"]) == 0
        assert 0 < float(values[f"vllm:kv_cache_usage_perc{labels}"]) < 1
        assert float(values[f"vllm:prefix_cache_hits_total{labels}"]) > 900

    run(body)
