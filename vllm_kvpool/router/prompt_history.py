"""Whether a session's prompt continues its last one, and where it stopped doing so. Pure."""

from __future__ import annotations

from collections import OrderedDict

from vllm_kvpool.router.keys import TEXT_BLOCK_BYTES
from vllm_kvpool.router.types import RouteRequest

CAPACITY = 4_096
MARKS = 32
"""Places of a prompt that are remembered."""


class PromptHistory:
    """The last CAPACITY sessions, some 5 MB."""

    def __init__(self) -> None:
        self._marks: OrderedDict[int, tuple[tuple[int, int], ...]] = OrderedDict()
        """Session to (position, hash) of blocks of its last prompt, the last block among them."""

    def __len__(self) -> int:
        return len(self._marks)

    def compare(self, request: RouteRequest) -> int | None:
        """The first byte, to a thirty-second part of the prompt, that differs from the session's last
        prompt; None: it continues it, or there was none. Remembers this prompt."""
        marks = self._marks.get(request.session, ())
        self._remember(request)
        same_blocks = 0
        for position, block in marks:
            if position >= len(request.blocks) or request.blocks[position] != block:
                return same_blocks * TEXT_BLOCK_BYTES
            same_blocks = position + 1
        return None

    def _remember(self, request: RouteRequest) -> None:
        blocks = request.blocks
        step = max(1, -(-len(blocks) // MARKS))
        positions = range(len(blocks) - 1, -1, -step)[::-1]
        self._marks[request.session] = tuple((i, blocks[i]) for i in positions)
        self._marks.move_to_end(request.session)
        if len(self._marks) > CAPACITY:
            self._marks.popitem(last=False)

    def check_integrity(self) -> None:
        assert len(self._marks) <= CAPACITY
        assert all(len(marks) <= MARKS for marks in self._marks.values())
