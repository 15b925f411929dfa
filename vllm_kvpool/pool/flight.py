"""What is known of a pull under way: who asks, and the flight that brings the blocks. State only; `pulls`
moves flights from stage to stage, `transfer` fills their slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from vllm_kvpool.pool.directory import HostRecord
from vllm_kvpool.pool.landing import Landing
from vllm_kvpool.pool.peer import Peer
from vllm_kvpool.pool.spaces import Space
from vllm_kvpool.types import KEY_BYTES, NO_REFS, BlockKeys, SlotRefs


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
class Batch:
    """Some blocks of a flight, between the request for their slots and its acknowledged end."""

    flight: Flight
    grant_id: int
    first: int
    """Its first block's place in the flight's keys."""
    keys: BlockKeys
    refs: SlotRefs = NO_REFS
    """Granted slots."""
    landing: Landing | None = None
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
    batches: dict[int, Batch] = field(default_factory=dict)
    """By their grant."""
    started_ms: int = 0
    received_bytes: int = 0
    reason: str = ""
    """Why it ends before its time."""

    @property
    def due_ms(self) -> int:
        return max((asker.due_ms for asker in self.askers), default=0)

    @property
    def complete(self) -> bool:
        """Whether all that it will bring is in batches, and these have ended."""
        failed_early = self.stage is not Stage.TRANSFER and bool(self.reason)
        asked_all = self.stage is Stage.TRANSFER and self.next >= self.count
        return not self.batches and (failed_early or asked_all)


def key_at(keys: bytes, place: int) -> bytes:
    return keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]
