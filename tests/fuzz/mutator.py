"""New inputs out of old ones, so that most of them are still messages: MessagePack is taken apart,
something in it changed, and put together again. Bare bytes are changed now and then."""

from __future__ import annotations

import random
from typing import Any

import msgpack

from tests.fuzz.frames import Message, pack, unpack
from vllm_kvpool._native import crc32c

INTEGERS = (0, 1, -1, 2, 7, 31, 32, 33, 255, 256, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40)
HUGE = ((1 << 63) - 1, -(1 << 63), (1 << 64) - 1)


def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
    """At most `max_bytes` long; the same for the same arguments."""
    draw = random.Random(seed)
    messages = unpack(data) or [Message([b""])]
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        _change(messages, draw)
    return pack(messages)[:max_bytes]


def _change(messages: list[Message], draw: random.Random) -> None:
    place = draw.randrange(len(messages))
    match draw.randrange(10):
        case 0 if len(messages) > 1:
            del messages[place]
        case 1:
            messages.insert(draw.randrange(len(messages) + 1), messages[place])
        case 2:
            draw.shuffle(messages)
        case 3:
            messages[place] = messages[place]._replace(other=not messages[place].other)
        case _:
            messages[place] = _changed_message(messages[place], draw)


def _changed_message(message: Message, draw: random.Random) -> Message:
    frames = list(message.frames) or [b""]
    place = 0 if draw.random() < 0.7 else draw.randrange(len(frames))
    kind = draw.randrange(8)
    if kind == 0:
        frames.insert(place, frames[place])
    elif kind == 1:
        frames[place] = _changed_bytes(frames[place], draw)
    else:
        frames[place] = _changed_object(frames[place], draw)
    return message._replace(frames=_with_sums(frames) if draw.random() < 0.5 else frames)


def _changed_object(raw: bytes, draw: random.Random) -> bytes:
    try:
        found = msgpack.unpackb(raw, strict_map_key=False)
        return bytes(msgpack.packb(_changed_value(found, draw)))
    except (ValueError, TypeError, OverflowError, RecursionError):  # msgpack's own are ValueErrors
        return _changed_bytes(raw, draw)


def _changed_value(value: Any, draw: random.Random) -> Any:
    """One place in it, as far down as chance goes."""
    if draw.random() < 0.1:
        value = draw.choice([None, True, 0, -1, 1.5, "text", b"bytes", [], {}, float("nan")])
    elif isinstance(value, dict) and value:
        key = draw.choice(list(value))
        changed = {} if draw.random() < 0.1 else {key: _changed_value(value[key], draw)}
        value = {k: v for k, v in value.items() if k != key} | changed
    elif isinstance(value, list) and value:
        place = draw.randrange(len(value))
        value = [*value[:place], _changed_value(value[place], draw), *value[place + 1 :]]
    elif isinstance(value, int):
        value = draw.choice([*INTEGERS, *HUGE, value + draw.choice((-1, 1))])
    elif isinstance(value, bytes):
        value = _changed_bytes(value, draw)
    elif isinstance(value, str):
        value = _changed_bytes(value.encode(), draw).decode("utf-8", "replace")
    return value


def _changed_bytes(raw: bytes, draw: random.Random) -> bytes:
    changed = bytearray(raw)
    place, length = draw.randrange(len(raw) + 1), draw.choice((1, 1, 2, 4, 8, 32))
    match draw.randrange(5):
        case 0:
            changed[place : place + length] = draw.randbytes(length)
        case 1:
            del changed[place : place + length]
        case 2:
            changed[place:place] = changed[:length]
        case 3:
            changed[place:place] = draw.randbytes(length)
        case _:
            del changed[place:]
    return bytes(changed)


def _with_sums(frames: list[bytes]) -> list[bytes]:
    """The right checksums, where frames have some: or nothing would ever come behind that check."""
    try:
        head = msgpack.unpackb(frames[0], strict_map_key=False)
        if not isinstance(head, dict) or "sums" not in head:
            return frames
        head["sums"] = b"".join(crc32c(frame).to_bytes(4, "little") for frame in frames[1:])
        return [bytes(msgpack.packb(head)), *frames[1:]]
    except (ValueError, TypeError, OverflowError):
        return frames
