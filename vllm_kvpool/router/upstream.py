"""A connection to a replica: one request at a time, its answer passed on as it comes.

    ask(request) -> ResponseHead        the head is parsed
    relay_to(client, head)              body bytes go to the client as they are, framing and all

The parser runs beside the body only to find its end. The last pieces are kept for `tail`: usage stands
there. One that did not reach the end of an answer is closed, never used again: that is also how an
engine learns that a client went away.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple, cast

import httptools

from vllm_kvpool.router.downstream import ClientConnection
from vllm_kvpool.router.headers import Header
from vllm_kvpool.router.usage import TAIL_BYTES

MAX_HEAD_BYTES = 64 << 10
TAIL_PIECES = 8
"""The last events of a stream, its end and its framing may each come alone."""


class UpstreamLost(Exception):  # noqa: N818
    """The replica ended the connection, or sent what is not HTTP, before its answer was whole."""


class UpstreamSilent(UpstreamLost):
    """No byte came for too long."""


class ResponseHead(NamedTuple):
    status: int
    reason: bytes
    headers: list[Header]
    until_close: bool
    """The body has neither length nor chunks: it ends with the connection."""


class UpstreamConnection(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._received = bytearray()
        """What came of the head; then what came of the body before `relay_to`."""
        self._headers: list[Header] = []
        self._reason = b""
        self._head: ResponseHead | None = None
        self._answer: asyncio.Future[ResponseHead] | None = None
        self._end: asyncio.Future[None] | None = None
        self._client: ClientConnection | None = None
        self._pieces: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._whole = False
        self._keeps_alive = False
        self.used = False
        """It has carried a request before: it may have been closed by its idle timeout."""
        self.quiet_since = 0.0

    # the transport --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.quiet_since = self._loop.time()
        if self._head is not None:
            self._body(data)
        else:
            self._received += data
            self._parse_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._parser = None  # refers back to this object
        if self._whole or (self._head is not None and self._head.until_close and error is None):
            self._finish()
        else:
            self.fail(UpstreamLost(str(error) if error else "the replica closed the connection"))

    def pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    # the head -------------------------------------------------------------------------------------

    def ask(self, request: bytes, body: bytes) -> asyncio.Future[ResponseHead]:
        """Raises `UpstreamLost`, from here or from the future."""
        if self._transport is None:
            raise UpstreamLost("the replica closed the connection")
        self._received.clear()
        self._pieces.clear()
        self._head = self._client = None
        self._whole = False
        self.quiet_since = self._loop.time()
        self._answer = self._loop.create_future()
        self._end = self._loop.create_future()
        self._transport.write(request + body if len(body) < 65_536 else request)
        if len(body) >= 65_536:
            self._transport.write(body)
        return self._answer

    def on_status(self, reason: bytes) -> None:
        self._reason = reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is None:
            self._headers.append((name, value))

    def on_message_complete(self) -> None:
        self._whole = True

    def _parse_head(self) -> None:
        end = self._received.find(b"\r\n\r\n") + 4
        if end == 3:
            if len(self._received) > MAX_HEAD_BYTES:
                self._not_http("its head is too long")
            return
        if self._answer is None or self._answer.done():
            self._not_http("it sent what nobody asked for")
            return
        self._headers, self._reason = [], b""
        if not self._feed(bytes(self._received[:end])):
            return
        rest = bytes(self._received[end:])
        self._received.clear()
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer: the real one follows
            self._whole = False
            self._received += rest
            self._parse_head()
            return
        self._keeps_alive = self._parser.should_keep_alive()
        self._head = ResponseHead(
            status,
            self._reason,
            self._headers,
            not self._whole and not _is_framed(self._headers),
        )
        self._answer.set_result(self._head)
        if rest:
            self._body(rest)
        elif self._whole:
            self._finish()

    def _feed(self, data: bytes) -> bool:
        if self._parser is None:
            return False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._not_http(str(error))
            return False
        return True

    def _not_http(self, what: str) -> None:
        self.fail(UpstreamLost(f"the replica's answer is not HTTP/1.1: {what}"))

    # the body -------------------------------------------------------------------------------------

    def relay_to(self, client: ClientConnection, head: bytes) -> asyncio.Future[None]:
        """Done at the end of the answer."""
        assert self._end is not None
        client.source = self
        client.write(head + self._received)
        self._received.clear()
        self._client = client
        if client.stalled:
            self.pause_reading()
        return self._end

    def skip_body(self) -> None:
        """The answer to HEAD: its lengths are those of a body that does not come."""
        self._whole = True
        self._finish()
        self.close()

    def _body(self, data: bytes) -> None:
        self._pass_on(data)
        self._pieces.append(data)
        if self._feed(data) and self._whole:
            self._finish()

    def _pass_on(self, data: bytes) -> None:
        if self._client is None:
            self._received += data
        else:
            self._client.write(data)

    def _finish(self) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    @property
    def tail(self) -> bytes:
        return b"".join(self._pieces)[-TAIL_BYTES:]

    # the end --------------------------------------------------------------------------------------

    @property
    def reusable(self) -> bool:
        return (
            self._transport is not None
            and self._whole
            and self._keeps_alive
            and not self._transport.is_closing()
        )

    @property
    def waits_for_client(self) -> bool:
        return self._client is not None and self._client.stalled

    def fail(self, error: UpstreamLost) -> None:
        """Whoever waits for this connection gets `error`."""
        for future in (self._answer, self._end):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # nobody may wait for the second: that is no mistake
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def rest(self) -> None:
        """Between two requests nothing is kept of the one before."""
        self._client = self._answer = self._end = None
        self._pieces.clear()
        self._head = None
        self.resume_reading()  # its last client may have stalled at the answer's end
        self.used = True


def _is_framed(headers: list[Header]) -> bool:
    framing = (b"content-length", b"transfer-encoding")
    return any(name.lower() in framing for name, _ in headers)
