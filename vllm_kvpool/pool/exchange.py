"""The daemon's traffic with other hosts, on a thread of its own: blocks out, blocks in.

The daemon's loop hands over what its engines ask (`submit`) and takes the answers from `mailbox`; it
never waits for this thread, and this thread changes the pool only by asking that loop, as engines do
(see `spaces`). Sockets: the mailbox, the door for other hosts, connections to peers, and the clients
of this pool. Copies and checksums release the GIL.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from vllm_kvpool import protocol
from vllm_kvpool._native import PoolOwner
from vllm_kvpool.clock import now_ms
from vllm_kvpool.config import PoolConfig
from vllm_kvpool.errors import ConfigError
from vllm_kvpool.host_keys import HostKeys
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.pool.directory import Directory, HostRecord
from vllm_kvpool.pool.finder import Finder
from vllm_kvpool.pool.flight import Asker
from vllm_kvpool.pool.offers import WHOLE, Offers
from vllm_kvpool.pool.peer import (
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    QUEUE_MESSAGES,
    Peer,
)
from vllm_kvpool.pool.peer_door import PeerDoor
from vllm_kvpool.pool.pulls import Pulls
from vllm_kvpool.pool.pushes import Pushes
from vllm_kvpool.pool.spaces import Spaces
from vllm_kvpool.pool.upstream import Upstream
from vllm_kvpool.protocol import MAX_MESSAGE_BYTES, CancelPull, Pull, Pulled
from vllm_kvpool.types import BlockKeys

logger = logging.getLogger(__name__)

IO_THREADS = 4
IDLE_POLL_MS, WAITING_POLL_MS, BUSY_POLL_MS = 100, 10, 1
PEER_IDLE_MS = 120_000
MAX_SOCKETS = 16_384
"""ZeroMQ's own limit is 1,023, and 255 peers have so many connections."""
STOP_TIMEOUT_S = 5.0
_MAILBOXES = itertools.count()


class Exchange:
    """ConfigError: the endpoint cannot be bound, or the keys or the directory's URL are unusable."""

    def __init__(self, paths: PoolPaths, config: PoolConfig, owner: PoolOwner) -> None:
        """`owner`: for the daemon's loop; this thread does not touch it."""
        config.check_access()
        self.counters: Counter[str] = Counter()
        self._directory_counters: Counter[str] = Counter()
        self._keys = HostKeys(Path(config.keys)) if config.keys else None
        serves = config.listen.startswith("tcp://")
        self.directory: Directory | None = None
        self._upstream = Upstream(config.upstream, self._keys) if config.upstream else None
        self.offers: Offers | None = None
        if self._upstream is not None:
            host_id = self._upstream.host.id
            self.offers = Offers(owner, host_id, self._submit_chain, self.counters)
        self._pool_id = owner.pool_id
        if config.directory:
            me = self._record(config) if serves else None
            self.directory = Directory(
                config.directory, config.name, self._pool_id, me, self._directory_counters
            )
        self.finder: Finder | None = self.directory or self._upstream
        self._spaces = Spaces(paths)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=IO_THREADS)
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self.mailbox, self._inbox = self._mailboxes()
        self._authenticator = self._keys.authenticator(self._context) if self._keys else None
        self._door_socket = self._bind(config.listen) if serves else None
        self._peers: dict[bytes, Peer] = {}
        self._poller = zmq.Poller()
        self._polled: list[Any] = []
        self._thread = threading.Thread(target=self._run, name="kvpool-exchange", daemon=True)

    def _record(self, config: PoolConfig) -> HostRecord:
        public_key = self._keys.public if self._keys else b""
        return HostRecord(
            bytes.fromhex(self._pool_id), config.advertise or config.listen, public_key
        )

    def _mailboxes(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Two ends: one for the daemon's loop, one for this thread."""
        ends = (self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR))
        name = f"inproc://mailbox-{next(_MAILBOXES)}"
        ends[0].bind(name)
        ends[1].connect(name)
        return ends

    def _bind(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Of a frame: what is a little too large gets an answer.
        socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 3_000)
        if self._keys is not None:
            self._keys.serve(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            self._close_sockets()
            raise ConfigError("listen", endpoint, str(error)) from None
        return socket

    # the daemon's loop ----------------------------------------------------------------------------

    def start(self) -> None:
        if self.finder is not None:
            self.finder.start()
        self._thread.start()

    def stop(self) -> None:
        self.mailbox.send_multipart([b""])
        self._thread.join(STOP_TIMEOUT_S)
        if self.finder is not None:
            self.finder.stop()
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def submit(
        self, connection: bytes, digest: bytes, due_ms: int, request: Pull | CancelPull
    ) -> bool:
        """`due_ms` on our clock. False: too much waits already."""
        try:
            message = [connection, digest, str(due_ms).encode(), protocol.encode(request)]
            self.mailbox.send_multipart(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    @property
    def pulls(self) -> bool:
        """Whether there is anybody to ask for blocks."""
        return self.finder is not None

    def _submit_chain(self, digest: bytes, parent: bytes, keys: bytes) -> bool:
        try:
            self.mailbox.send_multipart([digest, parent, keys], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def take_replies(self) -> list[tuple[bytes, Pulled]]:
        """(connection, answer)."""
        replies = []
        while self.mailbox.poll(0):
            match self.mailbox.recv_multipart():
                case [connection, reply]:
                    replies.append((connection, msgspec.msgpack.decode(reply, type=Pulled)))
                case [what, digest, keys] if self.offers is not None:
                    self.offers.hear(what, digest, keys)
        return replies

    def stats(self) -> dict[str, int]:
        return dict(self.counters) | dict(self._directory_counters)

    # the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        counters = self.counters
        self._pulls = Pulls(self._spaces, self.finder, self._peer_of, self._answer, counters)
        upstream = self._upstream
        self._pushes = (
            Pushes(
                self._spaces,
                partial(self._connect_for_pushes, upstream.host),
                self._tell_offers,
                counters,
            )
            if upstream is not None
            else None
        )
        self._door = (
            PeerDoor(self._door_socket, self._spaces, self._pool_id, counters, self._keys)
            if self._door_socket is not None
            else None
        )
        stopping = False
        while not stopping:
            try:
                stopping = self._turn()
            except Exception:
                # The pool of this host goes on whatever happens here.
                logger.exception("the exchange with other hosts failed")
                counters["exchange_errors"] += 1
        if self._pushes is not None:
            self._pushes.close()
        self._spaces.close()

    def _turn(self) -> bool:
        """Wait for something to happen and do all that can be done. True: stop."""
        self._wait()
        now = now_ms()
        if self._inbox.poll(0) and self._take_mail(now):
            return True
        if self.finder is not None:
            for answer in self.finder.take_answers():
                self._pulls.take_answer(answer, now)
        for peer in list(self._peers.values()):
            for reply, frames in peer.receive():
                self._pulls.take_reply(peer, reply, frames, now_ms())
        for space in self._spaces.all():
            for grant in space.client.poll():
                if self._door is None or not self._door.inbox.take_grant(space, grant):
                    self._pulls.take_grant(space, grant, now_ms())
        self._pulls.tick(now_ms())
        if self._pushes is not None:
            self._pushes.turn(now_ms())
        if self._door is not None:
            self._door.serve_burst()
            self._door.pump()
        self._spaces.close_idle(now)
        self._close_idle_peers(now)
        return False

    def _wait(self) -> None:
        """Nearly every turn waits for the same sockets: a poller is made anew only for others."""
        watched = self._watched()
        if watched != self._polled:
            self._poller, self._polled = zmq.Poller(), watched
            for one in watched:
                self._poller.register(one, zmq.POLLIN)
        self._poller.poll(self._wait_ms)

    def _watched(self) -> list[Any]:
        watched: list[Any] = [self._inbox]
        if self.finder is not None:
            watched.append(self.finder.wake_fd)
        if self._door_socket is not None:
            watched.append(self._door_socket)
        if self._pushes is not None:
            watched += self._pushes.sockets
        for peer in self._peers.values():
            watched += peer.sockets
        return watched + [space.client.channel.socket for space in self._spaces.all()]

    @property
    def _wait_ms(self) -> int:
        if self._pulls.busy or (self._door is not None and self._door.busy):
            return BUSY_POLL_MS
        if self._pushes is not None and self._pushes.busy:
            return BUSY_POLL_MS
        waiting = self._pushes is not None and self._pushes.waiting
        return WAITING_POLL_MS if waiting else IDLE_POLL_MS

    def _take_mail(self, now: int) -> bool:
        while self._inbox.poll(0):
            message = self._inbox.recv_multipart()
            if len(message) == 1:
                return True
            if len(message) == 3:
                digest, parent, chain = message
                assert self._pushes is not None
                self._pushes.add(digest, parent, BlockKeys(chain), now)
                continue
            connection, digest, due_ms, payload = message
            request = protocol.decode_request(payload)
            if isinstance(request, Pull):
                keys = BlockKeys(request.keys)
                asker = Asker(connection, request.id, digest, keys, request.parent, int(due_ms))
                self._pulls.ask(asker, now)
            elif isinstance(request, CancelPull):
                self._pulls.cancel(connection, request.id, now)
        return False

    def _tell_offers(self, what: bytes, digest: bytes, keys: bytes) -> None:
        try:
            self._inbox.send_multipart([what, digest, keys], zmq.NOBLOCK)
        except zmq.Again:
            if what == WHOLE:
                self.counters["push_busy"] += 1

    def _answer(self, connection: bytes, pulled: Pulled) -> None:
        try:
            self._inbox.send_multipart([connection, protocol.encode(pulled)], zmq.NOBLOCK)
        except zmq.Again:
            self.counters["replies_lost"] += 1

    def _peer_of(self, host: HostRecord) -> Peer | None:
        """None: it speaks another language, we may not trust it, or it did not answer just now."""
        if not self._trusts(host):
            return None
        peer = self._peers.get(host.id)
        if peer is not None and peer.host != host:
            peer.close()
            del self._peers[host.id]
            peer = None
        peer = peer or self._connect(host)
        if peer is None:
            return None
        self._peers[host.id] = peer
        return peer if now_ms() >= peer.suspect_until_ms else None

    def _trusts(self, host: HostRecord) -> bool:
        if not host.is_ours or bool(host.public_key) != (self._keys is not None):
            self.counters["peers_other_version_or_security"] += 1
            return False
        if self._keys is not None and not self._keys.allows(host.public_key):
            self.counters["peers_unknown_key"] += 1
            return False
        return True

    def _connect(self, host: HostRecord) -> Peer | None:
        """None: its address is none."""
        try:
            return Peer(self._context, host, self._keys)
        except zmq.ZMQError:
            self.counters["peers_bad_address"] += 1
            return None

    def _connect_for_pushes(self, host: HostRecord) -> Peer | None:
        return self._connect(host) if self._trusts(host) else None

    def _close_idle_peers(self, now: int) -> None:
        for host, peer in list(self._peers.items()):
            if now - peer.used_ms > PEER_IDLE_MS or peer.refused(now):
                peer.close()
                del self._peers[host]
