"""Pulls: a chain's missing tail comes from another host into slots of this one.

    ask ── all here? ── answer
     '── first missing block on its way already? ── wait for that flight
     '── new flight:  LOOK_UP   the directory names hosts, the one with most of the chain first
                      MATCH     that host says how many of the blocks it really has
                      TRANSFER  slots for a batch, its bytes, its completion; a few batches at a time
                      end       answer those who wait, or see what else they miss

One flight at most brings a block at a time, however many ask for it. Who asks has a deadline, and a
flight ends with the last of its askers. It takes only so many blocks as the link can bring by then:
the start of a chain is worth something without its end. Bytes that come later find no slot: they go
by a number that nobody knows any more.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from vllm_kvpool._native import copy_checked
from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.pool.anchors import anchors, asked
from vllm_kvpool.pool.directory import Answer, Directory, HostRecord
from vllm_kvpool.pool.peer import Peer
from vllm_kvpool.pool.spaces import Space, Spaces
from vllm_kvpool.protocol import (
    AnyReply,
    Blocks,
    Error,
    MatchBlocks,
    Matched,
    Pulled,
    ReadBlocks,
)
from vllm_kvpool.types import (
    KEY_BYTES,
    BlockKeys,
    SlotRefs,
    num_keys,
    num_refs,
    pack_refs,
    unpack_refs,
)

BATCH_BYTES = 8 << 20
WINDOW_BATCHES = 12
"""Of one flight: enough for every connection to have the next one waiting."""
MAX_FLIGHTS = 64
NO_REFS = SlotRefs(b"")
LOOK_UP_MS = 100
"""How long the directory may take; with Redis on the same link it is a few milliseconds."""


@dataclass(slots=True, eq=False)
class Asker:
    """Somebody who waits for a chain."""

    connection: bytes
    request_id: int
    digest: bytes
    keys: BlockKeys
    parent: bytes
    due_ms: int
    flight: Flight | None = None
    led: bool = False
    """It has had a flight of its own: what is missing now stays missing."""
    reason: str = ""


class Stage(Enum):
    LOOK_UP = auto()
    MATCH = auto()
    TRANSFER = auto()


@dataclass(slots=True, eq=False)
class _Batch:
    flight: Flight
    first: int
    """Its first block's place in the flight's keys."""
    keys: BlockKeys
    refs: SlotRefs = NO_REFS
    """Granted slots."""
    received: list[int] = field(default_factory=list)
    """Good bytes of each of them."""
    read_id: int = 0
    completing: bool = False


@dataclass(slots=True, eq=False)
class Flight:
    number: int
    space: Space
    keys: BlockKeys
    parent: bytes
    step_due_ms: int
    stage: Stage = Stage.LOOK_UP
    askers: list[Asker] = field(default_factory=list)
    hosts: list[HostRecord] = field(default_factory=list)
    peer: Peer | None = None
    match_id: int = 0
    count: int = 0
    """Blocks to bring, of `keys`."""
    next: int = 0
    """First block that is in no batch yet."""
    batches: dict[int, _Batch] = field(default_factory=dict)
    """By their grant."""
    started_ms: int = 0
    received_bytes: int = 0
    reason: str = ""
    """Why it ends before its time."""

    @property
    def due_ms(self) -> int:
        return max((asker.due_ms for asker in self.askers), default=0)


class Pulls:
    def __init__(
        self,
        spaces: Spaces,
        directory: Directory | None,
        peer_of: Callable[[HostRecord], Peer | None],
        answer: Callable[[bytes, Pulled], None],
        counters: Counter[str],
    ) -> None:
        """`peer_of`: None for a host that is not to be asked now."""
        self._spaces = spaces
        self._directory = directory
        self._peer_of = peer_of
        self._answer = answer
        self._counters = counters
        self._numbers = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        self._by_key: dict[bytes, Flight] = {}
        self._matches: dict[int, Flight] = {}
        self._reads: dict[int, _Batch] = {}
        self._starting: list[Asker] = []
        """Their namespace's client is still connecting."""

    @property
    def busy(self) -> bool:
        return bool(self._flights or self._starting)

    # who asks -------------------------------------------------------------------------------------

    def ask(self, asker: Asker, now: int) -> None:
        self._counters["pulls"] += 1
        if len(self._flights) >= MAX_FLIGHTS:
            asker.reason = "busy"
            asker.led = True
        self._advance(asker, now)

    def cancel(self, connection: bytes, request_id: int, now: int) -> None:
        """Nobody waits for it any more."""
        for waiting in (self._starting, *(flight.askers for flight in self._flights.values())):
            for asker in list(waiting):
                if (asker.connection, asker.request_id) == (connection, request_id):
                    waiting.remove(asker)
                    self._counters["pulls_cancelled"] += 1
        for flight in list(self._flights.values()):
            if not flight.askers:
                self._fail(flight, "cancelled", now)

    def _advance(self, asker: Asker, now: int) -> None:
        asker.flight = None
        space = self._spaces.get(asker.digest, now)
        if space is None:
            self._finish(asker, 0, "absent")
            return
        if not space.client.readable and now < asker.due_ms:
            self._starting.append(asker)
            return
        here = num_refs(space.client.match_prefix(asker.keys))
        if here == num_keys(asker.keys) or now >= asker.due_ms:
            self._finish(asker, here, "" if here == num_keys(asker.keys) else "deadline")
            return
        flight = self._by_key.get(_key(asker.keys, here))
        if flight is None and not asker.led:
            asker.led = True
            flight = self._launch(space, asker, here, now)
        if flight is None:
            self._finish(asker, here, asker.reason or "absent")
            return
        asker.flight = flight
        flight.askers.append(asker)

    def _finish(self, asker: Asker, blocks: int, reason: str) -> None:
        if reason:
            self._counters[f"pull_{reason}"] += 1
        pulled = Pulled(id=asker.request_id, blocks=blocks, reason=reason)
        self._answer(asker.connection, pulled)

    # a flight -------------------------------------------------------------------------------------

    def _launch(self, space: Space, asker: Asker, here: int, now: int) -> Flight | None:
        if self._directory is None or not self._directory.available:
            asker.reason = "no_directory"
            return None
        end, seen = here, set[bytes]()
        while end < num_keys(asker.keys):
            key = _key(asker.keys, end)
            if key in self._by_key or key in seen:
                break
            seen.add(key)
            end += 1
        keys = BlockKeys(asker.keys[here * KEY_BYTES : end * KEY_BYTES])
        parent = _key(asker.keys, here - 1) if here else asker.parent
        flight = Flight(next(self._numbers), space, keys, parent, now + LOOK_UP_MS)
        self._flights[flight.number] = flight
        for i in range(num_keys(keys)):
            self._by_key[_key(keys, i)] = flight
        self._directory.ask(flight.number, asked(keys, space.grain))
        return flight

    def take_answer(self, answer: Answer, now: int) -> None:
        flight = self._flights.get(answer.ticket)
        if flight is not None and flight.stage is Stage.LOOK_UP:
            flight.hosts = [host for host, _ in answer.hosts]
            self._try_next_host(flight, "absent", now)

    def _try_next_host(self, flight: Flight, reason: str, now: int) -> None:
        """`reason`: why the pull ends where there is none left."""
        while flight.hosts:
            flight.peer = self._peer_of(flight.hosts.pop(0))
            if flight.peer is not None:
                break
        else:
            self._fail(flight, reason, now)
            return
        flight.stage = Stage.MATCH
        # If it does not answer, the next one shall still have a chance.
        flight.step_due_ms = now + max(1, (flight.due_ms - now) // 2)
        flight.match_id = next(self._numbers)
        self._matches[flight.match_id] = flight
        request = MatchBlocks(id=flight.match_id, namespace=flight.space.digest, keys=flight.keys)
        flight.peer.ask(request)

    def _take_match(self, flight: Flight, matched: Matched, now: int) -> None:
        assert flight.peer is not None
        if not matched.blocks or matched.slot_bytes != flight.space.slot_bytes:
            self._counters["pull_stale_entries"] += 1
            self._forget(flight)
            self._try_next_host(flight, "absent", now)
            return
        flight.count = min(matched.blocks, num_keys(flight.keys), self._affordable(flight, now))
        if not flight.count:
            self._fail(flight, "slow", now)
            return
        flight.stage, flight.started_ms = Stage.TRANSFER, now
        self._fill(flight, now)

    def _forget(self, flight: Flight) -> None:
        assert flight.peer is not None
        if self._directory is not None:
            listed = [key for _, key in anchors(flight.keys, flight.space.grain)]
            self._directory.forget(listed, flight.peer.host.id)

    def _affordable(self, flight: Flight, now: int) -> int:
        """Blocks that the link brings in the time that is left, as it went lately."""
        peer = flight.peer
        assert peer is not None
        if not peer.bytes_per_s:
            return num_keys(flight.keys)
        blocks = int(peer.bytes_per_s * (flight.due_ms - now) / 1_000 / flight.space.slot_bytes)
        if not blocks:
            peer.bytes_per_s *= 1.1  # or one bad moment would count for ever
        return blocks

    def _fill(self, flight: Flight, now: int) -> None:
        client, slot_bytes = flight.space.client, flight.space.slot_bytes
        step = max(1, BATCH_BYTES // slot_bytes)
        while flight.next < flight.count and len(flight.batches) < WINDOW_BATCHES:
            end = min(flight.next + step, flight.count)
            keys = BlockKeys(flight.keys[flight.next * KEY_BYTES : end * KEY_BYTES])
            parent = _key(flight.keys, flight.next - 1) if flight.next else flight.parent
            grant_id = client.prepare_store(keys, parent)
            if grant_id is None:
                if not flight.batches:
                    self._fail(flight, "no_room", now)
                return
            flight.batches[grant_id] = _Batch(flight, flight.next, keys)
            flight.next = end

    def take_grant(self, space: Space, grant: StoreGrant, now: int) -> None:
        found = (f for f in self._flights.values() if f.space is space)
        flight = next((f for f in found if grant.request_id in f.batches), None)
        if flight is None:
            space.client.complete_store(grant.request_id, _granted(grant))
            return
        batch = flight.batches[grant.request_id]
        batch.refs = _granted(grant)
        if flight.reason or not batch.refs:
            # Nothing to bring: the blocks came some other way, or there is no room.
            self._complete(flight, grant.request_id)
            if grant.refs is None:
                self._fail(flight, "no_room", now)
            return
        keys = [_key(batch.keys, i) for i, ref in enumerate(unpack_refs(grant.refs or b"")) if ref]
        batch.received = [0] * len(keys)
        batch.read_id = next(self._numbers)
        self._reads[batch.read_id] = batch
        assert flight.peer is not None
        flight.peer.ask(ReadBlocks(id=batch.read_id, namespace=space.digest, keys=b"".join(keys)))

    # what peers send ------------------------------------------------------------------------------

    def take_reply(self, peer: Peer, reply: AnyReply, frames: list[memoryview], now: int) -> None:
        peer.suspect_until_ms = min(peer.suspect_until_ms, now)
        flight = self._matches.pop(reply.id, None)
        batch = self._reads.get(reply.id)
        match reply:
            case Matched() if flight is not None and flight.stage is Stage.MATCH:
                self._take_match(flight, reply, now)
            case Blocks() if batch is not None:
                self._take_blocks(batch, reply, frames, now)
            case Error() if flight is not None or batch is not None:
                self._counters[f"peer_error_{reply.code}"] += 1
                failed = flight or (batch.flight if batch is not None else None)
                assert failed is not None
                if failed.stage is Stage.MATCH:
                    self._try_next_host(failed, "lost", now)
                else:
                    self._fail(failed, "lost", now)
            case _:
                self._counters["late_frames"] += len(frames)

    def _take_blocks(
        self, batch: _Batch, blocks: Blocks, frames: list[memoryview], now: int
    ) -> None:
        flight = batch.flight
        client, slot_bytes = flight.space.client, flight.space.slot_bytes
        refs = unpack_refs(batch.refs)
        if len(blocks.sums) != 4 * len(frames) or blocks.first + len(frames) > len(refs):
            self._fail(flight, "malformed", now)
            return
        assert client.view is not None
        for i, frame in enumerate(frames):
            place, nbytes = blocks.first + i, frame.nbytes
            if place < 0 or blocks.offset != batch.received[place]:
                self._fail(flight, "malformed", now)
                return
            slot = client.view.payload(refs[place])
            if nbytes == 0 or blocks.offset + nbytes > slot_bytes:
                self._fail(flight, "malformed", now)
                return
            found = copy_checked(slot[blocks.offset : blocks.offset + nbytes], frame)
            if found != int.from_bytes(blocks.sums[4 * i : 4 * i + 4], "little"):
                self._fail(flight, "checksum", now)
                return
            batch.received[place] += nbytes
            flight.received_bytes += nbytes
            self._counters["pulled_bytes"] += nbytes
        if blocks.last:
            grant_id = next(g for g, b in flight.batches.items() if b is batch)
            whole = self._complete(flight, grant_id)
            if whole < len(refs):
                self._fail(flight, "absent", now)
            self._fill(flight, now)

    # ends -----------------------------------------------------------------------------------------

    def _complete(self, flight: Flight, grant_id: int) -> int:
        """End a batch: its whole blocks become visible, the other slots free. How many are whole."""
        batch = flight.batches[grant_id]
        if batch.completing:
            return 0
        batch.completing = True
        self._reads.pop(batch.read_id, None)
        refs = unpack_refs(batch.refs)
        received = batch.received or [0] * len(refs)
        slot_bytes = flight.space.slot_bytes
        short = [ref for ref, got in zip(refs, received, strict=True) if got < slot_bytes]
        flight.space.client.complete_store(grant_id, pack_refs(short))
        self._counters["pulled_blocks"] += len(refs) - len(short)
        return len(refs) - len(short)

    def _fail(self, flight: Flight, reason: str, now: int) -> None:
        """Bring nothing more; what has arrived whole stays."""
        flight.reason = flight.reason or reason
        flight.count = flight.next
        if flight.number not in self._flights:
            return
        for grant_id, batch in flight.batches.items():
            if batch.refs:
                self._complete(flight, grant_id)
        self._end_if_done(flight, now)

    def _end_if_done(self, flight: Flight, now: int) -> None:
        client = flight.space.client
        for grant_id, batch in list(flight.batches.items()):
            if batch.completing and not client.is_open(grant_id):
                del flight.batches[grant_id]
        transferring = flight.stage is Stage.TRANSFER and flight.next < flight.count
        if flight.batches or (not flight.reason and flight.stage is not Stage.TRANSFER):
            return
        if not transferring:
            self._end(flight, now)

    def _end(self, flight: Flight, now: int) -> None:
        del self._flights[flight.number]
        self._matches.pop(flight.match_id, None)
        for i in range(num_keys(flight.keys)):
            del self._by_key[_key(flight.keys, i)]
        if flight.received_bytes and flight.peer is not None:
            flight.peer.note_rate(flight.received_bytes, now - flight.started_ms)
        askers, flight.askers = flight.askers, []
        for asker in askers:
            if flight.reason:
                asker.led, asker.reason = True, flight.reason
            self._advance(asker, now)

    def tick(self, now: int) -> None:
        """Notice what is overdue, and what the daemon has acknowledged."""
        starting, self._starting = self._starting, []
        for asker in starting:
            self._advance(asker, now)
        for flight in list(self._flights.values()):
            self._tick_flight(flight, now)

    def _tick_flight(self, flight: Flight, now: int) -> None:
        overdue = now >= flight.due_ms
        for asker in [a for a in flight.askers if a.due_ms <= now]:
            flight.askers.remove(asker)
            self._advance(asker, now)
        if overdue:
            if flight.peer is not None and not flight.reason and not flight.received_bytes:
                flight.peer.suspect()
            self._fail(flight, "deadline", now)
            return
        if flight.stage is Stage.LOOK_UP and now >= flight.step_due_ms:
            self._fail(flight, "directory_slow", now)
        elif flight.stage is Stage.MATCH and now >= flight.step_due_ms:
            assert flight.peer is not None
            flight.peer.suspect()
            self._matches.pop(flight.match_id, None)
            self._try_next_host(flight, "lost", now)
        elif flight.stage is Stage.TRANSFER:
            if not flight.reason:
                self._fill(flight, now)
            self._end_if_done(flight, now)


def _key(keys: bytes, place: int) -> bytes:
    return keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]


def _granted(grant: StoreGrant) -> SlotRefs:
    return pack_refs(ref for ref in unpack_refs(grant.refs or b"") if ref)
