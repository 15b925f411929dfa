"""The door for other hosts: what they may ask, and what they hear. Reads shared memory, and stores as
an engine does.

Who comes through was let in by the CURVE keys, if there are any; a first message, `hello`, settles
the version. Nothing that comes in stops the daemon: see `PoolService.handle`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import msgspec
import zmq

from vllm_kvpool import protocol
from vllm_kvpool.clock import now_ms
from vllm_kvpool.host_keys import HostKeys
from vllm_kvpool.pool.inbox import Inbox
from vllm_kvpool.pool.outbox import Outbox
from vllm_kvpool.pool.requests import RefusedError, check_version, checked_keys, decode, id_of
from vllm_kvpool.pool.sessions import Session, Sessions
from vllm_kvpool.pool.spaces import Space, Spaces
from vllm_kvpool.protocol import (
    NO_CLIENT,
    AnyPeerRequest,
    AnyReply,
    Blocks,
    CancelRead,
    Error,
    Hello,
    MatchBlocks,
    Matched,
    ReadBlocks,
    Welcome,
    WriteBlocks,
)
from vllm_kvpool.types import KEY_BYTES, num_refs

logger = logging.getLogger(__name__)

MAX_BURST = 64


CONNECT_MS = 1_000
MAX_PUT_OFF = 256


class _NotYetError(Exception):
    """Ask again in a moment. Never leaves this module."""


class PeerDoor:
    def __init__(
        self,
        socket: zmq.Socket[bytes],
        spaces: Spaces,
        pool_id: str,
        counters: Counter[str],
        keys: HostKeys | None = None,
    ) -> None:
        """`keys`: who may write; None: everybody may."""
        self._socket = socket
        self._spaces = spaces
        self._pool_id = pool_id
        self._counters = counters
        self._keys = keys
        self._sessions = Sessions()
        self._outbox = Outbox(socket, counters)
        self.inbox = Inbox(self._send, counters)
        self._put_off: list[tuple[bytes, bytes, int]] = []
        """(connection, message, until when): their namespace's client is still connecting."""

    @property
    def busy(self) -> bool:
        """Whether `pump` has something to do before the next message comes."""
        return self._outbox.busy or self.inbox.busy or bool(self._put_off)

    def pump(self) -> None:
        self._outbox.pump()
        self.inbox.turn(now_ms())
        put_off, self._put_off = self._put_off, []
        for connection, payload, until_ms in put_off:
            self._serve(connection, payload, until_ms)

    def serve_burst(self) -> None:
        for _ in range(MAX_BURST):
            try:
                connection, head, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            buffers = [frame.buffer for frame in frames]
            key = str(head.get("User-Id")).encode() if self._keys is not None else b""
            self._serve(connection.bytes, head.bytes, now_ms() + CONNECT_MS, buffers, key)

    def _serve(
        self,
        connection: bytes,
        payload: bytes,
        until_ms: int,
        frames: Sequence[memoryview] = (),
        key: bytes = b"",
    ) -> None:
        try:
            reply = self.handle(connection, payload, frames, key)
        except _NotYetError:
            if now_ms() < until_ms and len(self._put_off) < MAX_PUT_OFF:
                self._put_off.append((connection, payload, until_ms))
                return
            reply = self._error(id_of(payload), "busy", "the pool is just starting")
        if reply is not None:
            self._send(connection, reply)

    def _send(self, connection: bytes, reply: AnyReply) -> None:
        try:
            self._socket.send_multipart([connection, protocol.encode(reply)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._counters["replies_lost"] += 1

    def handle(
        self,
        connection: bytes,
        payload: bytes,
        frames: Sequence[memoryview] = (),
        key: bytes = b"",
    ) -> AnyReply | None:
        """`key`: of who sends it, in Z85."""
        self._counters["peer_requests"] += 1
        request_id = 0
        try:
            request: AnyPeerRequest = decode(payload, protocol.decode_peer_request)
            request_id = request.id
            if frames and not isinstance(request, Blocks):
                raise RefusedError("malformed", "only blocks have frames behind them")
            if isinstance(request, Hello):
                return self._hello(connection, request, key)
            return self._answer(connection, request, list(frames))
        except msgspec.DecodeError as error:
            return self._error(id_of(payload), "malformed", str(error))
        except RefusedError as error:
            return self._error(request_id or id_of(payload), error.code, str(error))
        except _NotYetError:
            raise
        except Exception as error:
            logger.exception("a peer's request failed")
            return self._error(request_id, "internal", f"{type(error).__name__}: {error}")

    def _error(self, request_id: int, code: str, message: str) -> Error:
        self._counters[f"error_{code}"] += 1
        return Error(id=request_id, code=code, message=message)

    def _answer(
        self, connection: bytes, request: AnyPeerRequest, frames: list[memoryview]
    ) -> AnyReply | None:
        session = self._sessions.get(connection)
        if session is None:
            raise RefusedError("hello", "say hello first (the daemon may have been restarted)")
        if isinstance(request, CancelRead):
            self._outbox.cancel(connection, request.id)
            return None
        now = now_ms()
        if isinstance(request, Blocks):
            self.inbox.take_blocks(connection, request, frames, now)
            return None
        if request.deadline_ms and now > request.deadline_ms + session.offset_ms:
            raise RefusedError("deadline", "too late: nothing was done")
        match request:
            case MatchBlocks():
                return self._match(request, now)
            case ReadBlocks():
                self._read(connection, request, now)
            case WriteBlocks():
                self._check_may_write(session)
                self._write(connection, request, now)
        return None

    def _match(self, request: MatchBlocks, now: int) -> Matched:
        keys = checked_keys(request.keys)
        space = self._space(request.namespace, now)
        if space is None:
            return Matched(id=request.id)
        blocks = num_refs(space.client.match_prefix(keys))
        return Matched(id=request.id, blocks=blocks, slot_bytes=space.slot_bytes)

    def _read(self, connection: bytes, request: ReadBlocks, now: int) -> None:
        keys = checked_keys(request.keys)
        space = self._space(request.namespace, now)
        if space is None:
            raise RefusedError("namespace", "no such namespace in this pool")
        self._outbox.add(connection, request, space)
        # A pool whose engines are all elsewhere would take its hottest blocks for the oldest.
        space.client.touch(space.client.match_prefix(keys))

    def _check_may_write(self, session: Session) -> None:
        if self._keys is not None and not self._keys.lets_write(session.public_key):
            raise RefusedError("forbidden", "this host's key may read here, and not write")

    def _write(self, connection: bytes, request: WriteBlocks, now: int) -> None:
        checked_keys(request.keys, request.parent)
        _check_digest(request.namespace.digest)
        space = self._spaces.open(request.namespace, now)
        if not space.client.connected:
            raise _NotYetError
        self.inbox.open(connection, request, space, now)

    def _space(self, digest: bytes, now: int) -> Space | None:
        _check_digest(digest)
        space = self._spaces.get(digest, now)
        if space is not None and not space.client.readable:
            raise _NotYetError
        return space

    def _hello(self, connection: bytes, hello: Hello, key: bytes) -> Welcome:
        check_version(hello)
        offset_ms = now_ms() - hello.now_ms
        session = Session(NO_CLIENT, "", hello.now_ms, offset_ms, public_key=key)
        self._sessions.add(connection, session)
        return Welcome(
            id=hello.id, version=hello.version, pool_id=self._pool_id, epoch=0, writes=True
        )


def _check_digest(digest: bytes) -> None:
    if len(digest) != KEY_BYTES:
        raise RefusedError("malformed", f"a namespace's digest has {KEY_BYTES} bytes")
