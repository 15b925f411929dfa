"""A client's connection: requests come in, one at a time is answered.

    bytes -> parser -> Request -> handler (a task) -> write() ... -> next request

Requests that come before the answer to the one before (pipelining) wait in order, and no more than
`MAX_WAITING` are read. A client that goes away cancels its task, wherever that is. Whatever is wrong
with a request's bytes is answered (400, 408, 413, 431, 501), in turn, and closes the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol, cast

import httptools

from vllm_kvpool.router.request import Request
from vllm_kvpool.router.responses import error_body, respond

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""As much as most servers take for request line and headers."""
MAX_WAITING = 8
WRITE_BUFFER_BYTES = 256 << 10
"""Above it a replica's answer is no longer read, until the client has taken half of it."""
LINGER_S = 2.0
"""After a refusal the client's bytes are still read so long: a reset would lose the answer."""

Handler = Callable[[Request, "ClientConnection"], Awaitable[None]]


class Source(Protocol):
    """Who writes to a client's connection and can be asked to wait."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Refusal(NamedTuple):
    status: int
    message: str


class _RefusedError(Exception):
    """Ends the parser's run."""


class ClientConnection(asyncio.Protocol):
    def __init__(
        self,
        handler: Handler,
        connections: set[ClientConnection],
        max_body_bytes: int,
        loop: asyncio.AbstractEventLoop,
        refused: Callable[[int], None],
    ) -> None:
        """`refused`: told the status of each answer that no handler gave."""
        self._handler = handler
        self._connections = connections
        self._max_body_bytes = max_body_bytes
        self._loop = loop
        self._refused = refused
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._incoming: Request | None = None
        self._refusal: Refusal | None = None
        self._in_head = False
        self._head_since = 0.0
        self._head_bytes = 0
        """As the parser tells them, which it does of whole headers only."""
        self._head_read = 0
        """As they come in."""
        self._body_bytes = 0
        self._waiting: deque[Request | Refusal] = deque()
        self._task: asyncio.Task[None] | None = None
        self._deaf = False
        """Nothing that comes in counts any more."""
        self._last_request = False
        self._bodiless = False
        self._quiet_since = loop.time()
        self._stalled_since: float | None = None
        self.source: Source | None = None
        self.begun = False
        """Bytes of the answer to the current request were written."""

    # the transport --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        self._parser = None  # refers back to this object
        self._deaf = True
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._stalled_since = self._loop.time()
        if self.source is not None:
            self.source.pause_reading()

    def resume_writing(self) -> None:
        self._stalled_since = None
        if self.source is not None:
            self.source.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._deaf or self._parser is None:
            return
        self._quiet_since = self._loop.time()
        before = self._incoming
        try:
            self._parser.feed_data(data)
            if self._in_head and self._incoming is before:  # all of it is this head's
                self._head_read += len(data)
                self._limit_head(self._head_read)
        except _RefusedError:
            self._refuse()
        except httptools.HttpParserCallbackError:
            self._refuse()
        except httptools.HttpParserUpgrade:
            self._refusal = Refusal(501, "this router does not switch protocols")
            self._refuse()
        except httptools.HttpParserError as error:
            self._refusal = Refusal(400, f"this is not HTTP/1.1: {error}")
            self._refuse()

    # the parser -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._incoming = Request()
        self._in_head = True
        self._head_since = self._loop.time()
        self._head_bytes = self._head_read = self._body_bytes = 0

    def on_url(self, part: bytes) -> None:
        assert self._incoming is not None
        self._incoming.target += part
        self._count_head(len(part))

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._incoming is not None
        if not self._in_head:
            return  # a trailer
        self._incoming.headers.append((name, value))
        self._count_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        request, parser = self._incoming, self._parser
        assert request is not None
        assert parser is not None
        self._in_head = False
        if parser.should_upgrade():
            self._stop(501, "this router does not switch protocols")
        request.method = parser.get_method()
        request.http10 = parser.get_http_version() == "1.0"
        request.keep_alive = parser.should_keep_alive() and not request.http10
        for name, value in request.headers:
            length = len(name)
            if length == 14 and name.lower() == b"content-length":
                request.has_body = True
                self._count_body(int(value), announced=True)
            elif length == 17 and name.lower() == b"transfer-encoding":
                request.has_body = True
            elif length == 6 and name.lower() == b"expect":
                self._continue(value)

    def on_body(self, part: bytes) -> None:
        assert self._incoming is not None
        self._incoming.chunks.append(part)
        self._count_body(len(part))

    def on_message_complete(self) -> None:
        request = self._incoming
        assert request is not None
        self._incoming = None
        chunks = request.chunks
        request.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if not request.keep_alive:
            self._deaf = True
        self._waiting.append(request)
        if self._task is None:
            self._next()
        elif len(self._waiting) >= MAX_WAITING and self._transport is not None:
            self._transport.pause_reading()

    def _count_head(self, number: int) -> None:
        self._head_bytes += number
        self._limit_head(self._head_bytes)

    def _limit_head(self, number: int) -> None:
        if number > MAX_HEAD_BYTES:
            self._stop(431, f"request line and headers are limited to {MAX_HEAD_BYTES:,} bytes")

    def _count_body(self, number: int, *, announced: bool = False) -> None:
        self._body_bytes += 0 if announced else number
        if max(number, self._body_bytes) > self._max_body_bytes:
            limit = f"{self._max_body_bytes:,} bytes (max_body)"
            self._stop(413, f"request bodies are limited to {limit}")

    def _continue(self, expected: bytes) -> None:
        if expected.lower() != b"100-continue":
            self._stop(417, "only 100-continue can be expected")
        if self._task is None and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _stop(self, status: int, message: str) -> None:
        self._refusal = Refusal(status, message)
        raise _RefusedError

    def _refuse(self) -> None:
        """Answer what cannot be a request, after those that came before it."""
        self._deaf = True
        self._incoming = None
        self._waiting.append(self._refusal or Refusal(400, "this is not HTTP/1.1"))
        if self._task is None:
            self._next()

    # one request after the other ------------------------------------------------------------------

    def _next(self) -> None:
        waiting = self._waiting
        if not waiting:
            return
        first = waiting.popleft()
        self.begun = False
        if isinstance(first, Refusal):
            self._farewell(first)
            return
        self._last_request = not first.keep_alive
        self._bodiless = first.method == b"HEAD"
        self._task = self._loop.create_task(self._serve(first))

    async def _serve(self, request: Request) -> None:
        try:
            await self._handler(request, self)
        except Exception:
            logger.exception("%s failed", request.path.decode("latin-1"))
            if self.begun:
                self.abort()
            else:
                self._refused(500)
                self.answer(500, error_body(500, "the router failed; its log says why"))
        finally:
            self._task = None
            self.source = None
            self._quiet_since = self._loop.time()
        if self._transport is None:
            return
        if self._last_request:
            self._transport.close()
            return
        if len(self._waiting) == MAX_WAITING - 1:
            self._transport.resume_reading()
        self._next()

    def _farewell(self, refusal: Refusal) -> None:
        self._refused(refusal.status)
        body = error_body(refusal.status, refusal.message)
        self.write(respond(refusal.status, body, close=True))
        if self._transport is not None:
            self._transport.write_eof()
            self._loop.call_later(LINGER_S, self._close)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # for the handler ------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self.begun = True
        if self._transport is not None:
            self._transport.write(data)

    def answer(self, status: int, body: bytes, *, added: bytes = b"", **options: bytes) -> None:
        """A whole answer of the router's own."""
        whole = respond(status, body, added=added, close=self._last_request, **options)
        self.write(whole[: len(whole) - len(body)] if self._bodiless else whole)

    @property
    def closes(self) -> bool:
        """The answer has to say that the connection ends with it."""
        return self._last_request

    @property
    def stalled(self) -> bool:
        """It does not take what was written."""
        return self._stalled_since is not None

    def close_after(self) -> None:
        """The answer's end is the end of the connection."""
        self._last_request = self._deaf = True

    def abort(self) -> None:
        """So that the client sees that its answer is not whole."""
        if self._transport is not None:
            self._transport.abort()

    # time -----------------------------------------------------------------------------------------

    def check_time(self, now: float, timeout_s: float) -> None:
        """Called now and then: ends what waits for a client that has stopped."""
        if self._transport is None:
            return
        if self._stalled_since is not None and now - self._stalled_since > timeout_s:
            self.abort()
        elif self._task is None and not self._deaf and now - self._waiting_since() > timeout_s:
            if self._incoming is None:
                self._transport.close()
            else:
                self._refusal = Refusal(408, f"waited {timeout_s:g} s for the rest of the request")
                self._refuse()

    def _waiting_since(self) -> float:
        """A head has to come as a whole, of a body only the next bytes."""
        return self._head_since if self._in_head else self._quiet_since

    def leave(self) -> None:
        """The router ends: finish what is in flight, take no more."""
        self._deaf = True
        if self._task is None:
            self._close()
        else:
            self._last_request = True
