"""Looks at the replicas: /health says whether they are well, /metrics how busy they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from vllm_kvpool.router.roster import Entry, Gauges, Roster
from vllm_kvpool.router.scrape import parse_gauges

MAX_METRICS_BYTES = 8 << 20


class Probes:
    def __init__(
        self,
        roster: Roster,
        timeout_s: float,
        clock: Callable[[], float],
        session: aiohttp.ClientSession,
    ) -> None:
        self._roster = roster
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._clock = clock
        self._session = session

    async def look(self) -> None:
        """Once at each replica whose turn it is; no longer than the timeout twice."""
        now = self._clock()
        due = [entry for entry in self._roster if entry.health.probe_due(now)]
        async with asyncio.TaskGroup() as group:
            for entry in due:
                group.create_task(self._look_at(entry))

    async def _look_at(self, entry: Entry) -> None:
        name, url = entry.replica.id, entry.replica.url
        try:
            async with self._session.get(f"{url}/health", timeout=self._timeout) as response:
                if response.status >= 400:
                    raise aiohttp.ClientPayloadError(f"/health answers {response.status}")
        except aiohttp.ClientConnectorError as error:
            self._roster.failed(name, str(error), self._clock(), refused=True)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            text = str(error) or "no answer to /health in time"
            self._roster.failed(name, text, self._clock(), refused=False)
        else:
            gauges = await self._gauges(entry)
            self._roster.ok(name, gauges, self._clock())

    async def _gauges(self, entry: Entry) -> Gauges:
        """Nothing is known of an engine without metrics, and that is fine. Of one that is too busy to
        tell them, what it told last."""
        url = f"{entry.replica.url}/metrics"
        try:
            async with self._session.get(url, timeout=self._timeout) as response:
                if response.status != 200:
                    return Gauges()
                text = await response.content.read(MAX_METRICS_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return entry.gauges
        return parse_gauges(text.decode("utf-8", "replace"), entry.replica.dp_rank)
