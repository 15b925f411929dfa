"""Clients of a router as an hour has them: most ask and wait, some leave, stall or talk nonsense. For `chaos`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter

CHAT = "/v1/chat/completions"
TASKS, SESSIONS, TURNS = 8, 1_000, 3
PARTS = 4
"""Events of a stream that is read to its end."""
LONG = 2_000
"""Tokens of an answer that nobody waits for."""
PATIENCE_S = 30.0
"""Nothing may take so long, whatever happens."""
SHORT_S = 0.01
"""For a request to get to its replica before its client leaves."""

REFUSED_S = 0.3
"""Before the next request of a client that was told that nobody takes it: who asks again at once is told so a thousand
times in one outage of fast time."""


class Clients:
    """What all of them share: the router's port, and what became of their requests."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.seed = seed
        self.done: Counter[str] = Counter()
        """Visits by kind."""
        self.outcomes: Counter[str] = Counter()
        """Of requests that were waited for: status, `cut` (the answer broke off) or `lost` (no answer at all)."""


class Client:
    """One after the other, on one connection as long as it lasts."""

    def __init__(self, shared: Clients, number: int) -> None:
        self._shared = shared
        self._draw = random.Random(f"{shared.seed} {number}")
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def visit(self, kind: str) -> None:
        """One of `VISITS`."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                await VISITS[kind](self)
            except OSError:  # the worker at its other end was killed
                self._shared.outcomes["lost"] += 1
                await self.close()
        self._shared.done[kind] += 1

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._reader = self._writer = None

    # kinds of visits --------------------------------------------------------------------------------

    async def ask(self) -> None:
        await self._send(self._request(max_tokens=4))
        await self._receive()

    async def stream(self) -> None:
        await self._send(self._request(max_tokens=PARTS, stream=True))
        await self._receive()

    async def leave_before_the_answer(self) -> None:
        await self._send(self._request(max_tokens=LONG))
        await asyncio.sleep(SHORT_S)
        await self.close()

    async def leave_in_a_stream(self) -> None:
        await self._send(self._request(max_tokens=LONG, stream=True))
        await self._first_part()
        await self.close()

    async def reset_in_a_stream(self) -> None:
        await self._send(self._request(max_tokens=LONG, stream=True))
        await self._first_part()
        assert self._writer is not None
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.close()

    async def half_a_request(self) -> None:
        whole = self._request()
        await self._send(whole[: self._draw.randrange(1, len(whole))])
        await self.close()

    async def too_slow(self) -> None:
        """Waits to be thrown out."""
        await self.close()
        await self._send(self._request()[:100])
        await self._receive()
        await self.close()

    async def nonsense(self) -> None:
        await self.close()
        await self._send(b"HELO router\r\n\r\n")
        await self._receive()
        await self.close()

    # a request and its answer -----------------------------------------------------------------------

    def _request(self, **more: object) -> bytes:
        session, turn = self._draw.randrange(SESSIONS), self._draw.randrange(TURNS)
        system = f"You are assistant {session % TASKS}. " * 40
        turns = [{"role": "user", "content": f"{session} {n} " * 60} for n in range(turn + 1)]
        messages = [{"role": "system", "content": system}, *turns]
        body = json.dumps({"model": "m", "messages": messages, **more}).encode()
        lines = (
            f"POST {CHAT} HTTP/1.1", "host: x", f"x-session-id: {session}",
            f"content-length: {len(body)}", "", "",
        )  # fmt: skip
        return "\r\n".join(lines).encode() + body

    async def _send(self, data: bytes) -> None:
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(
                "127.0.0.1", self._shared.port
            )
        self._writer.write(data)

    async def _receive(self) -> None:
        try:
            outcome = await self._status_and_body()
        except asyncio.IncompleteReadError as error:
            outcome = "cut" if error.partial or self._begun else "lost"
            await self.close()
        self._shared.outcomes[outcome] += 1
        if outcome == "503":
            await asyncio.sleep(REFUSED_S)

    async def _status_and_body(self) -> str:
        assert self._reader is not None
        self._begun = False
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        self._begun = True
        if b"\r\ntransfer-encoding: chunked\r\n" in head:
            while (await self._reader.readuntil(b"\r\n")) != b"0\r\n":
                pass
            await self._reader.readuntil(b"\r\n")
        else:
            length = head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
            await self._reader.readexactly(int(length))
        if b"\r\nconnection: close\r\n" in head:
            await self.close()
        return head[9:12].decode()

    async def _first_part(self) -> None:
        """Of an answer that is going to be left; the fault of another may have come before."""
        assert self._reader is not None
        with contextlib.suppress(asyncio.IncompleteReadError):
            await self._reader.readuntil(b"data: ")


VISITS = {
    "ask": Client.ask,
    "stream": Client.stream,
    "leave before the answer": Client.leave_before_the_answer,
    "leave in a stream": Client.leave_in_a_stream,
    "reset in a stream": Client.reset_in_a_stream,
    "half a request": Client.half_a_request,
    "too slow": Client.too_slow,
    "nonsense": Client.nonsense,
}
