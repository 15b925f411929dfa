"""The bytes of a flight: slots for a batch of its blocks, its read, its frames, its completion.

    prepare_store -> grant -> read_blocks -> frames, each into its slot and checked -> complete_store

A few batches of a flight are under way at a time. Bytes that come for a batch that has ended find no
slot: they go by the number of a read that nobody knows any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.pool.flight import Batch, Flight, key_at
from vllm_kvpool.pool.landing import Landing, TransferError
from vllm_kvpool.protocol import Blocks, ReadBlocks
from vllm_kvpool.types import KEY_BYTES, BlockKeys, SlotRefs, num_refs, unpack_refs, without_none

BATCH_BYTES = 8 << 20
WINDOW_BATCHES = 12
"""Of one flight: enough for every connection to have the next one waiting."""


class Transfers:
    """`new_id` draws numbers for requests to peers, which `pulls` draws from as well."""

    def __init__(self, new_id: Callable[[], int], counters: Counter[str]) -> None:
        self._new_id = new_id
        self._counters = counters
        self._reads: dict[int, Batch] = {}

    def batch_of(self, read_id: int) -> Batch | None:
        return self._reads.get(read_id)

    def fill(self, flight: Flight) -> None:
        """Ask for slots for the next batches. TransferError: there are none."""
        assert flight.peer is not None
        client, slot_bytes = flight.space.client, flight.space.slot_bytes
        step = max(1, BATCH_BYTES // slot_bytes)
        while flight.next < flight.count and len(flight.batches) < WINDOW_BATCHES:
            end = min(flight.next + step, flight.count)
            keys = BlockKeys(flight.keys[flight.next * KEY_BYTES : end * KEY_BYTES])
            parent = key_at(flight.keys, flight.next - 1) if flight.next else flight.parent
            grant_id = client.prepare_store(keys, parent, source=flight.peer.host.id)
            if grant_id is None:
                if not flight.batches:
                    raise TransferError("no_room")
                return
            flight.batches[grant_id] = Batch(flight, grant_id, flight.next, keys)
            flight.next = end

    def take_grant(self, flight: Flight, grant: StoreGrant) -> None:
        """Ask for the bytes of a batch. TransferError: it has no slots."""
        batch = flight.batches[grant.request_id]
        batch.refs = granted(grant)
        if flight.reason or not batch.refs:
            # Nothing to bring: the blocks came some other way, or there is no room.
            self._complete(batch)
            if grant.refs is None:
                raise TransferError("no_room")
            return
        refs = unpack_refs(grant.refs or b"")
        keys = [key_at(batch.keys, i) for i, ref in enumerate(refs) if ref]
        batch.landing = Landing(batch.refs, flight.space.slot_bytes)
        batch.read_id = self._new_id()
        self._reads[batch.read_id] = batch
        assert flight.peer is not None
        request = ReadBlocks(id=batch.read_id, namespace=flight.space.digest, keys=b"".join(keys))
        flight.peer.ask(request)

    def take_blocks(self, batch: Batch, blocks: Blocks, frames: list[memoryview]) -> None:
        """TransferError: they cannot be used, or the peer does not have them all."""
        view = batch.flight.space.client.view
        assert view is not None
        assert batch.landing is not None
        nbytes = batch.landing.take(view, blocks, frames)
        batch.flight.received_bytes += nbytes
        self._counters["pulled_bytes"] += nbytes
        if blocks.last and self._complete(batch) < num_refs(batch.refs):
            raise TransferError("absent")

    def end(self, flight: Flight) -> None:
        """Bring nothing more: what has arrived whole stays. Grants that are still to come end when they
        do."""
        flight.count = flight.next
        for batch in flight.batches.values():
            if batch.refs:
                self._complete(batch)

    def _complete(self, batch: Batch) -> int:
        """End a batch: its whole blocks become visible, the other slots free. How many are whole."""
        if batch.completing:
            return 0
        batch.completing = True
        short = batch.landing.short if batch.landing is not None else batch.refs
        batch.flight.space.client.complete_store(batch.grant_id, short)
        if self._reads.pop(batch.read_id, None) is not None:
            assert batch.flight.peer is not None
            batch.flight.peer.cancel(batch.read_id)
        whole = num_refs(batch.refs) - num_refs(short)
        self._counters["pulled_blocks"] += whole
        return whole


def forget_acknowledged(flight: Flight) -> None:
    """Batches whose end the daemon has confirmed."""
    for grant_id, batch in list(flight.batches.items()):
        if batch.completing and not flight.space.client.is_open(grant_id):
            del flight.batches[grant_id]


def granted(grant: StoreGrant) -> SlotRefs:
    return without_none(grant.refs or b"")
