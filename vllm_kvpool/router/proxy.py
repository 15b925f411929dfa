"""The paths that the router answers itself; all others are a replica's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from vllm_kvpool.router.context import Context
from vllm_kvpool.router.downstream import ClientConnection
from vllm_kvpool.router.exchange import Exchange
from vllm_kvpool.router.request import Request
from vllm_kvpool.router.responses import TEXT
from vllm_kvpool.router.types import ReplicaState

METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Proxy:
    def __init__(self, context: Context, ask_metrics: Callable[[], Awaitable[str]]) -> None:
        """`ask_metrics`: the text of the whole router, all workers added up."""
        self._context = context
        self._ask_metrics = ask_metrics
        self._own = {
            b"/health": (b"GET", self._health),
            b"/ready": (b"GET", self._ready),
            b"/metrics": (b"GET", self._metrics),
            b"/route": (b"POST", self._route),
        }

    async def handle(self, request: Request, client: ClientConnection) -> None:
        own = self._own.get(request.path)
        if own is None:
            await self._relay(request, client)
            return
        method, answer = own
        if request.method not in {method, b"HEAD" if method == b"GET" else method}:
            allow = b"allow: %b\r\n" % method
            self._context.reject(client, 405, f"this is for {method.decode()}", allow)
            return
        await answer(request, client)

    async def _relay(self, request: Request, client: ClientConnection) -> None:
        try:
            await Exchange(self._context, request, client).run()
        except asyncio.CancelledError:
            self._context.metrics.count("disconnects_total")
            raise

    async def _health(self, request: Request, client: ClientConnection) -> None:
        """This process runs."""
        client.answer(200, b"ok\n", content_type=TEXT)

    async def _ready(self, request: Request, client: ClientConnection) -> None:
        """A replica takes requests."""
        if any(member.state is ReplicaState.ACCEPTING for member in self._context.fleet):
            client.answer(200, b"ready\n", content_type=TEXT)
        else:
            self._context.reject_for_now(client, "no replica takes requests now")

    async def _metrics(self, request: Request, client: ClientConnection) -> None:
        text = await self._ask_metrics()
        client.answer(200, text.encode(), content_type=METRICS_TYPE)

    async def _route(self, request: Request, client: ClientConnection) -> None:
        """The decision alone. Nothing is counted, and the policy is told nothing."""
        route, policy = self._context.route(request)
        if policy.needs_tokens:
            route = await self._context.with_tokens(request, route)
        decision = self._context.decide(route, policy)
        if decision is None:
            self._context.reject_for_now(client, "no replica takes requests now")
            return
        answer = {
            "replica": decision.replica.id,
            "url": decision.replica.url,
            "dp_rank": decision.replica.dp_rank,
            "reason": decision.reason,
            "predicted_hit_tokens": decision.hits.total,
            "predicted_stable_hit_tokens": decision.hits.stable,
            "prompt_tokens": route.prompt_tokens,
            "session_source": route.session_source,
            "fallbacks": [replica.id for replica in decision.fallbacks],
        }
        client.answer(200, msgspec.json.encode(answer))
