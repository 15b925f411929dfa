"""One streamed completion over the OpenAI API, timed: what a user's client sees."""

from __future__ import annotations

import http.client
import json
import random
import time
from typing import Any, NamedTuple

from benchmarks.processes import Engine

TIMEOUT_S = 300
SETTLE_S = 3.2
"""vLLM's workers spin for three seconds after their last step. On a machine of few cores a request at one engine waits
for the spinning of another, so that has to end before engines change turns."""


class Completion(NamedTuple):
    ttft_s: float
    """From sending the request to the first token."""
    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    """What the engine reports: from its own prefix cache or from the pool."""


def complete(
    engine: Engine, prompt: list[int], *, max_tokens: int = 16, **extra: Any
) -> Completion:
    """Greedy, exactly `max_tokens` long. OSError or RuntimeError when the request fails."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **extra,
    }
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=TIMEOUT_S)
    try:
        begun = time.perf_counter()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(
                f"status {response.status}: {response.read().decode(errors='replace')}"
            )
        return _read_stream(response, begun)
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, begun: float) -> Completion:
    ttft_s = 0.0
    tokens: list[int] = []
    usage: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(f"the stream ended with an error: {event['error']}")
        for choice in event["choices"]:
            if not tokens:
                ttft_s = time.perf_counter() - begun
            tokens += choice.get("token_ids") or []
        usage = event.get("usage") or usage
    details = usage.get("prompt_tokens_details") or {}
    return Completion(ttft_s, tokens, usage["prompt_tokens"], details.get("cached_tokens") or 0)


def wake(engine: Engine) -> None:
    """A few requests of less than a block. An engine that was idle for seconds may have lost pages of its code to the
    kernel's proactive reclaim, and would spend up to a second on reading them again: that is not what is measured."""
    for _ in range(3):
        complete(engine, [random.randrange(256) for _ in range(100)], max_tokens=4)


def reset_prefix_cache(engine: Engine, timeout_s: float = 30) -> None:
    """Empty the engine's own prefix cache. It refuses while blocks are held (stores in flight): then once more."""
    give_up = time.monotonic() + timeout_s
    while True:
        answer = engine.post("/reset_prefix_cache")
        if not answer or json.loads(answer).get("success", True):
            return
        if time.monotonic() > give_up:
            raise TimeoutError("the engine kept refusing to reset its prefix cache")
        time.sleep(0.05)
