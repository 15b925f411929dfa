"""An OpenAI-compatible server without a model: what a router sees of an engine, with a modelled cache and speed.

    python -m benchmarks.mock_replica --port 8001 [--speed 10] [--dp-ranks 2] [--events-port 5557]

It answers /v1/chat/completions, /v1/completions (both also streamed), /v1/responses, /v1/embeddings, /v1/models,
/tokenize, /health and /metrics (vLLM's names). The "tokens" are four bytes of text each; the answer is a fixed text of
`max_tokens` tokens (default 16). The prefix cache, prefill and decode are `modelled_engine.py`: `--speed 10` makes all
of its durations ten times shorter, and `--speed 0` leaves them out. What the model's cache held is reported as
`usage.prompt_tokens_details.cached_tokens`. With `--events-port P`, rank r publishes KV events at port P + r and
replays them at P + 1000 + r (`mock_events.py`). `X-data-parallel-rank` chooses the rank, else ranks take turns.

Beyond what an engine has:
    POST /mock/faults    one `Fault` as JSON, e.g. {"kind": "status", "status": 503, "count": 2}; DELETE ends all;
                         GET: {"met": {"status 503": 2}, "waiting": [the faults that nobody has met yet]}
    POST /mock/restart   forget the cache, as a restart does
    GET  /mock/requests  the last requests: path, rank, session header, prompt and cached tokens
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal

import msgspec
from aiohttp import web

from benchmarks.mock_answers import (
    Reply,
    chain_of,
    output_tokens_of,
    prompt_of,
    runs,
    tokens_of,
    usage_of,
    with_answer,
)
from benchmarks.mock_events import MockEvents
from benchmarks.modelled_engine import Admission, EngineModel, ModelledEngine


@dataclass(frozen=True)
class MockConfig:
    port: int = 0
    """0: one that is free."""
    model: str = "mock"
    speed: float = 1.0
    dp_ranks: int = 1
    events_port: int = 0
    """0: no KV events."""
    events_kept: int = 10_000
    events_as_arrays: bool = False
    engine: EngineModel = field(default_factory=EngineModel)


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """What goes wrong with the next `count` requests (-1: with all)."""

    kind: Literal["status", "close", "stall", "unhealthy", "lose_events", "exit"]
    """`status`: answered with it. `close`: the connection is cut. `stall`: nothing for `seconds`.
    `unhealthy`: /health answers 503. `lose_events`: `count` event batches are not sent. `exit`: the
    process ends at once."""
    count: int = 1
    status: int = 503
    after_parts: int = 0
    """`close` and `stall`: of the next streams only, after so many parts; 0: before the first byte."""
    seconds: float = 1.0

    @property
    def name(self) -> str:
        """For counting."""
        if self.kind == "status":
            return f"status {self.status}"
        return f"{self.kind} in a stream" if self.after_parts else self.kind


class Rank:
    """One data-parallel rank: its own cache, queue and events."""

    def __init__(self, number: int, config: MockConfig) -> None:
        self.engine = ModelledEngine(config.engine)
        self.running = 0
        self.waiting = 0
        self.queries = 0
        self.hits = 0
        self.events: MockEvents | None = None
        if config.events_port:
            endpoint = f"tcp://127.0.0.1:{config.events_port + number}"
            replay = f"tcp://127.0.0.1:{config.events_port + 1000 + number}"
            kept, arrays = config.events_kept, config.events_as_arrays
            self.events = MockEvents(endpoint, replay, number, kept, arrays)


class MockReplica:
    """Call inside a running event loop."""

    def __init__(self, config: MockConfig) -> None:
        self.config = config
        self.ranks = [Rank(number, config) for number in range(config.dp_ranks)]
        self.faults: list[Fault] = []
        self.met: Counter[str] = Counter()
        """Faults that requests met, by `Fault.name`."""
        self.requests: deque[dict[str, Any]] = deque(maxlen=1_000)
        self._turns = cycle(self.ranks)
        self._started = time.monotonic()
        self._started_at = time.time()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._generate),
                web.post("/v1/completions", self._generate),
                web.post("/v1/responses", self._generate),
                web.post("/v1/embeddings", self._embed),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.post("/mock/faults", self._add_fault),
                web.get("/mock/faults", self._list_faults),
                web.delete("/mock/faults", self._end_faults),
                web.post("/mock/restart", self._restart),
                web.get("/mock/requests", self._requests),
            ]
        )
        return app

    async def close(self) -> None:
        for rank in self.ranks:
            if rank.events:
                await rank.events.close()

    # generation -----------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await _parsed(request)
        fault = self._fault(("status", "close", "stall", "exit"), streamed=bool(body.get("stream")))
        if fault is not None and not fault.after_parts:
            await self._suffer(fault, request)
        rank = self._rank(request)
        output_tokens = output_tokens_of(body)
        prompt = prompt_of(body)
        tokens = tokens_of(prompt)
        admission = await self._admit(rank, tokens, with_answer(prompt, output_tokens))
        self._note(request, rank, len(tokens), admission.cached_tokens)
        usage = usage_of(len(tokens), output_tokens, admission.cached_tokens)
        reply = Reply(request.path, self.config.model, output_tokens, usage)
        rank.waiting += 1
        try:
            await self._until(admission.first_token_s)
        finally:
            rank.waiting -= 1
        rank.running += 1
        try:
            if not body.get("stream"):
                await self._until(admission.finished_s)
                return web.json_response(body=msgspec.json.encode(reply.whole()))
            pause = (admission.finished_s - admission.first_token_s) / max(1, output_tokens)
            parts = reply.parts(bool((body.get("stream_options") or {}).get("include_usage")))
            return await self._stream(request, parts, pause, fault)
        finally:
            rank.running -= 1

    async def _admit(self, rank: Rank, prompt: Sequence[int], whole: Sequence[int]) -> Admission:
        size = self.config.engine.block_tokens
        chain = chain_of(whole, size)
        in_prompt = chain[: len(prompt) // size]
        admission = rank.engine.admit(
            in_prompt, len(prompt), len(whole) - len(prompt) + 1, self._now()
        )
        stored, evicted = rank.engine.store(chain)
        rank.queries += len(prompt)
        rank.hits += admission.cached_tokens
        if rank.events:
            await self._publish(rank.events, chain, whole, [*admission.stored, *stored])
            gone = [
                block for block in [*admission.evicted, *evicted] if block not in rank.engine.blocks
            ]
            if gone:
                await rank.events.removed(gone)
        return admission

    async def _publish(
        self, events: MockEvents, chain: Sequence[int], tokens: Sequence[int], stored: Sequence[int]
    ) -> None:
        """One event for each run of neighbours, as an engine does."""
        size = self.config.engine.block_tokens
        for first, end in runs(stored):
            parent = chain[first - 1] if first else None
            await events.stored(chain[first:end], parent, tokens[first * size : end * size], size)

    async def _stream(
        self, request: web.Request, parts: Sequence[bytes], pause_s: float, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for number, part in enumerate(parts):
            if fault is not None and number == fault.after_parts:
                await self._suffer(fault, request)
            await response.write(part)
            if pause_s and self.config.speed:
                await asyncio.sleep(pause_s / self.config.speed)
        await response.write_eof()
        return response

    def _now(self) -> float:
        """In the model's seconds."""
        return (time.monotonic() - self._started) * (self.config.speed or 1.0)

    async def _until(self, model_time_s: float) -> None:
        if self.config.speed:
            await asyncio.sleep(max(0.0, model_time_s - self._now()) / self.config.speed)

    def _rank(self, request: web.Request) -> Rank:
        named = request.headers.get("X-data-parallel-rank")
        if named is None:
            return next(self._turns)
        if not named.isdigit() or int(named) >= len(self.ranks):
            raise web.HTTPBadRequest(text=f"X-data-parallel-rank {named!r} is out of range")
        return self.ranks[int(named)]

    def _note(self, request: web.Request, rank: Rank, prompt_tokens: int, cached: int) -> None:
        self.requests.append(
            {
                "path": request.path,
                "rank": self.ranks.index(rank),
                "session": request.headers.get("X-Session-ID", ""),
                "prompt_tokens": prompt_tokens,
                "cached_tokens": cached,
            }
        )

    # faults ---------------------------------------------------------------------------------------

    def _fault(self, kinds: Sequence[str], *, streamed: bool = False) -> Fault | None:
        """The first that is due, counted."""
        due = (f for f in self.faults if f.kind in kinds and (streamed or not f.after_parts))
        fault = next(due, None)
        if fault is None:
            return None
        self.met[fault.name] += 1
        if fault.count > 0:
            fault.count -= 1
            if not fault.count:
                self.faults.remove(fault)
        return fault

    async def _suffer(self, fault: Fault, request: web.Request) -> None:
        match fault.kind:
            case "exit":
                os._exit(1)
            case "close":
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError("cut on demand")
            case "stall":
                await asyncio.sleep(fault.seconds)
            case _:
                body = msgspec.json.encode(
                    {"error": {"message": "on demand", "code": fault.status}}
                )
                raise _error(fault.status, body)

    async def _add_fault(self, request: web.Request) -> web.Response:
        try:
            fault = msgspec.json.decode(await request.read(), type=Fault)
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        if fault.kind == "lose_events":
            for rank in self.ranks:
                if rank.events:
                    rank.events.lose(fault.count)
        else:
            self.faults.append(fault)
        return web.json_response({})

    async def _list_faults(self, request: web.Request) -> web.Response:
        answer = {"met": self.met, "waiting": self.faults}
        return web.json_response(body=msgspec.json.encode(answer))

    async def _end_faults(self, request: web.Request) -> web.Response:
        self.faults.clear()
        return web.json_response({})

    async def _restart(self, request: web.Request) -> web.Response:
        for rank in self.ranks:
            rank.engine.clear()
            if rank.events:
                await rank.events.cleared()
        return web.json_response({})

    # the rest -------------------------------------------------------------------------------------

    async def _embed(self, request: web.Request) -> web.Response:
        body = await _parsed(request)
        tokens = tokens_of(prompt_of(body))
        data = [{"object": "embedding", "index": 0, "embedding": [0.0] * 8}]
        usage = {"prompt_tokens": len(tokens), "total_tokens": len(tokens)}
        return web.json_response(
            {"object": "list", "data": data, "model": self.config.model, "usage": usage}
        )

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": self.config.model, "object": "model"}]}
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        tokens = tokens_of(prompt_of(await _parsed(request)))
        return web.json_response({"count": len(tokens), "max_model_len": 1 << 20, "tokens": tokens})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self._fault(("unhealthy",)) else 200)

    async def _requests(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.requests))

    async def _metrics(self, request: web.Request) -> web.Response:
        model = self.config.engine
        lines = []
        for number, rank in enumerate(self.ranks):
            labels = f'engine="{number}",model_name="{self.config.model}"'
            usage = len(rank.engine.blocks) / rank.engine.capacity
            blocks = f'block_size="{model.block_tokens}",num_gpu_blocks="{rank.engine.capacity}"'
            lines += [
                f"vllm:num_requests_running{{{labels}}} {rank.running}",
                f"vllm:num_requests_waiting{{{labels}}} {rank.waiting}",
                f"vllm:kv_cache_usage_perc{{{labels}}} {usage}",
                f"vllm:prefix_cache_queries_total{{{labels}}} {rank.queries}",
                f"vllm:prefix_cache_hits_total{{{labels}}} {rank.hits}",
                f'vllm:cache_config_info{{{blocks},engine="{number}"}} 1',
            ]
        lines.append(f"process_start_time_seconds {self._started_at}")
        return web.Response(text="\n".join([*lines, ""]))


async def _parsed(request: web.Request) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(await request.read())
    except msgspec.DecodeError as error:
        raise _error(400, msgspec.json.encode({"error": {"message": str(error)}})) from None
    if not isinstance(body, dict):
        raise _error(400, b'{"error": {"message": "not an object"}}')
    return body


def _error(status: int, body: bytes) -> web.HTTPException:
    error = web.HTTPInternalServerError(text=body.decode(), content_type="application/json")
    error.set_status(status)
    return error


# serving ------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(config: MockConfig) -> AsyncIterator[tuple[MockReplica, str]]:
    """The replica and its URL, in this event loop."""
    replica = MockReplica(config)
    # handler_cancellation: as an engine aborts the requests of clients that leave
    runner = web.AppRunner(
        replica.app(), access_log=None, shutdown_timeout=0.1, handler_cancellation=True
    )
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", config.port))
    await web.SockSite(runner, listener).start()
    try:
        yield replica, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await runner.cleanup()
        await replica.close()


async def _serve(config: MockConfig) -> None:
    async with serving(config) as (_, url):
        print(f"ready {url}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine = EngineModel()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="mock")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--dp-ranks", type=int, default=1)
    parser.add_argument("--events-port", type=int, default=0)
    parser.add_argument("--cache-tokens", type=int, default=engine.cache_tokens)
    parser.add_argument("--block-tokens", type=int, default=engine.block_tokens)
    parser.add_argument("--prefill-rate", type=float, default=engine.prefill_tokens_per_s)
    parser.add_argument("--decode-rate", type=float, default=engine.decode_tokens_per_s)
    args = parser.parse_args()
    model = EngineModel(args.cache_tokens, args.block_tokens, args.prefill_rate, args.decode_rate)
    config = MockConfig(
        args.port, args.model, args.speed, args.dp_ranks, args.events_port, engine=model
    )
    try:
        asyncio.run(_serve(config))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
