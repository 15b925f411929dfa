"""Book-keeping of a client's stores, from the request for slots to the acknowledged completion.
Pure: no I/O, no clock.

    PrepareStore   ->  a prepare, until it is answered, refused, timed out or lost: one StoreGrant each
    Prepared       ->  a grant of slots, which are `writing` now: the daemon keeps them for us
    CompleteStore  ->  a completion of the whole grant, its slots still `writing`
    Completed      ->  done

`writing` is what Hello.writing lists: the daemon frees every other WRITING slot of this client, so
a grant that never reached us leaks nothing. A CompleteStore may be sent twice (it is idempotent),
never zero times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_kvpool.errors import ProtocolError
from vllm_kvpool.protocol import CompleteStore, Prepared, PrepareStore
from vllm_kvpool.types import (
    NO_REF,
    REF_BYTES,
    SlotRefs,
    num_keys,
    num_refs,
    pack_refs,
    unpack_refs,
    without_none,
)

MAX_PREPARES = 64
"""Requests for slots that may wait for an answer; a client that reaches it skips stores until the
daemon is back."""
MAX_WRITING = 65_536
"""Blocks being stored at once: what Hello.writing has to carry."""
MAX_REFUSALS = 3
"""A completion that was refused so often is given up: its blocks are lost, its slots become free at
the next Hello."""


class StoreGrant(NamedTuple):
    """The end of one `prepare_store`."""

    request_id: int
    refs: SlotRefs | None
    """One reference a key (0: nothing to store); None when there was no grant at all."""
    reason: str = ""
    """Why there was none: "timeout", "lost", or the code of the daemon's error."""


class _Prepare(NamedTuple):
    request: PrepareStore
    due_ms: int


@dataclass(slots=True)
class _Completion:
    request: CompleteStore
    grant_id: int
    due_ms: int | None = None
    """None: not sent over the present connection."""
    refusals: int = 0


class StoreLedger:
    def __init__(self) -> None:
        self._prepares: dict[int, _Prepare] = {}
        self._granted: dict[int, SlotRefs] = {}
        """By the number of the PrepareStore."""
        self._completions: dict[int, _Completion] = {}
        self._asked_blocks = 0
        self._writing_blocks = 0
        self._finished: list[StoreGrant] = []

    # prepares -------------------------------------------------------------------------------------

    def has_room(self, num_blocks: int) -> bool:
        blocks = self._writing_blocks + self._asked_blocks + num_blocks
        return len(self._prepares) < MAX_PREPARES and blocks <= MAX_WRITING

    def asked(self, request: PrepareStore, due_ms: int) -> None:
        self._prepares[request.id] = _Prepare(request, due_ms)
        self._asked_blocks += num_keys(request.keys)

    def granted(self, reply: Prepared) -> SlotRefs:
        """Note the answer. Returns slots to give back: those of a request that was given up
        meanwhile. ProtocolError: it is no answer to what was asked; nothing was noted."""
        self._check(reply)
        refs = without_none(reply.refs)
        if not self._answered(reply.id):
            return refs
        if refs:
            self._granted[reply.id] = refs
            self._writing_blocks += num_refs(refs)
        self._finished.append(StoreGrant(reply.id, SlotRefs(reply.refs)))
        return SlotRefs(b"")

    def _check(self, reply: Prepared) -> None:
        size = len(reply.refs)
        prepare = self._prepares.get(reply.id)
        asked = size // REF_BYTES if prepare is None else num_keys(prepare.request.keys)
        if size != asked * REF_BYTES:
            raise ProtocolError("malformed", f"{size} bytes of slot references for {asked} keys")

    def _answered(self, request_id: int) -> bool:
        prepare = self._prepares.pop(request_id, None)
        if prepare is not None:
            self._asked_blocks -= num_keys(prepare.request.keys)
        return prepare is not None

    # completions ----------------------------------------------------------------------------------

    def completing(self, request_id: int, grant_id: int, aborted: SlotRefs) -> CompleteStore | None:
        """The message that ends a grant, kept until it is acknowledged. None: its pool is gone, or there
        was nothing in it."""
        refs = self._granted.pop(grant_id, None)
        if refs is None:
            return None
        if aborted:
            dropped = set(unpack_refs(aborted))
            stored = pack_refs(ref for ref in unpack_refs(refs) if ref not in dropped)
            assert num_refs(stored) + len(dropped) == num_refs(refs), "aborted what was not granted"
            refs = stored
        request = CompleteStore(id=request_id, refs=refs, aborted=aborted)
        self._completions[request.id] = _Completion(request, grant_id)
        return request

    def sent(self, request: CompleteStore, due_ms: int) -> None:
        self._completions[request.id].due_ms = due_ms

    def completed(self, request_id: int) -> None:
        completion = self._completions.pop(request_id, None)
        if completion is not None:
            self._writing_blocks -= num_refs(_named(completion.request))

    def is_open(self, grant_id: int) -> bool:
        """Whether the grant is still to be completed, or its completion to be acknowledged."""
        completing = (completion.grant_id for completion in self._completions.values())
        return grant_id in self._granted or grant_id in completing

    @property
    def unsent(self) -> list[CompleteStore]:
        return [c.request for c in self._completions.values() if c.due_ms is None]

    # ends -----------------------------------------------------------------------------------------

    def refused(self, request_id: int, code: str) -> bool:
        """The daemon answered with an error. True: it was a completion, whose slots the daemon
        still keeps for us: only a new Hello sets that right."""
        if self._answered(request_id):
            self._finished.append(StoreGrant(request_id, None, code))
            return False
        completion = self._completions.get(request_id)
        if completion is None:
            return False
        completion.refusals += 1
        if code == "malformed" or completion.refusals >= MAX_REFUSALS:
            self.completed(request_id)
        return True

    @property
    def holds_grants(self) -> bool:
        return bool(self._granted)

    @property
    def outstanding(self) -> bool:
        """Whether the daemon owes an answer, or will when a completion has been sent again."""
        return bool(self._prepares or self._completions)

    def overdue(self, now_ms: int) -> bool:
        """Whether the daemon owes an answer. Answers come in order, so the oldest of each kind
        tells."""
        prepare = next(iter(self._prepares.values()), None)
        completion = next(iter(self._completions.values()), None)
        if prepare is not None and prepare.due_ms <= now_ms:
            return True
        return completion is not None and (completion.due_ms or now_ms + 1) <= now_ms

    def lose_outstanding(self, reason: str) -> int:
        """Answers do not count any more: prepares end without a grant, completions wait to be sent
        again."""
        lost = list(self._prepares)
        self._finished.extend(StoreGrant(request_id, None, reason) for request_id in lost)
        self._prepares.clear()
        self._asked_blocks = 0
        for completion in self._completions.values():
            completion.due_ms = None
        return len(lost)

    def forget(self) -> None:
        """The pool is another one now: references to the old one mean nothing there."""
        self.lose_outstanding("lost")
        self._completions.clear()
        self._granted.clear()
        self._writing_blocks = 0
        self._finished = [grant._replace(refs=None, reason="lost") for grant in self._finished]

    def take_finished(self) -> list[StoreGrant]:
        finished, self._finished = self._finished, []
        return finished

    @property
    def writing(self) -> SlotRefs:
        completing = [_named(completion.request) for completion in self._completions.values()]
        return SlotRefs(b"".join([*self._granted.values(), *completing]))

    def check_integrity(self) -> None:
        writing = unpack_refs(self.writing)
        assert len(writing) == len(set(writing)) == self._writing_blocks
        assert NO_REF not in writing
        asked = [prepare.request for prepare in self._prepares.values()]
        assert self._asked_blocks == sum(num_keys(request.keys) for request in asked)


def _named(request: CompleteStore) -> bytes:
    return request.refs + request.aborted
