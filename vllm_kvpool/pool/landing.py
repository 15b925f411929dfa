"""Where blocks from another host come down: frame by frame into WRITING slots, each frame checked."""

from __future__ import annotations

from vllm_kvpool._native import PoolView, copy_checked
from vllm_kvpool.protocol import Blocks
from vllm_kvpool.types import SlotRefs, pack_refs, unpack_refs


class TransferError(Exception):
    """Nothing more can come, for this reason. Never leaves the exchange."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Landing:
    """`refs`: granted slots, in the order in which their blocks come."""

    def __init__(self, refs: SlotRefs, slot_bytes: int) -> None:
        self._refs = unpack_refs(refs)
        self._slot_bytes = slot_bytes
        self._received = [0] * len(self._refs)
        """Good bytes of each."""

    def take(self, view: PoolView, blocks: Blocks, frames: list[memoryview]) -> int:
        """How many bytes came. TransferError: what was good before stays."""
        if len(blocks.sums) != 4 * len(frames) or blocks.first < 0:
            raise TransferError("malformed")
        if blocks.first + len(frames) > len(self._refs):
            raise TransferError("malformed")
        for i, frame in enumerate(frames):
            wanted = int.from_bytes(blocks.sums[4 * i : 4 * i + 4], "little")
            self._take_frame(view, blocks.first + i, blocks.offset, frame, wanted)
        return sum(frame.nbytes for frame in frames)

    def _take_frame(
        self, view: PoolView, place: int, offset: int, frame: memoryview, wanted: int
    ) -> None:
        end = offset + frame.nbytes
        if offset != self._received[place] or not offset < end <= self._slot_bytes:
            raise TransferError("malformed")
        if copy_checked(view.payload(self._refs[place])[offset:end], frame) != wanted:
            raise TransferError("checksum")
        self._received[place] = end

    @property
    def whole(self) -> SlotRefs:
        """Slots whose block has come."""
        return self._split(whole=True)

    @property
    def short(self) -> SlotRefs:
        """The others."""
        return self._split(whole=False)

    def _split(self, *, whole: bool) -> SlotRefs:
        pairs = zip(self._refs, self._received, strict=True)
        return pack_refs(ref for ref, got in pairs if (got == self._slot_bytes) is whole)
