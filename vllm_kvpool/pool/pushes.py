"""Pushes: what engines store here goes to the upstream, a batch of a chain at a time.

    add ── queue, until the blocks are READY ── write_blocks ── wanted ── blocks, from the slots ── written

Best effort, and nobody waits for it. While the upstream is away chains wait in the queue, as long as
there is room; what has left the pool by its turn is forgotten. A batch is asked for once the batch
before it in its chain has slots up there: without its parent a block is of no use. The bytes go from
pool memory, through an outbox, so a slow upstream costs leases on a few batches and no memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from vllm_kvpool.pool.offers import ARRIVED, WHOLE
from vllm_kvpool.pool.outbox import Outbox
from vllm_kvpool.pool.peer import Peer
from vllm_kvpool.pool.push_queue import Chain, PushQueue
from vllm_kvpool.pool.spaces import Space, Spaces
from vllm_kvpool.protocol import AnyReply, Error, ReadBlocks, Wanted, WriteBlocks, Written
from vllm_kvpool.types import BlockKeys, num_keys, num_refs, split_keys

BATCH_BYTES = 8 << 20
WRITES_A_CONNECTION = 3
"""Under way on each that is up: the next one waits already, and the upstream takes eight."""
MAX_WAITING = 65_536
"""Blocks in the queue."""
LOOKED_AT, PASSED_OVER = 64, 1_024
"""Chains of the queue, in one turn: looked up in the pool, and left where they are unseen. The next turn goes on
where they ended, so whatever stands at the head, all have their turn."""
PATIENCE_MS = 10_000
"""For blocks to become READY, or their namespace to be known: an engine that writes for longer has died or given
up, a daemon that is silent for longer gives no namespace."""
STALL_MS = 5_000
"""An upstream that takes and says nothing for so long is lost."""
ANSWER_MS = 15_000
"""For a batch of which nothing is here any more. The upstream waits ten seconds for a byte."""
PAUSE_MS = 1_000
"""After a refusal that may pass."""
RETRY_MS = 2_000
"""Before the next attempt to reach an upstream that was lost."""
MAX_TRIES = 8
RETRIED = {"no_room", "busy", "deadline", "checksum", "lost"}


@dataclass(slots=True, eq=False)
class _Push:
    """A batch under way."""

    batch: Chain
    space: Space
    socket: zmq.Socket[bytes]
    heard_ms: int
    """When the upstream said something about it, or bytes of it were still here."""
    num_wanted: int | None = None
    """None: not answered yet."""


class Pushes:
    def __init__(
        self,
        spaces: Spaces,
        connect: Callable[[], Peer | None],
        tell: Callable[[bytes, bytes, bytes], None],
        counters: Counter[str],
    ) -> None:
        """`connect`: to the upstream, over connections of our own: bulk shall not hold up pulls.
        `tell`: what, namespace and keys, as `Offers.hear` wants it."""
        self._spaces = spaces
        self._connect = connect
        self._tell = tell
        self._counters = counters
        self._ids = itertools.count(1)
        self._queue = PushQueue(counters)
        self._peer: Peer | None = None
        self._outboxes: dict[zmq.Socket[bytes], Outbox] = {}
        self._leaving: list[Outbox] = []
        """Of connections that were given up: ZeroMQ still holds frames of theirs."""
        self._open: dict[int, _Push] = {}
        self._progress = 0
        self._heard_ms = 0
        self._not_before_ms = 0
        self._place = 0
        """In the queue, where the next turn begins."""
        self._headless: dict[bytes, Chain] = {}
        """By their last keys: batches whose whole chain shall come, from the pool. What comes behind them waits."""

    # what is to be pushed -------------------------------------------------------------------------

    def add(self, digest: bytes, parent: bytes, keys: BlockKeys, now: int) -> None:
        """A chain that is here, or will be soon."""
        chain = Chain(digest, parent, keys, now)
        batch = None if parent else self._headless.pop(chain.last, None)
        if batch is not None:
            chain.wholes, chain.not_before_ms = batch.wholes, batch.not_before_ms
        self._queue.add(chain)
        while self._queue.num_blocks > MAX_WAITING and len(self._queue) > 1:
            self._give_up(self._queue.take_out(self._oldest), "slow" if self._reachable else "lost")

    @property
    def _oldest(self) -> int:
        """Place in the queue; of what is not the rest of a chain on its way, unless there is nothing else."""
        on_their_way = {push.batch.last for push in self._open.values()}
        return next((n for n, c in enumerate(self._queue) if c.parent not in on_their_way), 0)

    # a turn ---------------------------------------------------------------------------------------

    @property
    def _reachable(self) -> bool:
        return self._peer is not None and self._peer.num_greeted > 0

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return self._peer.sockets if self._peer is not None else []

    @property
    def busy(self) -> bool:
        """Whether frames are on their way."""
        return any(outbox.busy for outbox in (*self._outboxes.values(), *self._leaving))

    @property
    def waiting(self) -> bool:
        """Whether something may be READY in a moment."""
        return bool(self._queue) and self._reachable

    def turn(self, now: int) -> None:
        self._counters["push_waiting"] = self._queue.num_blocks
        self._leaving = [outbox for outbox in self._leaving if _pumped(outbox).busy]
        if self._peer is None:
            if not self._queue or now < self._not_before_ms:
                return
            self._enter(now)
        if self._peer is None:
            return
        peer = self._peer
        for reply, _ in peer.receive():
            self._heard_ms = now
            self._take(reply, now)
            if self._peer is not peer:
                return
        for outbox in self._outboxes.values():
            outbox.pump()
        self._retry_unanswered(now)
        self._forget_headless(now)
        progress = sum(outbox.released for outbox in self._outboxes.values())
        if progress != self._progress or not self._open:
            self._progress, self._heard_ms = progress, now
        if now - self._heard_ms > STALL_MS:
            self._lose(now)
        elif self._peer.refused(now):
            self.close()
        elif self._reachable and now >= self._not_before_ms:
            self._begin(now)

    def _retry_unanswered(self, now: int) -> None:
        """Of batches whose answer got lost, while others are answered."""
        assert self._peer is not None
        for push_id, push in list(self._open.items()):
            if self._outboxes[push.socket].holds(b"", push_id):
                push.heard_ms = now
            elif now - push.heard_ms > ANSWER_MS:
                del self._open[push_id]
                self._peer.forget(push_id)
                self._counters["push_unanswered"] += 1
                self._refused(push, "lost", now)

    def _forget_headless(self, now: int) -> None:
        """Nobody has their heads any more, or the question got lost."""
        for last, batch in list(self._headless.items()):
            if now - batch.not_before_ms <= PATIENCE_MS:
                return
            del self._headless[last]

    def _enter(self, now: int) -> None:
        self._peer = self._connect()
        if self._peer is None:
            self._not_before_ms = now + RETRY_MS
            return
        self._outboxes = {socket: Outbox(socket, self._counters) for socket in self._peer.sockets}
        self._heard_ms, self._progress = now, 0

    def _lose(self, now: int) -> None:
        """It hangs, or nothing passes, or it was restarted: connect anew and begin anew."""
        self._counters["push_losses"] += 1
        for push_id in reversed(self._open):
            self._retry(self._open[push_id].batch, "lost")
        self._open.clear()
        self.close()
        self._not_before_ms = now + RETRY_MS

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        for outbox in self._outboxes.values():
            outbox.drop(b"")
        self._leaving += self._outboxes.values()
        self._outboxes = {}

    # batches --------------------------------------------------------------------------------------

    def _begin(self, now: int) -> None:
        assert self._peer is not None
        if not self._peer.takes_writes:
            self._queue.drop_all("version")
        unanswered = {p.batch.last for p in self._open.values() if p.num_wanted is None}
        most_open = WRITES_A_CONNECTION * self._peer.num_greeted
        place, looked_at, passed_over = self._place, 0, 0
        self._place = 0
        while place < len(self._queue) and len(self._open) < most_open:
            if looked_at == LOOKED_AT or passed_over == PASSED_OVER:
                self._place = place
                return
            chain = self._queue[place]
            if self._waits(chain, unanswered, now):
                passed_over += 1
                place += 1
                continue
            looked_at += 1
            space = self._spaces.get(chain.digest, now)
            ready = 0 if space is None else _ready(space, chain)
            if ready and space is not None:
                batch = self._ask(self._queue.take_out(place), space, ready, now)
                unanswered.add(batch.last)
            elif now - _since_ms(space, chain) > PATIENCE_MS:
                known = space is None or space.client.readable
                self._queue.drop(self._queue.take_out(place), "evicted" if known else "lost")
            else:
                place += 1

    def _waits(self, chain: Chain, unanswered: set[bytes], now: int) -> bool:
        """For its time, or for what comes before it: nothing in the pool changes that."""
        parent = chain.parent
        before = parent in unanswered or parent in self._queue.lasts or parent in self._headless
        return before or now < chain.not_before_ms

    def _ask(self, chain: Chain, space: Space, ready: int, now: int) -> Chain:
        assert self._peer is not None
        batch, rest = chain.split(min(ready, max(1, BATCH_BYTES // space.slot_bytes)))
        if rest is not None:
            self._queue.put_back(rest)  # its turn comes when this batch is answered
        request = WriteBlocks(
            id=next(self._ids), namespace=space.namespace, keys=batch.keys, parent=batch.parent
        )
        self._open[request.id] = _Push(batch, space, self._peer.ask(request), now)
        return batch

    # answers --------------------------------------------------------------------------------------

    def _take(self, reply: AnyReply, now: int) -> None:
        push = self._open.get(reply.id)
        if push is not None:
            push.heard_ms = now
        match reply:
            case Wanted() if push is not None and push.num_wanted is None:
                self._send(reply, push)
            case Written() if push is not None:
                del self._open[reply.id]
                self._finish(push, reply, now)
            case Error(code="hello"):
                self._lose(now)
            case Error(code="version"):
                self._queue.drop_all("version")
            case Error() if push is not None:
                del self._open[reply.id]
                self._counters[f"peer_error_{reply.code}"] += 1
                self._refused(push, reply.code, now)

    def _send(self, wanted: Wanted, push: _Push) -> None:
        chosen = itertools.compress(split_keys(push.batch.keys), wanted.places)
        read = ReadBlocks(id=wanted.id, namespace=push.space.digest, keys=b"".join(chosen))
        push.num_wanted = num_keys(read.keys)
        self._outboxes[push.socket].add(b"", read, push.space)

    def _finish(self, push: _Push, written: Written, now: int) -> None:
        self._counters["pushed_blocks"] += written.blocks
        if written.reason:
            self._refused(push, written.reason, now)
        elif push.num_wanted is not None and written.blocks < push.num_wanted:
            self._counters["push_evicted"] += push.num_wanted - written.blocks
        else:
            self._tell(ARRIVED, push.batch.digest, push.batch.keys)

    def _refused(self, push: _Push, reason: str, now: int) -> None:
        if reason == "no_parent":
            self._ask_for_whole(push.batch, now)
        elif reason in RETRIED:
            push.batch.not_before_ms = now + PAUSE_MS
            if reason == "busy":
                self._not_before_ms = now + PAUSE_MS
            self._retry(push.batch, reason)
        else:
            self._queue.drop(push.batch, "refused")

    def _ask_for_whole(self, batch: Chain, now: int) -> None:
        """Not without end: in an upstream that is full each chain may be evicted by the next one."""
        batch.wholes += 1
        if batch.wholes < MAX_TRIES:
            batch.not_before_ms = now + PAUSE_MS
            self._headless.pop(batch.last, None)  # they are in order of time
            self._headless[batch.last] = batch
            self._tell(WHOLE, batch.digest, batch.last)
        else:
            self._give_up(batch, "lost")

    def _retry(self, batch: Chain, reason: str) -> None:
        batch.tries += 1
        if batch.tries < MAX_TRIES:
            self._queue.put_back(batch)
        else:
            self._give_up(batch, reason)

    def _give_up(self, batch: Chain, reason: str) -> None:
        self._queue.drop(batch, reason)
        self._queue.drop_behind(batch, reason)


def _since_ms(space: Space | None, chain: Chain) -> int:
    """When its blocks could have been seen first: what has waited for the upstream for long may be of a namespace
    that nobody has asked for until now."""
    if space is None or space.client.readable:
        return chain.since_ms
    return max(chain.since_ms, space.made_ms)


def _ready(space: Space, chain: Chain) -> int:
    """How many of its leading blocks can be sent. 0 of a namespace whose client has not connected."""
    if not space.client.readable:
        return 0
    if chain.parent and not space.client.match_prefix(BlockKeys(chain.parent)):
        return 0
    return num_refs(space.client.match_prefix(chain.keys))


def _pumped(outbox: Outbox) -> Outbox:
    outbox.pump()
    return outbox
