"""What an engine reports of its cache, found at the end of an answer without parsing it.

`usage` stands at the end of a JSON answer and in the last event of a stream. A text that a model
wrote cannot be mistaken for it: inside of a JSON string each quote has a backslash before it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TAIL_BYTES = 8_192
_PROMPT = re.compile(rb'(?<!\\)"(?:prompt|input)_tokens"\s*:\s*(\d{1,9})')
_CACHED = re.compile(rb'(?<!\\)"cached_tokens"\s*:\s*(\d{1,9})')


class Usage(NamedTuple):
    prompt_tokens: int | None
    cached_tokens: int | None
    """None: not reported; vLLM does with `--enable-prompt-tokens-details`."""


def find_usage(tail: bytes) -> Usage:
    """From the last `TAIL_BYTES` of an answer."""
    return Usage(_last(_PROMPT, tail), _last(_CACHED, tail))


def _last(pattern: re.Pattern[bytes], tail: bytes) -> int | None:
    found = pattern.findall(tail)
    return int(found[-1]) if found else None
