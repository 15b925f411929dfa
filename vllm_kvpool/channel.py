"""One ZeroMQ connection to a daemon, and the blocking call that admin commands make over it.

A `Channel` never waits unless told to. Messages go out only over a live connection: what cannot go
now is not queued for a daemon that may come some day, the caller hears `False` and skips.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import msgspec
import zmq

from vllm_kvpool import protocol
from vllm_kvpool.clock import now_ms
from vllm_kvpool.errors import PoolTimeout, PoolUnavailable, ProtocolError
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.protocol import AnyReply, AnyRequest, Error, Hello, Welcome

RECONNECT_MS = 100
RECONNECT_MAX_MS = 1_000
QUEUE_MESSAGES = 512
"""Messages that wait in ZeroMQ for a daemon that is slow or stopped; more are refused."""
NOBLOCK, POLLIN = int(zmq.NOBLOCK), int(zmq.POLLIN)
"""As plain numbers: arithmetic of enumerations costs as much as the calls that they go into."""


class Channel:
    """A DEALER socket. It connects, and connects again, by itself."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
        self._socket.connect(endpoint)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For pollers."""
        return self._socket

    def send(self, request: AnyRequest, wait_ms: int = 0) -> bool:
        """False: there is no connection now, or the daemon has not taken the last
        `QUEUE_MESSAGES`."""
        if wait_ms and not self._socket.poll(wait_ms, zmq.POLLOUT):
            return False
        try:
            self._socket.send(protocol.encode(request), NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, wait_ms: int = 0) -> AnyReply | None:
        """The next reply; None: there is none. ProtocolError: it is not one that this version knows."""
        if wait_ms and not self._socket.poll(wait_ms, zmq.POLLIN):
            return None
        # Unlike recv, a look does not release the GIL. In the scheduler's thread that would invite every other thread
        # of the engine to take its turn here, in each step.
        if not int(self._socket.get(zmq.EVENTS)) & POLLIN:
            return None
        try:
            reply: AnyReply = protocol.decode_reply(self._socket.recv(NOBLOCK))
        except zmq.Again:
            return None
        except msgspec.DecodeError as error:
            raise ProtocolError("malformed", f"an answer cannot be read: {error}") from None
        return reply

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def call_daemon(
    folder: PoolPaths, request: AnyRequest | None = None, timeout_s: float = 5.0
) -> AnyReply:
    """Say hello as an admin client, send `request` if there is one, and wait for the answer.

    Raises PoolUnavailable (nobody listens), PoolTimeout (no answer in time) or ProtocolError
    (refused, or answered in a way that this version cannot read).
    """
    give_up_ms = now_ms() + int(timeout_s * 1_000)
    hello = Hello(id=1, version=protocol.PROTOCOL_VERSION, now_ms=now_ms(), pid=os.getpid())
    with Channel(folder.endpoint) as channel:
        reply = _exchange(channel, hello, give_up_ms, folder)
        assert isinstance(reply, Welcome)
        if request is not None:
            timed = msgspec.structs.replace(request, id=2, deadline_ms=give_up_ms)
            reply = _exchange(channel, timed, give_up_ms, folder)
    return reply


def _exchange(
    channel: Channel, request: AnyRequest, give_up_ms: int, folder: PoolPaths
) -> AnyReply:
    if not channel.send(request, wait_ms=max(1, give_up_ms - now_ms())):
        raise PoolUnavailable(
            f"no daemon answers at {folder.endpoint}: start it with `vllm-kvpool serve`; "
            "if it runs, ask `vllm-kvpool doctor`"
        )
    while (left_ms := give_up_ms - now_ms()) > 0:
        reply = channel.receive(wait_ms=left_ms)
        if reply is None or reply.id != request.id:
            continue
        if isinstance(reply, Error):
            raise ProtocolError(reply.code, reply.message)
        return reply
    raise PoolTimeout(f"the daemon at {folder.endpoint} did not answer in time")
