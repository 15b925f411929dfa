"""How a pull learns who may have blocks: from a directory (`directory`), or because there is but one
host to ask (`upstream`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vllm_kvpool.pool.directory import Answer


class Finder(Protocol):
    """Nobody waits for it: what is asked is answered later."""

    @property
    def available(self) -> bool:
        """Whether it is worth asking."""

    @property
    def living(self) -> frozenset[bytes]:
        """Hosts whose blocks can be counted on."""

    @property
    def wake_fd(self) -> int:
        """Readable when there are answers."""

    def ask(self, ticket: int, anchors: list[tuple[int, bytes]]) -> None:
        """Who holds them? `take_answers` says, soon or late."""

    def take_answers(self) -> list[Answer]: ...

    def forget(self, keys: Iterable[bytes], host: bytes) -> None:
        """`host` has none of these blocks."""

    def start(self) -> None: ...

    def stop(self) -> None: ...
