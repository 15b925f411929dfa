"""KV events as vLLM's ZmqEventPublisher sends them, from a modelled cache.

PUB socket: frames (topic, sequence number as 8 bytes big-endian, msgpack of an event batch). ROUTER
socket for replay: the request is one frame with the first sequence number wanted; the answers are the
batches still kept, then one with sequence number -1. Batches are arrays `[time, events, dp rank]`;
events are maps with a `type`, or with `as_arrays` the arrays of vLLM's earlier versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
STORED_FIELDS = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
)
REMOVED_FIELDS = ("block_hashes", "medium")


class MockEvents:
    """The publisher of one data-parallel rank."""

    def __init__(
        self, endpoint: str, replay_endpoint: str, dp_rank: int, kept: int, as_arrays: bool = False
    ) -> None:
        self._context = zmq.asyncio.Context.instance()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind(endpoint)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(replay_endpoint)
        self._rank = dp_rank
        self._as_arrays = as_arrays
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._sequence = 0
        self._skip = 0
        self._task = asyncio.get_running_loop().create_task(self._serve_replays())

    async def stored(
        self, hashes: Sequence[int], parent: int | None, tokens: Sequence[int], block_tokens: int
    ) -> None:
        values = (list(hashes), parent, list(tokens), block_tokens, None, "GPU")
        await self._publish(self._event("BlockStored", STORED_FIELDS, values))

    async def removed(self, hashes: Sequence[int]) -> None:
        await self._publish(self._event("BlockRemoved", REMOVED_FIELDS, (list(hashes), "GPU")))

    async def cleared(self) -> None:
        await self._publish(self._event("AllBlocksCleared", (), ()))

    def lose(self, batches: int) -> None:
        """Count the next batches, and keep them for replay, but do not send them."""
        self._skip += batches

    def _event(self, tag: str, names: Sequence[str], values: Sequence[Any]) -> Any:
        if self._as_arrays:
            return [tag, *values]
        return {"type": tag, **dict(zip(names, values, strict=True))}

    async def _publish(self, event: Any) -> None:
        payload = msgspec.msgpack.encode([time.time(), [event], self._rank])
        sequence, self._sequence = self._sequence, self._sequence + 1
        self._kept.append((sequence, payload))
        if self._skip:
            self._skip -= 1
            return
        await self._pub.send_multipart((b"", sequence.to_bytes(8, "big"), payload))

    async def _serve_replays(self) -> None:
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, first = frames
            for sequence, payload in list(self._kept):
                if sequence >= int.from_bytes(first, "big"):
                    number = sequence.to_bytes(8, "big")
                    await self._router.send_multipart((client, b"", b"", number, payload))
            await self._router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._pub.close(linger=0)
        self._router.close(linger=0)
