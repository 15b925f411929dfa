"""Blocks on their way to other hosts: sent from pool memory, leased until ZeroMQ has let go of them.

For each connection at most `MAX_READS` requests wait (more are refused as "busy"), one is served at
a time, and at most `WINDOW_BYTES` are in ZeroMQ's hands: a slow peer holds leases on one read and
costs no memory at all, and a read that is cancelled stops after so much.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec
import zmq

from vllm_kvpool import protocol
from vllm_kvpool._native import crc32c
from vllm_kvpool.pool.requests import RefusedError
from vllm_kvpool.pool.spaces import Space
from vllm_kvpool.protocol import MAX_FRAME_BYTES, MAX_FRAMES, Blocks, ReadBlocks
from vllm_kvpool.types import REF_BYTES, BlockKeys, SlotRefs, num_keys, num_refs, unpack_refs

MAX_READS = 64
MAX_READ_BYTES = 16 << 20
WINDOW_BYTES = 4 << 20
"""Three milliseconds of 10 Gbit/s: ZeroMQ has enough to do until the exchange comes by again."""
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)


@dataclass(slots=True)
class _Read:
    """One request: `refs` are leased, message number `sent` is the next one."""

    request_id: int
    space: Space
    refs: SlotRefs
    sent: int = 0
    cancelled: bool = False
    done: bool = False
    """Its last message was sent."""
    in_flight: deque[tuple[zmq.MessageTracker, int]] = field(default_factory=deque)

    @property
    def num_messages(self) -> int:
        """The end is told even when there is nothing."""
        blocks, (per_message, pieces) = num_refs(self.refs), _cut(self.space.slot_bytes)
        return max(1, -(-blocks // per_message) * pieces)

    def message(self) -> tuple[Blocks, list[memoryview]]:
        if self.cancelled:
            return Blocks(id=self.request_id, last=True), []
        slot_bytes, (per_message, pieces) = self.space.slot_bytes, _cut(self.space.slot_bytes)
        first, offset = self.sent // pieces * per_message, self.sent % pieces * MAX_FRAME_BYTES
        view = self.space.client.view
        refs = unpack_refs(self.refs[first * REF_BYTES : (first + per_message) * REF_BYTES])
        end = min(offset + MAX_FRAME_BYTES, slot_bytes)
        assert view is not None or not refs, "the view of leased blocks is gone"
        frames = [view.payload(ref)[offset:end] for ref in refs] if view is not None else []
        sums = b"".join(crc32c(frame).to_bytes(4, "little") for frame in frames)
        last = self.sent + 1 == self.num_messages
        return Blocks(id=self.request_id, first=first, offset=offset, sums=sums, last=last), frames


def _cut(slot_bytes: int) -> tuple[int, int]:
    """Blocks in a message, and messages for a block: one of the two is 1."""
    pieces = -(-slot_bytes // MAX_FRAME_BYTES)
    return min(MAX_FRAMES, max(1, MAX_FRAME_BYTES // slot_bytes)), pieces


@dataclass(slots=True)
class _Line:
    """One connection."""

    waiting: deque[tuple[ReadBlocks, Space]] = field(default_factory=deque)
    reads: deque[_Read] = field(default_factory=deque)
    """The last one is being sent, those before it are still in ZeroMQ's hands."""
    in_flight_bytes: int = 0


class Outbox:
    """Of a ROUTER socket; or of a DEALER, whose only connection has no name (b"")."""

    def __init__(self, socket: zmq.Socket[bytes], counters: Counter[str]) -> None:
        self.released = 0
        """Messages that ZeroMQ has let go of: whether the other side takes any."""
        self._socket = socket
        self._counters = counters
        self._lines: dict[bytes, _Line] = {}

    def add(self, connection: bytes, request: ReadBlocks, space: Space) -> None:
        """RefusedError: too much was asked for at once."""
        if num_keys(request.keys) > max(1, MAX_READ_BYTES // space.slot_bytes):
            raise RefusedError(
                "too_large", f"a read has {MAX_READ_BYTES} bytes at most, or one block"
            )
        line = self._lines.setdefault(connection, _Line())
        if len(line.waiting) >= MAX_READS:
            raise RefusedError("busy", f"{MAX_READS} reads wait on this connection already")
        line.waiting.append((request, space))

    def cancel(self, connection: bytes, request_id: int) -> None:
        """Send nothing more of that read but its end. What is unknown has ended already."""
        line = self._lines.get(connection, _Line())
        for i, (request, space) in enumerate(line.waiting):
            if request.id == request_id:
                line.waiting[i] = (msgspec.structs.replace(request, keys=b""), space)
                self._counters["reads_cancelled"] += 1
        for read in line.reads:
            if read.request_id == request_id and not read.done:
                read.cancelled = True
                self._counters["reads_cancelled"] += 1

    @property
    def busy(self) -> bool:
        return bool(self._lines)

    def holds(self, connection: bytes, request_id: int) -> bool:
        """Whether bytes of that read are still here, or with ZeroMQ."""
        line = self._lines.get(connection, _Line())
        waiting = any(request.id == request_id for request, _ in line.waiting)
        return waiting or any(read.request_id == request_id for read in line.reads)

    def pump(self) -> None:
        """Send what the windows allow; give back the leases on what has gone."""
        for connection, line in list(self._lines.items()):
            self._settle(line)
            try:
                while self._advance(connection, line):
                    pass
            except zmq.ZMQError:  # the peer has gone; ZeroMQ drops what it has of it
                self._counters["peers_lost"] += 1
                self._drop(line)
            if not line.waiting and not line.reads:
                del self._lines[connection]

    def _advance(self, connection: bytes, line: _Line) -> bool:
        """Send one message. False: nothing to send, or no room for it."""
        read = line.reads[-1] if line.reads and not line.reads[-1].done else self._begin(line)
        if read is None or (line.in_flight_bytes >= WINDOW_BYTES and not read.cancelled):
            return False
        blocks, frames = read.message()
        tracker = self._send(connection, blocks, frames)
        if tracker is None:
            return False
        nbytes = sum(frame.nbytes for frame in frames)
        read.in_flight.append((tracker, nbytes))
        read.sent += 1
        read.done = blocks.last
        line.in_flight_bytes += nbytes
        self._counters["sent_bytes"] += nbytes
        return True

    def _begin(self, line: _Line) -> _Read | None:
        if not line.waiting:
            return None
        request, space = line.waiting.popleft()
        refs = space.client.lease(space.client.match_prefix(BlockKeys(request.keys)))
        self._counters["sent_blocks"] += num_refs(refs)
        line.reads.append(_Read(request.id, space, refs))
        return line.reads[-1]

    def _send(
        self, connection: bytes, blocks: Blocks, frames: list[memoryview]
    ) -> zmq.MessageTracker | None:
        """Tells when ZeroMQ has let go of the last frame, and so of all before it. None: its queue
        for this peer is full."""
        head = [connection, protocol.encode(blocks)] if connection else [protocol.encode(blocks)]
        parts: list[bytes | memoryview] = [*head, *frames]
        tracker: zmq.MessageTracker | None = None
        for i, part in enumerate(parts):
            more = SNDMORE if i + 1 < len(parts) else 0
            zero_copy = i >= len(head)
            try:
                tracker = self._socket.send(
                    part, NOBLOCK | more, copy=not zero_copy, track=zero_copy
                )
            except zmq.Again:
                if i == 0:
                    return None
                break  # the connection has gone in mid-message, and the message with it
        return tracker or zmq.MessageTracker()

    def _settle(self, line: _Line) -> None:
        while line.reads:
            read = line.reads[0]
            while read.in_flight and read.in_flight[0][0].done:
                line.in_flight_bytes -= read.in_flight.popleft()[1]
                self.released += 1
            if read.in_flight or not read.done:
                return
            if read.refs:
                read.space.client.release(read.refs)
            line.reads.popleft()

    def drop(self, connection: bytes) -> None:
        """It is given up: what waits is not sent, what ZeroMQ still holds ends when it does."""
        if connection in self._lines:
            self._drop(self._lines[connection])

    def _drop(self, line: _Line) -> None:
        line.waiting.clear()
        for read in line.reads:
            read.done = True
        self._settle(line)
