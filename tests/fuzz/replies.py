"""What another host answers to a pull: its messages go to the real pull, which has asked it for the
blocks of a chain, beside a real daemon. Whatever they are, the pull ends and holds nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from tests.fuzz.frames import Message, pack, unpack
from tests.fuzz.host import FuzzHost
from tests.fuzz.target import SPACE, Target
from tests.helpers import keys_of
from vllm_kvpool import protocol
from vllm_kvpool._native import crc32c
from vllm_kvpool.clock import now_ms
from vllm_kvpool.pool.directory import Answer, Directory, HostRecord
from vllm_kvpool.pool.peer import Peer, _Connection
from vllm_kvpool.pool.pulls import Asker, Pulls
from vllm_kvpool.protocol import Pulled
from vllm_kvpool.types import num_keys, num_refs

NUM_BLOCKS = 3
MATCH_ID, READ_ID = 2, 3
"""As a pull numbers what it asks."""
WITHIN_MS = 60_000


class Wire:
    """In place of a DEALER socket."""

    def __init__(self) -> None:
        self.coming: list[list[bytes]] = []

    def recv_multipart(self, flags: int, copy: bool) -> list[zmq.Frame]:
        if not self.coming:
            raise zmq.Again
        return [zmq.Frame(frame) for frame in self.coming.pop(0)]

    def send(self, message: bytes, flags: int) -> None:
        protocol.decode_peer_request(message)


class Replies(Target):
    name = "replies"

    def __init__(self, shm_dir: Path) -> None:
        self._host = FuzzHost(shm_dir)
        self._host.store(keys_of("something", 1))
        self._context: zmq.Context[Any] = zmq.Context()
        self._peer = Peer(self._context, HostRecord(b"0" * 16, "inproc://nowhere"), None)
        for connection in self._peer._connections:
            connection.socket.close(linger=0)
        self._directory = Directory("redis://127.0.0.1:1", "fuzz", "00" * 16, None, Counter())
        self._directory._redis = object()  # never started: somebody who is always there
        self._numbers = itertools.count()

    def seeds(self) -> list[bytes]:
        slot = SPACE.slot_bytes
        welcome = protocol.Welcome(id=0, version=1, pool_id="0" * 32, epoch=1)
        matched = protocol.Matched(id=MATCH_ID, blocks=NUM_BLOCKS, slot_bytes=slot)
        blocks = [bytes([i]) * slot for i in range(NUM_BLOCKS)]
        halves = [blocks[0][: slot // 2], blocks[0][slot // 2 :]]
        errors = [protocol.Error(id=n, code="busy", message="no") for n in (MATCH_ID, READ_ID)]
        whole = [
            _message(welcome),
            _message(matched),
            _blocks(blocks[:2], first=0),
            _blocks(blocks[2:], first=2, last=True),
        ]
        pieces = [
            _message(matched),
            _blocks(halves[:1], first=0),
            _blocks(halves[1:], first=0, offset=slot // 2),
            _blocks([], last=True),
        ]
        inputs = [whole, pieces, *([_message(matched), _message(error)] for error in errors)]
        inputs.append([_message(protocol.Matched(id=MATCH_ID))])
        return [pack(messages) for messages in inputs]

    def run(self, data: bytes) -> None:
        """One pull, answered by `data`. Its chain is new each time, and the pool makes room by itself."""
        answers: list[Pulled] = []
        pulls = Pulls(
            self._host.spaces, self._directory, lambda host: self._peer,
            lambda connection, pulled: answers.append(pulled), Counter(),
        )  # fmt: skip
        self._peer.suspect()
        self._peer.bytes_per_s = 0.0
        wire: Any = Wire()
        self._peer._connections = [_Connection(wire, greeted=True)]
        now, keys = now_ms(), keys_of(f"chain {next(self._numbers)}", NUM_BLOCKS)
        pulls.ask(Asker(b"engine", 1, SPACE.digest, keys, b"", now + WITHIN_MS), now)
        pulls.take_answer(Answer(1, [(self._peer.host, NUM_BLOCKS)]), now)
        for message in unpack(data):
            wire.coming.append(message.frames)
            for reply, frames in self._peer.receive():
                pulls.take_reply(self._peer, reply, frames, now)
            self._settle(pulls, now)
        self._end(pulls, now + WITHIN_MS)
        (pulled,) = answers
        # Who is answered at the deadline hears of all that has come whole by then.
        visible = num_refs(self._host.space.client.match_prefix(keys))
        assert 0 <= pulled.blocks == visible <= num_keys(keys)

    def _settle(self, pulls: Pulls, now: int) -> None:
        """What the daemon has been asked for is there: slots, or the end of a batch."""
        client = self._host.space.client

        def settled() -> bool:
            for grant in client.poll():
                pulls.take_grant(self._host.space, grant, now)
            pulls.tick(now)
            flights = pulls._flights.values()
            return all(b.read_id and not b.completing for f in flights for b in f.batches.values())

        self._host.wait(settled, "the daemon")

    def _end(self, pulls: Pulls, due: int) -> None:
        client = self._host.space.client

        def ended() -> bool:
            for grant in client.poll():
                pulls.take_grant(self._host.space, grant, due)
            pulls.tick(due)
            return not pulls.busy and not client.writing

        self._host.wait(ended, "the end of the pull")
        assert not any((pulls._by_key, pulls._matches, pulls._transfers._reads))
        assert client.view is not None
        assert client.view.leased_slots == 0
        self._directory._take_asks(0)  # as its thread would do, which never ran
        self._directory._writes.clear()

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._host.close()


def _message(reply: protocol.AnyReply, *frames: bytes) -> Message:
    return Message([protocol.encode(reply), *frames])


def _blocks(frames: list[bytes], *, first: int = 0, offset: int = 0, last: bool = False) -> Message:
    sums = b"".join(crc32c(frame).to_bytes(4, "little") for frame in frames)
    blocks = protocol.Blocks(id=READ_ID, first=first, offset=offset, sums=sums, last=last)
    return _message(blocks, *frames)
