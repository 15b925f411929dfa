"""Connections to the replicas, kept open between requests."""

from __future__ import annotations

import asyncio
from collections import deque
from urllib.parse import urlsplit

from vllm_kvpool.router.unchunking import UnchunkingConnection
from vllm_kvpool.router.upstream import UpstreamConnection, UpstreamSilent

IDLE_S = 3.0
"""vLLM's own server (uvicorn) closes after five seconds. Sooner, and no request meets a closed one."""


class ConnectFailed(Exception):  # noqa: N818
    """No connection to the replica."""


class Connections:
    """State: a connection is idle in `_idle`, or `active` and with one request, or gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect_timeout_s: float) -> None:
        self._loop = loop
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[str, deque[tuple[UpstreamConnection, float]]] = {}
        self.active: set[UpstreamConnection] = set()

    def take(self, url: str) -> UpstreamConnection | None:
        """An idle one; of several the last used, so that the others can time out."""
        idle = self._idle.get(url)
        while idle:
            connection, since = idle.pop()
            if connection.reusable and self._loop.time() - since < IDLE_S:
                self.active.add(connection)
                return connection
            connection.close()
        return None

    async def open(self, url: str, *, unchunked: bool = False) -> UpstreamConnection:
        kind = UnchunkingConnection if unchunked else UpstreamConnection
        address = urlsplit(url)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: kind(self._loop), address.hostname or "", address.port or 80
                )
        except TimeoutError:
            text = f"no connection to {url} in {self._connect_timeout_s:g} s"
            raise ConnectFailed(text) from None
        except OSError as error:
            raise ConnectFailed(f"no connection to {url}: {error}") from None
        self.active.add(connection)
        return connection

    def give_back(self, url: str, connection: UpstreamConnection) -> None:
        """After an answer, whole or not."""
        self.active.discard(connection)
        if connection.reusable and type(connection) is UpstreamConnection:
            connection.rest()
            self._idle.setdefault(url, deque()).append((connection, self._loop.time()))
        else:
            connection.close()

    def check_time(self, now: float, silence_s: float) -> None:
        """Called now and then: ends what waits for a replica that is silent, and old idle ones."""
        for connection in list(self.active):
            if now - connection.quiet_since > silence_s and not connection.waits_for_client:
                connection.fail(UpstreamSilent(f"no byte of the answer for {silence_s:g} s"))
        for url, idle in list(self._idle.items()):
            while idle and now - idle[0][1] >= IDLE_S:
                idle.popleft()[0].close()
            if not idle:
                del self._idle[url]

    @property
    def idle(self) -> int:
        return sum(map(len, self._idle.values()))

    def close(self) -> None:
        for idle in self._idle.values():
            for connection, _ in idle:
                connection.close()
        self._idle.clear()
