"""The scheduler side's handle on a pool. One thread, never waits, never raises for a failing pool.

Lookups (`match_prefix`) and leases are reads and writes of shared memory: they work whether or not
a daemon runs. Stores go through the daemon; `poll` moves messages and returns the answers.

    no view       no pool file yet, looked for every second
    away          a view perhaps, but no daemon: Hello is sent every second until one answers
    draining      the daemon serves another pool (or gave us another lease bitmap): matches are
                  empty until what is leased and granted in the old one has ended, then the new one
                  is mapped
    connected     stores go

Away again on: a new epoch in the header, Error("hello"), an answer overdue, the lock or pool file
replaced. Each Hello lists the slots still being written; the daemon frees all others, so nothing
leaks however a connection ended.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections import Counter, deque
from pathlib import Path

from vllm_kvpool._native import MAX_CLIENTS, PoolFormatError, PoolView
from vllm_kvpool.channel import Channel
from vllm_kvpool.clock import now_ms, pool_time_s
from vllm_kvpool.errors import PoolUnavailable, ProtocolError
from vllm_kvpool.ledger import StoreGrant, StoreLedger
from vllm_kvpool.liveness import ClientLock
from vllm_kvpool.paths import PoolPaths, check_folder
from vllm_kvpool.protocol import (
    MAX_KEYS,
    NO_CLIENT,
    PROTOCOL_VERSION,
    AnyReply,
    CancelPull,
    Completed,
    CompleteStore,
    Drop,
    Error,
    Hello,
    Namespace,
    Prepared,
    PrepareStore,
    Pull,
    Pulled,
    Touch,
    Welcome,
)
from vllm_kvpool.types import (
    NO_REFS,
    REF_BYTES,
    BlockKeys,
    SlotRefs,
    num_keys,
    num_refs,
    pack_refs,
    unpack_refs,
)

logger = logging.getLogger(__name__)

RETRY_MS = 1_000
"""Between attempts to find a pool or a daemon, and between looks at what may have changed."""
UNSENT_RETRY_MS = 50
"""After a Hello that could not go out for want of a connection: ZeroMQ is just making one."""
MAX_HELLOS = 60
"""Of which an answer is taken, however late: a minute's."""
REFUSALS = ("version", "namespace", "clients_full")
REFUSED_RETRY_MS = 10_000
"""After one of `REFUSALS`: somebody has to change something first."""
MAX_REPLIES = 256
"""Replies taken in one `poll`: a bound for the time spent in a scheduler step."""


class PoolClient:
    """`namespace` None: a client that only looks (no leases, no stores)."""

    def __init__(
        self,
        directory: Path,
        namespace: Namespace | None,
        *,
        client_id: str | None = None,
        timeout_ms: int = 1_000,
    ) -> None:
        paths = PoolPaths(directory)
        self.client_id = client_id or uuid.uuid4().hex
        self.pool_path = paths.pool
        self.lock_path = paths.client_lock(self.client_id)
        self.view: PoolView | None = None
        self.skipped: Counter[str] = Counter()
        """What was not done, by reason."""
        self.timeout_ms = timeout_ms
        """How long the daemon may take for an answer; a change counts for what is sent from then on."""
        self._namespace = namespace
        self._channel = Channel(paths.endpoint)
        self._lock = ClientLock(self.lock_path)
        self._ledger = StoreLedger()
        self._pulling: set[int] = set()
        self._pulled: list[Pulled] = []
        self._ids = itertools.count(1)
        self._hellos: deque[int] = deque(maxlen=MAX_HELLOS)
        self._welcome: Welcome | None = None
        self._draining = False
        self._bitmap = NO_CLIENT
        self._next_try_ms = 0
        self._said: set[str] = set()

    @property
    def connected(self) -> bool:
        """Whether stores are taken now."""
        return self._welcome is not None and not self._draining

    @property
    def channel(self) -> Channel:
        """Its socket is readable when `poll` may have something to take."""
        return self._channel

    @property
    def readable(self) -> bool:
        """Whether blocks can be found and leased; a daemon has answered once."""
        return self.view is not None and not self._draining and self._may_read

    @property
    def writing(self) -> SlotRefs:
        """Slots that this client still has to complete."""
        return self._ledger.writing

    def is_open(self, grant_id: int) -> bool:
        """Whether the daemon has not acknowledged the end of that grant yet."""
        return self._ledger.is_open(grant_id)

    def close(self) -> None:
        """What is still leased or being written returns to the pool once no process of the engine
        holds the lock."""
        self._channel.close()
        self._lock.close()
        self._welcome = None
        self.view = None

    # blocks ---------------------------------------------------------------------------------------

    def match_prefix(self, keys: BlockKeys) -> SlotRefs:
        """The longest run of leading READY blocks; b"" when there is no pool."""
        if self.view is None or not self.readable:
            self.skipped["match_no_pool"] += 1
            return NO_REFS
        return SlotRefs(self.view.match_prefix(keys, pool_time_s()))

    @property
    def _may_read(self) -> bool:
        """A hit is worth something to those who can lease it, once a daemon has lent them a
        bitmap."""
        return self._bitmap != NO_CLIENT or self._namespace is None

    def lease(self, refs: SlotRefs) -> SlotRefs:
        """Those that are leased now: all up to the first whose slot is another block's by now."""
        if self.view is None or self._draining or self._bitmap == NO_CLIENT:
            self.skipped["lease_no_pool"] += 1
            return NO_REFS
        leased = self.view.lease(refs)
        run = len(leased) - len(leased.lstrip(b"\1"))
        if run == len(leased):
            return refs
        behind = zip(unpack_refs(refs)[run:], leased[run:], strict=True)
        self.view.release(pack_refs(ref for ref, held in behind if held))
        return SlotRefs(refs[: run * REF_BYTES])

    def release(self, refs: SlotRefs) -> None:
        assert self.view is not None, "released without a lease"
        self.view.release(refs)

    def prepare_store(
        self,
        keys: BlockKeys,
        parent: bytes = b"",
        ttl_s: int = 0,
        pin: bool = False,
        source: bytes = b"",
    ) -> int | None:
        """Ask for slots for a chain of blocks. The number that `poll` will answer with, or None:
        skipped. `source`: see `PrepareStore`."""
        reason = self._why_not(num_keys(keys))
        if reason is not None:
            self.skipped[reason] += 1
            return None
        due_ms = now_ms() + self.timeout_ms
        request = PrepareStore(
            id=next(self._ids),
            deadline_ms=due_ms,
            keys=keys,
            parent=parent,
            ttl_s=ttl_s,
            pin=pin,
            source=source,
        )
        if not self._channel.send(request):
            self.skipped["store_not_sent"] += 1
            self._leave()
            return None
        self._ledger.asked(request, due_ms)
        return request.id

    def _why_not(self, num_blocks: int) -> str | None:
        if not self.connected or self._namespace is None:
            return "store_not_connected"
        if num_blocks > MAX_KEYS:
            return "store_too_large"
        if not self._ledger.has_room(num_blocks):
            return "store_busy"
        return None

    def complete_store(self, grant_id: int, aborted: SlotRefs = NO_REFS) -> bool:
        """Every grant ends here once: the bytes of all its slots are there, but for `aborted`. False: its slots have
        gone away with their pool."""
        request = self._ledger.completing(next(self._ids), grant_id, aborted)
        if request is not None and self.connected:
            self._send_completion(request)
        return request is not None

    def pull(self, keys: BlockKeys, parent: bytes, within_ms: int) -> int | None:
        """Ask for a chain's missing tail from other hosts. The number that `take_pulled` will answer
        with, or None: skipped."""
        if not self.pulls:
            self.skipped["pull_not_connected"] += 1
            return None
        request = Pull(id=next(self._ids), keys=keys, parent=parent, within_ms=within_ms)
        if num_keys(keys) > MAX_KEYS or not self._channel.send(request):
            self.skipped["pull_not_sent"] += 1
            return None
        self._pulling.add(request.id)
        return request.id

    def cancel_pull(self, pull_id: int) -> None:
        """Nobody waits for it any more; its answer may be on its way."""
        if pull_id in self._pulling:
            self._pulling.discard(pull_id)
            self._channel.send(CancelPull(id=pull_id))

    def take_pulled(self) -> list[Pulled]:
        """Answers that `poll` has received since the last call."""
        pulled, self._pulled = self._pulled, []
        return pulled

    @property
    def pulls(self) -> bool:
        """Whether other hosts can be asked for blocks."""
        return self.connected and self._welcome is not None and self._welcome.pulls

    def touch(self, refs: SlotRefs) -> None:
        """A chain (head first) was used."""
        if not self.connected or not self._channel.send(Touch(id=next(self._ids), refs=refs)):
            self.skipped["touch_not_sent"] += 1

    def drop(self, refs: SlotRefs) -> None:
        """These blocks hold wrong bytes."""
        if not self.connected or not self._channel.send(Drop(id=next(self._ids), refs=refs)):
            self.skipped["drop_not_sent"] += 1

    # messages -------------------------------------------------------------------------------------

    def poll(self) -> list[StoreGrant]:
        """Take what has arrived, notice what is overdue, connect if need be. Call it at every
        step."""
        now = now_ms()
        if self._expects_reply or now >= self._next_try_ms:
            self._receive()
        if self._welcome is not None and self._is_replaced(self._welcome):
            self._leave("lost")
        elif self._ledger.overdue(now):
            self._leave("timeout")
        if now >= self._next_try_ms:
            self._next_try_ms = now + RETRY_MS
            self._look_around()
        return self._ledger.take_finished()

    @property
    def _expects_reply(self) -> bool:
        """A look at the socket costs more than all else in an idle step."""
        return self._welcome is None or bool(self._pulling) or self._ledger.outstanding

    def _receive(self) -> None:
        for _ in range(MAX_REPLIES):
            try:
                reply = self._channel.receive()
            except ProtocolError:
                self.skipped["reply_malformed"] += 1
                self._say_once("an answer of the daemon cannot be read: is it of another version?")
                continue
            if reply is None:
                break
            self._take(reply)

    def _take(self, reply: AnyReply) -> None:
        match reply:
            case Prepared():
                self._take_grant(reply)
            case Completed():
                self._ledger.completed(reply.id)
            case Pulled() if reply.id in self._pulling:
                self._pulling.discard(reply.id)
                self._pulled.append(reply)
            case Welcome() if reply.id in self._hellos:
                self._take_welcome(reply)
            case Error():
                self._take_error(reply)

    def _take_welcome(self, welcome: Welcome) -> None:
        lent = range(NO_CLIENT, 0) if self._namespace is None else range(MAX_CLIENTS)
        if welcome.client not in lent:
            self._distrust(f"it made us client {welcome.client}")
            return
        self._welcome = welcome
        self._adopt(welcome)

    def _distrust(self, what: str) -> None:
        """It is no daemon of ours that answers so, or a broken one."""
        self._say_once(f"the daemon's answer makes no sense, asking again: {what}")
        self._leave("lost", retry_ms=REFUSED_RETRY_MS)

    def _take_grant(self, reply: Prepared) -> None:
        try:
            late = self._ledger.granted(reply)
        except ProtocolError as error:
            self._distrust(str(error))
            return
        if late:
            self.skipped["grant_too_late"] += num_refs(late)
            # Once is enough: if it does not arrive, the next Hello does the same.
            self._channel.send(CompleteStore(id=next(self._ids), refs=b"", aborted=late))

    def _take_error(self, error: Error) -> None:
        if error.id in self._hellos:
            self._say_once(f"the daemon refused this engine: {error.message} ({error.code})")
            refused = error.code in REFUSALS
            self._next_try_ms = now_ms() + (REFUSED_RETRY_MS if refused else RETRY_MS)
        elif error.code == "hello":
            self._leave("lost")
        else:
            self.skipped[f"refused_{error.code}"] += 1
            if self._ledger.refused(error.id, error.code):
                self._say_once(f"the end of a store was refused: {error.message} ({error.code})")
                self._leave("lost", retry_ms=RETRY_MS)

    # connection -----------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Once a second: find the pool or the daemon, or notice that one of them is another now."""
        if self._welcome is not None and self._has_new_lock():
            self._leave("lost")
        if self._welcome is None:
            self._knock()
        elif self._draining:
            self._adopt(self._welcome)

    def _knock(self) -> None:
        if self._may_use_folder():
            self.view = self.view or self._open()
            self._say_hello()

    def _may_use_folder(self) -> bool:
        """Looked at again before anything there is opened: a folder that was deleted may come back as
        somebody else's."""
        try:
            check_folder(self.pool_path.parent)
        except PoolUnavailable as error:
            self._say_once(f"no pool: {error}")
            return False
        return True

    def _has_new_lock(self) -> bool:
        """Whether our lock file was deleted and could be made anew: the daemon has to be told."""
        if self._namespace is None or self._lock.held:
            return False
        return self._may_use_folder() and self._lock.hold()

    def _is_replaced(self, welcome: Welcome) -> bool:
        """Whether another daemon has taken the pool over; a look into shared memory."""
        if self.view is None or self._draining:
            return False
        return self.view.epoch != welcome.epoch

    def _leave(self, reason: str = "lost", retry_ms: int = 0) -> None:
        """Not connected any more; say hello in `retry_ms`."""
        self._welcome = None
        self._hellos.clear()
        self._pulled += [Pulled(id=pull_id, reason="lost") for pull_id in self._pulling]
        self._pulling.clear()
        self._next_try_ms = now_ms() + retry_ms
        lost = self._ledger.lose_outstanding(reason)
        if lost:
            self.skipped[f"store_{reason}"] += lost

    def _say_hello(self) -> None:
        if self._namespace is not None and not self._lock.hold():
            return
        hello = Hello(
            id=next(self._ids),
            version=PROTOCOL_VERSION,
            now_ms=now_ms(),
            pid=os.getpid(),
            client_id="" if self._namespace is None else self.client_id,
            namespace=self._namespace,
            writing=self._ledger.writing,
        )
        if self._channel.send(hello):
            self._hellos.append(hello.id)
        else:
            self._next_try_ms = now_ms() + UNSENT_RETRY_MS

    def _adopt(self, welcome: Welcome) -> None:
        """Use the pool and the lease bitmap that the daemon named, as soon as nothing of others is held: no
        lease, and no grant, whose references could name somebody's slots in the new pool."""
        same_pool = self.view is not None and self.view.pool_id == welcome.pool_id
        if same_pool and self._bitmap == welcome.client:
            self._enter()
            return
        self._draining = True
        if self.view is not None and (self.view.leased_slots or self._ledger.holds_grants):
            return
        if not same_pool and not self._remap(welcome):
            return
        assert self.view is not None
        if welcome.client != NO_CLIENT:
            self.view.attach_client(welcome.client)
        self._bitmap = welcome.client
        self._enter()

    def _enter(self) -> None:
        self._draining = False
        for request in self._ledger.unsent:
            self._send_completion(request)

    def _send_completion(self, request: CompleteStore) -> None:
        if self._channel.send(request):
            self._ledger.sent(request, now_ms() + self.timeout_ms)
        else:
            self._leave()

    def _remap(self, welcome: Welcome) -> bool:
        """Map the pool that the daemon serves. The old mapping's stores mean nothing there."""
        if self.view is not None:
            self._ledger.forget()
            self.view, self._bitmap = None, NO_CLIENT
        self.view = self._open() if self._may_use_folder() else None
        if self.view is not None and self.view.pool_id == welcome.pool_id:
            return True
        self._say_once(f"{self.pool_path} is not what its daemon serves: restart the daemon")
        return False

    def _open(self) -> PoolView | None:
        try:
            return PoolView.open(str(self.pool_path))
        except FileNotFoundError:
            return None
        except (OSError, PoolFormatError) as error:
            self._say_once(f"cannot use {self.pool_path}: {error}")
            return None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("KV pool: %s", text)
