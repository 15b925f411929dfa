"""What is fuzzed: a part of the daemon that reads what others wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from tests.helpers import keys_of, namespace_of
from vllm_kvpool.protocol import MAX_MESSAGE_BYTES, AnyReply, Error, decode_reply, encode

CORPUS = Path(__file__).with_name("corpus")
SLOT_BYTES = 4 << 10
SPACE = namespace_of("fuzz", SLOT_BYTES)
KEYS = keys_of("fuzz", 6)
CLIENT_ID = "0123456789abcdef" * 2


class Target(ABC):
    """Made once, for a folder in shared memory; `run` leaves nothing behind that the next one could
    notice."""

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, shm_dir: Path) -> None: ...

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Inputs that do what the part is for."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Any exception is a finding."""

    @abstractmethod
    def close(self) -> None: ...

    def corpus(self) -> list[bytes]:
        """Kept inputs: each reached something new, or was a finding once."""
        return [file.read_bytes() for file in sorted((CORPUS / self.name).glob("*"))]


def check_reply(reply: AnyReply) -> None:
    """One that clients can read, and no failure of ours."""
    raw = encode(reply)
    assert len(raw) <= MAX_MESSAGE_BYTES
    assert encode(decode_reply(raw)) == raw
    assert not (isinstance(reply, Error) and reply.code == "internal"), reply
