"""What every door of the daemon does with a message: decode it, or say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from vllm_kvpool import __version__, protocol
from vllm_kvpool.protocol import ACCEPTED_VERSIONS, MAX_KEYS, MAX_MESSAGE_BYTES, Hello
from vllm_kvpool.types import KEY_BYTES, BlockKeys

T = TypeVar("T")


class RefusedError(Exception):
    """A request gets an `Error` for an answer. Never leaves the door it came through."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Head(msgspec.Struct):
    """What any message has, even one that we do not know: enough to address the error reply."""

    id: int = 0


_decode_head = protocol.decoder(_Head)


def decode(payload: bytes, decoder: Callable[[bytes], T]) -> T:
    """RefusedError, msgspec.DecodeError."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RefusedError("too_large", f"a message has at most {MAX_MESSAGE_BYTES} bytes")
    return decoder(payload)


def id_of(payload: bytes) -> int:
    if len(payload) > MAX_MESSAGE_BYTES:
        return 0
    try:
        head: _Head = _decode_head(payload)
    except msgspec.DecodeError:
        return 0
    return head.id


def check_version(hello: Hello) -> None:
    if hello.version not in ACCEPTED_VERSIONS:
        spoken = ", ".join(map(str, ACCEPTED_VERSIONS))
        raise RefusedError(
            "version",
            f"this daemon ({__version__}) speaks protocol {spoken}, not {hello.version}: "
            "run the same vllm-kvpool on both sides",
        )


def checked_keys(keys: bytes, parent: bytes = b"") -> BlockKeys:
    if len(keys) % KEY_BYTES or len(parent) not in {0, KEY_BYTES}:
        raise RefusedError("malformed", f"keys have {KEY_BYTES} bytes each")
    if len(keys) > MAX_KEYS * KEY_BYTES:
        raise RefusedError("too_large", f"at most {MAX_KEYS} keys a request")
    return BlockKeys(keys)
