"""Chat requests at one address, as cheaply as Python can: raw sockets, no HTTP library, for `bench_router`.

    python -m benchmarks.http_load --port P --mode closed|stream|paced [--connections N] [--rate R] [--seconds S]

closed and stream: each connection sends its next request when it has the answer. paced: R requests a second at fixed
times on connections that are free; a request's time counts from when it was due. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import deque
from typing import cast

import uvloop

from benchmarks.bare_replica import content_length
from benchmarks.report import percentile

BODY_BYTES = 6_000
TASKS, SESSIONS = 8, 256
"""Requests of 256 sessions of 8 tasks, so that policies that look at prompts have something to see."""
SYSTEM_BYTES = 2_000
WARM_UP_S = 2.0
SEED = 3


def requests(port: int, *, stream: bool) -> list[bytes]:
    draw = random.Random(SEED)
    systems = [draw.randbytes(SYSTEM_BYTES // 2).hex() for _ in range(TASKS)]
    made = []
    for number in range(SESSIONS):
        user = draw.randbytes((BODY_BYTES - SYSTEM_BYTES) // 2).hex()
        messages = [
            {"role": "system", "content": systems[number % TASKS]},
            {"role": "user", "content": user},
        ]
        value = {"model": "m", "messages": messages, "max_tokens": 64, "stream": stream}
        body = json.dumps(value, separators=(",", ":")).encode()
        lines = (
            "POST /v1/chat/completions HTTP/1.1", f"host: 127.0.0.1:{port}", "user-agent: bench",
            "authorization: Bearer none", "content-type: application/json", f"x-session-id: session-{number}",
            f"content-length: {len(body)}", "", "",
        )  # fmt: skip
        made.append("\r\n".join(lines).encode() + body)
    draw.shuffle(made)
    return made


class Load:
    def __init__(self, port: int, mode: str) -> None:
        self.requests = requests(port, stream=mode == "stream")
        self.mode = mode
        self.sent = 0
        self.done = self.reads = self.failed = 0
        self.times: list[float] = []
        self.free: deque[Connection] = deque()
        self.late = 0

    def reset(self) -> None:
        self.done = self.reads = self.failed = self.late = 0
        self.times.clear()

    def finished(self, connection: Connection, seconds: float, ok: bool) -> None:
        self.done += 1
        self.failed += not ok
        self.times.append(seconds)
        if self.mode == "paced":
            self.free.append(connection)
        else:
            connection.send(time.perf_counter())


class Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._received = b""
        self._missing: int | None = None
        self._last = b""
        self._due = 0.0
        self._ok = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.failed += 1

    def send(self, due: float) -> None:
        load = self._load
        self._due, self._received, self._missing = due, b"", None
        load.sent += 1
        self._transport.write(load.requests[load.sent % len(load.requests)])

    def data_received(self, data: bytes) -> None:
        self._load.reads += 1
        if self._missing is None:
            self._received += data
            end = self._received.find(b"\r\n\r\n") + 4
            if end == 3:
                return
            head = self._received[:end].lower()
            self._ok = head.startswith(b"http/1.1 200")
            if b"\r\ntransfer-encoding: chunked" in head:
                self._missing = -1
            else:
                self._missing = end + content_length(head) - len(self._received)
        elif self._missing > 0:
            self._missing -= len(data)
        self._last = (self._last + data)[-7:]  # the end may come alone, or in parts
        if self._missing == 0 or (self._missing < 0 and self._last == b"\r\n0\r\n\r\n"):
            self._load.finished(self, time.perf_counter() - self._due, self._ok)


async def pace(load: Load, rate: float) -> None:
    """Sends at fixed times, whatever has been answered; `late`: no connection was free."""
    due = time.perf_counter()
    while True:
        now = time.perf_counter()
        while due <= now:
            if load.free:
                load.free.popleft().send(due)
            else:
                load.late += 1
            due += 1 / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


async def run(options: argparse.Namespace) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    load = Load(options.port, options.mode)
    for _ in range(options.connections):
        _, connection = await loop.create_connection(
            lambda: Connection(load), "127.0.0.1", options.port
        )
        if options.mode == "paced":
            load.free.append(connection)
        else:
            connection.send(time.perf_counter())
    if options.mode == "paced":
        pacing = loop.create_task(pace(load, options.rate))
    await asyncio.sleep(WARM_UP_S)
    print("begin", flush=True)
    load.reset()
    busy, begun = time.process_time(), time.perf_counter()
    await asyncio.sleep(options.seconds)
    seconds = time.perf_counter() - begun
    result = {
        "rate": load.done / seconds,
        "done": load.done,
        "failed": load.failed,
        "late": load.late,
        "p50_ms": percentile(load.times, 0.5) * 1e3 if load.times else 0.0,
        "p99_ms": percentile(load.times, 0.99) * 1e3 if load.times else 0.0,
        "reads_per_answer": load.reads / max(1, load.done),
        "generator_cpu": (time.process_time() - busy) / seconds,
    }
    if options.mode == "paced":
        pacing.cancel()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=("closed", "stream", "paced"), required=True)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rate", type=float, default=500)
    parser.add_argument("--seconds", type=float, default=5)
    print(json.dumps(uvloop.run(run(parser.parse_args()))), flush=True)


if __name__ == "__main__":
    main()
