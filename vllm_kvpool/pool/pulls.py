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

from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.pool.anchors import anchors, asked
from vllm_kvpool.pool.directory import Answer, HostRecord
from vllm_kvpool.pool.finder import Finder
from vllm_kvpool.pool.flight import Asker, Batch, Flight, Stage, key_at
from vllm_kvpool.pool.landing import TransferError
from vllm_kvpool.pool.peer import Peer
from vllm_kvpool.pool.spaces import Space, Spaces
from vllm_kvpool.pool.transfer import Transfers, forget_acknowledged, granted
from vllm_kvpool.protocol import AnyReply, Blocks, Error, MatchBlocks, Matched, Pulled
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_keys, num_refs

MAX_FLIGHTS = 64
LOOK_UP_MS = 100
"""How long the directory may take; with Redis on the same link it is a few milliseconds."""
LANDING_MS = 50
"""After the deadline, for what has come to become visible: it counts in the answer. The daemon's loop
does it in a millisecond."""


class Pulls:
    def __init__(
        self,
        spaces: Spaces,
        directory: Finder | None,
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
        self._transfers = Transfers(lambda: next(self._numbers), counters)
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
        flight = self._by_key.get(key_at(asker.keys, here))
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
            key = key_at(asker.keys, end)
            if key in self._by_key or key in seen:
                break
            seen.add(key)
            end += 1
        keys = BlockKeys(asker.keys[here * KEY_BYTES : end * KEY_BYTES])
        parent = key_at(asker.keys, here - 1) if here else asker.parent
        flight = Flight(next(self._numbers), space, keys, parent, now + LOOK_UP_MS)
        self._flights[flight.number] = flight
        for i in range(num_keys(keys)):
            self._by_key[key_at(keys, i)] = flight
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
        try:
            self._transfers.fill(flight)
        except TransferError as error:
            self._fail(flight, error.reason, now)

    def take_grant(self, space: Space, grant: StoreGrant, now: int) -> None:
        found = (f for f in self._flights.values() if f.space is space)
        flight = next((f for f in found if grant.request_id in f.batches), None)
        if flight is None:
            space.client.complete_store(grant.request_id, granted(grant))
            return
        try:
            self._transfers.take_grant(flight, grant)
        except TransferError as error:
            self._fail(flight, error.reason, now)

    # what peers send ------------------------------------------------------------------------------

    def take_reply(self, peer: Peer, reply: AnyReply, frames: list[memoryview], now: int) -> None:
        peer.suspect_until_ms = min(peer.suspect_until_ms, now)
        flight = self._matches.pop(reply.id, None)
        batch = self._transfers.batch_of(reply.id)
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
        self, batch: Batch, blocks: Blocks, frames: list[memoryview], now: int
    ) -> None:
        try:
            self._transfers.take_blocks(batch, blocks, frames)
        except TransferError as error:
            self._fail(batch.flight, error.reason, now)
            return
        if blocks.last:
            self._fill(batch.flight, now)

    # ends -----------------------------------------------------------------------------------------

    def _fail(self, flight: Flight, reason: str, now: int) -> None:
        """Bring nothing more; what has arrived whole stays."""
        flight.reason = flight.reason or reason
        if flight.number in self._flights:
            self._transfers.end(flight)
            self._end_if_done(flight, now)

    def _end_if_done(self, flight: Flight, now: int) -> None:
        forget_acknowledged(flight)
        if flight.complete:
            self._end(flight, now)

    def _end(self, flight: Flight, now: int) -> None:
        del self._flights[flight.number]
        self._matches.pop(flight.match_id, None)
        for i in range(num_keys(flight.keys)):
            del self._by_key[key_at(flight.keys, i)]
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

    def _let_go(self, flight: Flight, due_ms: int, now: int) -> None:
        """Answer those who are due by then."""
        for asker in [a for a in flight.askers if a.due_ms <= due_ms]:
            flight.askers.remove(asker)
            self._advance(asker, now)

    def _tick_flight(self, flight: Flight, now: int) -> None:
        if now >= flight.due_ms:
            if flight.peer is not None and not flight.reason and not flight.received_bytes:
                flight.peer.suspect()
            self._fail(flight, "deadline", now)
            self._let_go(flight, now - LANDING_MS, now)
            return
        self._let_go(flight, now, now)  # it goes on for others
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
