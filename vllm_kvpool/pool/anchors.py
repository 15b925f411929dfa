"""Which blocks of a chain the directory lists. Pure.

A host that holds a block holds those before it (leaves are evicted first), so one entry stands for
the whole chain up to there, and one block in `grain` is enough: about one entry for 128 tokens. The
key itself tells whether it is one of them, wherever in a chain it lies, so all hosts agree without
knowing each other's chains. What a host holds behind its last entry, it says when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_kvpool.types import KEY_BYTES

TOKENS_AN_ENTRY = 128
MAX_ASKED = 64
"""Entries that one lookup reads, half a millisecond of redis-py; and a few more at the start of the
chain. They decide which host is asked how much it has, not how much is brought."""


def grain_of(fields: Mapping[str, str]) -> int:
    """From a namespace's description; 1, every block, where it does not tell the size of blocks."""
    tokens = fields.get("block_tokens", "")
    if not re.fullmatch("[1-9][0-9]{0,8}", tokens):
        return 1
    return max(1, TOKENS_AN_ENTRY // int(tokens))


def anchors(keys: bytes, grain: int) -> list[tuple[int, bytes]]:
    """(place in `keys`, key) of those that are listed."""
    return [
        (start // KEY_BYTES, keys[start : start + KEY_BYTES])
        for start in range(0, len(keys), KEY_BYTES)
        # Some bytes of a SHA-256; the first one names the entry's bucket.
        if grain == 1 or int.from_bytes(keys[start + 8 : start + 12], "little") % grain == 0
    ]


def asked(keys: bytes, grain: int) -> list[tuple[int, bytes]]:
    """Those to ask the directory for: of a long chain only some, evenly spread, the last one too. Before
    the first of these steps some more, closer and closer, for hosts that have the start only."""
    listed = anchors(keys, grain)
    step = max(1, -(-len(listed) // MAX_ASKED))
    first = (len(listed) - 1) % step
    start = {first >> n for n in range(1, first.bit_length() + 1)}
    return [listed[i] for i in sorted(start | set(range(first, len(listed), step)))]
