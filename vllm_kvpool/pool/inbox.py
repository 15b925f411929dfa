"""Blocks that other hosts write here, on their way into slots: the outbox's other side.

    write_blocks -> prepare_store -> wanted -> blocks, each frame into its slot -> complete_store -> written

For each connection at most `MAX_WRITES` are under way (more are refused as "busy"), of `MAX_READ_BYTES`
each: there is a slot for every byte that may come, and no other memory. A connection's bytes come in
the order in which they were asked for; a write of which nothing comes for `IDLE_MS`, nor of one before
it, has to begin anew.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.pool.landing import Landing, TransferError
from vllm_kvpool.pool.outbox import MAX_READ_BYTES
from vllm_kvpool.pool.requests import RefusedError
from vllm_kvpool.pool.spaces import Space
from vllm_kvpool.protocol import AnyReply, Blocks, Error, Wanted, WriteBlocks, Written
from vllm_kvpool.types import (
    BlockKeys,
    SlotRefs,
    num_keys,
    num_refs,
    split_keys,
    unpack_refs,
    without_none,
)

MAX_WRITES = 8
IDLE_MS = 10_000


@dataclass(slots=True, eq=False)
class _Write:
    connection: bytes
    request: WriteBlocks
    space: Space
    grant_id: int
    keys: frozenset[bytes]
    heard_ms: int
    """When something came for it last, or for one that was asked for before it."""
    asked: int = 0
    """Its place in the order of asking."""
    landing: Landing | None = None
    """None: there are no slots yet."""
    reason: str = ""
    whole: SlotRefs | None = None
    """Completed slots, to be acknowledged."""

    @property
    def name(self) -> tuple[bytes, int]:
        return self.connection, self.request.id


class Inbox:
    def __init__(self, answer: Callable[[bytes, AnyReply], None], counters: Counter[str]) -> None:
        self._answer = answer
        self._counters = counters
        self._writes: dict[tuple[bytes, int], _Write] = {}
        self._by_grant: dict[tuple[bytes, int], _Write] = {}
        """(namespace, grant), until it comes."""
        self._asked = itertools.count(1)

    @property
    def busy(self) -> bool:
        """Whether something is to be acknowledged soon."""
        return any(write.whole is not None for write in self._writes.values())

    # what is asked --------------------------------------------------------------------------------

    def open(self, connection: bytes, request: WriteBlocks, space: Space, now: int) -> None:
        """RefusedError: too much at once."""
        blocks = num_keys(request.keys)
        if not 0 < blocks <= max(1, MAX_READ_BYTES // space.slot_bytes):
            raise RefusedError("too_large", f"a write has {MAX_READ_BYTES} bytes, or one block")
        under_way = [write for write in self._writes.values() if write.connection == connection]
        if len(under_way) >= MAX_WRITES:
            raise RefusedError("busy", f"{MAX_WRITES} writes are under way on this connection")
        if (connection, request.id) in self._writes:
            raise RefusedError("malformed", "a write of this id is under way")
        if request.parent and not self._has(space, BlockKeys(request.parent)):
            # Nobody would find what follows it.
            self._refuse(connection, request, "no_parent")
            return
        grant_id = space.client.prepare_store(BlockKeys(request.keys), request.parent)
        if grant_id is None:
            raise RefusedError("busy", "the pool takes no blocks just now")
        keys = frozenset(split_keys(request.keys))
        write = _Write(connection, request, space, grant_id, keys, now)
        self._writes[write.name] = self._by_grant[space.digest, grant_id] = write

    def _has(self, space: Space, key: BlockKeys) -> bool:
        """READY, or coming just now."""
        return bool(space.client.match_prefix(key)) or any(
            write.space is space and write.landing is not None and key in write.keys
            for write in self._writes.values()
        )

    def _refuse(self, connection: bytes, request: WriteBlocks, reason: str) -> None:
        self._counters[f"write_{reason}"] += 1
        self._answer(connection, Written(id=request.id, reason=reason))

    def take_grant(self, space: Space, grant: StoreGrant) -> bool:
        """Whether it is one of ours."""
        write = self._by_grant.pop((space.digest, grant.request_id), None)
        if write is None:
            return False
        if grant.refs is None:
            del self._writes[write.name]
            text = "the pool takes no blocks just now"
            self._answer(write.connection, Error(id=write.request.id, code="busy", message=text))
            return True
        refs = unpack_refs(grant.refs)
        others = b"".join(
            k for k, ref in zip(split_keys(write.request.keys), refs, strict=True) if not ref
        )
        if num_refs(space.client.match_prefix(BlockKeys(others))) < num_keys(others):
            write.reason = "no_room"  # or somebody else is writing them, and may yet give up
        if not any(refs):
            self._finish(write, 0)
            return True
        write.asked = next(self._asked)
        write.landing = Landing(without_none(grant.refs), space.slot_bytes)
        places = bytes(map(bool, refs))
        self._answer(write.connection, Wanted(id=write.request.id, places=places))
        return True

    # what is sent ---------------------------------------------------------------------------------

    def take_blocks(
        self, connection: bytes, blocks: Blocks, frames: list[memoryview], now: int
    ) -> None:
        write = self._writes.get((connection, blocks.id))
        if write is None or write.landing is None or write.whole is not None:
            self._counters["late_frames"] += len(frames)
            return
        self._note_heard(write, now)
        view = write.space.client.view
        assert view is not None, "the view of slots being written is gone"
        try:
            self._counters["written_bytes"] += write.landing.take(view, blocks, frames)
        except TransferError as error:
            self._end(write, error.reason)
            return
        if blocks.last:
            self._end(write, "")

    def _note_heard(self, write: _Write, now: int) -> None:
        for other in self._writes.values():
            if other.connection == write.connection and other.asked >= write.asked:
                other.heard_ms = now

    def _end(self, write: _Write, reason: str) -> None:
        """Whole blocks become visible, the other slots free."""
        assert write.landing is not None
        write.reason = write.reason or reason
        write.whole = write.landing.whole
        write.space.client.complete_store(write.grant_id, write.landing.short)

    def turn(self, now: int) -> None:
        """Answer what has been acknowledged, end what is overdue."""
        for write in list(self._writes.values()):
            if write.whole is not None:
                if not write.space.client.is_open(write.grant_id):
                    self._finish(write, num_refs(write.whole))
            elif write.landing is not None and now - write.heard_ms > IDLE_MS:
                self._end(write, "deadline")

    def _finish(self, write: _Write, blocks: int) -> None:
        del self._writes[write.name]
        self._counters["written_blocks"] += blocks
        if write.reason:
            self._counters[f"write_{write.reason}"] += 1
        written = Written(id=write.request.id, blocks=blocks, reason=write.reason)
        self._answer(write.connection, written)
