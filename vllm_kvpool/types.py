"""Values that every layer shares: how arrays of blocks, keys and slots look. No behaviour beyond
packing.

A *block key* is 32 bytes, a *slot reference* is a 64-bit integer `generation << 32 | slot index`, 0
meaning none. Both travel in bulk: keys as concatenated bytes, references as little-endian uint64
arrays (`SlotRefs`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NewType

KEY_BYTES = 32
REF_BYTES = 8
NO_REF = 0

BlockKeys = NewType("BlockKeys", bytes)
"""n x 32 bytes, in chain order."""

SlotRefs = NewType("SlotRefs", bytes)
"""n x 8 bytes, little-endian uint64."""

NO_REFS = SlotRefs(b"")


def pack_refs(refs: Iterable[int]) -> SlotRefs:
    return SlotRefs(array("Q", refs).tobytes())


def unpack_refs(refs: bytes) -> array[int]:
    values = array("Q")
    values.frombytes(refs)
    return values


def without_none(refs: bytes) -> SlotRefs:
    """Those of `refs` that are not `NO_REF`."""
    values = unpack_refs(refs)
    if NO_REF not in values:  # the rule, at the speed of C
        return SlotRefs(refs)
    return pack_refs(ref for ref in values if ref != NO_REF)


def num_keys(keys: bytes) -> int:
    return len(keys) // KEY_BYTES


def split_keys(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def num_refs(refs: bytes) -> int:
    return len(refs) // REF_BYTES
