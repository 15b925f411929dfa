"""The parent's own endpoint, for operators: the fleet, and the metrics of all workers.

GET    /admin/replicas                who there is, and how each is
POST   /admin/replicas                {"address": "http://host:port"}: add, or take a drain back
POST   /admin/replicas/{id}/drain     no new sessions
DELETE /admin/replicas/{id}           gone at once; requests that it has go on
GET    /admin/workers                 the gauges of each worker
GET    /metrics
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router.address import DnsName, parse_address
from vllm_kvpool.router.roster import Roster


class Admin:
    def __init__(
        self,
        roster: Roster,
        drain_s: float,
        clock: Callable[[], float],
        changed: Callable[[], Awaitable[None]],
        workers: Callable[[], Awaitable[list[dict[str, Any]]]],
        metrics: Callable[[], Awaitable[str]],
    ) -> None:
        """`changed` returns when the workers have been told."""
        self._roster = roster
        self._drain_s = drain_s
        self._clock = clock
        self._changed = changed
        self._workers = workers
        self._metrics = metrics

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 10)
        app.add_routes(
            [
                web.get("/admin/replicas", self._list),
                web.post("/admin/replicas", self._add),
                web.post("/admin/replicas/{id}/drain", self._drain),
                web.delete("/admin/replicas/{id}", self._remove),
                web.get("/admin/workers", self._list_workers),
                web.get("/metrics", self._metrics_text),
            ]
        )
        return app

    async def _list(self, request: web.Request) -> web.Response:
        """As every worker knows it by now."""
        now = self._clock()
        listed = [self._described(entry, now) for entry in self._roster]
        await self._changed()
        return web.json_response(listed)

    def _described(self, entry: Any, now: float) -> dict[str, Any]:
        return {
            "id": entry.replica.id,
            "url": entry.replica.url,
            "dp_rank": entry.replica.dp_rank,
            "state": entry.state(now, self._drain_s).value,
            "condition": entry.health.condition.value,
            "share": round(entry.health.share(now), 2),
            "draining_s": None if entry.draining_since is None else now - entry.draining_since,
            "ejections": entry.health.ejections,
            "error": "" if entry.health.usable else entry.health.error,
            "sources": sorted(entry.sources),
            "waiting": entry.gauges.waiting,
            "cache_usage": entry.gauges.cache_usage,
        }

    async def _list_workers(self, request: web.Request) -> web.Response:
        return web.json_response(await self._workers())

    async def _add(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            address = parse_address("address", str(body["address"]))
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            text = (
                str(error) if isinstance(error, ConfigError) else 'send {"address": "http://..."}'
            )
            return web.json_response({"error": text}, status=400)
        if isinstance(address, DnsName):
            text = "a DNS name goes into the configuration or the fleet file"
            return web.json_response({"error": text}, status=400)
        self._roster.add(address)
        await self._changed()
        return web.json_response({"id": address.id})

    async def _drain(self, request: web.Request) -> web.Response:
        return await self._change(request, lambda name: self._roster.drain(name, self._clock()))

    async def _remove(self, request: web.Request) -> web.Response:
        return await self._change(request, self._roster.remove)

    async def _change(self, request: web.Request, change: Callable[[str], bool]) -> web.Response:
        name = request.match_info["id"]
        if not change(name):
            return web.json_response({"error": f"there is no replica {name!r}"}, status=404)
        await self._changed()
        return web.json_response({"id": name})

    async def _metrics_text(self, request: web.Request) -> web.Response:
        return web.Response(text=await self._metrics(), content_type="text/plain")
