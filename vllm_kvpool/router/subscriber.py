"""Hears the KV events of replicas over ZeroMQ and tells them to an `EventIndex`.

Each data-parallel rank publishes on a port of its own, so a source is a replica with its rank. What
was published before we came, or got lost, is asked for at the replay endpoint. Nothing that a
publisher sends or leaves out stops a subscriber: what it says is believed less.
"""

from __future__ import annotations

import asyncio
import logging

import zmq
import zmq.asyncio

from vllm_kvpool.router.event_index import EventIndex, Trust
from vllm_kvpool.router.event_wire import Batch, decode

REPLAY_TIMEOUT_S = 5.0
QUIET_MS, MAX_QUIET_MS = 1_000, 60_000
"""Without a batch for so long the engine is asked for what came after the last one, and again after twice as long: PUB
loses batches while a subscription is on its way or a queue is full, and only the next batch would show it."""
_END = -1
_logger = logging.getLogger(__name__)


def endpoint_of_rank(endpoint: str, dp_rank: int | None) -> str:
    """vLLM adds the rank to the port. ValueError: there is no port to add it to."""
    if not dp_rank:
        return endpoint
    address, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"{endpoint!r} has no port that rank {dp_rank} could be added to")
    return f"{address}:{int(port) + dp_rank}"


class Subscriber:
    """Belongs to one event loop."""

    def __init__(self, index: EventIndex) -> None:
        self._index = index
        self._context = zmq.asyncio.Context()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, replica_id: str, endpoint: str, replay_endpoint: str = "") -> None:
        """From now on; a second call with the same id replaces the first."""
        self.unfollow(replica_id)
        source = self._follow(replica_id, endpoint, replay_endpoint)
        self._tasks[replica_id] = asyncio.get_running_loop().create_task(source)

    def unfollow(self, replica_id: str) -> None:
        task = self._tasks.pop(replica_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for replica_id in list(self._tasks):
            self.unfollow(replica_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _follow(self, replica_id: str, endpoint: str, replay_endpoint: str) -> None:
        with self._context.socket(zmq.SUB) as socket:
            socket.set_hwm(100_000)
            socket.subscribe(b"")
            socket.connect(endpoint)
            # connecting is silent: ask at once for what was published before
            await self._replay(replica_id, replay_endpoint)
            quiet_ms = QUIET_MS
            while True:
                if await socket.poll(quiet_ms):
                    complete = self._hear(replica_id, await socket.recv_multipart())
                    quiet_ms = QUIET_MS
                else:
                    complete = await self._catch_up(replica_id, replay_endpoint)
                    quiet_ms = min(2 * quiet_ms, MAX_QUIET_MS)
                if not complete:
                    await self._replay(replica_id, replay_endpoint)

    def _hear(self, replica_id: str, frames: list[bytes]) -> bool:
        """False: a replay is needed."""
        try:
            sequence, batch = _read(frames)
        except ValueError as error:
            self._not_understood(replica_id, error)
            return True
        return self._index.received(replica_id, sequence, batch)

    async def _replay(self, replica_id: str, endpoint: str) -> None:
        batches = None
        if endpoint:
            try:
                batches = await self._ask(replica_id, endpoint)
            except TimeoutError:
                _logger.warning("%s: no replay of KV events from %s", replica_id, endpoint)
            except ValueError as error:
                self._not_understood(replica_id, error)
                return
        if batches is None:
            self._index.not_replayed(replica_id)
        else:
            self._index.replayed(replica_id, batches)

    async def _catch_up(self, replica_id: str, endpoint: str) -> bool:
        """False: a replay is needed. An engine that does not answer is believed as before."""
        if not endpoint:
            return True
        if not self._index.knows(replica_id):
            return False  # forgotten since: it has restarted
        if self._index.trust(replica_id) is Trust.NONE:
            return True  # what it says is of no use
        try:
            batches = await self._ask(replica_id, endpoint)
        except TimeoutError:
            return True
        except ValueError as error:
            self._not_understood(replica_id, error)
            return True
        return all(self._index.received(replica_id, number, batch) for number, batch in batches)

    async def _ask(self, replica_id: str, endpoint: str) -> list[tuple[int, Batch]]:
        """All that the engine still has of what we have not heard. TimeoutError, ValueError (not understood)."""
        first = self._index.next_sequence(replica_id)
        batches: list[tuple[int, Batch]] = []
        async with asyncio.timeout(REPLAY_TIMEOUT_S):
            with self._context.socket(zmq.DEALER) as socket:
                socket.set_hwm(0)
                socket.linger = 0
                socket.connect(endpoint)
                await socket.send_multipart([b"", first.to_bytes(8, "big")])
                while True:
                    frames = await socket.recv_multipart()
                    if _sequence(frames) == _END:
                        return batches
                    batches.append(_read(frames))

    def _not_understood(self, replica_id: str, error: ValueError) -> None:
        _logger.warning("%s: KV events are not understood: %s", replica_id, error)
        self._index.not_understood(replica_id)


def _read(frames: list[bytes]) -> tuple[int, Batch]:
    return _sequence(frames), decode(frames[-1])


def _sequence(frames: list[bytes]) -> int:
    """The frame before the last, whatever comes before: topics and delimiters differ by version."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise ValueError(f"{len(frames)} frames without a sequence number")
    return int.from_bytes(frames[-2], "big", signed=True)
