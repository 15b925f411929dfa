"""How an input of the fuzzer reads: messages of frames, each frame behind two bytes.

    length of the frame (14 bits, big-endian) | 0x4000: another connection | 0x8000: more frames follow

Any bytes are an input; what is cut off at the end is a shorter frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MAX_FRAME_BYTES = 0x3FFF
OTHER, MORE = 0x4000, 0x8000


class Message(NamedTuple):
    frames: list[bytes]
    other: bool = False
    """Over another connection."""


def unpack(data: bytes) -> list[Message]:
    messages: list[Message] = []
    place, more = 0, False
    while place + 2 <= len(data):
        head = int.from_bytes(data[place : place + 2], "big")
        end = place + 2 + (head & MAX_FRAME_BYTES)
        if not more:
            messages.append(Message([], bool(head & OTHER)))
        messages[-1].frames.append(data[place + 2 : end])
        place, more = end, bool(head & MORE)
    return messages


def pack(messages: Iterable[Message]) -> bytes:
    """What is too long for a frame is cut."""
    packed = []
    for message in messages:
        for i, frame in enumerate(message.frames):
            cut = frame[:MAX_FRAME_BYTES]
            more = MORE if i + 1 < len(message.frames) else 0
            head = len(cut) | more | (OTHER if message.other else 0)
            packed += [head.to_bytes(2, "big"), cut]
    return b"".join(packed)
