"""Our own hashes of blocks of tokens.

The hashes that engines publish depend on their algorithm and seed, and are cut to 64 bits. Hashing
the events' tokens ourselves makes the blocks of all replicas comparable, whatever those do.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root(lora_name: str) -> int:
    """The parent of a first block. Another adapter makes other KV of the same tokens."""
    return _hash(b"root\x00" + lora_name.encode("utf-8", "surrogatepass"))


def child(parent: int, tokens: array[int], extra: bytes = b"") -> int:
    """Of array("I"); `extra` is what else the block's KV depends on: images, salt."""
    return _hash(parent.to_bytes(8, "little") + tokens.tobytes() + extra)


def chain(lora_name: str, tokens: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """Of all full blocks. ValueError: these are no token ids."""
    try:
        ids = array("I", tokens)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"no token ids: {error}") from None
    blocks, parent = [], root(lora_name)
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        parent = child(parent, ids[end - block_tokens : end])
        blocks.append(parent)
    return tuple(blocks)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
