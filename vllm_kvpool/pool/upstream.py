"""`--upstream`: the one host that this pool stands in front of. A finder that knows the answer: the
upstream may have any block, and says itself how many of a chain it has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from vllm_kvpool.host_keys import HostKeys
from vllm_kvpool.pool.directory import Answer, HostRecord
from vllm_kvpool.protocol import POOL_ID_BYTES

KEY_NAME = "upstream"
"""Of the file in the key folder with its public key: `upstream.key`."""
ANY_BLOCKS = 1 << 31
"""It may hold a chain to its end."""


class Upstream:
    def __init__(self, address: str, keys: HostKeys | None) -> None:
        """ConfigError: the key folder does not hold its key."""
        public_key = b"" if keys is None else keys.named(KEY_NAME)
        host_id = hashlib.sha256(address.encode()).digest()[:POOL_ID_BYTES]
        self.host = HostRecord(host_id, address, public_key)
        self._answers: list[Answer] = []
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    available = True

    @property
    def living(self) -> frozenset[bytes]:
        """Also while it is away: it keeps what it has."""
        return frozenset({self.host.id})

    def ask(self, ticket: int, anchors: list[tuple[int, bytes]]) -> None:
        self._answers.append(Answer(ticket, [(self.host, ANY_BLOCKS)]))
        os.eventfd_write(self.wake_fd, 1)

    def take_answers(self) -> list[Answer]:
        if self._answers:
            os.eventfd_read(self.wake_fd)
        answers, self._answers = self._answers, []
        return answers

    def forget(self, keys: Iterable[bytes], host: bytes) -> None:
        """Nothing was promised."""

    def start(self) -> None:
        """Nothing runs."""

    def stop(self) -> None:
        os.close(self.wake_fd)
