"""The daemon's loop: one thread, one ROUTER socket, and housekeeping between messages."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import zmq

from vllm_kvpool import protocol
from vllm_kvpool._native import PoolOwner
from vllm_kvpool.clock import now_ms, pool_time_ms
from vllm_kvpool.errors import ConfigError
from vllm_kvpool.pool.announcer import Announcer
from vllm_kvpool.pool.exchange import Exchange
from vllm_kvpool.pool.service import PoolService
from vllm_kvpool.pool.sources import Sources
from vllm_kvpool.protocol import MAX_MESSAGE_BYTES, AnyReply

logger = logging.getLogger(__name__)

HOUSEKEEPING_MS = 250
BEAT_MS = 1_000
REAP_GRACE_S = 1
"""After the kernel let go of a client's lock: time for a DMA in flight of a dying GPU context to
end."""
MAX_BURST = 256
"""Messages served before housekeeping gets its turn."""
WIRE_LIMIT_BYTES = 4 * MAX_MESSAGE_BYTES
"""Larger messages never reach us: ZeroMQ drops their connection. Between the two limits they get an
error reply."""


class Daemon:
    def __init__(
        self,
        service: PoolService,
        owner: PoolOwner,
        endpoints: list[str],
        exchange: Exchange | None = None,
    ) -> None:
        """ConfigError: an endpoint cannot be bound."""
        self._service = service
        self._owner = owner
        self._exchange = exchange
        directory = exchange.directory if exchange is not None else None
        self._announcer = Announcer(owner, directory) if directory is not None else None
        self._offers = exchange.offers if exchange is not None else None
        self._sources = Sources(owner, exchange.finder if exchange is not None else None)
        self._stopping = False
        self._next_reap_ms = 0
        self._next_beat_ms = 0
        self._file = os.stat(owner.path)
        self._file_missed = False
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, WIRE_LIMIT_BYTES)
        # An unreachable client is an error that we see (zmq.ZMQError), not a reply that vanishes.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        for endpoint in endpoints:
            self._bind(endpoint)
        # Who looks from now on shall not take this one for its predecessor, or for silent.
        owner.beat(pool_time_ms(), os.getpid())

    def _bind(self, endpoint: str) -> None:
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError("listen", endpoint, str(error)) from None

    def run(self) -> None:
        """Serve until `stop`."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if self._exchange is not None:
            poller.register(self._exchange.mailbox, zmq.POLLIN)
        while not self._stopping:
            if poller.poll(self._wait_ms()):
                self._serve_burst()
                self._relay()
            self._keep_house()

    def _wait_ms(self) -> int:
        if self._announcer is None:
            return HOUSEKEEPING_MS
        return min(HOUSEKEEPING_MS, self._announcer.wait_ms(now_ms()))

    def stop(self) -> None:
        self._stopping = True

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _serve_burst(self) -> None:
        for _ in range(MAX_BURST):
            try:
                connection, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # One frame is the rule. Anything else is malformed, which an empty payload is as well.
            reply = self._service.handle(connection, frames[0] if len(frames) == 1 else b"")
            if reply is not None:
                self._send(connection, reply)

    def _relay(self) -> None:
        """What the exchange has to say to engines."""
        if self._exchange is not None:
            for connection, reply in self._exchange.take_replies():
                self._send(connection, reply)

    def _send(self, connection: bytes, reply: AnyReply) -> None:
        try:
            self._socket.send_multipart([connection, protocol.encode(reply)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._service.undelivered(connection, reply)

    def _keep_house(self) -> None:
        now = now_ms()
        if now >= self._next_reap_ms:
            self._next_reap_ms = now + HOUSEKEEPING_MS
            self._service.reap(REAP_GRACE_S)
        if now >= self._next_beat_ms:
            self._next_beat_ms = now + BEAT_MS
            self._service.tidy()
            self._owner.beat(pool_time_ms(), os.getpid())
            self._look_for_file()
            self._sources.review(now)
        if self._announcer is not None:
            self._announcer.turn(now)
        if self._offers is not None:
            self._offers.turn(now)

    def _look_for_file(self) -> None:
        if self._file_missed:
            return
        with contextlib.suppress(OSError):
            there = os.stat(self._owner.path)
            if (there.st_dev, there.st_ino) == (self._file.st_dev, self._file.st_ino):
                return
        self._file_missed = True
        logger.error(
            "%s was deleted: engines that have it mapped go on with it, new ones cannot find it; "
            "restart the daemon for a new, empty pool",
            self._owner.path,
        )


@contextlib.contextmanager
def stop_on_signals(daemon: Daemon) -> Iterator[None]:
    """SIGTERM and SIGINT end `run` within `HOUSEKEEPING_MS`."""
    before = {
        number: signal.signal(number, lambda *_: daemon.stop())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
