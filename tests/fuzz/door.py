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
from tests.helpers import keys_of, namespace_of
from vllm_kvpool import protocol
from vllm_kvpool._native import crc32c
from vllm_kvpool.clock import now_ms
from vllm_kvpool.pool import peer_door
from vllm_kvpool.pool.inbox import IDLE_MS
from vllm_kvpool.pool.peer_door import PeerDoor

HELLO = protocol.Hello(id=1, version=1, now_ms=5, pid=7)
WRITTEN = keys_of("written", 2)


class Wire:
    """In place of the ROUTER socket: what comes in is a list, what goes out is checked."""

    def __init__(self, messages: list[Message]) -> None:
        hello = Message([protocol.encode(HELLO)])
        self._coming = [hello, hello._replace(other=True), *messages]
        self._parts: list[bytes | memoryview] = []
        self.pause = False
        """No more messages in this burst."""

    def recv_multipart(self, flags: int, *, copy: bool) -> list[zmq.Frame]:
        if not self._coming or self.pause:
            raise zmq.Again
        self.pause = True
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
        peer_door.CONNECT_MS = 50  # namespaces that the daemon does not want never connect

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
        write = protocol.WriteBlocks(id=6, namespace=SPACE, keys=WRITTEN)
        behind = protocol.WriteBlocks(
            id=7, namespace=SPACE, keys=keys_of("x", 1), parent=KEYS[-32:]
        )
        other = protocol.WriteBlocks(id=8, namespace=namespace_of("other", 256), keys=WRITTEN)
        alone = [[Message([protocol.encode(request)])] for request in [*requests, write, other]]
        block = bytes(SPACE.slot_bytes)
        written = [
            [*alone[-2], _blocks(6, [block, block], last=True)],
            [*alone[-2], _blocks(6, [block[:1_000]]), _blocks(6, [block[1_000:]], offset=1_000)],
            [*alone[-1], Message([protocol.encode(behind)]), _blocks(7, [block], last=True)],
        ]
        whole = [Message([protocol.encode(request)]) for request in requests]
        return [pack(messages) for messages in (*alone, *written, whole)]

    def run(self, data: bytes) -> None:
        wire: Any = Wire(unpack(data))
        counters: Counter[str] = Counter()
        door = PeerDoor(wire, self._host.spaces, "0" * 32, counters)
        self._host.wait(lambda: self._rests(door, wire), "the door to come to rest")
        door.inbox.turn(now_ms() + IDLE_MS + 1)  # of what was begun and not gone on with
        self._host.wait(lambda: self._rests(door, wire), "the end of all writes")
        assert not door.inbox._writes
        view = self._host.space.client.view
        assert view is not None
        assert view.leased_slots == 0
        assert not self._host.space.client.writing
        self._host.forget_others()
        if counters["written_blocks"]:
            self._host.restore(KEYS)

    def _rests(self, door: PeerDoor, wire: Wire) -> bool:
        """Slots are granted between two messages, as if the daemon were fast."""
        spaces = self._host.spaces.all()
        for space in spaces:
            for grant in space.client.poll():
                assert door.inbox.take_grant(space, grant)
        if not door.inbox._by_grant:
            wire.pause = False
            door.serve_burst()
        door.pump()
        return not door.inbox._by_grant and not door.busy and not wire._coming

    def close(self) -> None:
        self._host.close()


def _blocks(write_id: int, frames: list[bytes], *, offset: int = 0, last: bool = False) -> Message:
    sums = b"".join(crc32c(frame).to_bytes(4, "little") for frame in frames)
    blocks = protocol.Blocks(id=write_id, offset=offset, sums=sums, last=last)
    return Message([protocol.encode(blocks), *frames])
