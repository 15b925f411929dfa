"""A TCP relay between two hosts that does to their traffic what a bad network does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

from benchmarks.processes import free_port

CHUNK_BYTES = 256 << 10


class FaultProxy:
    """Relays to `target` port. Attributes may change at any time and count at once."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.target = target
        self.delay_s = 0.0
        """Each piece of an answer waits so long."""
        self.dropping = False
        """Nothing passes, and nobody is told: a partition."""
        self.corrupt_after: int | None = None
        """From the server: one bit flips once so many bytes have passed, whenever that is set."""
        self.stall_after: int | None = None
        """From the server: nothing passes behind so many bytes."""
        self.stall_each_after: int | None = None
        """Likewise, but of each connection."""
        self.passed = 0
        """Bytes from the server."""
        self._passed_over: Counter[int] = Counter()
        """Of these, by connection."""
        self.hold_after: int | None = None
        """To the server: nothing passes behind so many bytes."""
        self.spoil_after: int | None = None
        """To the server: one bit flips once so many bytes have passed."""
        self.taken = 0
        """Bytes to the server."""
        self.connections = 0
        self.most_connections: int | None = None
        """Nothing passes over those beyond so many, of those that are up."""
        self._open: list[socket.socket] = []
        self._up: list[int] = []
        """Numbers of the connections that neither side has ended, oldest first."""
        self._counting = threading.Lock()
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.settimeout(0.05)
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                self._relay(near)
        self._listener.close()

    def _relay(self, near: socket.socket) -> None:
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)  # bounds what waits here
        try:
            far.connect(("127.0.0.1", self.target))
        except OSError:
            near.close()
            far.close()
            return
        self._open += [near, far]
        self.connections += 1
        self._up.append(self.connections)
        for source, sink, answers in ((near, far, False), (far, near, True)):
            self._start(self._pump, source, sink, answers, self.connections)

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool, number: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if answers:
                    time.sleep(self.delay_s)
                with self._counting:
                    data = self._counted(data, number) if answers else self._counted_upwards(data)
                while self._holds(answers, number) and not self._closing:
                    time.sleep(0.01)
                sink.sendall(data)
        with self._counting:
            if number in self._up:
                self._up.remove(number)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _holds(self, answers: bool, number: int) -> bool:
        # Each is read once: the test may change it meanwhile.
        stall_after, hold_after, most = self.stall_after, self.hold_after, self.most_connections
        stall_each_after, passed_over = self.stall_each_after, self._passed_over[number]
        stalled = answers and stall_after is not None and self.passed > stall_after
        stalled |= answers and stall_each_after is not None and passed_over > stall_each_after
        held = not answers and hold_after is not None and self.taken > hold_after
        beyond = most is not None and number not in self._up[:most]
        return self.dropping or stalled or held or beyond

    def _counted(self, data: bytes, number: int) -> bytes:
        before, self.passed = self.passed, self.passed + len(data)
        self._passed_over[number] += len(data)
        if self.corrupt_after is None or self.passed <= self.corrupt_after:
            return data
        place, self.corrupt_after = max(0, self.corrupt_after - before), None
        return _flipped(data, place)

    def _counted_upwards(self, data: bytes) -> bytes:
        before, self.taken = self.taken, self.taken + len(data)
        if self.spoil_after is None or self.taken <= self.spoil_after:
            return data
        place, self.spoil_after = max(0, self.spoil_after - before), None
        return _flipped(data, place)

    def close(self) -> None:
        self._closing = True
        self._threads[0].join()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for end in self._open:
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
