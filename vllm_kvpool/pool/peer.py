"""Another host's daemon, as the exchange reads from it: a few connections side by side.

One TCP stream does not fill a fast link, and one that lost a packet holds back only itself. ZeroMQ
connects and connects again; here each connection says hello first, and again when the other side has
forgotten it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import zmq

from vllm_kvpool import protocol
from vllm_kvpool.clock import now_ms
from vllm_kvpool.host_keys import HostKeys
from vllm_kvpool.pool.directory import HostRecord
from vllm_kvpool.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    AnyReply,
    CancelRead,
    Error,
    Hello,
    MatchBlocks,
    ReadBlocks,
    Welcome,
    WriteBlocks,
)

CONNECTIONS = 4
QUEUE_MESSAGES = 16
"""A connection's messages that wait in ZeroMQ: with frames of 4 MiB the bound for its memory."""
HELLO_RETRY_MS = 1_000
SUSPECT_MS = 5_000
"""A host that did not answer is not asked again so soon."""
GREETING_MS = 10_000
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 10_000
MAX_WIRE_BYTES = 2 * MAX_FRAME_BYTES


@dataclass(slots=True)
class _Connection:
    socket: zmq.Socket[bytes]
    greeted: bool = False
    hello_due_ms: int = 0
    unanswered: set[int] = field(default_factory=set)
    queue: deque[MatchBlocks | ReadBlocks | WriteBlocks | CancelRead] = field(default_factory=deque)

    def forget_unsent(self, ids: set[int]) -> bool:
        """Whether some of these requests had not gone out. They do not any more."""
        unsent = ids & {request.id for request in self.queue}
        self.queue = deque(request for request in self.queue if request.id not in unsent)
        self.unanswered -= unsent
        return bool(unsent)

    def forget_sent(self) -> None:
        """The other side does not know us any more: it answers nothing of what it was asked."""
        self.unanswered = {request.id for request in self.queue}


class Peer:
    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], host: HostRecord, keys: HostKeys | None
    ) -> None:
        self.host = host
        self.suspect_until_ms = 0
        self.bytes_per_s = 0.0
        """As the last transfers went; 0: not known yet."""
        self.takes_writes = False
        self.used_ms = self._made_ms = now_ms()
        self._connections = [
            _Connection(_socket(context, host, keys, number)) for number in range(CONNECTIONS)
        ]

        self.sockets = [connection.socket for connection in self._connections]

    @property
    def num_greeted(self) -> int:
        """Connections over which it has answered."""
        return sum(connection.greeted for connection in self._connections)

    def refused(self, now: int) -> bool:
        """Whether it has never answered, for long: ZeroMQ does not connect again to a host that did not
        know our key. It may know it by now: make another."""
        return not self.num_greeted and now - self._made_ms > GREETING_MS

    def ask(self, request: MatchBlocks | ReadBlocks | WriteBlocks) -> zmq.Socket[bytes]:
        """Send it as soon as there is a connection, over the one with the least to do: its socket."""
        self.used_ms = now_ms()
        chosen = min(self._connections, key=lambda c: (not c.greeted, len(c.unanswered)))
        chosen.unanswered.add(request.id)
        chosen.queue.append(request)
        self._flush(chosen)
        return chosen.socket

    def cancel(self, read_id: int) -> None:
        """Nobody waits for that read any more: what is left of it, if anything, shall not be sent."""
        for connection in self._connections:
            if read_id in connection.unanswered and not connection.forget_unsent({read_id}):
                connection.queue.append(CancelRead(id=read_id))
                self._flush(connection)

    def forget(self, request_id: int) -> None:
        """Its answer is not waited for any more."""
        for connection in self._connections:
            connection.unanswered.discard(request_id)

    def receive(self) -> Iterator[tuple[AnyReply, list[memoryview]]]:
        """What has come, a bounded number of messages. Frames are valid until the next one is
        taken."""
        for connection in self._connections:
            self._greet(connection)
            for _ in range(QUEUE_MESSAGES):
                message = _take(connection.socket)
                if message is None:
                    break
                if not self._is_greeting(connection, message[0]):
                    if _is_end(message[0]):
                        connection.unanswered.discard(message[0].id)
                    yield message
            self._flush(connection)

    def _greet(self, connection: _Connection) -> None:
        now = now_ms()
        if connection.greeted or now < connection.hello_due_ms:
            return
        hello = Hello(version=PROTOCOL_VERSION, now_ms=now, pid=os.getpid())
        if _send(connection.socket, protocol.encode(hello)):
            connection.hello_due_ms = now + HELLO_RETRY_MS

    def _is_greeting(self, connection: _Connection, reply: AnyReply) -> bool:
        if isinstance(reply, Welcome):
            connection.greeted = True
            self.takes_writes = reply.writes
            return True
        if isinstance(reply, Error) and reply.code in {"hello", "version"}:
            connection.greeted = False
            connection.hello_due_ms = 0
            connection.forget_sent()
            if reply.code == "version":
                self.suspect_until_ms = connection.hello_due_ms = now_ms() + SUSPECT_MS
        return False

    def _flush(self, connection: _Connection) -> None:
        while connection.greeted and connection.queue:
            if not _send(connection.socket, protocol.encode(connection.queue[0])):
                return
            connection.queue.popleft()

    def note_rate(self, nbytes: int, elapsed_ms: int) -> None:
        rate = nbytes * 1_000 / max(1, elapsed_ms)
        self.bytes_per_s = (self.bytes_per_s + rate) / 2 if self.bytes_per_s else rate

    def suspect(self) -> None:
        """It did not answer in time. What still waits to be sent is worth nothing any more."""
        self.suspect_until_ms = now_ms() + SUSPECT_MS
        for connection in self._connections:
            connection.forget_unsent(connection.unanswered)

    def close(self) -> None:
        """What is asked or cancelled afterwards goes nowhere: flights may still hold this peer when its
        host has come back under another address."""
        for connection in self._connections:
            connection.greeted = False
            connection.socket.close(linger=0)


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], host: HostRecord, keys: HostKeys | None, number: int
) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    # A thread of ZeroMQ for each: left to itself it may give all of them to the same one.
    socket.setsockopt(zmq.AFFINITY, 1 << number % int(context.get(zmq.IO_THREADS)))
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_WIRE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 3_000)
    if keys is not None:
        keys.connect(socket, host.public_key)
    try:
        socket.connect(host.address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def _send(socket: zmq.Socket[bytes], message: bytes) -> bool:
    try:
        socket.send(message, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def _take(socket: zmq.Socket[bytes]) -> tuple[AnyReply, list[memoryview]] | None:
    """None: nothing there. What cannot be read is passed over."""
    while True:
        try:
            head, *frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        try:
            reply: AnyReply = protocol.decode_reply(head.buffer)
        except msgspec.DecodeError:
            continue
        return reply, [frame.buffer for frame in frames]


def _is_end(reply: AnyReply) -> bool:
    """Whether it is the last of its request."""
    if isinstance(reply, protocol.Blocks):
        return reply.last
    return not isinstance(reply, protocol.Wanted)
