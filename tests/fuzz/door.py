"""The door for other hosts: what comes in, over two connections, to the real door beside a real
daemon; what goes out is read as the other host would."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from tests.fuzz.frames import Message, pack, unpack
from tests.fuzz.host import FuzzHost
from tests.fuzz.target import KEYS, SPACE, Target, check_reply
from tests.helpers import keys_of
from vllm_kvpool import protocol
from vllm_kvpool._native import crc32c
from vllm_kvpool.pool.peer_door import PeerDoor

HELLO = protocol.Hello(id=1, version=1, now_ms=5, pid=7)
MAX_TURNS = 1_000


class Wire:
    """In place of the ROUTER socket: what comes in is a list, what goes out is checked."""

    def __init__(self, messages: list[Message]) -> None:
        hello = Message([protocol.encode(HELLO)])
        self._coming = [hello, hello._replace(other=True), *messages]
        self._parts: list[bytes | memoryview] = []

    def recv_multipart(self, flags: int, *, copy: bool) -> list[zmq.Frame]:
        if not self._coming:
            raise zmq.Again
        message = self._coming.pop(0)
        return [
            zmq.Frame(part) for part in (b"other" if message.other else b"one", *message.frames)
        ]

    def send_multipart(self, parts: list[bytes], flags: int) -> None:
        (_, payload) = parts
        check_reply(protocol.decode_reply(payload))

    def send(self, part: bytes | memoryview, flags: int, **_: Any) -> zmq.MessageTracker:
        self._parts.append(part)
        if not flags & zmq.SNDMORE:
            self._check_blocks()
            self._parts.clear()
        return zmq.MessageTracker()

    def _check_blocks(self) -> None:
        _, head, *frames = self._parts
        blocks = protocol.decode_reply(head)
        assert isinstance(blocks, protocol.Blocks)
        sums = b"".join(crc32c(frame).to_bytes(4, "little") for frame in frames)
        assert blocks.sums == sums


class Door(Target):
    name = "door"

    def __init__(self, shm_dir: Path) -> None:
        self._host = FuzzHost(shm_dir)
        self._host.store(KEYS)

    def seeds(self) -> list[bytes]:
        longer = KEYS + keys_of("other", 2)
        requests = [
            HELLO,
            protocol.MatchBlocks(id=2, namespace=SPACE.digest, keys=longer),
            protocol.ReadBlocks(id=3, namespace=SPACE.digest, keys=longer),
            protocol.ReadBlocks(id=4, namespace=SPACE.digest, keys=b"", deadline_ms=1),
            protocol.MatchBlocks(id=5, namespace=bytes(32), keys=KEYS),
            protocol.CancelRead(id=3),
        ]
        alone = [pack([Message([protocol.encode(request)])]) for request in requests]
        return [*alone, pack(Message([protocol.encode(request)]) for request in requests)]

    def run(self, data: bytes) -> None:
        wire: Any = Wire(unpack(data))
        door = PeerDoor(wire, self._host.spaces, "0" * 32, Counter())
        for _ in range(MAX_TURNS):
            door.serve_burst()
            door.pump()
            if not door.busy and not wire._coming:
                break
        else:
            raise AssertionError("the door does not come to rest")
        view = self._host.space.client.view
        assert view is not None
        assert view.leased_slots == 0

    def close(self) -> None:
        self._host.close()
