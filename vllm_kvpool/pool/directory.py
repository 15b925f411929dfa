"""Which hosts hold which blocks: a directory in Redis (or Valkey), on a thread of its own.

    kvpool:1:<pool>:{hosts}          set of host ids
    kvpool:1:<pool>:{hosts}:<id>     a host's record; expires when it stops beating
    kvpool:1:<pool>:{xx}:<key>       set of host ids that hold a block; xx are the first digits of its key

All of it are hints: a host that is gone, or that has forgotten the block, costs a miss. Every command
names one key, and the braces spread them over the nodes of a Redis Cluster. Times are Redis's own
(EXPIRE), so clocks need not agree.

Nobody waits for Redis. Lookups are handed over (`ask`) and answered later (`take_answers`), writes are
gathered and sent in batches. While Redis is away lookups find nothing, writes are forgotten, and once
it is back (perhaps empty) `wants_all` asks for everything again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from vllm_kvpool._native import FORMAT_VERSION
from vllm_kvpool.pool.redis_url import TIMEOUT_S, connector
from vllm_kvpool.protocol import ACCEPTED_VERSIONS, POOL_ID_BYTES, PROTOCOL_VERSION, decoder

logger = logging.getLogger(__name__)

SCHEMA = 1
BEAT_S = 2.0
HOST_TTL_S = 10
BLOCK_TTL_S = 900
FLUSH_S = 0.1
RETRY_S = 1.0
BATCH = 1_000
"""Writes in one round trip: about a millisecond of Redis, which a lookup may have to wait for."""
MAX_WRITES = 500_000
CACHE_S = 1.0
MAX_CACHED = 100_000


class HostRecord(msgspec.Struct, frozen=True):
    """What a host says of itself."""

    id: bytes
    address: str
    """tcp://host:port"""
    public_key: bytes = b""
    """Z85; empty without CURVE."""
    protocol: int = PROTOCOL_VERSION
    format: int = FORMAT_VERSION

    @property
    def is_ours(self) -> bool:
        """Whether we can talk to it, and use its blocks byte by byte."""
        if not self.address.startswith("tcp://"):
            return False
        return self.protocol in ACCEPTED_VERSIONS and self.format == FORMAT_VERSION


class Answer(NamedTuple):
    ticket: int
    hosts: list[tuple[HostRecord, int]]
    """Who holds some of the blocks, and how many of the chain up to the last of them; the longest
    first."""


class _Ask(NamedTuple):
    ticket: int
    anchors: list[tuple[int, bytes]]


class Directory:
    """`url`: redis://, rediss:// (TLS), and with "-cluster" behind that (redis-cluster://) for a Redis
    Cluster; user, password and options as redis-py reads them. `me` None: this host serves nobody."""

    def __init__(
        self, url: str, pool: str, pool_id: str, me: HostRecord | None, counters: Counter[str]
    ) -> None:
        self._connect, self._failures = connector(url)
        self._prefix = f"kvpool:{SCHEMA}:{pool}:".encode()
        self._id = bytes.fromhex(pool_id)
        self._me = me
        self._counters = counters
        self._redis: Any = None
        self._asks: queue.SimpleQueue[_Ask | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there are answers."""
        self._lock = threading.Lock()
        self._writes: dict[tuple[bytes, bytes], bool] = {}
        """(block, host) -> holds it. Guarded by the lock."""
        self._cache: dict[bytes, tuple[float, frozenset[bytes]]] = {}
        self._hosts: dict[bytes, HostRecord] = {}
        self.living: frozenset[bytes] = frozenset()
        """Ids of the hosts whose heart beat when we last looked."""
        self._said_away = False
        self.wants_all = False
        """Redis knows nothing of this host's blocks: `announce` them all."""
        self._thread = threading.Thread(target=self._run, name="kvpool-directory", daemon=True)

    # from any thread ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._asks.put(None)
        self._thread.join(2 * TIMEOUT_S + 1)
        os.close(self.wake_fd)

    @property
    def available(self) -> bool:
        return self._redis is not None

    def ask(self, ticket: int, anchors: list[tuple[int, bytes]]) -> None:
        """Who holds them? `take_answers` says, soon or late."""
        self._asks.put(_Ask(ticket, anchors))

    def take_answers(self) -> list[Answer]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        answers = []
        while not self._answers.empty():
            answers.append(self._answers.get())
        return answers

    def announce(self, keys: Iterable[bytes], here: bool) -> None:
        """This host has these blocks now, or no more."""
        if self._me is not None:
            self._note([(key, self._id, here) for key in keys])

    @property
    def is_behind(self) -> bool:
        """Whether so much waits to be written that what is in no hurry should wait."""
        return len(self._writes) > MAX_WRITES // 4

    def forget(self, keys: Iterable[bytes], host: bytes) -> None:
        """`host` has none of these blocks, whatever is written of it."""
        self._note([(key, host, False) for key in keys])

    def _note(self, writes: list[tuple[bytes, bytes, bool]]) -> None:
        if not writes or not self.available:
            return
        with self._lock:
            if len(self._writes) > MAX_WRITES:
                self._writes.clear()
                self.wants_all = True
                self._counters["directory_overflows"] += 1
            for key, host, holds in writes:
                self._writes[key, host] = holds

    # the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                return self._serve()
            except Exception as error:
                # The pool of this host goes on, for a moment without a directory.
                logger.exception("the directory's thread failed, it begins anew")
                self._counters["directory_failed"] += 1
                self._lose(error)
                time.sleep(RETRY_S)

    def _serve(self) -> None:
        next_beat_s = next_flush_s = next_try_s = 0.0
        while (asks := self._take_asks(FLUSH_S)) is not None:
            try:
                now_s = time.monotonic()
                if self._redis is None and now_s >= next_try_s:
                    next_try_s = now_s + RETRY_S
                    redis = self._connect()
                    redis.ping()
                    self._redis = redis
                    next_beat_s = 0.0
                if self._redis is None:
                    self._reply_nothing(asks)
                    continue
                if asks:
                    self._look_up(asks)
                    asks = []
                if now_s >= next_beat_s:
                    next_beat_s = now_s + BEAT_S
                    self._beat()
                if now_s >= next_flush_s:
                    next_flush_s = now_s + FLUSH_S
                    self._flush()
            except self._failures as error:
                self._lose(error)
                next_try_s = time.monotonic() + RETRY_S
                self._reply_nothing(asks)
        self._leave()

    def _take_asks(self, wait_s: float) -> list[_Ask] | None:
        """All that were asked; waits for the first. None: stop."""
        asks: list[_Ask] = []
        try:
            ask = self._asks.get(timeout=wait_s)
            while True:
                if ask is None:
                    return None
                asks.append(ask)
                ask = self._asks.get_nowait()
        except queue.Empty:
            return asks

    def _lose(self, error: Exception) -> None:
        self._counters["directory_errors"] += 1
        if not self._said_away:
            logger.warning(
                "the directory is away, going on with the blocks of this host: %s", error
            )
            self._said_away = True
        self._redis = None
        self.living = frozenset()
        self.wants_all = True  # what was not written is not known any more
        with self._lock:
            self._writes.clear()
        self._cache.clear()

    def _leave(self) -> None:
        """A clean end: others need not find out."""
        if self._redis is None or self._me is None:
            return
        with contextlib.suppress(*self._failures):
            self._redis.delete(self._host_key(self._id))

    def _reply(self, ticket: int, hosts: list[tuple[HostRecord, int]]) -> None:
        self._answers.put(Answer(ticket, hosts))
        with contextlib.suppress(OSError):
            os.eventfd_write(self.wake_fd, 1)

    def _reply_nothing(self, asks: list[_Ask]) -> None:
        for ask in asks:
            self._reply(ask.ticket, [])

    # reads ----------------------------------------------------------------------------------------

    def _look_up(self, asks: list[_Ask]) -> None:
        """One round trip for all that were asked meanwhile."""
        now_s = time.monotonic()
        wanted = {key for ask in asks for _, key in ask.anchors}
        fresh = {key for key in wanted if self._cache.get(key, (0.0,))[0] > now_s}
        self._fetch(list(wanted - fresh), now_s)
        self._counters["directory_lookups"] += len(asks)
        unknown = {host for key in wanted for host in self._cache[key][1]} - self._hosts.keys()
        if unknown:
            self._fetch_hosts(unknown)
        for ask in asks:
            self._reply(ask.ticket, self._holders(ask))

    def _fetch(self, keys: list[bytes], now_s: float) -> None:
        if not keys:
            return
        if len(self._cache) > MAX_CACHED:
            self._cache = {key: entry for key, entry in self._cache.items() if entry[0] > now_s}
        pipe = self._redis.pipeline(transaction=False)
        for key in keys:
            pipe.smembers(self._block_key(key))
        for key, hosts in zip(keys, pipe.execute(), strict=True):
            self._cache[key] = (now_s + CACHE_S, frozenset(hosts))

    def _holders(self, ask: _Ask) -> list[tuple[HostRecord, int]]:
        reach: dict[bytes, int] = {}
        for place, key in ask.anchors:
            for host in self._cache[key][1]:
                reach[host] = place + 1
        reach.pop(self._id, None)
        found = [
            (self._hosts[host], blocks) for host, blocks in reach.items() if host in self._hosts
        ]
        return sorted(found, key=lambda entry: -entry[1])

    # writes ---------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Say that we live, and hear who else does."""
        if self._me is not None:
            record = msgspec.msgpack.encode(self._me)
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(self._host_key(self._id), record, ex=HOST_TTL_S, xx=True)
            pipe.sadd(self._hosts_key, self._id)
            if not pipe.execute()[0]:
                # No record of us: Redis was emptied, or we were away for too long.
                self._redis.set(self._host_key(self._id), record, ex=HOST_TTL_S)
                self.wants_all = True
        members = set(self._redis.smembers(self._hosts_key))
        self._hosts = {host: record for host, record in self._hosts.items() if host in members}
        self._fetch_hosts(members)
        self.living = frozenset(self._hosts)
        if self._said_away:
            logger.info("the directory is back")
            self._said_away = False

    def _fetch_hosts(self, ids: Iterable[bytes]) -> None:
        ids = [host for host in ids if len(host) == POOL_ID_BYTES]
        pipe = self._redis.pipeline(transaction=False)
        for host in ids:
            pipe.get(self._host_key(host))
        for host, raw in zip(ids, pipe.execute(), strict=True):
            record = _record(raw)
            if record is not None and record.id == host:
                self._hosts[host] = record
            else:
                self._hosts.pop(host, None)
                if raw is None and host != self._id:
                    self._redis.srem(self._hosts_key, host)

    def _flush(self) -> None:
        while True:
            with self._lock:
                batch = [self._writes.popitem() for _ in range(min(BATCH, len(self._writes)))]
            if not batch:
                return
            pipe = self._redis.pipeline(transaction=False)
            for (key, host), holds in batch:
                name = self._block_key(key)
                if holds:
                    pipe.sadd(name, host)
                    pipe.expire(name, BLOCK_TTL_S)
                else:
                    pipe.srem(name, host)
                self._cache.pop(key, None)
            pipe.execute()
            self._counters["directory_writes"] += len(batch)
            if not self._asks.empty():
                return  # the rest can wait

    # names ----------------------------------------------------------------------------------------

    @property
    def _hosts_key(self) -> bytes:
        return self._prefix + b"{hosts}"

    def _host_key(self, host: bytes) -> bytes:
        return self._prefix + b"{hosts}:" + host

    def _block_key(self, key: bytes) -> bytes:
        return self._prefix + b"{%02x}:" % key[0] + key


_decode_record = decoder(HostRecord)


def _record(raw: bytes | None) -> HostRecord | None:
    try:
        return None if raw is None else _decode_record(raw)
    except msgspec.DecodeError:
        return None
