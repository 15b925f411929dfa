"""A conversation with whatever serves chat completions at a URL: each turn appends to the one before."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

SYSTEM_CHARACTERS, USER_CHARACTERS, ANSWER_TOKENS = 2_500, 50, 24
"""The tiny model's tokens are bytes."""


class Turn(NamedTuple):
    replica: str
    """As the router names it."""
    answer: str
    prompt_tokens: int
    cached_tokens: int


def converse(
    url: str, turns: int, after_turn: Callable[[int, Turn], None], seed: int = 5
) -> list[Turn]:
    """`after_turn` hears of each turn, from 1 on, before the next begins. urllib.error.HTTPError: a
    request failed."""
    draw = random.Random(seed)
    messages = [{"role": "system", "content": text_of(draw, SYSTEM_CHARACTERS)}]
    taken: list[Turn] = []
    for number in range(1, turns + 1):
        messages.append({"role": "user", "content": text_of(draw, USER_CHARACTERS)})
        turn = ask(url, messages)
        messages.append({"role": "assistant", "content": turn.answer})
        taken.append(turn)
        after_turn(number, turn)
    return taken


def ask(url: str, messages: list[dict[str, str]]) -> Turn:
    body = {"model": "tiny", "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.loads(response.read())
        usage = answer["usage"]
        return Turn(
            response.headers["x-kvpool-replica"],
            answer["choices"][0]["message"]["content"],
            usage["prompt_tokens"],
            (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0,
        )


def text_of(draw: random.Random, length: int) -> str:
    return "".join(draw.choices("abcdefghij klmnop", k=length))
