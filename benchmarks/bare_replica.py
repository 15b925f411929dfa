"""The cheapest server that a router takes for a replica, for `bench_router`: every answer is the same bytes.

    python -m benchmarks.bare_replica PORT...

One process listens on all ports. A request whose body says `"stream":true` gets `CHUNKS` events, one each `INTERVAL_S`,
each in a write of its own; any other gets a JSON answer at once, and any GET the list of models. It is no model of an
engine: `mock_replica` is.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import uvloop

CHUNKS = 64
INTERVAL_S = 0.008
SLOTS = 8
"""Streams take turns within an interval, so that they do not all write at once."""
USAGE = {
    "prompt_tokens": 1_500,
    "completion_tokens": 64,
    "prompt_tokens_details": {"cached_tokens": 1_200},
}


def _whole(value: dict[str, Any]) -> bytes:
    body = json.dumps(value).encode()
    head = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return (head % len(body)).encode() + body


def _answer() -> bytes:
    message = {"role": "assistant", "content": "word " * 64}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    common = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    return _whole({**common, "choices": choices, "usage": USAGE})


def _chunk() -> bytes:
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    value = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }
    event = b"data: %b\n\n" % json.dumps(value).encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


ANSWER = _answer()
MODELS = _whole({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})
CHUNK = _chunk()
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
LAST = CHUNK + b"0\r\n\r\n"


class BareReplica(asyncio.Protocol):
    def __init__(self, slots: list[list[BareReplica]]) -> None:
        self._slots = slots
        self._received = b""
        self.left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n") + 4
        if end == 3:
            return
        whole = end + content_length(self._received[:end])
        if len(self._received) < whole:
            return
        body, self._received = self._received[end:whole], self._received[whole:]
        if not body:
            self.transport.write(MODELS)
        elif b'"stream":true' in body:
            self.transport.write(STREAM_HEAD)
            self.left = CHUNKS
            self._slots[id(self) // 64 % SLOTS].append(self)
        else:
            self.transport.write(ANSWER)

    def write_chunk(self) -> bool:
        """Whether more are to come."""
        self.left -= 1
        if self.transport.is_closing():
            return False
        self.transport.write(CHUNK if self.left else LAST)
        return self.left > 0


def content_length(head: bytes) -> int:
    name = head.lower().find(b"\r\ncontent-length:")
    return 0 if name < 0 else int(head[name + 17 : head.find(b"\r\n", name + 2)])


async def main(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    slots: list[list[BareReplica]] = [[] for _ in range(SLOTS)]
    for port in ports:
        await loop.create_server(lambda: BareReplica(slots), "127.0.0.1", port)
    print("ready", flush=True)
    turn, at = 0, loop.time()
    while True:
        slots[turn % SLOTS] = [stream for stream in slots[turn % SLOTS] if stream.write_chunk()]
        turn += 1
        at += INTERVAL_S / SLOTS
        await asyncio.sleep(max(0.0, at - loop.time()))


if __name__ == "__main__":
    uvloop.run(main([int(port) for port in sys.argv[1:]]))
