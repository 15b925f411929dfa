"""vLLM's KV events, decoded. Pure.

A batch is the array `[time, events, data-parallel rank, ...]`. An event is a map with a `type`, or in
earlier versions an array that begins with it; fields were added at the end over time. Read by hand
rather than by typed structs, so that one decoder takes both forms and any later field.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
    "lora_name", "extra_keys", "group_idx",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium", "group_idx")
_GPU = (None, "GPU", "gpu")

EngineHash = int | bytes
"""64 bits, or all of it with `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`."""


class Stored(msgspec.Struct, frozen=True):
    hashes: list[EngineHash]
    parent: EngineHash | None
    tokens: array[int]
    """Of all blocks, one after the other: array("I")."""
    block_tokens: int
    lora_name: str
    extras: list[bytes]
    """One a block: what its KV depends on beside tokens and adapter, encoded; empty for nothing."""


class Removed(msgspec.Struct, frozen=True):
    hashes: list[EngineHash]


class Cleared(msgspec.Struct, frozen=True):
    pass


Event = Stored | Removed | Cleared


class Batch(msgspec.Struct, frozen=True):
    time_s: float
    """By the engine's clock."""
    events: list[Event]


def decode(payload: bytes) -> Batch:
    """Only what concerns the first KV cache group in VRAM. ValueError: it is no such batch."""
    try:
        time_s, events, *_ = msgspec.msgpack.decode(payload)
        decoded = [event for event in map(_event, events) if event is not None]
        return Batch(float(time_s), decoded)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a batch of KV events: {error}") from None


def _event(raw: Any) -> Event | None:
    tag, fields = _fields(raw)
    if tag == "AllBlocksCleared":
        return Cleared()
    if fields.get("medium") not in _GPU or fields.get("group_idx") not in (None, 0):
        return None
    if tag == "BlockRemoved":
        return Removed(_hashes(fields["block_hashes"]))
    if tag == "BlockStored":
        return _stored(fields)
    return None


def _fields(raw: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(raw, dict):
        return str(raw["type"]), raw
    tag, *values = raw
    names: Sequence[str] = _STORED if tag == "BlockStored" else _REMOVED
    return str(tag), dict(zip(names, values, strict=False))


def _stored(fields: Mapping[str, Any]) -> Stored:
    hashes = _hashes(fields["block_hashes"])
    parent = fields["parent_block_hash"]
    if parent is not None:
        _hashes([parent])
    block_tokens = int(fields["block_size"])
    tokens = array("I", fields["token_ids"])
    if block_tokens < 1 or len(tokens) != block_tokens * len(hashes):
        raise ValueError(f"{len(tokens)} tokens for {len(hashes)} blocks of {block_tokens}")
    lora_name = str(fields.get("lora_name") or "")
    keys = fields.get("extra_keys") or [None] * len(hashes)
    extras = [_extra(entry, lora_name) for entry in keys]
    if len(extras) != len(hashes):
        raise ValueError(f"{len(extras)} extra keys for {len(hashes)} blocks")
    return Stored(hashes, parent, tokens, block_tokens, lora_name, extras)


def _hashes(values: Sequence[Any]) -> list[EngineHash]:
    if not all(isinstance(value, int | bytes) for value in values):
        raise ValueError("block hashes are numbers or bytes")
    return list(values)


def _extra(entry: Sequence[Any] | None, lora_name: str) -> bytes:
    """The adapter's name is among them, and counted already."""
    rest = [key for key in entry or () if not (lora_name and key == lora_name)]
    return msgspec.msgpack.encode(rest) if rest else b""
