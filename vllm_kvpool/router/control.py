"""What the parent and its workers tell each other, one line of JSON a message, over a socket pair.

parent -> worker:  Configure, then Statuses whenever they change, Collect, Stop, MetricsText
worker -> parent:  Ready, Failed, Samples (to Collect), AskMetrics
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from vllm_kvpool.config import RouterConfig
from vllm_kvpool.router.metrics import Sample
from vllm_kvpool.router.roster import ReplicaStatus

LINE_BYTES = 16 << 20


class Message(msgspec.Struct, frozen=True, tag=str.lower):
    pass


class Configure(Message, frozen=True):
    config: RouterConfig
    port: int
    statuses: tuple[ReplicaStatus, ...]


class Statuses(Message, frozen=True):
    statuses: tuple[ReplicaStatus, ...]


class Collect(Message, frozen=True):
    number: int


class MetricsText(Message, frozen=True):
    number: int
    text: str


class Stop(Message, frozen=True):
    pass


class Ready(Message, frozen=True):
    pass


class Failed(Message, frozen=True):
    """A request could not reach a replica."""

    replica_id: str
    error: str


class Samples(Message, frozen=True):
    number: int
    samples: list[Sample]


class AskMetrics(Message, frozen=True):
    number: int


AnyMessage = (
    Configure | Statuses | Collect | MetricsText | Stop | Ready | Failed | Samples | AskMetrics
)
_decode = msgspec.json.Decoder(AnyMessage).decode
_encode = msgspec.json.Encoder().encode


class Channel:
    """One end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: Any) -> Channel:
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=LINE_BYTES))

    def send(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(_encode(message) + b"\n")

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Until the other end is gone."""
        while line := await self._read_line():
            yield _decode(line)

    async def _read_line(self) -> bytes:
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return b""
        return line if line.endswith(b"\n") else b""  # the other end died in the middle of one

    def close(self) -> None:
        self._writer.close()
