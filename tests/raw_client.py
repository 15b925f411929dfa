"""The wire spoken by an independent implementation: `msgpack` and a bare ZeroMQ socket, as
docs/protocol.md says."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Any

import msgpack
import zmq
from helpers import PATIENT_MS, SLOT_BYTES, Daemon

CLIENT_ID = "0123456789abcdef" * 2
DIGEST = bytes(range(32))


class RawClient:
    def __init__(self, daemon: Daemon) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = PATIENT_MS
        self.socket.connect(daemon.paths.endpoint)
        self.lock = os.open(daemon.paths.client_lock(CLIENT_ID), os.O_CREAT | os.O_RDWR)
        fcntl.flock(self.lock, fcntl.LOCK_SH)

    def send(self, **message: Any) -> None:
        self.socket.send(msgpack.packb(message))

    def call(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        reply: dict[str, Any] = msgpack.unpackb(self.socket.recv())
        return reply

    def hello(self, **changes: Any) -> dict[str, Any]:
        hello = {
            "type": "hello", "id": 1, "version": 1, "now_ms": time.monotonic_ns() // 1_000_000,
            "pid": os.getpid(), "client_id": CLIENT_ID,
            "namespace": {"digest": DIGEST, "slot_bytes": SLOT_BYTES, "fields": {"model": "m"}},
        }  # fmt: skip
        return self.call(**hello | changes)

    def close(self) -> None:
        self.socket.close()
        self.context.term()
        os.close(self.lock)
