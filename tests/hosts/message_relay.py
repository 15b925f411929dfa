"""A relay of ZeroMQ messages between two hosts that loses single ones of them: what a bug, or a full queue,
does, and TCP never."""

from __future__ import annotations

import threading
from typing import Any, Self

import msgpack
import zmq

from benchmarks.processes import free_port

QUEUE = 64


class MessageRelay:
    """Relays to `target` port. Not for CURVE."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.lose: str = ""
        """The next answer of this type does not arrive."""
        self.lost: dict[str, Any] | None = None
        self._target = target
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as near:
            context.setsockopt(zmq.LINGER, 0)
            near.linger = 0
            near.bind(f"tcp://127.0.0.1:{self.port}")
            far: dict[bytes, zmq.Socket[bytes]] = {}
            poller = zmq.Poller()
            poller.register(near, zmq.POLLIN)
            while not self._stopping.is_set():
                for socket, _ in poller.poll(20):
                    if socket is near:
                        name, *message = near.recv_multipart()
                        if name not in far:
                            far[name] = context.socket(zmq.DEALER)
                            far[name].connect(f"tcp://127.0.0.1:{self._target}")
                            poller.register(far[name], zmq.POLLIN)
                        far[name].send_multipart(message)
                for name, socket in far.items():
                    while socket.poll(0):
                        self._answer(near, name, socket.recv_multipart())
            for socket in far.values():
                socket.close()

    def _answer(self, near: zmq.Socket[bytes], name: bytes, message: list[bytes]) -> None:
        head = msgpack.unpackb(message[0])
        if self.lose and head["type"] == self.lose:
            self.lose, self.lost = "", head
        else:
            near.send_multipart([name, *message])

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
