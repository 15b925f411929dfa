"""A replica that does as a test says: real sockets, in a thread of the test.

It answers /health and /metrics by itself. What it does with any other request is its `behave`, a
coroutine that gets the request and the writer; `answer`, `stream` and the others make such. All
requests that came in are in `requests`; `gone` counts those whose client left before the end.

Why it is not `benchmarks.mock_replica`: that one is an engine's model on an HTTP library, which neither
writes a broken head, a byte of framing of its own or half an answer, nor waits between two chunks for
the test, nor shows the request's headers as they came. Where a test needs an engine (its cache, its
events, its usage, its death as a process) the mock replica serves: test_chaos.py, test_kv_events.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Self

from benchmarks.processes import free_port

USAGE = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}


class Received(NamedTuple):
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]


Behaviour = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def head(status: int, *lines: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status} Whatever", *lines, "", "")).encode()


def whole(status: int, value: object, *lines: str) -> bytes:
    body = json.dumps(value).encode()
    lines = (*lines, "content-type: application/json", f"content-length: {len(body)}")
    return head(status, *lines) + body


def answer(status: int = 200, *lines: str) -> Behaviour:
    """Says what it was asked."""

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        value = {"path": request.target, "bytes": len(request.body), "usage": USAGE}
        writer.write(whole(status, value, *lines))

    return behave


def raw(data: bytes, *, close: bool = False) -> Behaviour:
    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return behave


def stream(count: int, pause_s: float = 0.0, *, break_after: int | None = None) -> Behaviour:
    """Events in chunks; the last but one reports usage. `break_after`: so many, then the end."""

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, "content-type: text/event-stream", "transfer-encoding: chunked"))
        for number in range(count):
            if number == break_after:
                writer.transport.abort()
                return
            writer.write(chunk(event({"number": number})))
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.write(chunk(event({"choices": [], "usage": USAGE})))
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    return behave


def event(value: object) -> bytes:
    return b"data: %b\n\n" % json.dumps(value).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def silent(request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3_600)


class FakeReplica:
    def __init__(
        self, port: int = 0, *, host: str = "127.0.0.1", behave: Behaviour | None = None
    ) -> None:
        self.host = host
        self.port = port or free_port()
        self.behave = behave or answer()
        self.requests: list[Received] = []
        self.gone = 0
        self.in_flight = 0
        self.well = True
        self.looks = 0
        """Questions for its health."""
        self.metrics: str | None = ""
        """None: it takes the question and does not answer."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.id}"

    @property
    def id(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self) -> None:
        """Listen: the first time, or again after `die`."""
        self._do(self._open())

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)

    def hold(self) -> Callable[[], object]:
        """From now on its answers are streams that stop after their first event, until what this returns is called."""
        more = asyncio.Event()

        async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(head(200, "content-type: text/event-stream", "transfer-encoding: chunked"))
            writer.write(chunk(event({"number": 0})))
            await more.wait()
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

        self.behave = behave
        return lambda: self._loop.call_soon_threadsafe(more.set)

    def die(self) -> None:
        """As a killed process does: no socket is left."""
        self._do(self._die())

    async def _die(self) -> None:
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        for _ in range(20):  # asyncio forgets to close what it accepted before a close()
            await asyncio.sleep(0)
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._server.is_serving():  # it was accepted, and then we died
            writer.transport.abort()
            return
        self._tasks.add(asyncio.current_task())
        try:
            while not writer.is_closing():
                await self._serve_one(await self._read(reader), reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(asyncio.current_task())
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> Received:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = [tuple(line.split(": ", 1)) for line in lines]
        request = Received(method, target, headers, b"")
        length = int((request.header("content-length") or ["0"])[0])
        return request._replace(body=await reader.readexactly(length))

    async def _serve_one(
        self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request.target == "/health":
            self.looks += 1
            writer.write(whole(200 if self.well else 500, {}))
            return
        if request.target == "/metrics":
            if self.metrics is None:
                await silent(request, writer)
            text = self.metrics.encode()
            writer.write(head(200, f"content-length: {len(text)}") + text)
            return
        self.requests.append(request)
        self.in_flight += 1
        work = asyncio.ensure_future(self.behave(request, writer))
        left = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.gone += 1
                work.cancel()
                writer.transport.abort()
            else:
                work.result()
        except ConnectionError:
            self.gone += 1
            raise
        finally:
            self.in_flight -= 1
            work.cancel()
            await self._stop_reading(left)

    async def _stop_reading(self, left: asyncio.Future[bytes]) -> None:
        """A byte that came meanwhile belongs to nobody: the router never pipelines."""
        left.cancel()
        await asyncio.wait([left])
        assert left.cancelled() or left.result() == b""
